"""Predicted beside measured, as rows of text: a run layer by layer and part by part, and a race of strategies."""

import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from planner.cost.model import LayerCost
from planner.cost.simulate import Timeline
from planner.plan.measured import Measured, median_and_iqr
from planner.plan.schema import Plan
from planner.report.tables import EQUAL, UNKNOWN, Table, counted, percent
from planner.units import format_count, format_seconds

NUM_LAYERS: Final = 10
"""Layers that a report lists: those with the largest difference."""


@dataclass(frozen=True, slots=True)
class LayerSeconds:
    """Predicted seconds of a layer: compute forward and backward, communication that compute waits for."""

    compute_s: float
    transfer_s: float


@dataclass(frozen=True, slots=True)
class StepParts:
    """The parts of a predicted step, in seconds; they add up to it.

    Attributes:
        forward_s, backward_s: compute.
        transfer_s: communication that compute waits for.
        gathering_s: gradients into buckets.
        exposed_sync_s: what gradient reductions add to the step.
        optimizer_s: the optimizer's step.
        layers: of every layer, by its id.
    """

    forward_s: float
    backward_s: float
    transfer_s: float
    gathering_s: float
    exposed_sync_s: float
    optimizer_s: float
    layers: Mapping[str, LayerSeconds]

    @property
    def step_s(self) -> float:
        """The whole step."""
        compute_s = self.forward_s + self.backward_s + self.gathering_s + self.optimizer_s
        return compute_s + self.transfer_s + self.exposed_sync_s


def predicted_parts(ids: Sequence[str], costs: Sequence[LayerCost], timeline: Timeline) -> StepParts:
    """Return the parts of a simulated step.

    Args:
        ids: of the layers.
        costs: of each of them.
        timeline: the step that they make.
    """
    forward_s, backward_s = sum(c.forward_s for c in costs), sum(c.backward_s for c in costs)
    gathering_s, update_s = sum(c.collect_s for c in costs), sum(c.update_s for c in costs)
    rest_s = timeline.step_s - (forward_s + backward_s + gathering_s + update_s + timeline.blocking_s)
    layers = {
        layer: LayerSeconds(cost.forward_s + cost.backward_s, times.waited_s)
        for layer, cost, times in zip(ids, costs, timeline.layers, strict=True)
    }
    return StepParts(forward_s, backward_s, timeline.blocking_s, gathering_s, rest_s, update_s, layers)


def steps(plan: Plan, predicted: Sequence[tuple[str, float]], measured: Measured) -> Table:
    """Return predicted and measured steps below each other.

    Args:
        plan: that was run.
        predicted: for what, and seconds.
        measured: the run.
    """
    found = [(f"predicted for {where}", seconds) for where, seconds in predicted]
    found += [("measured", measured.step_s), ("measured, compute only", measured.compute_only_s)]
    rows = tuple(
        (
            name,
            format_seconds(s),
            format_count(plan.batch / s),
            _error(s, measured.step_s) if name != "measured" else "",
        )
        for name, s in found
    )
    title = f"{plan.model.name}, batch {plan.batch}, {counted(plan.mesh.size, 'rank')}"
    return Table(title, ("", "step", "samples/s", "against measured"), rows, emphasis=len(predicted))


def layer_differences(plan: Plan, predicted: StepParts, measured: Measured, count: int = NUM_LAYERS) -> Table:
    """Return the layers whose predicted and measured seconds differ most, the largest difference first."""
    rows = zip(plan.stages[0].layers, measured.layers, strict=True)
    layers = [(layer, predicted.layers[layer.id], found) for layer, found in rows]
    off = [found.compute_s + found.transfer_s - said.compute_s - said.transfer_s for _, said, found in layers]
    size = [
        abs(found.compute_s - said.compute_s) + abs(found.transfer_s - said.transfer_s) for _, said, found in layers
    ]
    order = sorted(range(len(layers)), key=lambda i: -size[i])[:count]
    shown = []
    for i in order:
        layer, said, found = layers[i]
        compute, transfer = (said.compute_s, found.compute_s), (said.transfer_s, found.transfer_s)
        figures = [format_seconds(x) for x in (*compute, *transfer)]
        shown.append((layer.id, layer.op, *layer.assigned().texts, *figures, _signed(off[i])))
    axes = tuple(axis.name for axis in plan.mesh.axes)
    columns = ("layer", "operator", *axes, "compute, predicted", "measured", "transfer, predicted", "measured ",
               "measured - predicted")  # fmt: skip
    title = f"Layers with the largest difference, {len(shown)} of {len(layers)}"
    spare = ("operator", "transfer, predicted", "measured ")
    return Table(title, columns, tuple(shown), num_text=2 + len(axes), spare=spare)


def parts(measured: Measured, predicted: StepParts | None) -> Table:
    """Return where the time of a step goes: predicted, where that is known, and measured."""
    layers, p = measured.layers, predicted
    found = {
        "forward": sum(x.forward_s for x in layers),
        "backward": sum(x.backward_s for x in layers),
        "transfers": sum(x.transfer_s for x in layers),
        "gradients into buckets": measured.gathering_s,
        "exposed gradient sync": measured.exposed_sync_s,
        "optimizer": measured.optimizer_s,
        "other": measured.other_s,
        "step": measured.instrumented_step_s,
    }
    said: Sequence[float | None] = [None] * len(found)
    if p is not None:
        said = [p.forward_s, p.backward_s, p.transfer_s, p.gathering_s, p.exposed_sync_s, p.optimizer_s, 0.0, p.step_s]
    whole_s = measured.instrumented_step_s
    rows = tuple(
        (
            name,
            UNKNOWN if before is None else format_seconds(before),
            format_seconds(seconds),
            UNKNOWN if before is None else _signed(seconds - before),
            percent(seconds / whole_s),
        )
        for (name, seconds), before in zip(found.items(), said, strict=True)
    )
    columns = ("part", "predicted", "measured", "measured - predicted", "of the measured step")
    return Table("Parts of the step", columns, rows, emphasis=len(rows) - 1)


def marking_sentence(measured: Measured) -> str:
    """Return whose seconds the parts are, and what it cost to learn them."""
    return (
        f"Parts are medians over {counted(len(measured.instrumented_steps_s), 'step')} on rank {measured.rank}, which "
        f"computes most; these steps took {_error(measured.instrumented_step_s, measured.step_s)} against plain ones."
    )


@dataclass(frozen=True, slots=True)
class Raced:
    """A strategy, predicted and measured.

    Attributes:
        name: of the strategy.
        predicted_s: step.
        measured_s, iqr_s: median step of the slowest rank and inter-quartile range; None where it did not run.
        note: why it did not run, or whose run this is.
        is_planned: the strategy that was asked for.
    """

    name: str
    predicted_s: float
    measured_s: float | None = None
    iqr_s: float | None = None
    note: str = ""
    is_planned: bool = False

    @property
    def error(self) -> float | None:
        """How far the prediction is above the measured step, relative to that."""
        return None if self.measured_s is None else self.predicted_s / self.measured_s - 1


def race_row(name: str, predicted_s: float, samples_s: Sequence[float], note: str, is_planned: bool) -> Raced:
    """Return the row of a strategy whose steps took so long; of one that did not run if there is none."""
    if not samples_s:
        return Raced(name, predicted_s, note=note, is_planned=is_planned)
    median_s, iqr_s = median_and_iqr(samples_s)
    return Raced(name, predicted_s, median_s, iqr_s, note, is_planned)


def race(rows: Sequence[Raced]) -> Table:
    """Return predicted and measured steps of strategies side by side."""
    columns = {
        "strategy": [f"planned ({row.name})" if row.is_planned else row.name for row in rows],
        "predicted": [format_seconds(row.predicted_s, 4) for row in rows],
        "measured": [UNKNOWN if row.measured_s is None else format_seconds(row.measured_s, 4) for row in rows],
        "spread": [UNKNOWN if row.iqr_s is None else format_seconds(row.iqr_s) for row in rows],
        "error": [UNKNOWN if row.error is None else f"{row.error:+.1%}" for row in rows],
        "": ["not run" if row.measured_s is None else row.note for row in rows],
    }
    emphasis = next((i for i, row in enumerate(rows) if row.is_planned), None)
    return Table("Strategies, predicted and measured", tuple(columns), tuple(zip(*columns.values(), strict=True)),
                 emphasis=emphasis)  # fmt: skip


def rank_correlation(rows: Sequence[Raced]) -> float | None:
    """Return Spearman's rank correlation of predicted and measured steps; None where there is no order to compare."""
    from scipy.stats import spearmanr  # takes longer to import than most commands take

    pairs = [(row.predicted_s, row.measured_s) for row in rows if row.measured_s is not None]
    predicted, measured = [p for p, _ in pairs], [m for _, m in pairs]
    if len(set(predicted)) < 2 or len(set(measured)) < 2:
        return None
    return float(spearmanr(predicted, measured).statistic)


@dataclass(frozen=True, slots=True)
class Swap:
    """Two strategies that were measured in the other order than predicted: ``fast`` was predicted to be faster."""

    fast: Raced
    slow: Raced

    @property
    def gap(self) -> float:
        """How much longer the measured step of ``fast`` is, relative to that of ``slow``."""
        assert self.fast.measured_s is not None
        assert self.slow.measured_s is not None
        return self.fast.measured_s / self.slow.measured_s - 1


def swaps(rows: Sequence[Raced]) -> tuple[Swap, ...]:
    """Return the pairs in the wrong order, the largest measured difference first; ties are in no order."""
    found = []
    for a, b in itertools.permutations([row for row in rows if row.measured_s is not None], 2):
        assert a.measured_s is not None
        assert b.measured_s is not None
        if a.predicted_s < b.predicted_s * (1 - EQUAL) and a.measured_s > b.measured_s:
            found.append(Swap(a, b))
    return tuple(sorted(found, key=lambda swap: -swap.gap))


def order_sentence(rows: Sequence[Raced]) -> str:
    """Return whether the strategies were measured in the order that was predicted."""
    ran = [row for row in rows if row.measured_s is not None]
    correlation = rank_correlation(rows)
    if correlation is None:
        return "No two strategies to compare: there is no order that could be right or wrong."
    wrong = swaps(rows)
    rank = f"rank correlation {correlation:.3g}"
    if not wrong:
        return f"The predicted order is the measured one ({rank})."
    first, pairs = wrong[0], len(ran) * (len(ran) - 1) // 2
    fast, slow = first.fast, first.slow
    spread_s = max(fast.iqr_s or 0.0, slow.iqr_s or 0.0)
    assert fast.measured_s is not None
    assert slow.measured_s is not None
    within = ", less than the spread of the steps" if fast.measured_s - slow.measured_s < spread_s else ""
    return (
        f"The predicted order is not the measured one: {len(wrong)} of {counted(pairs, 'pair')} the wrong way round "
        f"({rank}). The largest: {_name(fast)} was predicted faster than {_name(slow)} by "
        f"{percent(1 - fast.predicted_s / slow.predicted_s)} and measured slower by {percent(first.gap)}{within}."
    )


def race_sentences(rows: Sequence[Raced]) -> Iterator[str]:
    """Yield whether the order was right, how large the errors are, and what did not run."""
    yield order_sentence(rows)
    errors = [abs(row.error) for row in rows if row.error is not None]
    if errors:
        yield f"Median absolute error of the prediction: {percent(statistics.median(errors))}."
    for row in rows:
        if row.measured_s is None:
            yield f"{_name(row)}: {row.note}"


def _name(row: Raced) -> str:
    return f"planned ({row.name})" if row.is_planned else row.name


def _error(seconds: float, reference_s: float) -> str:
    return f"{seconds / reference_s - 1:+.1%}"


def _signed(seconds: float) -> str:
    return f"+{format_seconds(seconds)}" if seconds > 0 else format_seconds(seconds)
