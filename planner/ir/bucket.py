"""How gradients are put into buckets; the step simulator and the runtime's reducer share the rule."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from planner.units import MIB

K = TypeVar("K")

DEFAULT_BUCKET_BYTES: Final = 25 * MIB
"""The default of torch's DistributedDataParallel (``bucket_cap_mb``)."""


@dataclass(frozen=True, slots=True)
class Bucket(Generic[K]):
    """Gradients that are reduced in one message.

    Attributes:
        key: what they have in common (group of ranks, element type, device).
        items: positions in the order in which gradients become ready.
    """

    key: K
    items: tuple[int, ...]


def fill_buckets(gradients: Sequence[tuple[K, int]], limit_bytes: int) -> tuple[Bucket[K], ...]:
    """Return the buckets of gradients, in launch order.

    Gradients of one key are collected as they become ready; a bucket is closed as soon as it holds
    ``limit_bytes``. What is left at the end is closed in the order of its last gradient.

    Args:
        gradients: key and bytes of each, in the order in which backward makes them ready.
        limit_bytes: bytes that close a bucket.
    """
    open_items: dict[K, list[int]] = {}
    open_bytes: dict[K, int] = {}
    closed: list[Bucket[K]] = []
    for position, (key, num_bytes) in enumerate(gradients):
        open_items.setdefault(key, []).append(position)
        open_bytes[key] = open_bytes.get(key, 0) + num_bytes
        if open_bytes[key] >= limit_bytes:
            closed.append(Bucket(key, tuple(open_items.pop(key))))
            del open_bytes[key]
    closed.extend(Bucket(key, tuple(items)) for key, items in open_items.items())
    return tuple(sorted(closed, key=lambda bucket: bucket.items[-1]))
