"""Parameters held in rows, whole while a layer needs them: gathered one layer ahead, forward and backward, then freed.

What autograd saves of a gathered parameter for backward is a note of where it was, not the memory: so that is free as
soon as the next layer runs, and backward gathers the parameter again when it asks for it. Nothing is freed that is in
use, as memory is counted by its readers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from planner.ir.split import LayerId
from runtime.comm.communicator import Communicator, Pending
from runtime.graphs import uncompiled
from runtime.lowering.ops import PartialSum
from runtime.parameters.shards import Bundle, Shard, naming

NAME = "gathers"
"""Under which the graph's modules that gather are."""


@dataclass(frozen=True)
class Note:
    """Stands for a tensor that autograd saved, and that lies in a gathered parameter.

    Attributes:
        point: of the graph at which it was saved.
        shard: number of the parameter.
        size, stride, offset: of the tensor.
    """

    point: int
    shard: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


@dataclass
class _Flight:
    """A bundle that is being gathered."""

    message: torch.Tensor
    own: torch.Tensor
    pending: Pending


@dataclass(frozen=True)
class Point:
    """A point of a graph, up to the next one.

    Attributes:
        layers: whose parameters are read.
        graph: number of the graph.
    """

    layers: tuple[LayerId, ...]
    graph: int


class Gathers:
    """Which parameters are whole at which point of the graph.

    Args:
        layers: the bundles of every layer.
        communicator: of this rank.

    Attributes:
        when_backward: called in a backward pass that gathers.
    """

    def __init__(self, layers: Mapping[LayerId, Sequence[Bundle]], communicator: Communicator) -> None:
        self._communicator = communicator
        self.when_backward: Callable[[], None] | None = None
        self._bundles = [bundle for bundles in layers.values() for bundle in bundles]
        self._of_layer = {layer: [self._bundles.index(b) for b in bundles] for layer, bundles in layers.items()}
        self._places = [(b, k) for b, bundle in enumerate(self._bundles) for k in range(len(bundle.shards))]
        self._shards = [self._bundles[b].shards[k] for b, k in self._places]
        self._points: list[Point] = []
        self._flights: dict[int, _Flight] = {}
        self._live: dict[int, list[torch.Tensor]] = {}
        self._storages: dict[int, int] = {}
        self._at = -1
        self.free()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "when_backward": None}  # a copy of the module has a reducer of its own

    def layers_at(self, point: int) -> tuple[LayerId, ...]:
        """Return the layers whose parameters are whole at a point."""
        return self._points[point].layers

    def need(self, point: int, step: int) -> None:
        """Have the parameters of a point whole, those of the next one on their way, and free all others.

        Args:
            point: the point.
            step: to the next one: 1 in forward, -1 in backward.
        """
        wanted = self._at_point(point)
        for b in [b for b in self._live if b not in wanted]:
            self._drop(b)
        for b in wanted:
            self._start(b)
        for b in wanted:
            if b not in self._live:
                self._arrive(b)
        ahead = point + step
        if 0 <= ahead < len(self._points) and self._points[ahead].graph == self._points[point].graph:
            for b in self._at_point(ahead):
                self._start(b)
        self._at = point

    def release(self) -> None:
        """Free everything, behind a pass."""
        for flight in self._flights.values():
            flight.pending.wait()
        self.free()

    def free(self) -> None:
        """Free everything; what is on its way is not waited for, as the pass may have failed there."""
        self._flights.clear()
        self._live.clear()
        self._storages.clear()
        self._at = -1
        for shard in self._shards:
            _free(shard)

    def _at_point(self, point: int) -> list[int]:
        return [b for layer in self._points[point].layers for b in self._of_layer[layer]]

    def _start(self, b: int) -> None:
        if b in self._live or b in self._flights:
            return
        bundle = self._bundles[b]
        message, own = bundle.message(), bundle.packed()
        with naming(bundle, self._communicator):
            pending = self._communicator.start_all_gather(message, own, bundle.axes)
        self._flights[b] = _Flight(message, own, pending)

    def _arrive(self, b: int) -> None:
        bundle, flight = self._bundles[b], self._flights.pop(b)
        with naming(bundle, self._communicator):
            flight.pending.wait()
        self._live[b] = bundle.unpacked(flight.message)
        for n, (shard, whole) in enumerate(zip(bundle.shards, self._live[b], strict=True), self._places.index((b, 0))):
            shard.whole.data = whole
            self._storages[whole.untyped_storage().data_ptr()] = n

    def _drop(self, b: int) -> None:
        for shard, whole in zip(self._bundles[b].shards, self._live.pop(b), strict=True):
            del self._storages[whole.untyped_storage().data_ptr()]
            _free(shard)

    # ---- what autograd saves

    def pack(self, tensor: torch.Tensor) -> Any:
        """Return what autograd keeps of a tensor."""
        pointer = tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else 0
        n = self._storages.get(pointer)
        if n is None or tensor.dtype != self._shards[n].rows.dtype:
            return tensor
        return Note(self._at, n, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def unpack(self, kept: Any) -> torch.Tensor:
        """Return the tensor; gathers its parameter where it is not whole."""
        if not isinstance(kept, Note):
            assert isinstance(kept, torch.Tensor)
            return kept
        b, k = self._places[kept.shard]
        if self._at != kept.point or b not in self._live:
            if self.when_backward is not None and torch._C._current_graph_task_id() >= 0:
                self.when_backward()
            self.need(kept.point, -1)
        return self._live[b][k].as_strided(kept.size, kept.stride, kept.offset)

    # ---- the graph

    def insert(self, graph: fx.Graph, modules: Mapping[str, Any]) -> dict[str, nn.Module]:
        """Put modules that gather into a graph, each in front of the first node that reads other parameters.

        Args:
            graph: calls the modules, and reads the parameters, by their names.
            modules: modules and tensors by name.

        Returns:
            The new modules by name.
        """
        of = {id(shard.whole): shard.layer for shard in self._shards}
        number = self._points[-1].graph + 1 if self._points else 0
        new: dict[str, nn.Module] = {}
        last: tuple[LayerId, ...] = ()
        for node in list(graph.nodes):
            layers = tuple(dict.fromkeys(of[id(p)] for p in _read(node, modules) if id(p) in of))
            if layers and layers != last:
                name = f"{NAME}.{len(self._points)}"
                new[name] = Gather(len(self._points), self)
                self._points.append(Point(layers, number))
                with graph.inserting_before(node):
                    graph.call_module(name).meta |= {k: v for k, v in node.meta.items() if k != "val"}
                last = layers
        return new


class Gather(nn.Module):
    """Gathers the parameters of the layers that follow in the graph.

    Args:
        point: number in the graph.
        gathers: of the module.
    """

    def __init__(self, point: int, gathers: Gathers) -> None:
        super().__init__()
        self._point, self._gathers = point, gathers

    @uncompiled
    def forward(self) -> None:
        """Gather."""
        self._gathers.need(self._point, 1)

    def extra_repr(self) -> str:
        """Return the layers."""
        return ", ".join(self._gathers.layers_at(self._point))


def _read(node: fx.Node, modules: Mapping[str, Any]) -> Sequence[torch.Tensor]:
    """Return the parameters that a node of a graph reads."""
    found: list[torch.Tensor] = [modules[str(n.target)] for n in node.all_input_nodes if n.op == "get_attr"]
    if node.op == "call_module":
        module = modules[str(node.target)]
        found += module.parameters()
        if isinstance(module, PartialSum) and (bias := module.parameter()) is not None:
            found.append(bias)
    return found


def _free(shard: Shard) -> None:
    """Leave a parameter its shape and no memory; who reads it by mistake gets no number."""
    nothing = torch.full((), torch.nan, dtype=shard.rows.dtype, device=shard.rows.device)
    shard.whole.data = nothing.expand(shard.whole.shape)
