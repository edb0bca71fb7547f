"""What ``inspect`` prints: the layers of a model, what they compute and keep, what they can be split by."""

import csv
import io
import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Final

from planner.ir.count import gradient_flow, work
from planner.ir.dimension import Dimension
from planner.ir.graph import Layer, LayerGraph
from planner.ir.ops import Input, Output, Redistribute, describe
from planner.ir.rules import effects
from planner.report.tables import UNKNOWN, Table, counted, percent
from planner.units import format_bytes, format_count

LETTERS: Final = {
    Dimension.SAMPLE: "N", Dimension.OUT_CHANNEL: "O", Dimension.IN_CHANNEL: "I", Dimension.DEPTH: "D",
    Dimension.HEIGHT: "H", Dimension.WIDTH: "W", Dimension.LENGTH: "L",
}  # fmt: skip
LEGEND: Final = (
    "split by: N samples, O output channels, I input channels, D depth, H height, W width, L length; - nothing.\n"
    "FLOP count a multiply-add as 2, and only those of convolutions and matrix products; torchvision and fvcore "
    "publish half as many.\n"
    "kept: what a layer made that its own or a later backward pass reads."
)
MAX_NAMED: Final = 3
"""Operators beside the first one that a row names."""
_IMPLIED: Final = {Dimension.REPLICATE, Dimension.BROADCAST}


@dataclass(frozen=True, slots=True)
class LayerRow:
    """One layer of a model; sizes are those of the whole batch.

    Attributes:
        name: of the layer.
        operator: what it computes; ``absorbed`` are further operators that work on its result.
        shape: of its result.
        dtype: of its elements.
        num_params: trainable ones, those that several layers share in the first of them only.
        forward_flop, backward_flop: of convolutions and matrix products.
        output_bytes: of its result.
        saved_bytes: of what it made and backward needs.
        split_by: what it can be split by, replicas left out.
        origin: place in the code.
    """

    name: str
    operator: str
    absorbed: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    num_params: int
    forward_flop: int
    backward_flop: int
    output_bytes: int
    saved_bytes: int
    split_by: tuple[str, ...]
    origin: str


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over all layers; inputs count as no layer, but what is kept of them counts."""

    layers: int
    num_params: int
    forward_flop: int
    backward_flop: int
    saved_bytes: int


@dataclass(frozen=True, slots=True)
class Part:
    """Layers that have nothing but samples to be split by, alike in operator and place in the code.

    Attributes:
        operator: of each.
        names: of the layers.
        per_sample: whether they can be split by samples; else not at all.
        flop_share: of the model's FLOP, forward and backward; None where it has none.
        output_bytes: of all results.
        origin: place in the code.
    """

    operator: str
    names: tuple[str, ...]
    per_sample: bool
    flop_share: float | None
    output_bytes: int
    origin: str


def rows_of_layers(graph: LayerGraph) -> tuple[LayerRow, ...]:
    """Return the inputs and layers of a model."""
    flows, seen = gradient_flow(graph), set[str]()
    rows = []
    for layer in graph.layers:
        if isinstance(layer.op, Output | Redistribute):
            continue
        found = work(
            layer, [s.shape for s in graph.inputs_of(layer)], layer.output.shape,
            [p.spec.shape for p in layer.params], input_gradient=any(flows[i] for i in layer.inputs),
        )  # fmt: skip
        own = {p.name: p.spec.numel for p in layer.params if p.trainable and p.name not in seen}
        seen |= own.keys()
        rows.append(LayerRow(
            layer.id, describe(layer.op), tuple(describe(a.op) for a in layer.absorbed), layer.output.shape,
            layer.output.dtype.value, sum(own.values()), found.forward_flop, found.backward_flop,
            layer.output.nbytes, layer.saved_bytes, _dimensions(layer, graph), layer.origin,
        ))  # fmt: skip
    return tuple(rows)


def _dimensions(layer: Layer, graph: LayerGraph) -> tuple[str, ...]:
    legal = effects(layer.op, graph.inputs_of(layer), layer.output)
    return tuple(d.value for d in Dimension if d in legal and d not in _IMPLIED)


def totals_of(rows: Sequence[LayerRow]) -> Totals:
    """Return the sums."""
    return Totals(
        sum(not _is_input(row) for row in rows), sum(row.num_params for row in rows),
        sum(row.forward_flop for row in rows), sum(row.backward_flop for row in rows),
        sum(row.saved_bytes for row in rows),
    )  # fmt: skip


def _is_input(row: LayerRow) -> bool:
    return row.operator == Input.kind


def parts_by_sample(rows: Sequence[LayerRow]) -> tuple[Part, ...]:
    """Return the layers that can be split by samples only, or not at all, those with most FLOP first."""
    total = totals_of(rows)
    whole = total.forward_flop + total.backward_flop
    found = [row for row in rows if set(row.split_by) <= {Dimension.SAMPLE} and not _is_input(row)]

    def key(row: LayerRow) -> tuple[str, str, bool]:
        return row.operator, row.origin, bool(row.split_by)

    parts = []
    for (operator, origin, per_sample), group in itertools.groupby(sorted(found, key=key), key):
        alike = list(group)
        flop = sum(row.forward_flop + row.backward_flop for row in alike)
        names, num_bytes = tuple(row.name for row in alike), sum(row.output_bytes for row in alike)
        parts.append(Part(operator, names, per_sample, flop / whole if whole else None, num_bytes, origin))
    return tuple(sorted(parts, key=lambda part: (-(part.flop_share or 0.0), -part.output_bytes, part.names)))


def layers(rows: Sequence[LayerRow], title: str) -> Table:
    """Return the layers, with the sums in the last row."""
    total = totals_of(rows)
    cells = [
        (
            row.name, _operators(row), " x ".join(map(str, row.shape)) or "scalar", short(row.split_by),
            _count(row.num_params), _count(row.forward_flop), _count(row.backward_flop),
            format_bytes(row.output_bytes), format_bytes(row.saved_bytes) if row.saved_bytes else "",
        )
        for row in rows
    ]  # fmt: skip
    cells.append((
        "total", counted(total.layers, "layer"), "", "", format_count(total.num_params),
        format_count(total.forward_flop), format_count(total.backward_flop), "", format_bytes(total.saved_bytes),
    ))  # fmt: skip
    columns = (
        "layer",
        "operator",
        "output",
        "split by",
        "parameters",
        "forward FLOP",
        "backward FLOP",
        "bytes",
        "kept",
    )
    spare = ("backward FLOP", "kept", "operator", "bytes")
    return Table(title, columns, tuple(cells), num_text=4, emphasis=len(cells) - 1, spare=spare)


def parts(found: Sequence[Part]) -> Table:
    """Return the layers that can be split by samples only, or not at all."""
    columns = ("operator", "layer", "split by", "in the code", "of all FLOP", "bytes")
    cells = tuple(
        (
            part.operator,
            part.names[0] if len(part.names) == 1 else f"{part.names[0]} and {len(part.names) - 1} more",
            "N" if part.per_sample else "-", part.origin,
            UNKNOWN if part.flop_share is None else percent(part.flop_share), format_bytes(part.output_bytes),
        )
        for part in found
    )  # fmt: skip
    return Table("Split by samples only, or not at all", columns, cells, num_text=4)


def parts_sentence(found: Sequence[Part]) -> str:
    """Return how much of a model can be split by samples only, or not at all."""
    if not found:
        return "Every layer can be split by more than samples."
    by_sample, whole = ([p for p in found if p.per_sample is wanted] for wanted in (True, False))
    said = []
    for group, words in ((by_sample, "by samples only"), (whole, "not at all: every device computes all of them")):
        if group:
            count = counted(sum(len(part.names) for part in group), "layer")
            share = sum(part.flop_share or 0.0 for part in group)
            said.append(f"{count} with {percent(share)} of the FLOP can be split {words}")
    return "; ".join(said) + "."


def totals_sentence(totals: Totals, graph: LayerGraph, *, training: bool) -> str:
    """Return the sums as a sentence."""
    return (
        f"{graph.name}, batch {graph.batch}, {_mode(training)}: {counted(totals.layers, 'layer')}, "
        f"{format_count(totals.num_params)} trainable parameters, {totals.forward_flop / 1e9:.4g} GFLOP forward, "
        f"{totals.backward_flop / 1e9:.4g} GFLOP backward, {format_bytes(totals.saved_bytes)} kept for backward"
    )


def document(graph: LayerGraph, rows: Sequence[LayerRow], *, training: bool) -> dict[str, object]:
    """Return everything for JSON."""
    return {
        "model": graph.name,
        "batch": graph.batch,
        "mode": _mode(training),
        "totals": asdict(totals_of(rows)),
        "layers": [asdict(row) for row in rows],
        "by_sample_or_whole": [asdict(part) for part in parts_by_sample(rows)],
    }


def as_csv(rows: Sequence[LayerRow]) -> str:
    """Return the layers as comma-separated values; shapes and lists are joined by spaces."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [field.name for field in fields(LayerRow)]
    writer.writerow(names)
    for row in rows:
        values = (getattr(row, name) for name in names)
        writer.writerow([" ".join(map(str, v)) if isinstance(v, tuple) else v for v in values])
    return text.getvalue()


def short(split_by: Sequence[str]) -> str:
    """Return what a layer can be split by in letters, see ``LEGEND``."""
    return " ".join(letter for dimension, letter in LETTERS.items() if dimension.value in split_by) or "-"


def _operators(row: LayerRow) -> str:
    """Return a layer's operators; of many, such as those of an attention, only the number."""
    absorbed = row.absorbed if len(row.absorbed) <= MAX_NAMED else (f"{len(row.absorbed)} more",)
    return " + ".join((row.operator, *absorbed))


def _mode(training: bool) -> str:
    return "training" if training else "evaluation"


def _count(value: int) -> str:
    return format_count(value) if value else ""
