"""Sharded parameters: what a rank keeps of them, and how they are whole while the model runs.

``planner.cost.sharding`` says what is cut and what a step sends; ``planner.ir.rows`` which rows a rank keeps. Between
two forward passes the module has the rows under the users' names, for optimizers and state dicts; while one runs, the
operators find whole parameters there.

- ``optimizer``: parameters stay whole, the rows are a part of them. What other ranks updated is gathered in front of
  the forward pass that follows.
- ``full``: a rank has its rows only; ``runtime.parameters.gathers`` makes parameters whole, layer by layer.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from torch import fx, nn
from torch.autograd.graph import saved_tensors_hooks

from planner.errors import UsageError
from planner.ir.bucket import fill_buckets
from planner.ir.graph import Layer
from planner.ir.layout import Layout
from planner.ir.rows import row_axes, row_region
from planner.ir.split import LayerId
from runtime.comm.communicator import Axes, Communicator, Pending, group_size, members_of
from runtime.parameters.gathers import Gathers
from runtime.parameters.local import Held
from runtime.parameters.reducer import MAX_IN_FLIGHT, Reducer
from runtime.parameters.shards import Bundle, Shard, naming

Ready = Sequence[tuple[str, nn.Parameter, Axes]]
"""Name, parameter and axes to reduce over, in the order in which backward makes the gradients ready."""
_Site = tuple[dict[str, Any], str, Shard]
"""Where a module has a parameter, under which name."""
FULL: Final = "full"


class Shards:
    """The sharded parameters of one rank.

    Args:
        sharding: ``none``, ``optimizer`` or ``full``.
        shards: in the order in which backward makes their gradients ready.
        communicator: of this rank.
        bucket_bytes: that close a message of updated parameters.
    """

    def __init__(self, sharding: str, shards: Sequence[Shard], communicator: Communicator, bucket_bytes: int) -> None:
        self._shards, self._communicator = tuple(shards), communicator
        self._sites: list[_Site] = []
        self._followed: list[_Site] = []
        self._gathers: Gathers | None = None
        self._bundles: list[Bundle] = []
        self._hooks: saved_tensors_hooks | None = None
        self._updated, self._version, self._mode = False, 0, True
        self._reducer: Reducer | None = None
        keys = [(s.axes, s.rows.dtype, s.rows.device) for s in shards]
        if sharding == FULL and shards:
            for shard in shards:
                shard.rows.data = shard.rows.data.clone()
            layers: dict[LayerId, list[Bundle]] = {}
            keyed = [((shard.layer, *key), 0) for shard, key in zip(shards, keys, strict=True)]
            for found in fill_buckets(keyed, 1):
                layers.setdefault(found.key[0], []).append(Bundle([shards[i] for i in found.items]))
            self._gathers = Gathers(layers, communicator)
        else:
            sizes = [s.whole.numel() * s.whole.element_size() for s in shards]
            filled = fill_buckets(list(zip(keys, sizes, strict=True)), bucket_bytes)
            self._bundles = [Bundle([shards[i] for i in found.items]) for found in filled]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_reducer": None}  # a copy of the module has a reducer of its own

    @staticmethod
    def of(
        sharding: str,
        ready: Ready,
        cut: Mapping[str, Layout],
        layers: Sequence[Layer],
        communicator: Communicator,
        bucket_bytes: int,
    ) -> "Shards":
        """Cut parameters in rows.

        Args:
            sharding: ``none``, ``optimizer`` or ``full``.
            ready: the parameters that several ranks hold.
            cut: layouts by name.
            layers: of the graph, in order.
            communicator: of this rank.
            bucket_bytes: that close a bucket.
        """
        first: dict[str, LayerId] = {}
        for layer in layers:
            for parameter in layer.params:
                first.setdefault(parameter.name, layer.id)
        found = []
        for name, piece, _ in ready if sharding != "none" else ():
            axes = row_axes(cut[name])
            if axes and piece.requires_grad:
                index = members_of(communicator.mesh, communicator.position, axes).index(communicator.position)
                found.append(Shard(name, first[name], axes, group_size(communicator.mesh, axes), index, piece))
        return Shards(sharding, found, communicator, bucket_bytes)

    @property
    def is_full(self) -> bool:
        """Whether a rank has its rows only."""
        return self._gathers is not None

    def insert(self, graph: fx.Graph, modules: Mapping[str, Any]) -> dict[str, nn.Module]:
        """Put what gathers parameters into a graph; return the new modules by name, arguments as of ``Gathers``."""
        return {} if self._gathers is None else self._gathers.insert(graph, modules)

    def attach(self, module: nn.Module) -> None:
        """Put the rows in the places of the parameters."""
        self._sites = list(self._places_in(module))
        self._leave()

    def follow(self, module: nn.Module) -> None:
        """Let another module that reads the same parameters, the only one so far, find them whole as well."""
        self._followed = list(self._places_in(module))

    def _places_in(self, module: nn.Module) -> Iterator[_Site]:
        shards = {id(p): shard for shard in self._shards for p in (shard.whole, shard.rows)}
        seen: set[int] = set()
        for part in module.modules():
            parameters = part._parameters
            if id(parameters) not in seen:  # modules may share them
                seen.add(id(parameters))
                yield from ((parameters, n, shards[id(p)]) for n, p in parameters.items() if id(p) in shards)

    def reducer(self, ready: Ready, bucket_bytes: int) -> Reducer:
        """Return what reduces the gradients; arguments as of ``Reducer``."""
        shards = {id(shard.whole): shard for shard in self._shards}
        found = Reducer(ready, self._communicator, bucket_bytes, shards, self.is_full)
        self.serve(found)
        return found

    def serve(self, reducer: Reducer) -> None:
        """Do what is to be done behind each backward pass of a reducer, and have it do what belongs to gathering."""
        reducer.when_done = self._done
        self._reducer = reducer
        if self._gathers is not None:
            self._gathers.when_backward = reducer.call_when_done

    def refined(self, held: Mapping[str, Held]) -> dict[str, Held]:
        """Return what the ranks store, where that of parameters by layout is known."""
        rows = {shard.name for shard in self._shards}
        return {
            name: replace(own, regions=tuple(row_region(own.layout, p) for p in range(len(own.regions))))
            if own.name in rows
            else own
            for name, own in held.items()
        }

    # ---- a forward pass

    def prepare(self) -> None:
        """See what has happened to the rows since the last pass.

        Raises:
            UsageError: a parameter was replaced, or a gradient changed that is not reduced yet.
        """
        for parameters, name, shard in self._sites:
            if parameters.get(name) is not shard.rows:
                raise UsageError(
                    f"the parameter {shard.name} was replaced by another object. It is one piece of a sharded "
                    "parameter: write into it (torch.no_grad(), copy_) or load a state dict without assign=True"
                )
        for shard in self._shards:
            shard.refuse_changed()
            if shard.whole.requires_grad != shard.rows.requires_grad:
                shard.whole.requires_grad_(shard.rows.requires_grad)

    def enter(self, training: bool) -> None:
        """Have whole parameters in the places of the rows."""
        if not self._shards:
            return
        for parameters, name, shard in (*self._sites, *self._followed):
            parameters[name] = shard.whole
        if self._gathers is None:
            self._gather_updated(training)
            return
        self._gathers.free()
        if torch.is_grad_enabled():
            self._hooks = saved_tensors_hooks(self._gathers.pack, self._gathers.unpack)
            self._hooks.__enter__()

    def leave(self) -> None:
        """Have the rows in their places again; may be called twice."""
        if self._hooks is not None:
            self._hooks.__exit__()
            self._hooks = None
        if self._gathers is not None:
            self._gathers.free()
        self._leave()

    def _leave(self) -> None:
        for parameters, name, shard in (*self._sites, *self._followed):
            parameters[name] = shard.rows

    def refresh(self) -> None:
        """Follow the rows to another device, element type or memory format."""
        for shard in self._shards:
            whole = shard.whole
            if self._gathers is None:
                whole.data = shard.empty()
                shard.own(whole.data).copy_(shard.rows.data)
                shard.rows.data = shard.own(whole.data)
            whole.grad = shard.unreduced = None
        if self._gathers is not None:
            self._gathers.free()
        self._updated = True

    def _done(self) -> None:
        """A backward pass has ended; behind one whose gradients stay on this rank, no optimizer updates."""
        self._updated |= self._reducer is None or self._reducer.enabled
        if self._gathers is not None:
            self._gathers.release()

    def _gather_updated(self, training: bool) -> None:
        """Take over the rows of other ranks, if they may have changed.

        They may have where a tensor says so, behind a backward pass (an optimizer may write past the tensors' counts)
        and where the mode changes.
        """
        version = sum(shard.rows._version for shard in self._shards)
        if not self._updated and version == self._version and training == self._mode:
            return
        under_way: deque[tuple[Bundle, torch.Tensor, torch.Tensor, Pending]] = deque()
        for bundle in reversed(self._bundles):
            if len(under_way) >= MAX_IN_FLIGHT:
                self._take(*under_way.popleft())
            message, own = bundle.message(), bundle.packed()
            with naming(bundle, self._communicator):
                pending = self._communicator.start_all_gather(message, own, bundle.axes)
            under_way.append((bundle, message, own, pending))
        for each in under_way:
            self._take(*each)
        self._updated, self._version, self._mode = False, version, training

    def _take(self, bundle: Bundle, message: torch.Tensor, _own: torch.Tensor, pending: Pending) -> None:
        with naming(bundle, self._communicator):
            pending.wait()
        bundle.unpack(message, [shard.whole.data for shard in bundle.shards])
