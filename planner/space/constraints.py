"""What a user fixes beforehand: splits of layers, dimensions that they may not use, layers that go together.

Layers are named by patterns over their ids (``fnmatch``: ``*``, ``?``, ``[ab]``). A pattern speaks of layers that can
be chosen for; the model's inputs and outputs are pinned by the plan's io, and redistribute layers follow their
neighbours.
"""

import difflib
import fnmatch
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from planner.errors import UnknownNameError, UsageError
from planner.ir.dimension import Dimension
from planner.ir.graph import Layer, LayerGraph, is_boundary
from planner.ir.mesh import Mesh
from planner.ir.ops import Redistribute
from planner.ir.rules import effects
from planner.ir.split import LayerId, Split

EVERY_AXIS: Final = ""
_IN_CHANNEL: Final = frozenset({Dimension.IN_CHANNEL, Dimension.IN_CHANNEL_SCATTER})
_DIGITS: Final = "0123456789"
_NAMES: Final = tuple(d.value for d in Dimension if d is not Dimension.BROADCAST)


@dataclass(frozen=True, slots=True)
class Pin:
    """Layers whose split is given, on all axes or on some.

    Attributes:
        pattern: of layer ids.
        axes: pairs of an axis and what it may split; the axis is that of a mesh (``gpu0``), a level of the machine,
            which is all axes it is cut into (``gpu``), or ``EVERY_AXIS``.
    """

    pattern: str
    axes: tuple[tuple[str, frozenset[Dimension]], ...]

    @property
    def dimensions(self) -> frozenset[Dimension]:
        """What some axis is given."""
        return frozenset().union(*(wanted for _, wanted in self.axes))

    def speaks_of(self, axis: str) -> bool:
        """Return whether an axis is given anything."""
        return any(is_called(axis, name) for name, _ in self.axes)

    def allows(self, split: Split) -> bool:
        """Return whether a split is as given; a level that a mesh does not use splits nothing.

        A mesh that uses a level, but does not cut it into the axis that is given (``gpu0``), has no such split.
        """
        axes = [axis for axis, _ in split.axes]
        return all(_is_cut(name, axes) for name, _ in self.axes) and all(
            dimension in wanted for name, wanted in self.axes for axis, dimension in split.axes if is_called(axis, name)
        )


@dataclass(frozen=True, slots=True)
class Forbid:
    """Layers that must not be split along some dimensions."""

    pattern: str
    dimensions: frozenset[Dimension]


@dataclass(frozen=True, slots=True)
class LayerLimits:
    """What the constraints say of one layer; equal for layers that they say the same of.

    Attributes:
        pins: of the layer.
        forbidden: dimensions that it must not use.
        followed: dimensions that neighbours are pinned to; of a redistribute layer.
    """

    pins: tuple[Pin, ...] = ()
    forbidden: frozenset[Dimension] = frozenset()
    followed: frozenset[Dimension] = frozenset()

    def permitted(self, dimensions: Collection[Dimension]) -> frozenset[Dimension]:
        """Return the dimensions to try, out of those that may be split everywhere: those pinned come on top."""
        return frozenset(dimensions).union(self.followed, *(pin.dimensions for pin in self.pins))

    def allows(self, split: Split, dimensions: Collection[Dimension]) -> bool:
        """Return whether a layer may be split so; axes without a pin use only the dimensions that all layers may."""
        if self.forbidden & set(split.dimensions) or not all(pin.allows(split) for pin in self.pins):
            return False
        return not self.pins or all(
            dimension in dimensions or dimension is Dimension.REPLICATE or any(p.speaks_of(axis) for p in self.pins)
            for axis, dimension in split.axes
        )


NO_LIMITS: Final = LayerLimits()


@dataclass(frozen=True, slots=True)
class Constraints:
    """All constraints of a plan.

    Attributes:
        pins, forbids: of layers.
        ties: patterns; layers that match one and have the same legal dimensions take the same split.
    """

    pins: tuple[Pin, ...] = ()
    forbids: tuple[Forbid, ...] = ()
    ties: tuple[str, ...] = ()

    @staticmethod
    def of(pin: Sequence[str] = (), forbid: Sequence[str] = (), tie: Sequence[str] = ()) -> "Constraints":
        """Return the constraints of texts.

        ``in_channel`` means either of its forms.

        Args:
            pin: such as ``fc*=out_channel`` (all axes) or ``conv1=gpu:sample,node:height``.
            forbid: such as ``conv*=in_channel``; several dimensions with commas between them.
            tie: patterns such as ``layer1.*``.

        Raises:
            UsageError: a text is not of that form, or names no dimension.
        """
        return Constraints(tuple(map(_pin, pin)), tuple(map(_forbid, forbid)), tuple(tie))

    def __bool__(self) -> bool:
        return bool(self.pins or self.forbids or self.ties)

    def limits(self, layer: Layer) -> LayerLimits:
        """Return what is said of one layer."""
        if not self or is_boundary(layer.op):
            return NO_LIMITS
        if isinstance(layer.op, Redistribute):
            return LayerLimits(followed=frozenset().union(*(pin.dimensions for pin in self.pins)))
        pins = tuple(pin for pin in self.pins if _matches(layer, pin.pattern))
        forbidden = [forbid.dimensions for forbid in self.forbids if _matches(layer, forbid.pattern)]
        return LayerLimits(pins, frozenset().union(*forbidden))

    def tied(self, graph: LayerGraph) -> tuple[tuple[LayerId, ...], ...]:
        """Return the groups of layers that the ties join, each of at least two."""
        found = []
        for pattern in self.ties:
            groups: dict[frozenset[Dimension], list[LayerId]] = {}
            for layer in filter(is_chosen, graph.layers):
                if _matches(layer, pattern):
                    legal = frozenset(effects(layer.op, graph.inputs_of(layer), layer.output))
                    groups.setdefault(legal, []).append(layer.id)
            found += [tuple(ids) for ids in groups.values() if len(ids) > 1]
        return tuple(found)

    def refuse_unknown(self, graph: LayerGraph, meshes: Iterable[Mesh], levels: Collection[str]) -> None:
        """Refuse names that mean nothing here.

        Args:
            graph: the network.
            meshes: that may be searched.
            levels: of the machine.

        Raises:
            UsageError: a pattern matches no layer, an axis is in no mesh, or a tie joins nothing.
        """
        options = [("--pin", pin.pattern) for pin in self.pins]
        options += [("--forbid", forbid.pattern) for forbid in self.forbids]
        options += [("--tie", pattern) for pattern in self.ties]
        for option, pattern in options:
            _refuse_unmatched(graph, option, pattern)
        known = dict.fromkeys([*levels, *(axis.name for mesh in meshes for axis in mesh.axes)])
        for pin in self.pins:
            for name, _ in pin.axes:
                if name != EVERY_AXIS and name not in known:
                    raise UnknownNameError("mesh axis", name, known, f"(--pin {pin.pattern})")
        for pattern in self.ties:
            if not Constraints(ties=(pattern,)).tied(graph):
                raise UsageError(
                    f"--tie {pattern!r} joins nothing: no two layers that match it have the same legal dimensions"
                )


NO_CONSTRAINTS: Final = Constraints()


def is_called(axis: str, name: str) -> bool:
    """Return whether a name means an axis: its own, that of a level which it is a part of or contains, or all."""
    return name in {axis, EVERY_AXIS} or name in axis.rstrip(_DIGITS).split("+")


def is_chosen(layer: Layer) -> bool:
    """Return whether a layer's split is chosen for itself."""
    return not is_boundary(layer.op) and not isinstance(layer.op, Redistribute)


def leaders(tied: Sequence[int], ties: Iterable[Sequence[int]]) -> tuple[int, ...]:
    """Return for every layer the first of those that it takes its split together with.

    Args:
        tied: for every layer the first that it shares a parameter with (``planner.ir.graph.tied_layers``).
        ties: further groups, by positions of layers.
    """
    leader = list(tied)

    def find(i: int) -> int:
        while leader[i] != i:
            i = leader[i]
        return i

    for group in ties:
        for member in group[1:]:
            low, high = sorted((find(group[0]), find(member)))
            leader[high] = low
    return tuple(find(i) for i in range(len(leader)))


def legal_text(splits: Iterable[Split]) -> str:
    """Return the dimensions that each axis has in some of these splits."""
    found: dict[str, dict[str, None]] = {}
    for split in splits:
        for axis, dimension in split.axes:
            found.setdefault(axis, {})[dimension.value] = None
    return "; ".join(f"{axis}: {', '.join(names)}" for axis, names in found.items()) or "one device"


def _is_cut(name: str, axes: Collection[str]) -> bool:
    """Return whether a name of a part of a level is one of these axes, if they use that level at all."""
    level = name.rstrip(_DIGITS)
    return level == name or name in axes or not any(is_called(axis, level) for axis in axes)


def _matches(layer: Layer, pattern: str) -> bool:
    return fnmatch.fnmatchcase(layer.id, pattern)


def _refuse_unmatched(graph: LayerGraph, option: str, pattern: str) -> None:
    chosen = [layer.id for layer in graph.layers if is_chosen(layer)]
    if fnmatch.filter(chosen, pattern):
        return
    others = [layer for layer in graph.layers if not is_chosen(layer) and _matches(layer, pattern)]
    if others:
        why = "is pinned by --io" if is_boundary(others[0].op) else "follows its neighbours"
        raise UsageError(f"{option} {pattern!r} matches only layers without a choice: {others[0].id!r} {why}")
    stem = pattern.strip("*?")
    near: list[str] = [str(name) for name in chosen if stem and stem in name][:3]
    near = near or difflib.get_close_matches(pattern, list(map(str, chosen)), n=3, cutoff=0.4)
    guess = f" Near: {', '.join(map(repr, near))}." if near else ""
    raise UsageError(
        f"{option} {pattern!r} matches none of the {len(chosen)} layers of {graph.name!r}.{guess} "
        "`layerwise inspect` lists them."
    )


def _pin(text: str) -> Pin:
    pattern, value = _halves(text, "--pin", "fc*=out_channel or conv1=gpu:sample,node:height")
    axes: dict[str, frozenset[Dimension]] = {}
    for part in value.split(","):
        axis, colon, name = part.rpartition(":")
        if colon and not axis.strip():
            raise UsageError(f"--pin {text!r}: {part!r} names no axis")
        if axis.strip() in axes or (axes and EVERY_AXIS in {axis.strip(), *axes}):
            raise UsageError(f"--pin {text!r} says twice what an axis splits; name each axis once, as in gpu:sample")
        axes[axis.strip()] = _dimensions(name, "--pin")
    return Pin(pattern, tuple(axes.items()))


def _forbid(text: str) -> Forbid:
    pattern, value = _halves(text, "--forbid", "conv*=in_channel")
    return Forbid(pattern, frozenset(d for name in value.split(",") for d in _dimensions(name, "--forbid")))


def _halves(text: str, option: str, example: str) -> tuple[str, str]:
    pattern, _, value = text.rpartition("=")
    if not pattern.strip() or not value.strip():
        raise UsageError(f"{option} {text!r} is not a pattern of layers and what it means, such as {example}")
    return pattern.strip(), value


def _dimensions(name: str, option: str) -> frozenset[Dimension]:
    if name.strip() not in _NAMES:
        raise UnknownNameError("dimension", name.strip(), _NAMES, f"({option})")
    found = Dimension(name.strip())
    return _IN_CHANNEL if found is Dimension.IN_CHANNEL else frozenset({found})


def texts(constraints: Constraints) -> Iterator[tuple[str, str]]:
    """Yield kind (``pin``, ``forbid``, ``tie``) and text of every constraint; ``Constraints.of`` reads them back."""
    for pin in constraints.pins:
        parts = (f"{axis}:{_text(wanted)}" if axis else _text(wanted) for axis, wanted in pin.axes)
        yield "pin", f"{pin.pattern}={','.join(parts)}"
    for forbid in constraints.forbids:
        left = set(forbid.dimensions)
        names = [d.value for d in Dimension if d in left and not (left >= _IN_CHANNEL and d in _IN_CHANNEL)]
        names += [Dimension.IN_CHANNEL.value] if left >= _IN_CHANNEL else []
        yield "forbid", f"{forbid.pattern}={','.join(names)}"
    for pattern in constraints.ties:
        yield "tie", pattern


def _text(wanted: frozenset[Dimension]) -> str:
    return Dimension.IN_CHANNEL.value if len(wanted) > 1 else next(iter(wanted)).value
