"""Describe a machine of your own, and see what another network between its hosts would be worth.

    python examples/custom_cluster.py

Two hosts with two GPUs each, PCIe inside and Ethernet between, as a graph: the same can be written in a file by hand
(profiles/README.md). The file that this writes is for `layerwise plan --cluster ./lab.json`.
"""

from pathlib import Path

import torch

from planner.api import plan_model
from planner.devices import Cluster, Device, Level, Link, write_cluster
from planner.models import entry
from planner.units import format_seconds

GB = 1e9


def lab(network_bytes_per_s):
    """Return the machine with a network of this rate between its hosts."""
    gpus = tuple(
        Device(f"{host}-gpu{i}", "lab-gpu", int(12 * GB), {"fp32": 10e12}, 450 * GB)
        for host in ("left", "right")
        for i in (0, 1)
    )
    buses = (Link(gpu.id, f"{gpu.id[:-5]}-pcie", "pcie3", 5e-6, 12 * GB) for gpu in gpus)
    cables = (Link(f"{host}-pcie", "switch", "ethernet", 20e-6, network_bytes_per_s) for host in ("left", "right"))
    return Cluster(
        "lab", gpus, ("left-pcie", "right-pcie", "switch"), (*buses, *cables), (Level("node", 2), Level("gpu", 2))
    )


def main():
    alexnet = entry("alexnet")
    with torch.device("meta"):
        model = alexnet.build()
    images = torch.empty(256, *alexnet.input_shape, device="meta")
    for gbit in (1, 10, 100):
        machine = lab(gbit * GB / 8)
        plan = plan_model(model, (images,), cluster=machine)
        data = next(other for other in plan.baselines if other.name == "data")
        step, beside = format_seconds(plan.totals.step_s), format_seconds(data.step_s)
        print(f"{gbit:3} Gbit/s: planned {step}, data parallel {beside}, {data.step_s / plan.totals.step_s:.2f} times")
    write_cluster(machine, Path("lab.json"))


if __name__ == "__main__":
    main()
