"""Groups of ranks that compute different layers of one step, each on streams of its own.

Where a split leaves ranks idle, these are busy with other branches meanwhile. Ranks that compute the same layers are
one part: they do the same at the same time. Parts wait for each other where they send each other something.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from planner.cost.memory import LayerBytes
from planner.cost.overlap import Event, Running, Streams
from planner.cost.transfer import Reduction
from planner.ir.branches import busy_positions
from planner.ir.mesh import Mesh
from planner.ir.split import Split


@dataclass(frozen=True, slots=True)
class Parts:
    """Which ranks compute what.

    Attributes:
        positions: of the mesh, of every part.
        members: of every layer, the parts that compute it.
    """

    positions: tuple[tuple[int, ...], ...]
    members: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(mesh: Mesh, splits: Iterable[Split]) -> "Parts":
        """Return the parts of a mesh under the splits of all layers."""
        busy = [busy_positions(split, mesh) for split in splits]
        found: dict[tuple[bool, ...], list[int]] = {}
        for position in range(mesh.size):
            found.setdefault(tuple(bool(own >> position & 1) for own in busy), []).append(position)
        members = tuple(tuple(p for p, column in enumerate(found) if column[j]) for j in range(len(busy)))
        return Parts(tuple(map(tuple, found.values())), members)

    @staticmethod
    def everyone(mesh: Mesh, num_layers: int) -> "Parts":
        """Return the only part where all ranks compute all layers."""
        return Parts((tuple(range(mesh.size)),), ((0,),) * num_layers)

    def fullest(self, of_layers: Sequence[LayerBytes]) -> tuple[int, int]:
        """Return the part that needs most memory, and the safe bound of it (``planner.cost.memory``)."""
        needed = []
        for part in range(len(self.positions)):
            own = [m for m, members in zip(of_layers, self.members, strict=True) if part in members]
            needed.append(sum(m.resident for m in own) + max(m.transient for m in own))
        part = max(range(len(needed)), key=needed.__getitem__)
        return part, needed[part]

    def largest(self, of_layers: Sequence[float]) -> tuple[int, float]:
        """Return the part whose layers have the largest sum, and that sum."""
        sums = [sum(x for x, own in zip(of_layers, self.members, strict=True) if p in own)
                for p in range(len(self.positions))]  # fmt: skip
        part = max(range(len(sums)), key=sums.__getitem__)
        return part, sums[part]


class Together:
    """The streams of some parts, as if they were one: what is sent begins when all of them are there.

    Reductions behind computation are those of each part: where parts are not at the same point, each starts on its own.
    """

    def __init__(self, streams: Sequence[Streams]) -> None:
        self._streams = streams

    @property
    def now_s(self) -> float:
        """How far the last of them is."""
        return max(own.now_s for own in self._streams)

    def meet(self) -> None:
        """Wait for the last."""
        now_s = self.now_s
        for own in self._streams:
            own.rest(now_s)

    def compute(self, name: str, seconds: float) -> None:
        """As of ``Streams``."""
        for own in self._streams:
            own.compute(name, seconds)

    def transfer(self, name: str, seconds: float, levels: int) -> None:
        """As of ``Streams``."""
        self.meet()
        for own in self._streams:
            own.transfer(name, seconds, levels)

    def beside(self, name: str, seconds: float, levels: int) -> None:
        """As of ``Streams``."""
        self.meet()
        for own in self._streams:
            own.beside(name, seconds, levels)

    def start(self, name: str, reduction: Reduction) -> Running:
        """As of ``Streams``."""
        return [own.start(name, reduction) for own in self._streams][-1]


class Crossing(NamedTuple):
    """A tensor that goes from some parts to others.

    Attributes:
        name: of the reader.
        forward_s, backward_s: of the transfer and that of the gradient.
        backward_levels: of the machine, that the latter uses.
        forward_on, backward_on: the parts that have to do with it.
    """

    name: str
    forward_s: float
    backward_s: float
    backward_levels: int
    forward_on: Streams | Together
    backward_on: Streams | Together

    def forward(self) -> None:
        """Move the tensor."""
        if self.forward_s:
            self.forward_on.transfer(f"{self.name} input", self.forward_s, 0)

    def backward(self) -> None:
        """Move its gradient."""
        if self.backward_s:
            self.backward_on.transfer(f"{self.name} input backward", self.backward_s, self.backward_levels)


class PartStreams:
    """The streams of every part, and of those that compute a layer together."""

    def __init__(self, parts: Parts, new: Callable[[], Streams]) -> None:
        self._parts, self._all = parts, [new() for _ in parts.positions]
        self._together: dict[tuple[int, ...], Streams | Together] = {(p,): own for p, own in enumerate(self._all)}

    @property
    def first(self) -> Streams:
        """Those of the first part; the only ones where all ranks compute all layers."""
        return self._all[0]

    @property
    def now_s(self) -> float:
        """How far the last part is."""
        return max(own.now_s for own in self._all)

    def on(self, members: tuple[int, ...]) -> Streams | Together:
        """Return the streams of these parts."""
        if members not in self._together:
            self._together[members] = Together([self._all[p] for p in members])
        return self._together[members]

    def finish(self, update_s: Sequence[float]) -> None:
        """Wait for all reductions; let every part update its own layers, each of which takes so long."""
        for part, own in enumerate(self._all):
            own.finish()
            mine = [s for s, members in zip(update_s, self._parts.members, strict=True) if part in members]
            own.compute("optimizer", sum(mine))

    def events(self, ranks: Sequence[int]) -> tuple[Event, ...]:
        """Return what happened, where there are several parts with the ranks of each in front of its streams' names."""
        if len(self._all) == 1:
            return self.first.events()
        found = [
            replace(event, stream=f"ranks {','.join(str(ranks[p]) for p in positions)} {event.stream}")
            for positions, own in zip(self._parts.positions, self._all, strict=True)
            for event in own.events()
        ]
        return tuple(sorted(found, key=lambda e: (e.start_s, e.stop_s, e.name)))
