"""What ``compare`` writes as JSON and CSV: all figures of all strategies in all cases, with all digits."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

from planner.report.comparison import CaseRow, Race
from planner.report.measured import rank_correlation, swaps
from planner.report.tables import StrategyRow

COLUMNS: Final = (
    "cluster", "devices", "link_bytes_per_s", "batch", "strategy", "is_planned", "step_s", "samples_per_s",
    "steps_per_s", "speed_up", "communication_bytes", "exposed_s", "memory_bytes", "num_replaced", "fits", "note",
    "lower_bound_s", "devices_used", "measured_s", "epoch_s", "epoch_cost",
)  # fmt: skip
"""Of the CSV file."""


def document(model: str, changes: Sequence[str], rows: Sequence[CaseRow]) -> dict[str, Any]:
    """Return everything for JSON: the only case itself, or a list of them."""
    found = [_case(row) for row in rows]
    head = {"model": model, "changes": list(changes)}
    return head | found[0] if len(found) == 1 else head | {"cases": found}


def _case(row: CaseRow) -> dict[str, Any]:
    strategies = [
        asdict(each) | {
            "steps_per_s": 1 / each.step_s, "epoch_s": row.epoch_s(each), "epoch_cost": row.epoch_cost(each)
        }
        for each in row.strategies
    ]  # fmt: skip
    return {
        "batch": row.batch,
        "cluster": row.cluster,
        "devices": row.num_devices,
        "devices_used": row.num_used,
        "link_bytes_per_s": row.link_bytes_per_s,
        "price_per_h": row.price_per_h,
        "samples_per_epoch": row.samples_per_epoch,
        "lower_bound_s": row.lower_bound_s,
        "planned_lost": row.has_lost,
        "why_not": row.why_not,
        "found_nothing": dict(row.missing),
        "strategies": strategies,
        **({} if row.race is None else {"measured": _measurements(row.race)}),
    }


def _measurements(race: Race) -> dict[str, Any]:
    return {
        "steps": race.steps,
        "warmup": race.warmup,
        "strategies": [asdict(row) | {"error": row.error} for row in race.rows],
        "rank_correlation": rank_correlation(race.rows),
        "predicted_faster_measured_slower": [[swap.fast.name, swap.slow.name] for swap in swaps(race.rows)],
    }


def as_csv(rows: Sequence[CaseRow]) -> str:
    """Return a line for every strategy of every case; a case without a plan has none. Empty: not known."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        measured = {(each.name, each.is_planned): each.measured_s for each in (row.race.rows if row.race else ())}
        for each in row.strategies:
            writer.writerow(_cells(row, each, measured.get((each.name, each.is_planned))))
    return text.getvalue()


def _cells(case: CaseRow, row: StrategyRow, measured_s: float | None) -> Mapping[str, object]:
    figures = asdict(row)
    figures["strategy"] = figures.pop("name")
    return figures | {
        "cluster": case.cluster, "devices": case.num_devices, "link_bytes_per_s": case.link_bytes_per_s,
        "batch": case.batch, "steps_per_s": 1 / row.step_s, "lower_bound_s": case.lower_bound_s,
        "devices_used": case.num_used if row.is_planned else case.num_devices, "measured_s": measured_s,
        "epoch_s": case.epoch_s(row), "epoch_cost": case.epoch_cost(row),
    }  # fmt: skip
