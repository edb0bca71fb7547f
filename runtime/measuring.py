"""Measurements that need all ranks of a job at once; the functions its processes are started with.

Ranks that compute at the same time share memory bandwidth and caches, so layers and rates are timed
on all ranks together.
"""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from planner.errors import UsageError
from planner.ir import ops as ir
from planner.ir.mesh import Mesh
from planner.measure.clock import Alone
from planner.measure.host import HostRates, measure_host, relative_speeds, sustained_rate
from planner.measure.journal import JournalWriter
from planner.measure.layers import LayerTimer, time_keys
from runtime.launch import Process
from runtime.links import measure_collectives
from runtime.lowering.norms import Normalise
from runtime.state import StepState
from runtime.training import SilentCommunicator


def host_rates(argument: dict[str, Any], process: Process) -> dict[str, Any]:
    """Return the rates of this rank (``planner.measure.host.HostRates`` as JSON).

    Args:
        argument: ``level``, the name of the machine's level that the ranks form.
        process: of this rank.

    Raises:
        UsageError: plans would run on GPUs here.
    """
    if process.device.type == "cuda":
        raise UsageError(
            "local-N measures processors, but this host has a GPU for every process, and plans run there: measure "
            f"the GPUs (layerwise profile links --ranks {process.world_size} -o x.json, then --cluster ./x.json), "
            "or hide them (CUDA_VISIBLE_DEVICES=)"
        )
    rates = measure_host(process.world_size).model_dump()
    if process.world_size > 1:
        rates["collectives"] = measure_collectives([(argument["level"], process.world_size)], process)
    return rates


def link_times(argument: dict[str, Any], process: Process) -> dict[str, Any]:
    """Return what ``layerwise profile links`` needs of this rank.

    Args:
        argument: ``nodes`` and ``ranks_per_node``.
        process: of this rank.

    Returns:
        ``collectives``; ``rates`` of fast CPU ranks (``HostRates``) and ``speeds`` of all ranks relative to them, or
        ``accelerator``, the name of the rank's device.
    """
    on_cpu = process.device.type == "cpu"
    levels = [("node", argument["nodes"]), ("cpu" if on_cpu else "gpu", argument["ranks_per_node"])]
    found: dict[str, Any] = {"collectives": measure_collectives(levels, process)}
    if on_cpu:
        everyone: list[Any] = [None] * process.world_size
        rates = measure_host(argument["ranks_per_node"]).model_dump()
        dist.barrier()
        dist.all_gather_object(everyone, (rates, sustained_rate()))
        measured = [HostRates.model_validate(each) for each, _ in everyone]
        reference, found["speeds"] = relative_speeds(measured, [rate for _, rate in everyone])
        found["rates"] = reference.model_dump(mode="json")
    else:
        found["accelerator"] = torch.cuda.get_device_name(process.device)
    return found


def layer_times(argument: dict[str, Any], process: Process) -> None:
    """Time layers on all ranks at once; every rank writes each into its journal as soon as it is done.

    Args:
        argument: ``keys``; ``folder`` of the journals; ``device``, ``cpu`` or ``cuda``, the rank's own if left out.
        process: of this rank.

    Raises:
        UsageError: CUDA is asked for, and there is no device for every rank.
    """
    kind = argument.get("device", process.device.type)
    if kind == "cuda" and process.device.type != "cuda":
        raise UsageError(f"--device cuda needs a CUDA device for each of {process.world_size} processes")
    device = process.device if kind == process.device.type else torch.device(kind)
    journal = JournalWriter(Path(argument["folder"]), process.rank)
    others = Ranks() if process.world_size > 1 else Alone()
    time_keys(argument["keys"], LayerTimer(device, norm_of_several_ranks, others), journal.add)


class Ranks(Alone):
    """The ranks of the process group time together."""

    def start(self) -> None:
        """Wait for all ranks."""
        dist.barrier()

    def largest(self, seconds: float) -> float:
        """Return the largest value of all ranks."""
        value = torch.tensor([seconds], dtype=torch.float64)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return float(value)


def norm_of_several_ranks(
    x: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """Return the runtime's batch norm on statistics of two ranks, the other one made up: its compute alone."""
    found: torch.Tensor = _ON_TWO_RANKS(x, mean, variance, weight, bias)
    return found


_ON_TWO_RANKS = Normalise(ir.BatchNorm(1), (0,), StepState(SilentCommunicator(Mesh.of(rank=2), 0)), "norm")
