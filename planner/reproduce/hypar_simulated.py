"""HyPar's plans on our own simulator of a step, on the shipped H-tree and torus of its accelerators."""

import functools
from dataclasses import dataclass, replace

from planner.cost.memory import Optimizer
from planner.cost.model import CostModel, Settings
from planner.cost.table import CostTable
from planner.devices.graph import Cluster
from planner.devices.library import cluster
from planner.ir.dimension import Dimension
from planner.ir.rules import default_io
from planner.reproduce.traced import layer_graph
from planner.search.auto import Search
from planner.search.published.hypar import hypar_choice
from planner.space.enumerate import enumerate_splits

_DIMENSIONS = frozenset({Dimension.SAMPLE, Dimension.IN_CHANNEL, Dimension.IN_CHANNEL_SCATTER})


@dataclass(frozen=True, slots=True)
class Simulated:
    """Predicted seconds of a step."""

    data_s: float
    hypar_s: float

    @property
    def gain(self) -> float:
        """Of HyPar over data parallelism."""
        return self.data_s / self.hypar_s


@functools.cache
def simulated(model: str, batch: int, name: str, speed: float = 1.0) -> Simulated:
    """Return what our simulator predicts for a network on a mesh of axes of two.

    Args:
        model: a name of ``planner.models``.
        batch: of all devices.
        name: of a shipped machine.
        speed: how many times as fast as its data sheet every device computes.
    """
    from planner.api.machine import machine_of

    machine = machine_of(_faster(cluster(name), speed), precision="fp32")
    mesh = next(mesh for mesh in machine.graph.meshes() if set(mesh.shape) == {2})
    graph = layer_graph(model, batch)
    space = enumerate_splits(graph, mesh, default_io(batch, mesh.size), _DIMENSIONS)
    prices = CostModel.of(graph, machine.graph, mesh, machine.profile, Settings("fp32", Optimizer.SGD, True))
    search = Search(CostTable.of(space, prices), None)
    plan = search.forced(hypar_choice(search.table, search.formulation))
    return Simulated(search.fixed("data").timeline.step_s, plan.timeline.step_s)


def _faster(graph: Cluster, speed: float) -> Cluster:
    devices = tuple(
        replace(d, peak_flop_per_s={p: speed * rate for p, rate in d.peak_flop_per_s.items()}) for d in graph.devices
    )
    return replace(graph, devices=devices)
