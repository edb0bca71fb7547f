"""Times of single layers on one kind of device: measured, fitted to measurements, or from the data sheet."""

import bisect
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property

from planner.ir.canonical import sha256_of
from planner.ir.graph import Layer
from planner.ir.ops import Custom, PerSample
from planner.profile.calibrated import CalibratedRoofline
from planner.profile.demand import Phase
from planner.profile.key import LocalLayer, PieceKey
from planner.profile.roofline import Roofline


@dataclass(frozen=True, slots=True)
class Measurement:
    """Median times of one layer on one device.

    Attributes:
        forward_s: of the forward pass.
        backward_data_s: of the gradients of the inputs; 0 where none is needed.
        backward_weight_s: of the gradients of the parameters; 0 where there are none.
        iqr_s: inter-quartile ranges of all three together.
        num_repeats: timed repeats behind the medians.
    """

    forward_s: float
    backward_data_s: float
    backward_weight_s: float
    iqr_s: float
    num_repeats: int

    @property
    def backward_s(self) -> float:
        """Seconds of the whole backward pass."""
        return self.backward_data_s + self.backward_weight_s


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


Family = Sequence[tuple[int, Measurement]]
"""Pieces that differ in their number of samples only, fewest samples first."""


@dataclass(frozen=True)
class ProfileTable:
    """What is known of one device: measured layers, a fit to them, and a roofline for all others.

    Attributes:
        device: its name.
        roofline: for what was neither measured nor can be fitted, and for the optimizer.
        layers: measurements by ``LocalLayer.key``.
        fit: of the measurements.
    """

    device: str
    roofline: Roofline
    layers: Mapping[str, Measurement] = field(default_factory=dict, hash=False)
    fit: CalibratedRoofline | None = field(default=None, hash=False)
    _known: dict[object, LayerTime] = field(init=False, default_factory=dict, compare=False, repr=False)
    """By everything that a layer's time depends on: a search asks for the same piece of many layers and splits."""
    _numbers: dict[object, int] = field(init=False, default_factory=dict, compare=False, repr=False)
    _layers_seen: dict[int, tuple[Layer, int]] = field(init=False, default_factory=dict, compare=False, repr=False)
    """By ``id``, which stays the layer's own as long as the layer is kept here."""

    def time(self, local: LocalLayer) -> LayerTime:
        """Return the time of a layer: the first of these that there is.

        1. the measurement of exactly this piece;
        2. of a piece that differs in its number of samples, scaled (``scaled``); both count as measured;
        3. the calibrated roofline;
        4. the plain roofline: of rates measured on this host, or of the device's data sheet.
        """
        asked = (
            self._number(local.layer), local.inputs, local.output, local.params, local.dtype, local.input_gradient,
            local.precision, local.memory_format, local.synchronised, local.resolved,
        )  # fmt: skip
        found = self._known.get(asked)
        if found is None:
            found = self._known[asked] = self._find(local)
        return found

    def estimate(self, local: LocalLayer) -> LayerTime:
        """Return the time of a layer by the rooflines alone: comparable among pieces, measured or not."""
        if self.fit is not None and local.has_kernel:
            fitted = self.fit.seconds(local.piece, _flop(local))
            if fitted is not None:
                forward_s = fitted.pop(Phase.FORWARD)
                return LayerTime(forward_s, sum(fitted.values()), Source.FITTED)
        return self._by_roofline(local)

    def _number(self, layer: Layer) -> int:
        """Return a number that layers share whose pieces of equal shapes take equally long."""
        seen = self._layers_seen.get(id(layer))
        if seen is None:
            params = tuple((p.role, len(p.spec.shape), p.trainable, p.whole) for p in layer.params)
            facts = (layer.op, tuple(a.op for a in layer.absorbed), layer.output, params)
            seen = self._layers_seen[id(layer)] = (layer, self._numbers.setdefault(facts, len(self._numbers)))
        return seen[1]

    def _find(self, local: LocalLayer) -> LayerTime:
        if not (self.layers or self.fit):
            return self._by_roofline(local)
        piece = local.piece
        measured = self._pieces.get(piece) or self._of_family(piece)
        if measured is not None:
            return LayerTime(measured.forward_s, measured.backward_s, Source.MEASURED)
        return self.estimate(local)

    def _by_roofline(self, local: LocalLayer) -> LayerTime:
        forward_s, backward_s = self.roofline.seconds(local.op.kind, local.work(), local.dtype)
        source = Source.FITTED if self.roofline.measured else Source.DATA_SHEET
        return LayerTime(forward_s, backward_s, source)

    def _of_family(self, piece: PieceKey) -> Measurement | None:
        samples = piece.samples
        members = None if samples is None else self._families.get(piece.with_samples(0))
        if samples is None or members is None:
            return None
        return scaled(members, samples, None if self.fit is None else Ratios(self.fit, piece))

    @cached_property
    def _pieces(self) -> Mapping[PieceKey, Measurement]:
        return {PieceKey.of_text(key): measurement for key, measurement in self.layers.items()}

    @cached_property
    def _families(self) -> Mapping[PieceKey, Family]:
        """Entries by their piece without samples."""
        found: dict[PieceKey, list[tuple[int, Measurement]]] = defaultdict(list)
        for piece, measurement in self._pieces.items():
            if piece.samples is not None:
                found[piece.with_samples(0)].append((piece.samples, measurement))
        return {piece: sorted(members, key=lambda member: member[0]) for piece, members in found.items()}

    @cached_property
    def digest(self) -> str:
        """Hash of all numbers."""
        roofline = self.roofline
        return sha256_of([
            self.device, dict(roofline.flop_per_s), roofline.bandwidth_bytes_per_s, roofline.launch_s,
            roofline.update_bytes_per_s,
            {key: [m.forward_s, m.backward_data_s, m.backward_weight_s] for key, m in self.layers.items()},
            None if self.fit is None else self.fit.model_dump(mode="json"),
        ])  # fmt: skip


@dataclass(frozen=True, slots=True)
class Ratios:
    """How the fitted time of a piece grows from another number of samples."""

    fit: CalibratedRoofline
    piece: PieceKey

    def of(self, samples: int) -> tuple[float, ...] | None:
        """Return the piece's fitted time over that with so many samples, of each phase; None where there is no fit.

        Measurements divide the backward pass of every trained layer in two, a fit does so for products only: the phase
        that it lacks grows like the other one, and in proportion to the samples where it has neither.
        """
        mine, other = self.fit.seconds(self.piece), self.fit.seconds(self.piece.with_samples(samples))
        if mine is None or other is None:
            return None
        found = {phase: mine[phase] / other[phase] for phase in Phase if mine.get(phase) and other.get(phase)}
        plain = (self.piece.samples or samples) / samples
        data, weight = Phase.BACKWARD_DATA, Phase.BACKWARD_WEIGHT
        return (
            found.get(Phase.FORWARD, plain),
            found.get(data, found.get(weight, plain)),
            found.get(weight, found.get(data, plain)),
        )


def scaled(family: Family, samples: int, ratios: Ratios | None = None) -> Measurement:
    """Return the time of a piece from those that differ in their number of samples only.

    Between two measured numbers of samples, on the line through both. Beyond them, the nearest one times the ratio that
    the fit predicts, so that launches are not multiplied; in proportion to the samples where there is no fit.

    Args:
        family: at least one.
        samples: of the piece.
        ratios: of the fit.
    """
    counts = [count for count, _ in family]
    place = bisect.bisect_left(counts, samples)
    if place < len(family) and counts[place] == samples:
        return family[place][1]
    if 0 < place < len(family):
        (few, low), (many, high) = family[place - 1], family[place]
        share = (samples - few) / (many - few)
        return _mixed(low, high, (1 - share,) * 3, (share,) * 3)
    count, nearest = family[0] if place == 0 else family[-1]
    plain = (samples / count,) * 3
    return _mixed(nearest, nearest, plain if ratios is None else ratios.of(count) or plain, (0.0,) * 3)


def _mixed(a: Measurement, b: Measurement, of_a: Sequence[float], of_b: Sequence[float]) -> Measurement:
    return Measurement(
        of_a[0] * a.forward_s + of_b[0] * b.forward_s,
        of_a[1] * a.backward_data_s + of_b[1] * b.backward_data_s,
        of_a[2] * a.backward_weight_s + of_b[2] * b.backward_weight_s,
        max(a.iqr_s, b.iqr_s), min(a.num_repeats, b.num_repeats),
    )  # fmt: skip


def _flop(local: LocalLayer) -> tuple[int, int, int] | None:
    """Return the FLOP of an operator whose key does not tell them."""
    if not isinstance(local.layer.op, PerSample | Custom):
        return None
    work = local.work()
    return work.forward_flop, work.input_gradient_flop, work.weight_gradient_flop
