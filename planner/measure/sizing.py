"""How many samples of a piece are timed: enough to tell, few enough to be done soon.

A piece with more samples than that is timed with fewer and looked up by its family (``PieceKey.family``), in
proportion. What does not grow with the samples, the traffic of the weights, must then be a small part.
"""

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch.nn import functional

from planner.ir.count import multiply_adds
from planner.ir.ops import Conv, ConvTranspose, Linear
from planner.measure.clock import cache_bytes, time_call
from planner.profile.key import PieceKey

TARGET_S: Final = 0.3
"""Of one repeat: forward and backward once."""
LEAST_SAMPLES: Final = 8
"""Fewer fit into the caches as many do not: a convolution then takes a tenth to a third less for each sample."""
FIXED_SHARE: Final = 0.1
"""Of a repeat's time that the traffic of the weights may take where samples are left out."""
_PASSES: Final = 3
"""A piece is computed forward, backward to its inputs, backward to its weights."""


@dataclass(frozen=True, slots=True)
class Rates:
    """What a device reaches, roughly; only good for choosing sizes and telling how long it will take."""

    flop_per_s: float
    bytes_per_s: float

    @staticmethod
    def of(device: torch.device, dtype: torch.dtype = torch.float32) -> "Rates":
        """Measure a convolution and a sum on a device, some tenths of a second."""
        x = torch.ones(4, 64, 28, 28, device=device, dtype=dtype)
        weight = torch.ones(64, 64, 3, 3, device=device, dtype=dtype)
        flop = 2 * x.numel() * 64 * 9
        data = torch.ones(2 * cache_bytes(device) // 4, device=device)
        return Rates(
            flop / time_call(lambda: functional.conv2d(x, weight, padding=1), device).median_s,
            3 * data.nbytes / time_call(lambda: data + data, device).median_s,
        )

    def seconds(self, key: PieceKey) -> float:
        """Estimate forward and backward of a piece."""
        flop = 2 * multiply_adds(key.op, key.inputs, key.output)
        moved = sum(map(math.prod, key.inputs)) + math.prod(key.output) * (1 + 2 * len(key.absorbed))
        return _PASSES * (flop / self.flop_per_s + moved * key.dtype.item_bytes / self.bytes_per_s) + self.fixed_s(key)

    def fixed_s(self, key: PieceKey) -> float:
        """Estimate the part that does not depend on the number of samples: reading and writing weights."""
        return _PASSES * _weights(key) * 4 / self.bytes_per_s


def _weights(key: PieceKey) -> int:
    match key.op:
        case Conv():
            return key.op.out_channels * key.op.in_channels // key.op.groups * math.prod(key.op.kernel)
        case ConvTranspose():
            return key.op.in_channels * key.op.out_channels // key.op.groups * math.prod(key.op.kernel)
        case Linear():
            return key.op.in_features * key.op.out_features
        case _:
            return 0


def sized(key: PieceKey, rates: Rates, target_s: float = TARGET_S) -> PieceKey:
    """Return a piece of the same family with as many samples as a repeat of the target's length takes, at most its own.

    Args:
        key: of the piece.
        rates: of the device.
        target_s: of one repeat.
    """
    samples = key.samples
    if samples is None or samples <= LEAST_SAMPLES:
        return key
    each_s = rates.seconds(key.with_samples(1)) - rates.fixed_s(key)
    enough = max(target_s, rates.fixed_s(key) / FIXED_SHARE) / max(each_s, 1e-12)
    if enough >= samples:
        return key
    count = max(2 ** math.floor(math.log2(max(enough, 1))), LEAST_SAMPLES)  # a power, so that it seldom changes
    return key if count >= samples else key.with_samples(count)
