"""The time of a layer that was not measured: the slower of arithmetic and memory, plus launches."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from planner.ir.count import Work
from planner.ir.tensor import DType

DATA_SHEET_EFFICIENCY: Final = 0.7
"""Share of a data sheet's peak that operators reach: the factor of Meta's AutoParallel (its cost
model multiplies its roofline by 0.7). Not fitted here."""
LAUNCH_S: Final = 7e-6
"""Time to start an operator on an accelerator: the floor of the same cost model."""


@dataclass(frozen=True, slots=True)
class Roofline:
    """max(FLOP / rate, bytes / bandwidth) + launches, for forward and backward apart.

    Attributes:
        flop_per_s: reached rate, by operator kind; ``""`` for kinds without an own rate.
        bandwidth_bytes_per_s: reached memory bandwidth.
        launch_s: per operator.
        update_bytes_per_s: reached by the optimizer.
        measured: the rates were measured on the device, not read off a data sheet.
    """

    flop_per_s: Mapping[str, float] = field(hash=False)
    bandwidth_bytes_per_s: float
    launch_s: float
    update_bytes_per_s: float
    measured: bool = False

    @staticmethod
    def of_data_sheet(peak_flop_per_s: float, bandwidth_bytes_per_s: float) -> "Roofline":
        """Return the roofline of an unmeasured accelerator."""
        bandwidth = bandwidth_bytes_per_s * DATA_SHEET_EFFICIENCY
        return Roofline({"": peak_flop_per_s * DATA_SHEET_EFFICIENCY}, bandwidth, LAUNCH_S, bandwidth)

    def seconds(self, kind: str, work: Work, dtype: DType) -> tuple[float, float]:
        """Return the forward and backward time of a layer on one device."""
        rate = self.flop_per_s.get(kind, self.flop_per_s[""])
        item = dtype.item_bytes
        forward = max(work.forward_flop / rate, work.forward_elements * item / self.bandwidth_bytes_per_s)
        backward = max(work.backward_flop / rate, work.backward_elements * item / self.bandwidth_bytes_per_s)
        launches = 2 if work.backward_flop else 1
        return (
            forward + work.kernels * self.launch_s,
            backward + launches * work.kernels * self.launch_s,
        )

    def update_s(self, num_bytes: float) -> float:
        """Return the time of an optimizer step that moves these bytes of memory."""
        return num_bytes / self.update_bytes_per_s
