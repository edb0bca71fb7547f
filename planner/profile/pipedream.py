"""Profiles as PipeDream's profiler writes them [PipeDream19]: a line for each layer, then a line for each edge.

::

    node2 -- Conv2d(3, 64, ...) -- forward_compute_time=22.3, backward_compute_time=24.6, activation_size=1644167168.0, parameter_size=7168.0
        node1 -- node2

Times are in ms, sizes in bytes, all for one mini-batch. The lines are in no order: only the edges, which are indented,
say what comes first. Some profiles have a list of sizes, ``[a; b]``, where a layer has several results; they count
together. The layers called ``Input`` hold the time to read a batch, which belongs to no stage; they are left out.
"""  # noqa: E501

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import networkx as nx

from planner.errors import FormatError
from planner.ir.canonical import read_text

WHAT: Final = "PipeDream profile"
MAX_FIGURE: Final = 1e18
"""Of milliseconds and of bytes."""
_SEPARATOR: Final = " -- "
_TIMES: Final = ("forward_compute_time", "backward_compute_time")
_SIZES: Final = ("activation_size", "parameter_size")


@dataclass(frozen=True, slots=True)
class MeasuredLayer:
    """One layer of a profile.

    Attributes:
        name: as in the file, such as ``node2``.
        description: the module as torch prints it.
        forward_s, backward_s: of one mini-batch; backward is that of inputs and weights together.
        output_bytes: of its result, for one mini-batch.
        weight_bytes: of its parameters.
        reads: positions of the layers whose results it reads; all are smaller than its own.
        place: in the file, for messages.
    """

    name: str
    description: str
    forward_s: float
    backward_s: float
    output_bytes: float
    weight_bytes: float
    reads: tuple[int, ...]
    place: str = ""


@dataclass(frozen=True, slots=True)
class PipeDreamProfile:
    """A whole file.

    Attributes:
        layers: in a topological order; of those that do not depend on each other, the smaller number first.
        input_bytes: of the mini-batch that the first layers read; 0 where the file has no ``Input``.
    """

    layers: tuple[MeasuredLayer, ...]
    input_bytes: float


def read_pipedream(path: Path) -> PipeDreamProfile:
    """Read a profile.

    Raises:
        UsageError: the file cannot be read.
        FormatError: every line that cannot be understood, edges between layers that are not there, or a cycle.
    """
    return parse_pipedream(read_text(path, WHAT), f"{WHAT} {path}")


def parse_pipedream(text: str, what: str = WHAT) -> PipeDreamProfile:
    """Return the profile that a text holds; ``what`` names it in messages.

    Raises:
        FormatError: as ``read_pipedream``.
    """
    problems: list[tuple[str, str]] = []
    layers: dict[str, MeasuredLayer] = {}
    edges: list[tuple[str, str, str]] = []
    for number, line in enumerate(text.splitlines(), 1):
        place = f"line {number}"
        parts = line.strip().split(_SEPARATOR)
        try:
            if not line.strip():
                continue
            if line[0].isspace():
                edges.append((*_edge(parts), place))
                continue
            layer = _layer(parts, place)
        except ValueError as error:
            problems.append((place, str(error)))
            continue
        if layer.name in layers:
            problems.append((place, f"repeats {layer.name} of {layers[layer.name].place}"))
        layers[layer.name] = layer
    for source, target, place in edges:
        problems += [(place, f"names {end}, which has no line") for end in (source, target) if end not in layers]
    if not layers:
        problems.append(("line 1", "there is no layer"))
    if problems:
        raise FormatError(what, problems)
    return _sorted(layers, [(source, target) for source, target, _ in edges], what)


def _edge(parts: Sequence[str]) -> tuple[str, str]:
    if len(parts) != 2:
        raise ValueError("is no edge of the form `node1 -- node2`")
    return parts[0], parts[1]


def _layer(parts: Sequence[str], place: str) -> MeasuredLayer:
    if len(parts) < 3:  # a fourth part is the stage that a planner gave it
        raise ValueError("is no layer of the form `name -- description -- forward_compute_time=..., ...`")
    values: dict[str, float] = {}
    for item in parts[2].split(", "):
        key, _, value = item.partition("=")
        if key not in (*_TIMES, *_SIZES):
            raise ValueError(f"{key!r} is none of {', '.join((*_TIMES, *_SIZES))}")
        values[key] = _number(key, value)
    if missing := [key for key in (*_TIMES, *_SIZES) if key not in values]:
        raise ValueError(f"{missing[0]} is missing")
    forward_s, backward_s = (values[key] * 1e-3 for key in _TIMES)
    output_bytes, weight_bytes = (values[key] for key in _SIZES)
    return MeasuredLayer(parts[0], parts[1], forward_s, backward_s, output_bytes, weight_bytes, (), place)


def _number(key: str, text: str) -> float:
    try:
        found = sum(map(float, text.strip("[]").split("; ")))
    except ValueError:
        raise ValueError(f"{key}: {text!r} is no number") from None
    if not 0 <= found < MAX_FIGURE:
        raise ValueError(f"{key}: {text} is no {'time' if key in _TIMES else 'size'}")
    return found


def _sorted(layers: Mapping[str, MeasuredLayer], edges: Sequence[tuple[str, str]], what: str) -> PipeDreamProfile:
    graph: nx.DiGraph[str] = nx.DiGraph()
    graph.add_nodes_from(layers)
    graph.add_edges_from(edges)
    try:
        order = list(nx.lexicographical_topological_sort(graph, key=_by_number))
    except nx.NetworkXUnfeasible:
        cycle = " -> ".join(edge[0] for edge in nx.find_cycle(graph))
        raise FormatError(
            what, [(layers[cycle.split(" ")[0]].place, f"the edges go round in a cycle: {cycle}")]
        ) from None
    inputs = [name for name in order if _is_input(layers[name], graph)]
    kept = [name for name in order if name not in inputs]
    if not kept:
        raise FormatError(what, [("line 1", "there is no layer but the input")])
    position = {name: i for i, name in enumerate(kept)}
    found = []
    for name in kept:
        read = sorted(position[p] for p in graph.predecessors(name) if p in position)
        x = layers[name]
        found.append(
            MeasuredLayer(
                name, x.description, x.forward_s, x.backward_s, x.output_bytes, x.weight_bytes, tuple(read), x.place
            )
        )
    return PipeDreamProfile(tuple(found), sum(layers[name].output_bytes for name in inputs))


def _is_input(layer: MeasuredLayer, graph: "nx.DiGraph[str]") -> bool:
    return layer.description.startswith("Input") and not graph.in_degree(layer.name)


def _by_number(name: str) -> tuple[int, str]:
    """Return what sorts node2 in front of node10."""
    digits = re.search(r"\d+$", name)
    return (int(digits.group()) if digits else -1), name
