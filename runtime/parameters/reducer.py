"""Gradient buckets: filled by backward, reduced behind it, launched in one order on every rank.

The only file that uses autograd's private ``queue_callback`` (as DistributedDataParallel does): it
runs when a backward pass has ended.
"""

import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeVar

from torch import Tensor, nn
from torch.autograd import Variable

from planner.ir.bucket import fill_buckets
from runtime.comm.communicator import Axes, Communicator, group_size
from runtime.comm.failures import peer_failed
from runtime.parameters.buckets import Bucket, RowBucket, WholeBucket
from runtime.parameters.shards import Bundle, Shard

T = TypeVar("T")

MAX_IN_FLIGHT: Final = 2
"""Buckets whose memory is only there during backward; a further one waits for the first of them."""


def _weakly(method: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    """Return a hook of a tensor that does not keep its owner alive, which holds the tensor.

    Python's collector does not see the hooks of a tensor, so the two would never be freed.
    """
    weak = weakref.WeakMethod(method)

    def hook(gradient: Tensor) -> None:
        owned = weak()
        if owned is not None:
            owned(gradient)

    return hook


class Reducer:
    """Sums the gradients of parameters that several ranks hold.

    A gradient arrives as g times this rank's addend, where g ranks hold the parameter; the reducer
    adds over the g ranks and divides by g. Gradients that are equal on all ranks (of a penalty on
    the parameters in the loss; of an earlier, already reduced pass) therefore stay what they are.

    Of a sharded parameter the rank gets its rows of the sum, which are added to the gradient of the rows.

    Args:
        parameters: name, parameter and the mesh axes to reduce over, in the order in which backward
            makes the gradients ready.
        communicator: of this rank.
        bucket_bytes: that close a bucket.
        shards: sharded ones by identity of what operators read, which is among ``parameters``.
        by_layer: reduce sharded ones layer by layer, in memory that is only there during backward.
    """

    def __init__(
        self,
        parameters: Sequence[tuple[str, nn.Parameter, Axes]],
        communicator: Communicator,
        bucket_bytes: int,
        shards: Mapping[int, Shard] | None = None,
        by_layer: bool = False,
    ) -> None:
        self._parameters, self._communicator, self._bucket_bytes = tuple(parameters), communicator, bucket_bytes
        self._shards, self._by_layer = dict(shards or {}), by_layer
        self.enabled = True
        self.when_done: Callable[[], None] = lambda: None
        self._names = {id(p): name for name, p, _ in parameters}
        self._buckets: list[Bucket] = []
        self._place: dict[int, tuple[int, int]] = {}
        self._hooked: set[int] = set()
        self._trainable: list[bool] = []
        self._next = 0
        self._running = self._came = False
        self._in_flight: deque[Bucket] = deque()
        self.refresh()

    def refresh(self) -> None:
        """Make the buckets anew, of what is trainable now, on the devices and in the types that parameters now have."""
        self._trainable = [p.requires_grad for _, p, _ in self._parameters]
        parameters = [each for each in self._parameters if each[1].requires_grad]
        for _, parameter, _ in parameters:
            if id(parameter) not in self._hooked:
                self._hooked.add(id(parameter))
                parameter.register_post_accumulate_grad_hook(_weakly(self._on_gradient))
                if id(parameter) in self._shards:
                    parameter.register_hook(_weakly(self._shards[id(parameter)].forget_dropped))
        self._buckets.clear()
        self._place.clear()
        keyed = [self._keyed(parameter, axes) for _, parameter, axes in parameters]
        for filled in fill_buckets(keyed, self._bucket_bytes):
            members = [parameters[i][1] for i in filled.items]
            self._buckets.append(self._bucket(members, filled.key[0]))
            for k, parameter in enumerate(members):
                self._place[id(parameter)] = (len(self._buckets) - 1, k)

    def _keyed(self, parameter: nn.Parameter, axes: Axes) -> tuple[tuple[Any, ...], int]:
        """Return what parameters of one bucket have in common, and the bytes that fill it."""
        shard = self._shards.get(id(parameter))
        num_bytes = parameter.numel() * parameter.element_size()
        if shard is None:
            return (axes, parameter.dtype, parameter.device, None), num_bytes
        like = axes, parameter.dtype, parameter.device
        return ((*like, shard.layer), 0) if self._by_layer else ((*like, "rows"), num_bytes)

    def _bucket(self, members: list[nn.Parameter], axes: Axes) -> Bucket:
        if id(members[0]) not in self._shards:
            return WholeBucket(axes, group_size(self._communicator.mesh, axes), members)
        return RowBucket(Bundle([self._shards[id(p)] for p in members]), is_kept=not self._by_layer)

    def copied(self, copies: Mapping[int, Any]) -> "Reducer":
        """Return a reducer for copies of the parameters, by the identity of each."""
        parameters = [(name, copies[id(p)], axes) for name, p, axes in self._parameters]
        shards = {id(copies[whole]): copies[id(shard)] for whole, shard in self._shards.items()}
        return Reducer(parameters, self._communicator, self._bucket_bytes, shards, self._by_layer)

    def reset(self) -> None:
        """Begin a step: forget a backward pass that did not end; see which parameters have been frozen or thawed."""
        self._running = False
        self._in_flight.clear()
        if self._trainable != [p.requires_grad for _, p, _ in self._parameters]:
            self.refresh()
        for bucket in self._buckets:
            bucket.forget()

    def reduces(self, parameter: Tensor) -> bool:
        """Return whether a parameter's gradient goes through a bucket."""
        return id(parameter) in self._place

    def call_when_done(self) -> None:
        """Let ``when_done`` be called when the running backward pass ends, whether or not a gradient comes."""
        if not self._running:
            self._running, self._came, self._next = True, False, 0
            Variable._execution_engine.queue_callback(self._finish)

    def flush(self) -> None:
        """Reduce the gradients that parameters have now, outside of a backward pass: of passes that called no hook."""
        self.reset()
        self._came, self._next = True, 0
        self._finish()

    def _on_gradient(self, parameter: Tensor) -> None:
        self.call_when_done()
        if not self.enabled:
            return
        self._came = True
        index, k = self._place[id(parameter)]
        bucket = self._buckets[index]
        bucket.collect(k)
        bucket.ready.add(k)
        while self._next < len(self._buckets) and len(self._buckets[self._next].ready) == len(
            self._buckets[self._next].parameters
        ):
            self._launch(self._buckets[self._next])

    def _launch(self, bucket: Bucket) -> None:
        self._next += 1
        for k in range(len(bucket.parameters)):
            if k not in bucket.ready:
                bucket.collect(k)
        if not bucket.is_kept:
            while len(self._in_flight) >= MAX_IN_FLIGHT:
                self._land(self._in_flight.popleft())
            self._in_flight.append(bucket)
        self._guard(bucket, lambda: bucket.start(self._communicator))

    def _land(self, bucket: Bucket) -> None:
        self._guard(bucket, bucket.finish)

    def _finish(self) -> None:
        """Launch what is left, wait for everything, let gradients that did not come stay away."""
        self._running = False
        if self._came:
            while self._next < len(self._buckets):
                self._launch(self._buckets[self._next])
            for bucket in self._buckets:
                self._land(bucket)
            self._in_flight.clear()
        elif not self.enabled:
            for shard in self._shards.values():
                shard.note_unreduced()
        self.when_done()

    def _guard(self, bucket: Bucket, call: Callable[[], T]) -> T:
        try:
            return call()
        except RuntimeError as error:
            first, last = (self._names[id(p)] for p in (bucket.parameters[0], bucket.parameters[-1]))
            mesh = self._communicator.mesh
            what = f"{bucket.collective} of the gradients of {first} to {last}"
            raise peer_failed(mesh.ranks[self._communicator.position], what, error) from error
