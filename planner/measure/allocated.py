"""The most bytes that torch's CPU allocator had given out at once: every tensor, and what kernels allocate for a while.

Read off the profiler's record of every allocation, so it does not depend on what the C library keeps for later, and
contains buffers inside operators (copies in another order of memory, workspaces), which no count of tensors sees. What
libraries allocate past torch's allocator is not in it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from torch._C._profiler import _ExtraFields_Allocation
from torch.profiler import ProfilerActivity, profile, record_function

_WATCHED: Final = "layerwise watched"


@dataclass(frozen=True, slots=True)
class Peak:
    """The most bytes that were given out at once.

    Attributes:
        num_bytes: of all that the watched functions made and had not freed.
        place: the innermost operators that asked for the last of them, innermost first.
    """

    num_bytes: int
    place: tuple[str, ...]


def allocated_peak(make: Callable[[], Callable[[], object]], count: int) -> Peak:
    """Make something and call it some times on this thread; return the peak during these calls.

    Args:
        make: returns the function to call, and makes all that counts: what was there before does not.
        count: of calls.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        function = make()
        for _ in range(count):
            with record_function(_WATCHED):
                function()
    assert found.profiler is not None
    assert found.profiler.kineto_results is not None
    events = list(_events(found.profiler.kineto_results.experimental_event_tree()))
    begin = min(event.start_time_ns for event, _ in events if event.name == _WATCHED)
    allocations = [pair for pair in events if isinstance(pair[0].extra_fields, _ExtraFields_Allocation)]
    now, peak = 0, Peak(0, ())
    for event, parents in sorted(allocations, key=lambda pair: pair[0].start_time_ns):
        now += event.extra_fields.alloc_size  # negative where memory is freed
        if event.start_time_ns >= begin and now > peak.num_bytes:
            peak = Peak(now, parents[:-4:-1])
    return peak


def _events(tree: Any, parents: tuple[str, ...] = ()) -> Iterator[tuple[Any, tuple[str, ...]]]:
    for event in tree:
        yield event, parents
        yield from _events(event.children, (*parents, event.name))
