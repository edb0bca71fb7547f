"""Measured times of single layers on one kind of device."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from planner.ir.canonical import sha256_of
from planner.profile.key import LocalLayer
from planner.profile.roofline import Roofline


@dataclass(frozen=True, slots=True)
class Measurement:
    """Median times of one layer on one device.

    Attributes:
        forward_s, backward_s: medians; backward is that of inputs and parameters together.
        iqr_s: inter-quartile range of forward and backward together.
        num_samples: timed repeats behind the medians.
    """

    forward_s: float
    backward_s: float
    iqr_s: float
    num_samples: int


class Source(StrEnum):
    """Where the compute time of a layer is from."""

    MEASURED = "measured"
    FITTED = "fitted"
    DATA_SHEET = "data_sheet"


@dataclass(frozen=True, slots=True)
class LayerTime:
    """Seconds of one layer on one device, and where they are from.

    Attributes:
        forward_s: of the forward pass.
        backward_s: of the gradients of inputs and parameters together.
        source: measured on the device, fitted to its measurements, or read off its data sheet.
    """

    forward_s: float
    backward_s: float
    source: Source


@dataclass(frozen=True, slots=True)
class ProfileTable:
    """What is known of one device: measured layers, and a roofline for all others.

    Attributes:
        device: its name.
        roofline: for what was not measured.
        layers: measurements by ``LocalLayer.key``.
    """

    device: str
    roofline: Roofline
    layers: Mapping[str, Measurement] = field(default_factory=dict, hash=False)

    def time(self, local: LocalLayer) -> LayerTime:
        """Return the time of a layer: the measured one where there is one."""
        found = self.layers.get(local.key) if self.layers else None
        if found is not None:
            return LayerTime(found.forward_s, found.backward_s, Source.MEASURED)
        forward_s, backward_s = self.roofline.seconds(local.op.kind, local.work(), local.dtype)
        source = Source.FITTED if self.roofline.measured else Source.DATA_SHEET
        return LayerTime(forward_s, backward_s, source)

    @property
    def digest(self) -> str:
        """Hash of all numbers."""
        roofline = self.roofline
        return sha256_of([
            self.device, dict(roofline.flop_per_s), roofline.bandwidth_bytes_per_s, roofline.launch_s,
            roofline.update_bytes_per_s,
            {key: [m.forward_s, m.backward_s] for key, m in self.layers.items()},
        ])  # fmt: skip
