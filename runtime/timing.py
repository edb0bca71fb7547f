"""Where the seconds of a real step go: every layer's forward and backward, moves, gradient sync, the optimizer.

``watched`` lets one step of a parallel module leave marks on a tape. Between two marks everything
belongs to one part of the step, so the parts add up to the step. The module computes what it always
does: its graph is walked node by node instead of called, and autograd's nodes get hooks that look at
nothing. Nothing stays behind, so the steps before and after are plain ones.
"""

import contextlib
import inspect
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

import torch
from torch import fx
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from planner.plan.measured import Measured, layers_of, median_and_iqr
from planner.plan.schema import Plan
from runtime.comm.communicator import Axes, Communicator, Pending
from runtime.lowering.ops import Redistribution
from runtime.lowering.rewriting import LAYER
from runtime.module import ParallelModule


class Phase(StrEnum):
    """What a rank does; the first four are a layer's.

    Attributes:
        FORWARD, BACKWARD: compute.
        TRANSFER_FORWARD, TRANSFER_BACKWARD: moves between layouts with their packing, partial sums, batch
            norm statistics: communication that compute waits for.
        GATHERING: gradients into the buckets of the reductions, and starting these.
        EXPOSED_SYNC: waiting for gradient reductions that backward has not hidden.
        OPTIMIZER: its step.
        OTHER: the loss, the interpreter, waiting for the sizes of the ranks' batches.
        REDUCTION: of gradients, from its start until the rank has waited for it. Lies beside all others.
    """

    FORWARD = "forward"
    BACKWARD = "backward"
    TRANSFER_FORWARD = "transfer_forward"
    TRANSFER_BACKWARD = "transfer_backward"
    GATHERING = "gathering"
    EXPOSED_SYNC = "exposed_sync"
    OPTIMIZER = "optimizer"
    OTHER = "other"
    REDUCTION = "reduction"


_TRANSFER: Final = {Phase.FORWARD: Phase.TRANSFER_FORWARD, Phase.BACKWARD: Phase.TRANSFER_BACKWARD}


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the step: a phase, of a layer (its id) or of none."""

    phase: Phase
    layer: str = ""


OTHER: Final = Part(Phase.OTHER)
GATHERING: Final = Part(Phase.GATHERING)
EXPOSED_SYNC: Final = Part(Phase.EXPOSED_SYNC)
OPTIMIZER: Final = Part(Phase.OPTIMIZER)


@dataclass(frozen=True, slots=True)
class Span:
    """A part that lasted from one mark to the next, in seconds since the step began."""

    part: Part
    start_s: float
    stop_s: float


class Tape:
    """The marks of one step on one rank.

    On CUDA a mark is an event on the current stream, so that neither host nor device waits for it;
    elsewhere it is the clock.

    Args:
        device: that the rank computes on.
        clock: returns seconds.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self._device, self._clock = device, clock
        self._marks: list[tuple[Any, Part]] = []
        self._beside: list[list[Any]] = []
        self._part = OTHER
        self._is_running = False

    def start(self) -> None:
        """Begin a step."""
        self._marks, self._part, self._is_running = [(self._stamp(), OTHER)], OTHER, True
        self._beside = []

    def switch(self, part: Part) -> Part:
        """From now on the time belongs to this part; return the one that it belonged to."""
        before = self._part
        if self._is_running and part != before:
            self._marks.append((self._stamp(), part))
            self._part = part
        return before

    def transfer(self) -> Part:
        """From now on the time is a transfer's of the layer at hand; return the part before."""
        now = self._part
        return self.switch(Part(_TRANSFER.get(now.phase, now.phase), now.layer))

    def beside(self) -> Callable[[], None]:
        """Begin a reduction that runs beside all else; call the result when it is over."""
        if not self._is_running:
            return lambda: None
        found = [self._stamp()]
        self._beside.append(found)
        return lambda: found.append(self._stamp())

    def reductions(self) -> tuple[Span, ...]:
        """Return the reductions of the last step that have ended, in the order of their starts."""
        if not self._beside:
            return ()
        ended = [(k, stamps) for k, stamps in enumerate(self._beside) if len(stamps) == 2]
        seconds = self._seconds([self._marks[0][0], *(stamp for _, stamps in ended for stamp in stamps)])[1:]
        pairs = zip(seconds[::2], seconds[1::2], strict=True)
        return tuple(
            Span(Part(Phase.REDUCTION, f"bucket {k}"), start, stop)
            for (k, _), (start, stop) in zip(ended, pairs, strict=True)
        )

    def stop(self) -> tuple[Span, ...]:
        """End the step; return its parts in order, without gaps."""
        self._marks.append((self._stamp(), OTHER))
        self._is_running = False
        seconds = self._seconds([stamp for stamp, _ in self._marks])
        starts = zip(seconds, self._marks[:-1], strict=False)
        return tuple(Span(part, start, stop) for (start, (_, part)), stop in zip(starts, seconds[1:], strict=True))

    def _stamp(self) -> Any:
        if self._device.type != "cuda":
            return self._clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _seconds(self, stamps: list[Any]) -> list[float]:
        if self._device.type != "cuda":
            return [stamp - stamps[0] for stamp in stamps]
        torch.cuda.synchronize(self._device)
        return [stamps[0].elapsed_time(stamp) / 1e3 for stamp in stamps]


@dataclass(frozen=True)
class PartSeconds:
    """What the parts of a rank's steps took.

    Attributes:
        steps_s: the whole steps.
        parts: median and inter-quartile range of every part over the steps.
    """

    steps_s: tuple[float, ...]
    parts: Mapping[Part, tuple[float, float]]

    @property
    def compute_s(self) -> float:
        """Forward and backward of all layers."""
        return sum(median for part, (median, _) in self.parts.items() if part.phase in _TRANSFER)

    def measured(
        self, plan: Plan, rank: int, plain_s: Sequence[float], alone_s: float, environment: Mapping[str, str]
    ) -> Measured:
        """Return them as the file of a run.

        Args:
            plan: that was run.
            rank: this one.
            plain_s: steps without marks, on the slowest rank.
            alone_s: a step in which nothing is sent.
            environment: versions and settings.
        """
        layers: dict[str, dict[str, tuple[float, float]]] = defaultdict(dict)
        for part, pair in self.parts.items():
            layers[part.layer][part.phase] = pair
        own = {part: self.parts.get(part, (0.0, 0.0))[0] for part in (GATHERING, EXPOSED_SYNC, OPTIMIZER)}
        step_s, iqr_s = median_and_iqr(plain_s)
        whole_s = statistics.median(self.steps_s)
        rest_s = sum(median for part, (median, _) in self.parts.items() if part != OTHER)
        return Measured(
            plan_sha256=plan.digest, model=plan.model.name, batch=plan.batch, num_ranks=plan.mesh.size,
            environment=dict(environment), rank=rank, steps_s=list(plain_s), step_s=step_s, step_iqr_s=iqr_s,
            compute_only_s=alone_s, instrumented_steps_s=list(self.steps_s), instrumented_step_s=whole_s,
            gathering_s=own[GATHERING], exposed_sync_s=own[EXPOSED_SYNC], optimizer_s=own[OPTIMIZER],
            other_s=whole_s - rest_s, layers=layers_of(plan, layers),
        )  # fmt: skip


def seconds_of(steps: Sequence[Sequence[Span]]) -> PartSeconds:
    """Return what the parts of these steps took; a part that a step has not took no time in it."""
    found: dict[Part, list[float]] = defaultdict(lambda: [0.0] * len(steps))
    for k, spans in enumerate(steps):
        for span in spans:
            found[span.part][k] += span.stop_s - span.start_s
    parts = {part: median_and_iqr(samples) for part, samples in found.items()}
    return PartSeconds(tuple(spans[-1].stop_s for spans in steps), parts)


@contextlib.contextmanager
def marked(tape: Tape | None, part: Part) -> Iterator[None]:
    """Give the time in this context to a part of the step, where there is a tape."""
    before = None if tape is None else tape.switch(part)
    try:
        yield
    finally:
        if tape is not None and before is not None:
            tape.switch(before)


class TimedCommunicator:
    """A communicator that marks on a tape when the rank waits for others; silent while the tape is.

    Args:
        inner: does the work.
        tape: of this rank.
    """

    def __init__(self, inner: Communicator, tape: Tape) -> None:
        self.mesh, self.position = inner.mesh, inner.position
        self._inner, self._tape = inner, tape

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        before = self._tape.transfer()
        try:
            yield
        finally:
            self._tape.switch(before)

    def all_reduce(self, buffer: torch.Tensor, axes: Axes) -> None:
        with self._waiting():
            self._inner.all_reduce(buffer, axes)

    def start_all_reduce(self, buffer: torch.Tensor, axes: Axes) -> Pending:
        before, over = self._tape.switch(GATHERING), self._tape.beside()
        pending = self._inner.start_all_reduce(buffer, axes)
        self._tape.switch(before)
        return _TimedPending(pending, self._tape, over)

    def start_reduce_scatter(self, buffer: torch.Tensor, own: torch.Tensor, axes: Axes) -> Pending:
        before, over = self._tape.switch(GATHERING), self._tape.beside()
        pending = self._inner.start_reduce_scatter(buffer, own, axes)
        self._tape.switch(before)
        return _TimedPending(pending, self._tape, over)

    def start_all_gather(self, result: torch.Tensor, own: torch.Tensor, axes: Axes) -> Pending:
        before = self._tape.switch(GATHERING)
        pending = self._inner.start_all_gather(result, own, axes)
        self._tape.switch(before)
        return _TimedPending(pending, self._tape)

    def all_gather(self, buffer: torch.Tensor, counts: Sequence[int], axes: Axes) -> torch.Tensor:
        with self._waiting():
            return self._inner.all_gather(buffer, counts, axes)

    def reduce_scatter(self, buffer: torch.Tensor, counts: Sequence[int], axes: Axes) -> torch.Tensor:
        with self._waiting():
            return self._inner.reduce_scatter(buffer, counts, axes)

    def exchange(
        self, buffer: torch.Tensor, send_counts: Sequence[int], receive_counts: Sequence[int], axes: Axes
    ) -> torch.Tensor:
        with self._waiting():
            return self._inner.exchange(buffer, send_counts, receive_counts, axes)

    def start_exchange(
        self, buffer: torch.Tensor, send_counts: Sequence[int], receive_counts: Sequence[int], axes: Axes
    ) -> Callable[[], torch.Tensor]:
        with self._waiting():
            result = self._inner.start_exchange(buffer, send_counts, receive_counts, axes)

        def timed() -> torch.Tensor:
            with self._waiting():
                return result()

        return timed

    def start_gather_ints(self, value: int) -> Callable[[], list[int]]:
        result = self._inner.start_gather_ints(value)

        def timed() -> list[int]:
            before = self._tape.switch(OTHER)
            found = result()
            self._tape.switch(before)
            return found

        return timed

    def broadcast(self, tensor: torch.Tensor) -> None:
        self._inner.broadcast(tensor)


class _TimedPending:
    def __init__(self, inner: Pending, tape: Tape, over: Callable[[], None] = lambda: None) -> None:
        self._inner, self._tape, self._over = inner, tape, over

    def wait(self) -> None:
        before = self._tape.switch(EXPOSED_SYNC)
        self._inner.wait()
        self._over()
        self._tape.switch(before)


@contextlib.contextmanager
def watched(net: ParallelModule, optimizer: torch.optim.Optimizer, tape: Tape) -> Iterator[None]:
    """Let the steps of a module inside this context leave marks; its communicator must be a timed one on this tape."""
    walk = _Walk(net, tape)
    vars(net)["forward"] = walk.forward  # found before the class's own
    hooks = [
        optimizer.register_step_pre_hook(lambda *_: _to(tape, OPTIMIZER)),
        optimizer.register_step_post_hook(lambda *_: _to(tape, OTHER)),
    ]
    try:
        yield
    finally:
        del vars(net)["forward"]
        for hook in hooks:
            hook.remove()
        walk.forget()


class _Walk(fx.Interpreter):
    """Runs a parallel module node by node; marks what each node takes, and what autograd's nodes of it will take."""

    def __init__(self, net: ParallelModule, tape: Tape) -> None:
        super().__init__(net)
        self.extra_traceback = False  # errors are those of a plain step
        self._net, self._tape = net, tape
        self._signature = inspect.signature(net.forward)
        self._watched: set[Any] = set()
        self._hooks: list[RemovableHandle] = []
        self._parts = {node: _parts_of(node, net) for node in net.graph.nodes if LAYER in node.meta}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the module returns."""
        self.forget()
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return self.run(*bound.args)

    def run_node(self, n: fx.Node) -> Any:
        """Run a node on the time of its layer."""
        parts = self._parts.get(n)
        if parts is None or n.op in {"placeholder", "output"}:
            return super().run_node(n)
        ahead, back = parts
        self._tape.switch(ahead)
        value = super().run_node(n)
        self._tape.switch(OTHER)
        self._watch(value, back)
        return value

    def _watch(self, value: Any, part: Part) -> None:
        """Mark when backward comes to the autograd nodes that a node has just made.

        From there on the time is that part's until the next one's begins: what lies between, the sum of the
        gradients of several readers, is due to the node that gave the last of them.
        """
        todo = [t.grad_fn for t in pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]
        while todo:
            node = todo.pop()
            if node is None or node in self._watched:
                continue
            self._watched.add(node)
            leaf = getattr(node, "variable", None)  # of the node that accumulates a parameter's gradient
            own = GATHERING if leaf is not None and self._net._reducer.reduces(leaf) else part
            self._hooks.append(node.register_prehook(lambda _, own=own: _to(self._tape, own)))
            todo += [behind for behind, _ in node.next_functions]

    def forget(self) -> None:
        """Take the hooks back: the node that accumulates a gradient may outlive the step."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._watched.clear()
        self.env.clear()


def _to(tape: Tape, part: Part) -> None:
    tape.switch(part)


def _parts_of(node: fx.Node, net: ParallelModule) -> tuple[Part, Part]:
    layer = str(node.meta[LAYER])
    moves = node.op == "call_module" and isinstance(net.get_submodule(str(node.target)), Redistribution)
    ahead, back = (Phase.TRANSFER_FORWARD, Phase.TRANSFER_BACKWARD) if moves else (Phase.FORWARD, Phase.BACKWARD)
    return Part(ahead, layer), Part(back, layer)
