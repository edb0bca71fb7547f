"""Pipelined plans for tests: stages with random legal splits, and their modules as threads of one process."""

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from planner.frontend.lower import trace_layers
from planner.ir.dimension import Dimension
from planner.ir.graph import LayerGraph
from planner.ir.mesh import Mesh, MeshAxis
from planner.ir.ops import Send, describe
from planner.ir.region import Region
from planner.ir.rules import default_io
from planner.ir.split import LayerId
from planner.ir.stages import legal_cuts, stage_graphs
from planner.plan import Plan
from planner.space.enumerate import enumerate_splits
from runtime.comm.communicator import ThreadCommunicator, ThreadWorld
from runtime.pipeline.build import (
    Port,
    StageModule,
    StagePlan,
    cut,
    input_regions,
    receives,
    sends,
    stage_module,
)
from runtime.types import ElementTypes
from support.plans import document, plan_of

T = TypeVar("T")
_NO_COST = {"compute_s": 0.0, "transfer_s": 0.0, "halo_s": 0.0, "sync_s": 0.0, "exposed_s": 0.0}
_NO_STAGE_COST = {
    "forward_s": 0.0, "backward_s": 0.0, "sent_bytes": 0, "tail_s": 0.0, "bubble_share": 0.0, "staleness": 0,
    "weight_versions": 1, "num_in_flight": 1, "memory_bytes": 0,
}  # fmt: skip


def staged_plan(  # noqa: PLR0917  # a plan has many parts
    model: nn.Module,
    shape: tuple[int, ...],
    batch: int,
    num_microbatches: int,
    cuts: Sequence[str] | int,
    meshes: Sequence[tuple[int, ...]],
    kind: str = "gpipe",
    seed: int | None = 0,
) -> Plan:
    """Return a pipelined plan.

    Args:
        model: the network.
        shape: of a sample.
        batch: samples of all micro-batches together.
        num_microbatches: of a batch.
        cuts: the first layer of every stage but the first, or the number of stages, cut evenly.
        meshes: the sizes of the mesh axes of every position, such as ``(2,)`` for two ranks; stages take turns.
        kind: of the schedule.
        seed: of the random splits; None splits all layers by samples, as far as that is legal.
    """
    dtype = next(model.parameters()).dtype
    example = torch.empty(batch // num_microbatches, *shape, device="meta", dtype=dtype)
    traced = trace_layers(model, (example,), "net")
    if isinstance(cuts, int):
        legal = legal_cuts(traced.layers)
        cuts = [legal[len(legal) * i // cuts] for i in range(1, cuts)]
    graphs = stage_graphs(traced.layers, [LayerId(c) for c in cuts])
    placed = _placed(meshes)
    found: dict[str, Any] = document()
    found["model"] |= {
        "name": "net", "graph_sha256": traced.layers.digest, "num_params": traced.layers.num_params,
        "inputs": [{"name": x.id, "shape": [batch, *x.output.shape[1:]], "dtype": x.output.dtype.value,
                    "keyword": False} for x in traced.layers.layers if x.op.kind == "input"],
    }  # fmt: skip
    found["batch"], found["io"] = batch, "global"
    found["cluster"]["num_devices"] = sum(len(mesh.ranks) for mesh in placed)
    found["schedule"] = {"kind": kind if len(graphs) > 1 else "single", "num_microbatches": num_microbatches}
    rng = np.random.default_rng(seed)
    found["stages"] = [
        _stage(graph, placed[s % len(placed)], None if seed is None else rng) for s, graph in enumerate(graphs)
    ]
    return plan_of(found)


def _placed(meshes: Sequence[tuple[int, ...]]) -> list[Mesh]:
    found, first = [], 0
    for sizes in meshes:
        count = int(np.prod(sizes))
        axes = tuple(MeshAxis(f"gpu{i}", size) for i, size in enumerate(sizes) if size > 1)
        found.append(Mesh(axes, tuple(range(first, first + count))))
        first += count
    return found


def _stage(graph: LayerGraph, mesh: Mesh, rng: np.random.Generator | None) -> dict[str, Any]:
    space = enumerate_splits(graph, mesh, default_io(graph.batch, mesh.size), frozenset(Dimension))
    taken: dict[LayerId, Any] = {}
    layers = []
    for layer in graph.layers:
        splits = space.splits[layer.id]
        followed = layer.follows or next(
            (x.id for x in graph.layers if {p.name for p in x.params} & {p.name for p in layer.params}), layer.id
        )
        by_samples = [s for s in splits if all(d is Dimension.SAMPLE for _, d in s.axes)]
        split = splits[0 if rng is None else int(rng.integers(len(splits)))]
        split = by_samples[0] if rng is None and by_samples else split
        taken[layer.id] = split = taken.get(followed, split)
        layers.append({
            "id": layer.id, "op": describe(layer.op), "split": dict(split.axes), "overlap": False, "cost": _NO_COST,
            "memory_bytes": 0,
        })  # fmt: skip
    axes = [{"name": axis.name, "size": axis.size} for axis in mesh.axes]
    return {"mesh": {"axes": axes, "ranks": list(mesh.ranks)}, "cost": _NO_STAGE_COST, "layers": layers}


Value = torch.Tensor | None
Held = dict[int, dict[str, Value]]
"""Of every rank of a stage, tensors by name."""


class Stages:
    """All stage modules of a plan, whose ranks are threads of this process."""

    def __init__(self, build: Callable[[], nn.Module], plan: Plan, seed: int = 0) -> None:
        model = build()
        self.plan, self.parts = plan, cut(model, plan)
        self.modules: list[list[StageModule]] = []
        self._worlds = [ThreadWorld(part.plan.mesh) for part in self.parts]
        for s, part in enumerate(self.parts):
            models = [build() for _ in part.plan.mesh.ranks]
            fresh = [cut(one, plan) for one in models]  # lowering rewrites the traced graph
            lowered = functools.partial(_lowered, models, fresh, s, seed)
            self.modules.append(self.on_ranks(s, lowered))

    def on_ranks(self, stage: int, work: Callable[[int, ThreadCommunicator], T]) -> list[T]:
        """Call a function on a thread for every mesh position of a stage."""
        world, size = self._worlds[stage], self.parts[stage].plan.mesh.size
        results: dict[int, T] = {}
        errors: list[BaseException] = []

        def rank(position: int) -> None:
            try:
                results[position] = work(position, ThreadCommunicator(world, position))
            except BaseException as error:
                errors.append(error)
                world.abort()

        threads = [threading.Thread(target=rank, args=(position,)) for position in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return [results[position] for position in range(size)]

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Pass a micro-batch through the stages; return the output of every rank of the last one."""
        self._received: list[Held] = []
        self._sent: list[Held] = []
        found: list[Any] = []
        for s, part in enumerate(self.parts):
            ranks = part.plan.mesh.ranks
            held: Held = self._arrived(s, len(x)) if s else {
                rank: {name: x[_slices(region)] for name, region in input_regions(part, rank, len(x)).items()}
                for rank in ranks
            }  # fmt: skip
            self._received.append(held)
            found = self.on_ranks(s, lambda p, _, s=s, h=held, r=ranks: self.modules[s][p](*h[r[p]].values()))  # type: ignore[misc]
            names = [port.name for port in self._ports(sends, s, ranks[0], len(x))] if part.ids(Send) else []
            self._sent.append({
                rank: dict(zip(names, sent, strict=True)) for rank, sent in zip(ranks, found, strict=True)
            } if names else {})  # fmt: skip
        return found

    def backward(self, batch: int, finish: Callable[[int], None]) -> None:
        """Go back through the stages.

        Args:
            batch: samples of the micro-batch.
            finish: calls backward on a rank of the last stage, by its position.
        """
        for s in reversed(range(len(self.parts))):
            if s == len(self.parts) - 1:
                self.on_ranks(s, lambda p, _: finish(p))
                continue
            ranks = self.parts[s].plan.mesh.ranks
            gradients = self._returned(s, batch)

            def back(p: int, _: object, s: int = s, g: Held = gradients, ranks: tuple[int, ...] = ranks) -> None:
                pairs = [
                    (sent, g[ranks[p]][name]) for name, sent in self._sent[s][ranks[p]].items()
                    if sent is not None and sent.requires_grad
                ]  # fmt: skip
                torch.autograd.backward([a for a, _ in pairs], [b for _, b in pairs if b is not None])

            self.on_ranks(s, back)

    def _ports(self, which: Callable[..., tuple[Port, ...]], s: int, rank: int, batch: int) -> tuple[Port, ...]:
        return which(self.parts, s, rank, batch, ElementTypes(torch.float64))

    def _arrived(self, s: int, batch: int) -> Held:
        """Return what every rank of a stage receives."""
        found: Held = {}
        for rank in self.parts[s].plan.mesh.ranks:
            found[rank] = {}
            for port in self._ports(receives, s, rank, batch):
                value = torch.full(port.shape, torch.nan, dtype=port.dtype)
                for copy in port.forward:
                    theirs = self._port(self._ports(sends, s - 1, copy.peer, batch), port.name)
                    (source,) = (c for c in theirs.forward if c.peer == rank and c.region == copy.region)
                    sent = self._sent[s - 1][copy.peer][port.name]
                    assert sent is not None
                    value[copy.part] = sent.detach()[source.part]
                found[rank][port.name] = value.requires_grad_(port.has_gradient)
        return found

    def _returned(self, s: int, batch: int) -> Held:
        """Return the gradients of what every rank of a stage sent."""
        found: Held = {}
        for rank in self.parts[s].plan.mesh.ranks:
            found[rank] = {}
            for port in self._ports(sends, s, rank, batch):
                value = torch.full(port.shape, torch.nan, dtype=port.dtype)
                for copy in port.backward if port.has_gradient else ():
                    theirs = self._port(self._ports(receives, s + 1, copy.peer, batch), port.name)
                    (source,) = (c for c in theirs.backward if c.peer == rank and c.region == copy.region)
                    received = self._received[s + 1][copy.peer][port.name]
                    assert received is not None
                    assert received.grad is not None
                    value[copy.part] = received.grad[source.part]
                found[rank][port.name] = value if port.has_gradient else None
        return found

    @staticmethod
    def _port(ports: Sequence[Port], name: str) -> Port:
        return next(port for port in ports if port.name == name)


def _lowered(
    models: Sequence[nn.Module],
    stages: Sequence[Sequence[StagePlan]],
    index: int,
    seed: int,
    position: int,
    communicator: ThreadCommunicator,
) -> StageModule:
    return stage_module(models[position], stages[position], index, communicator, seed)


def _slices(region: Region) -> tuple[slice, ...]:
    return tuple(slice(a, b) for a, b in zip(region.start, region.stop, strict=True))
