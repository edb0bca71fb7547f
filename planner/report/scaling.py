"""The same network and batch on other numbers of devices of a machine, as values for a curve."""

from collections.abc import Sequence
from dataclasses import dataclass

from planner.report.pictures import Json, short


@dataclass(frozen=True, slots=True)
class ScalePoint:
    """What is predicted for a number of devices; None where nothing fits in memory.

    Attributes:
        num_devices: of the machine, its first ones.
        planned_s: step of the plan for them.
        data_s: of data parallelism.
    """

    num_devices: int
    planned_s: float | None
    data_s: float | None


def scaling(points: Sequence[ScalePoint], batch: int) -> Json:
    """Return the points of the curve."""
    return {
        "batch": batch,
        "devices": [point.num_devices for point in points],
        "planned": [None if p.planned_s is None else short([p.planned_s])[0] for p in points],
        "data": [None if p.data_s is None else short([p.data_s])[0] for p in points],
    }
