"""The machine: devices, switches and links as a graph, and the meshes that can be laid over it."""

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Final, Literal

import networkx
from networkx import Graph

from planner.devices.hubs import HubPaths
from planner.devices.measured import MeasuredCollective
from planner.devices.paths import Paths, weight_of
from planner.devices.shapes import MAX_FACTORS, Shape, factored, merges
from planner.errors import FormatError, UnknownNameError, UsageError
from planner.ir.canonical import sha256_of
from planner.ir.mesh import Mesh, MeshAxis

PRECISIONS: Final = ("fp32", "tf32", "bf16")


@dataclass(frozen=True, slots=True)
class Device:
    """A piece of hardware that computes.

    Attributes:
        peak_flop_per_s: by precision; ``fp32`` always, ``tf32`` and ``bf16`` where it has them.
        speed: relative to others of its kind: what is known of the kind takes 1 / speed times as long here. For a
            processor that is shared or slowed down.
    """

    id: str
    kind: str
    memory_bytes: int
    peak_flop_per_s: Mapping[str, float] = field(hash=False)
    memory_bandwidth_bytes_per_s: float
    speed: float = 1.0


@dataclass(frozen=True, slots=True)
class Link:
    """A cable or bus between two devices or switches.

    Attributes:
        latency_s: of this link alone; a message pays every link of its route.
        bandwidth_bytes_per_s: in each direction; a half-duplex link shares it between both.
    """

    a: str
    b: str
    kind: str
    latency_s: float
    bandwidth_bytes_per_s: float
    duplex: Literal["full", "half"] = "full"


@dataclass(frozen=True, slots=True)
class Level:
    """A level of the machine's hierarchy, such as 4 nodes or the 8 GPUs of each."""

    name: str
    size: int


@dataclass(frozen=True)
class Cluster:
    """Devices joined by links and switches.

    ``cluster`` finds one by name or file; written out, or changed by ``dataclasses.replace``, it is what
    ``plan_model(cluster=...)`` plans for.

    Attributes:
        devices: in rank order; the innermost level runs fastest.
        switches: ids of what only forwards.
        levels: outermost first; their sizes multiply to the number of devices.
        collectives: measured on this machine; others are computed from the links.

    Raises:
        FormatError: every contradiction, with its JSON path in a cluster file.
    """

    name: str
    devices: tuple[Device, ...]
    switches: tuple[str, ...]
    links: tuple[Link, ...]
    levels: tuple[Level, ...]
    collectives: tuple[MeasuredCollective, ...] = ()

    def __post_init__(self) -> None:
        problems = list(itertools.chain(_number_problems(self), _structure_problems(self)))
        if not problems and not networkx.is_connected(self.nx()):
            apart = sorted(networkx.node_connected_component(self.nx(), self.devices[0].id))
            problems = [("$.links", f"not connected: from {apart[0]!r} only {apart} are reached")]
        if problems:
            raise FormatError(f"cluster {self.name!r}", problems)

    def nx(self) -> "Graph[str]":
        """Return a frozen graph over the ids; edges carry ``link`` and their ``weight`` (``paths.weight_of``)."""
        return self._nx

    @cached_property
    def _nx(self) -> "Graph[str]":
        graph: Graph[str] = Graph()
        graph.add_nodes_from((*(device.id for device in self.devices), *self.switches))
        for link in self.links:
            graph.add_edge(link.a, link.b, link=link, weight=weight_of(link.latency_s))
        networkx.freeze(graph)
        return graph

    @cached_property
    def paths(self) -> Paths | HubPaths:
        """The shortest paths, shared by every mesh on this machine."""
        return HubPaths.of(self.nx(), [device.id for device in self.devices]) or Paths(self.nx())

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of everything but the name."""
        parts = {key: part for key, part in asdict(self).items() if key != "name"}
        plain = [{k: v for k, v in device.items() if (k, v) != ("speed", 1.0)} for device in parts["devices"]]
        return sha256_of({**parts, "devices": plain})

    def mesh(self) -> Mesh:
        """Return the mesh with the whole levels as axes."""
        return self.mesh_of([(level.size,) for level in self.levels])

    def meshes(self) -> tuple[Mesh, ...]:
        """Return all meshes that cut each level into at most 3 ordered factors.

        The whole levels come first, then meshes with more axes; equal numbers of axes in
        ascending order of the factors of the outermost level.
        """
        return tuple(map(self.mesh_of, factored([level.size for level in self.levels])))

    def whole_meshes(self, counts: Sequence[int], max_axes: int) -> tuple[Mesh, ...]:
        """Return the meshes over the first ``counts`` of each level that cut no level, with at most so many axes.

        Where a machine has more levels than that, neighbouring ones are one axis together, in all ways.
        """
        whole: Shape = tuple((count,) for count in counts)
        return tuple(self.mesh_of(whole, runs) for runs in merges(counts, max_axes))

    def parse_mesh(self, text: str) -> Mesh:
        """Return the mesh of a text such as ``node=8,gpu=4x2``.

        It may name fewer devices of a level than there are. Neighbouring levels that are one axis are written with a
        plus sign, as in ``leaf+node=8``, and used whole.

        Raises:
            UsageError: not of that form, or it does not fit the levels of this machine.
        """
        parts = [self._parse_level(text, part) for part in text.split(",")]
        runs = self._runs(text, [names for names, _ in parts])
        factors = {name: own for names, own in parts for name in names}
        given = set(factors)
        for names, own in parts:
            if len(names) > 1:
                sizes = {level.name: level.size for level in self.levels if level.name in names}
                if own != (total := math.prod(sizes.values()),):
                    raise UsageError(f"mesh {text!r}: levels that are one axis are used whole, {total} parts")
                factors |= {name: (size,) for name, size in sizes.items()}
        for level in self.levels:
            chosen = factors.setdefault(level.name, (1,))
            written = "x".join(map(str, chosen))
            is_fewer = level.name in given and 1 <= math.prod(chosen) < level.size
            if math.prod(chosen) != level.size and level.name not in given:
                raise UsageError(
                    f"mesh {text!r} does not name the level {level.name} of {self.name}: write "
                    f"{level.name}={level.size},{text}, or {level.name}=1,{text} for a part of the machine"
                )
            if math.prod(chosen) != level.size and not is_fewer:
                product = f"{written} = {math.prod(chosen)}" if len(chosen) > 1 else written
                raise UsageError(
                    f"mesh {text!r}: {self.name} has {level.name}={level.size}, not {product}; "
                    f"write {self._whole}, factors of it, or fewer"
                )
            if len(chosen) > MAX_FACTORS or (len(chosen) > 1 and min(chosen) == 1):
                raise UsageError(
                    f"mesh {text!r}: {level.name}={written} must have at most {MAX_FACTORS} factors, each at least 2"
                )
        return self.mesh_of([factors[level.name] for level in self.levels], runs)

    def _parse_level(self, text: str, part: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
        match = re.fullmatch(r"\s*([a-z]+(?:\+[a-z]+)*)=([0-9]{1,9}(?:x[0-9]{1,9})*)\s*", part)
        if match is None:
            raise UsageError(f"mesh {text!r}: {part!r} is not a level and its factors, as in {self._whole}")
        known, names = [level.name for level in self.levels], tuple(match[1].split("+"))
        for name in names:
            if name not in known:
                raise UnknownNameError("mesh level", name, known, f"{self.name} is {self._whole}.")
        return names, tuple(map(int, match[2].split("x")))

    def _runs(self, text: str, parts: Sequence[tuple[str, ...]]) -> list[int]:
        """Return how many levels each axis joins, from the levels that are written as one."""
        known = [level.name for level in self.levels]
        written = [name for names in parts for name in names]
        if len(set(written)) != len(written):
            raise UsageError(f"mesh {text!r} names a level twice")
        runs, at = [], 0
        joined = {names[0]: names for names in parts if len(names) > 1}
        for names in joined.values():
            first = known.index(names[0])
            if list(names) != known[first : first + len(names)]:
                raise UsageError(f"mesh {text!r}: {'+'.join(names)} are not neighbours in {self._whole}")
        while at < len(known):
            names = joined.get(known[at], (known[at],))
            runs.append(len(names))
            at += len(names)
        return runs

    @property
    def _whole(self) -> str:
        return ",".join(f"{level.name}={level.size}" for level in self.levels)

    def mesh_of(self, shape: Sequence[tuple[int, ...]], runs: Sequence[int] | None = None) -> Mesh:
        """Return the mesh of a shape; its ranks are positions of devices.

        Args:
            shape: for every level the factors of the devices that are used of it, see ``planner.devices.shapes``.
            runs: how many neighbouring levels make each axis together; those that do are not cut.
        """
        counts = [math.prod(factors) for factors in shape]
        axes: list[MeshAxis] = []
        start = 0
        for run in runs or [1] * len(self.levels):
            used = [i for i in range(start, start + run) if counts[i] > 1]
            start += run
            if len(used) > 1:
                axes.append(MeshAxis("+".join(self.levels[i].name for i in used), math.prod(counts[i] for i in used)))
            for i in used if len(used) == 1 else ():
                name, factors = self.levels[i].name, shape[i]
                names = [name] if len(factors) == 1 else [f"{name}{index}" for index in range(len(factors))]
                axes += map(MeshAxis, names, factors)
        return Mesh(tuple(axes), self._ranks(counts))

    def shape_of(self, axes: Sequence[MeshAxis]) -> tuple[Shape, list[int]] | None:
        """Return the shape with these axes, and the levels that each joins; None where this machine has none.

        The inverse of ``mesh_of``: axes are found by their names.
        """
        for joined in dict.fromkeys(axis.name for axis in axes if "+" in axis.name):
            sizes = [level.size for level in self.levels if level.name in joined.split("+")]
            if math.prod(sizes) != next(axis.size for axis in axes if axis.name == joined):
                return None  # which part of each level is used does not show
        factors: dict[str, tuple[int, ...]] = {}
        for axis in axes:
            for name in axis.name.rstrip("0123456789").split("+"):
                own = axis.size if "+" not in axis.name else next((x.size for x in self.levels if x.name == name), 0)
                factors[name] = (*factors.get(name, ()), own)
        shape = tuple(factors.pop(level.name, (1,)) for level in self.levels)
        if factors or any(math.prod(own) > level.size for own, level in zip(shape, self.levels, strict=True)):
            return None
        names = [level.name for level in self.levels]
        runs = [1] * len(names)
        for axis in axes:
            parts = axis.name.split("+")
            first = names.index(parts[0].rstrip("0123456789"))
            last = names.index(parts[-1].rstrip("0123456789"))
            runs[first : last + 1] = [last - first + 1, *[0] * (last - first)]
        found = shape, [run for run in runs if run]
        return found if self.mesh_of(*found).axes == tuple(axes) else None

    def _ranks(self, counts: Sequence[int]) -> tuple[int, ...]:
        """Return the positions of the devices that are among the first of every level."""
        if counts == [level.size for level in self.levels]:
            return self._all_ranks
        ranks = [0]
        for level, count in zip(self.levels, counts, strict=True):
            ranks = [rank * level.size + i for rank in ranks for i in range(count)]
        return tuple(ranks)

    @cached_property
    def _all_ranks(self) -> tuple[int, ...]:
        return tuple(range(len(self.devices)))


def _number_problems(graph: Cluster) -> Iterator[tuple[str, str]]:
    """Yield every figure that is not a positive finite number (a latency may be 0)."""
    figures: list[tuple[str, float]] = []
    for index, device in enumerate(graph.devices):
        here = f"$.devices[{index}]"
        figures.append((f"{here}.memory_bytes", device.memory_bytes))
        figures.append((f"{here}.memory_bandwidth_bytes_per_s", device.memory_bandwidth_bytes_per_s))
        figures.append((f"{here}.speed", device.speed))
        figures += [(f"{here}.peak_flop_per_s.{k}", v) for k, v in device.peak_flop_per_s.items()]
        if "fp32" not in device.peak_flop_per_s or set(device.peak_flop_per_s) - set(PRECISIONS):
            yield f"{here}.peak_flop_per_s", "needs fp32, and may have tf32 and bf16 besides"
    for index, link in enumerate(graph.links):
        figures.append((f"$.links[{index}].bandwidth_bytes_per_s", link.bandwidth_bytes_per_s))
        if not 0 <= link.latency_s < math.inf:
            yield f"$.links[{index}].latency_s", f"must be finite and >= 0, found {link.latency_s}"
    figures += [(f"$.levels[{index}].size", level.size) for index, level in enumerate(graph.levels)]
    for path, value in figures:
        if not 0 < value < math.inf:
            yield path, f"must be finite and > 0, found {value}"


def _structure_problems(graph: Cluster) -> Iterator[tuple[str, str]]:
    """Yield every id, link or level that contradicts another."""
    ids = [(f"$.devices[{index}].id", device.id) for index, device in enumerate(graph.devices)]
    ids += [(f"$.switches[{index}]", switch) for index, switch in enumerate(graph.switches)]
    levels = [(f"$.levels[{index}].name", level.name) for index, level in enumerate(graph.levels)]
    yield from _repeated(ids)
    yield from _repeated(levels)
    yield from _link_problems(graph, {name for _, name in ids})
    yield from _collective_problems(graph)
    for path, name in levels:
        if re.fullmatch("[a-z]+", name) is None:
            yield path, f"must be lower-case letters, found {name!r}"
    if not graph.devices or math.prod(level.size for level in graph.levels) != len(graph.devices):
        sizes = " x ".join(str(level.size) for level in graph.levels)
        yield "$.levels", f"{sizes or 'no levels'} do not give {len(graph.devices)} devices"


def _collective_problems(graph: Cluster) -> Iterator[tuple[str, str]]:
    known = [level.name for level in graph.levels]
    seen: set[tuple[str, tuple[str, ...]]] = set()
    for index, measured in enumerate(graph.collectives):
        here = f"$.collectives[{index}]"
        if list(measured.levels) != [name for name in known if name in measured.levels] or not measured.levels:
            yield f"{here}.levels", f"must be levels of this machine, outermost first, found {list(measured.levels)}"
        if (measured.kind, measured.levels) in seen:
            yield here, f"{measured.kind} over {list(measured.levels)} appears twice"
        seen.add((measured.kind, measured.levels))
        sizes = [point.num_bytes for point in measured.points]
        if len(sizes) < 2 or sizes != sorted(set(sizes)):
            yield f"{here}.points", f"needs at least two points in ascending order of num_bytes, found {sizes}"


def _repeated(names: Sequence[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    seen: set[str] = set()
    for path, name in names:
        if name in seen:
            yield path, f"{name!r} appears twice"
        seen.add(name)


def _link_problems(graph: Cluster, ids: set[str]) -> Iterator[tuple[str, str]]:
    joined: set[frozenset[str]] = set()
    for index, link in enumerate(graph.links):
        for end, name in (("a", link.a), ("b", link.b)):
            if name not in ids:
                yield f"$.links[{index}].{end}", f"there is no device or switch {name!r}"
        ends = frozenset((link.a, link.b))
        if len(ends) == 1 or ends in joined:
            yield f"$.links[{index}]", f"{link.a!r} and {link.b!r} are the same or already linked"
        joined.add(ends)
