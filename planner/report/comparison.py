"""Cases of ``compare``, each with its strategies, side by side."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from planner.report.measured import Raced
from planner.report.tables import EQUAL, UNKNOWN, StrategyRow, Table, counted, part_of_step, percent
from planner.search.fixed import FIXED
from planner.units import format_bit_rate, format_bytes, format_count, format_seconds


@dataclass(frozen=True, slots=True)
class Race:
    """What was measured: every strategy, with so many steps behind so many that do not count."""

    rows: tuple[Raced, ...]
    steps: int
    warmup: int


@dataclass(frozen=True, slots=True)
class CaseRow:
    """The strategies on one machine, for one batch.

    Attributes:
        cluster: that the machine is made of.
        num_devices: of the machine.
        batch: samples of a step.
        link_bytes_per_s: of the outermost links, where they are not those of the cluster.
        strategies: the planned one last; none where there is no plan.
        lower_bound_s: of all steps.
        num_used: devices of the plan.
        why_not: why there is no plan.
        missing: other solvers that found nothing, and why.
        price_per_h: of the machine.
        samples_per_epoch: that an epoch has.
        fixed_batch: the batch was asked for, else it grows with the devices.
        race: what was measured.
    """

    cluster: str
    num_devices: int
    batch: int
    link_bytes_per_s: float | None
    strategies: tuple[StrategyRow, ...]
    lower_bound_s: float = 0.0
    num_used: int = 0
    why_not: str = ""
    missing: tuple[tuple[str, str], ...] = ()
    price_per_h: float | None = None
    samples_per_epoch: int | None = None
    fixed_batch: bool = False
    race: Race | None = None

    @property
    def planned(self) -> StrategyRow | None:
        """The planned strategy."""
        return self.strategies[-1] if self.strategies else None

    @property
    def rivals(self) -> list[StrategyRow]:
        """The other strategies that fit and that could have been planned, the fastest first."""
        return sorted((r for r in self.strategies[:-1] if r.fits and not r.note), key=lambda row: row.step_s)

    @property
    def best_fixed(self) -> StrategyRow | None:
        """The fastest fixed strategy among them."""
        return next((row for row in self.rivals if row.name in FIXED), None)

    @property
    def has_lost(self) -> bool:
        """Whether the planned strategy is slower than another one."""
        planned, rival = self.planned, next(iter(self.rivals), None)
        return planned is not None and rival is not None and rival.step_s < planned.step_s * (1 - EQUAL)

    def epoch_s(self, row: StrategyRow) -> float | None:
        """Return the seconds of an epoch; its last step may have fewer samples, and counts as a whole one."""
        count = self.samples_per_epoch
        return None if count is None else row.step_s * math.ceil(count / self.batch)

    def epoch_cost(self, row: StrategyRow) -> float | None:
        """Return what an epoch costs, in the price's currency."""
        seconds = self.epoch_s(row)
        return None if seconds is None or self.price_per_h is None else seconds / 3600 * self.price_per_h

    @property
    def texts(self) -> dict[str, str]:
        """What tells this case from others, by heading."""
        links = "as they are" if self.link_bytes_per_s is None else format_bit_rate(self.link_bytes_per_s)
        return {"cluster": self.cluster, "devices": f"{self.num_devices}", "links": links, "batch": f"{self.batch}"}


def cases(rows: Sequence[CaseRow]) -> Table:
    """Return the planned strategy of every case; the fastest one, or that with the cheapest epoch, stands out."""
    plans = [row.planned for row in rows]
    rivals = [row.best_fixed for row in rows]

    def each(text: Callable[[StrategyRow], str]) -> list[str]:
        return [UNKNOWN if plan is None else text(plan) for plan in plans]

    columns = {name: [row.texts[name] for row in rows] for name in _differing(rows)}
    num_text = len(columns)
    columns["uses"] = [f"{row.num_used}" if row.planned else "no plan" for row in rows]
    columns["step"] = each(lambda plan: format_seconds(plan.step_s, 5))
    columns["samples/s"] = each(lambda plan: format_count(plan.samples_per_s))
    columns["steps/s"] = each(lambda plan: format_count(1 / plan.step_s))
    if any(_kind(a) == _kind(b) and a.num_devices != b.num_devices for a in rows for b in rows):
        scaled = [_scaled(row, rows) for row in rows]
        columns |= {"faster": [faster for faster, _ in scaled], "efficiency": [share for _, share in scaled]}
    columns["exposed"] = each(lambda plan: part_of_step(plan.exposed_s, plan.step_s))
    columns["communication"] = each(lambda plan: format_bytes(plan.communication_bytes))
    columns["memory"] = each(lambda plan: format_bytes(plan.memory_bytes))
    columns["best fixed"] = [_text(None if rival is None else rival.name) for rival in rivals]
    columns["over it"] = [
        _text(f"{rival.step_s / plan.step_s:.3f}x" if plan and rival else None)
        for plan, rival in zip(plans, rivals, strict=True)
    ]
    if any(row.samples_per_epoch for row in rows):
        epochs = [row.epoch_s(p) if p else None for row, p in zip(rows, plans, strict=True)]
        columns["epoch"] = [_text(None if s is None else format_seconds(s, 4)) for s in epochs]
    if any(row.price_per_h is not None for row in rows):
        columns["epoch costs"] = [_text(None if c is None else f"{c:.4g}") for c in map(_cost, rows)]
    cells = tuple(zip(*columns.values(), strict=True))
    spare = ("communication", "steps/s", "exposed", "memory", "uses")
    title = "The planned strategy in every case, predicted"
    return Table(title, tuple(columns), cells, num_text, emphasis=_best(rows), spare=spare)


def by_strategy(rows: Sequence[CaseRow]) -> Table:
    """Return the samples per second of every strategy in every case; in brackets those that could not be planned."""
    found: dict[str, None] = {}
    for row in rows:
        found.update(dict.fromkeys(_named(each) for each in row.strategies))
    names = [
        *(name for name in found if not name.startswith("planned")),
        *(n for n in found if n.startswith("planned")),
    ]
    headings = tuple(", ".join(row.texts[name] for name in _telling(rows)) for row in rows)
    speeds = [{_named(each): _speed(each) for each in row.strategies} for row in rows]
    cells = tuple((name, *(speed.get(name, UNKNOWN) for speed in speeds)) for name in names)
    emphasis = next((i for i, name in enumerate(names) if name.startswith("planned")), None)
    title = f"Samples per second of every strategy, by {', '.join(_telling(rows))}"
    return Table(title, ("strategy", *headings), cells, emphasis=emphasis)


def sentences(rows: Sequence[CaseRow]) -> Iterator[str]:
    """Yield which case is the best, where the planned strategy lost, and which cases have no plan."""
    planned = [(row, row.planned) for row in rows if row.planned is not None]
    if planned:
        fastest, plan = max(planned, key=lambda pair: pair[1].samples_per_s)
        yield f"Fastest: {named(fastest, rows)}, {format_count(plan.samples_per_s)} samples/s."
    if priced := [(row, cost) for row in rows if (cost := _cost(row)) is not None]:
        cheapest, cost = min(priced, key=lambda pair: pair[1])
        epoch = counted(cheapest.samples_per_epoch or 0, "sample")
        yield f"Cheapest: {named(cheapest, rows)}, {cost:.4g} for an epoch of {epoch}."
    for row, plan in planned:
        if row.has_lost:
            rival = row.rivals[0]
            saved = percent(1 - rival.step_s / plan.step_s)
            yield f"{named(row, rows)}: {rival.name} is faster than the planned strategy by {saved}: that one lost."
    for row in rows:
        if row.why_not:
            yield f"{named(row, rows)}: no plan. {row.why_not}"


def use_sentences(row: CaseRow) -> Iterator[str]:
    """Yield how many devices the planned strategy of the only case leaves idle."""
    if row.planned is not None and row.num_used < row.num_devices:
        yield f"The planned strategy uses {row.num_used} of {counted(row.num_devices, 'device')}."


def epoch_sentences(row: CaseRow) -> Iterator[str]:
    """Yield how long an epoch of the only case takes, and what it costs."""
    if row.planned is None or (seconds := row.epoch_s(row.planned)) is None:
        return
    cost = row.epoch_cost(row.planned)
    costs = "" if cost is None else f" and costs {cost:.4g}"
    yield f"An epoch of {counted(row.samples_per_epoch or 0, 'sample')} takes {format_seconds(seconds, 4)}{costs}."


def named(row: CaseRow, rows: Sequence[CaseRow]) -> str:
    """Return what tells a case from the others, in words."""
    return ", ".join(f"{name} {row.texts[name]}" for name in _telling(rows))


def _differing(rows: Sequence[CaseRow]) -> list[str]:
    """Return the headings of what differs between cases; of all of it where nothing does."""
    headings = list(rows[0].texts)
    return [name for name in headings if len({row.texts[name] for row in rows}) > 1] or headings


def _telling(rows: Sequence[CaseRow]) -> list[str]:
    """Return the headings that tell cases apart: devices may follow from the cluster, and batches from devices."""
    found = _differing(rows)
    by_cluster = len({(row.cluster, row.num_devices) for row in rows}) == len({row.cluster for row in rows}) > 1
    left_out = {"devices"} if by_cluster else set()
    left_out |= set() if any(row.fixed_batch for row in rows) else {"batch"}
    return [name for name in found if name not in left_out] or found


def _scaled(row: CaseRow, rows: Sequence[CaseRow]) -> tuple[str, str]:
    """Return how much faster a case is than that with the fewest devices which is otherwise alike, and per device."""
    alike = [other for other in rows if other.planned and _kind(other) == _kind(row)]
    if row.planned is None or not alike:
        return UNKNOWN, UNKNOWN
    base = min(alike, key=lambda other: other.num_devices)
    assert base.planned is not None
    faster = row.planned.samples_per_s / base.planned.samples_per_s
    return f"{faster:.2f}x", f"{100 * faster * base.num_devices / row.num_devices:.0f} %"


def _kind(row: CaseRow) -> tuple[str, float | None, int | None]:
    return row.cluster, row.link_bytes_per_s, row.batch if row.fixed_batch else None


def _best(rows: Sequence[CaseRow]) -> int | None:
    costs = {i: cost for i, row in enumerate(rows) if (cost := _cost(row)) is not None}
    if costs:
        return min(costs, key=costs.__getitem__)
    speeds = {i: row.planned.samples_per_s for i, row in enumerate(rows) if row.planned is not None}
    return max(speeds, key=speeds.__getitem__, default=None)


def _cost(row: CaseRow) -> float | None:
    return None if row.planned is None else row.epoch_cost(row.planned)


def _named(row: StrategyRow) -> str:
    return f"planned ({row.name})" if row.is_planned else row.name


def _speed(row: StrategyRow) -> str:
    text = format_count(row.samples_per_s)
    return text if row.fits and not row.note else f"({text})"


def _text(value: str | None) -> str:
    return UNKNOWN if value is None else value
