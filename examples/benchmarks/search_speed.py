"""Seconds, memory and proven gap of a search, from a traced graph, on machines of 8 to 4096 devices.

    python -m examples.benchmarks.search_speed [--network resnet50 ...] [--machine 8x8-a100-ib400 ...] [-o FILE.csv]

All dimensions are allowed (sample, height, width, out_channel, in_channel). ``seconds`` are of the search, cost tables
included, on the mesh of whole levels, then over meshes as well, with the fixed strategies on spaces of their own beside
them, as ``layerwise plan`` does. Every case runs in a process of its own, whose
largest memory is ``peak_mib``. Nothing is measured on the machines that are planned for: layers are priced
by their data sheets. torchvision and timm networks need ``pip install 'layerwise[zoo]'``.
"""

import argparse
import csv
import io
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from planner.api import Options, Origin, example_inputs, machine_of, prepare
from planner.cli.planning import refuse_unwritable
from planner.errors import LayerwiseError
from planner.frontend.source import load_model
from planner.ir.canonical import write_atomically
from planner.ir.dimension import Dimension
from planner.ir.graph import LayerGraph

OUTPUT: Final = Path(__file__).with_suffix(".csv")
NETWORKS: Final = (
    "alexnet", "vgg16", "resnet50", "torchvision:resnet152", "torchvision:inception_v3", "torchvision:densenet201",
    "timm:nasnetalarge", "timm:hrnet_w48", "unet", "examples/benchmarks/search_speed.py:resnet1000",
)  # fmt: skip
MACHINES: Final = ("8xa100-nvlink", "8x8-a100-ib400", "64x8-a100-ib400", "512x8-a100-ib400")
DIMENSIONS: Final = frozenset({
    Dimension.SAMPLE, Dimension.HEIGHT, Dimension.WIDTH,
    Dimension.OUT_CHANNEL, Dimension.IN_CHANNEL, Dimension.IN_CHANNEL_SCATTER,
})  # fmt: skip
SAMPLES: Final = 32
"""Of each device."""


def resnet1000() -> object:
    """Return a ResNet of 1,001 layers: 333 blocks of three layers in four stages, a convolution and a linear layer."""
    from planner.models.resnet import Bottleneck, imagenet_resnet

    model = imagenet_resnet(Bottleneck, (83, 83, 83, 84), num_classes=10)
    model.input_shape = (3, 224, 224)  # type: ignore[assignment]  # read by load_model
    return model


def case(network: str, machine_name: str, *, all_meshes: bool) -> dict[str, object]:
    """Return a row: seconds of one search and what it found."""
    machine = machine_of(machine_name, None, "fp32", None)
    loaded = load_model(network)
    inputs = example_inputs(loaded.input_shapes, SAMPLES * len(machine.graph.devices))
    mesh = None if all_meshes else ",".join(f"{level.name}={level.size}" for level in machine.graph.levels)
    start = time.perf_counter()
    planner = prepare(loaded.module, inputs, machine, Options(dimensions=DIMENSIONS, mesh=mesh), Origin(network))
    traced = time.perf_counter()
    if all_meshes:
        search, planned = planner.best()
    else:
        search = planner.search(planner.meshes()[0])
        planned = search.solve("auto")
    ended = time.perf_counter()
    graph: LayerGraph = planner.traced.layers
    return {
        "network": network.rpartition(":")[2], "machine": machine_name, "layers": len(graph.layers),
        "edges": sum(1 for _ in graph.edges()),
        "trace_s": round(traced - start, 3), "seconds": round(ended - traced, 3),
        "mesh": "x".join(map(str, search.table.space.mesh.shape)), "step_ms": round(planned.timeline.step_s * 1e3, 4),
        "gap": round(planned.gap, 5), "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }  # fmt: skip


def run(network: str, machine: str, *, all_meshes: bool) -> dict[str, object] | None:
    """Run a case in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "examples.benchmarks.search_speed",
        "--case",
        network,
        machine,
        str(int(all_meshes)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.stderr.write(f"{network} on {machine}: {(done.stderr.strip().splitlines() or ['no output'])[-1]}\n")
        return None
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Run every case and write the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--network", action="append", choices=None)
    parser.add_argument("--machine", action="append")
    parser.add_argument("-o", "--output", type=Path, default=OUTPUT)
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.case:
        network, machine, all_meshes = asked.case
        try:
            sys.stdout.write(json.dumps(case(network, machine, all_meshes=all_meshes == "1")) + "\n")
        except LayerwiseError as error:
            sys.exit(str(error))
        return
    try:
        refuse_unwritable(asked.output)  # before minutes of searching
    except LayerwiseError as error:
        parser.error(str(error))
    rows: list[dict[str, object]] = []
    for all_meshes in (False, True):  # the longer half last: what is there is written after each case
        for machine in asked.machine or MACHINES:
            for network in asked.network or NETWORKS:
                if (found := run(network, machine, all_meshes=all_meshes)) is not None:
                    rows.append({"meshes": "all" if all_meshes else "whole levels", **found})
                    sys.stdout.write(" ".join(f"{key}={value}" for key, value in rows[-1].items()) + "\n")
                    sys.stdout.flush()
                    write(rows, asked.output)
    sys.exit(0 if rows else 2)


def write(rows: Sequence[dict[str, object]], path: Path) -> None:
    """Write what is there, under a temporary name first."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue())


if __name__ == "__main__":
    main()
