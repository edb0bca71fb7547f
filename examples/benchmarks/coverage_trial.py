"""What ``coverage.py`` does with one model: build, trace, count, run again, plan; in a process of its own."""

import multiprocessing
import os
import resource
import signal
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import fx, nn

from examples.benchmarks.coverage_models import Case
from planner.api import Options, Origin, Planner, example_inputs, machine_of
from planner.errors import UnknownNameError
from planner.frontend import zoo
from planner.frontend.lower import TracedModel, trace_layers
from planner.frontend.source import LoadedModel, load_model
from planner.ir.count import total_flop

OK = "ok"
TOLERANCE = 1e-3  # of outputs, relative to their largest: the same operators in the same order, in fp32
REAL_BATCH = 2
POLL_S = 0.2
OUT_OF_MEMORY = 77
"""Exit code of a process that says so."""
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Settings:
    """What is asked of every model.

    Attributes:
        devices: that a plan is made for.
        solver: a name of ``planner.search.auto.SOLVERS``; an empty one makes no plan.
        mesh: to plan on; None: all that fit the devices are searched.
        batch: samples of the traced and planned step.
        numbers: also run small inputs on the CPU and compare the outputs.
        timeout_s: for one model.
        memory_bytes: that the process of one model may add to what its imports take.
    """

    devices: int
    solver: str
    mesh: str | None
    batch: int
    numbers: bool
    timeout_s: float
    memory_bytes: int


@dataclass(slots=True)
class Row:
    """A line of the result; what was not reached stays empty.

    Attributes:
        traced_by: the ways of tracing that were needed.
        layers: of the layer graph.
        peak_mib: largest resident memory of the process, with about 500 MiB of imports.
        result: ``ok`` or the step that failed.
        reason: what was said or happened then.
    """

    source: str
    family: str
    model: str
    kind: str
    traced_by: str = ""
    trace_s: float | None = None
    count_s: float | None = None
    layers: int | None = None
    forward_flop: int | None = None
    peak_mib: float | None = None
    plan_s: float | None = None
    result: str = "build"
    reason: str = ""


def trial(case: Case, settings: Settings, report: Callable[[Row], None]) -> None:
    """Try a model, reporting the row when a step begins and at the end."""
    row = Row(**asdict(case))
    try:
        _try(case, settings, row, report)
        row.result, row.reason = OK, ""
    except Exception as error:  # one model's trouble is one row
        what = f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
        row.reason = f"{row.reason}: {what}" if row.reason else what  # before: which part it is
    row.peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB
    report(row)


def _try(case: Case, settings: Settings, row: Row, report: Callable[[Row], None]) -> None:
    def begin(step: str, part: LoadedModel) -> None:
        row.result, row.reason = step, "" if part.name == case.model else part.name
        report(row)

    report(row)
    for part in _parts(case):
        module = part.module.to("meta").train()
        inputs = example_inputs(part.input_shapes, settings.batch)
        begin("trace", part)
        start = time.perf_counter()
        traced = trace_layers(module, inputs, part.name)
        row.trace_s = (row.trace_s or 0.0) + time.perf_counter() - start
        row.traced_by = " ".join(sorted({*row.traced_by.split(), _tracer(traced)}))
        row.layers = (row.layers or 0) + len(traced.layers.layers)
        begin("count", part)
        start = time.perf_counter()
        row.forward_flop = (row.forward_flop or 0) + total_flop(traced.layers)[0]
        row.count_s = (row.count_s or 0.0) + time.perf_counter() - start
        begin("rerun", part)
        _rerun(module, traced.graph, inputs)
        if settings.numbers:
            begin("numbers", part)
            _compare_on_cpu(part)
        if settings.solver:
            begin("plan", part)
            start = time.perf_counter()
            options = Options(solver=settings.solver, mesh=settings.mesh, time_limit_s=settings.timeout_s)
            Planner(traced, machine_of(devices=settings.devices), options, Origin(part.name, part.source)).plan()
            row.plan_s = (row.plan_s or 0.0) + time.perf_counter() - start


def _parts(case: Case) -> Iterator[LoadedModel]:
    """Yield the model, or the parts of a detection model."""
    if case.kind != "detection":
        yield load_model(case.reference)
        return
    for part in zoo.DETECTION_PARTS:
        with suppress(UnknownNameError):  # not every one has all
            yield load_model(f"{case.reference}.{part}")


def _tracer(traced: TracedModel) -> str:
    return str(getattr(traced, "traced_by", "fx"))


def _rerun(module: nn.Module, graph: fx.Graph, inputs: Sequence[torch.Tensor]) -> None:
    """Bind the graph to the module; compare the shapes of outputs, and which parameters get a gradient."""
    eager, expected = _step(module, module, inputs)
    again, found = _step(fx.GraphModule(module, graph), module, inputs)
    if (shapes := [x.shape for x in eager]) != [x.shape for x in again]:
        raise ValueError(f"outputs have the shapes {[tuple(x.shape) for x in again]}, not {shapes}")
    _refuse_other_gradients(expected, found)


def _refuse_other_gradients(expected: set[str], found: set[str]) -> None:
    if expected != found:
        names = sorted(expected ^ found)
        raise ValueError(f"{len(names)} parameters get a gradient in one only: {', '.join(names[:3])}")


def _compare_on_cpu(part: LoadedModel) -> None:
    """Run module and graph on equal real inputs; compare outputs, and which parameters get a gradient."""
    shapes = small_shapes(part)
    module = load_model(part.source, device="cpu").module.train()
    generator = torch.Generator().manual_seed(0)
    inputs = tuple(torch.randn(REAL_BATCH, *shape, generator=generator) for shape in shapes)
    traced = trace_layers(module, inputs, part.name)
    eager, expected = _step(module, module, inputs)
    again, found = _step(fx.GraphModule(module, traced.graph), module, inputs)
    _refuse_other_gradients(expected, found)
    for x, y in zip(eager, again, strict=True):
        if not torch.allclose(x, y, rtol=0.0, atol=TOLERANCE * max(1e-6, float(x.abs().max())), equal_nan=True):
            raise ValueError(f"outputs differ by up to {float((x - y).abs().max()):.2g}, of {float(x.abs().max()):.2g}")


def _step(run: nn.Module, owner: nn.Module, inputs: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], set[str]]:
    """Return outputs, and the names of the parameters that get a gradient."""
    owner.zero_grad(set_to_none=True)
    torch.manual_seed(0)  # dropout and stochastic depth draw the same
    outputs = [x for x in tensors(run(*inputs)) if x.is_floating_point()]
    sum(x.square().mean() for x in outputs).backward()
    return [x.detach() for x in outputs], {name for name, p in owner.named_parameters() if p.grad is not None}


def small_shapes(part: LoadedModel) -> tuple[tuple[int, ...], ...]:
    """Return the smallest input that the module takes, of a quarter and a half of the usual size, and that one."""
    module = part.module
    for divisor in (4, 2):
        shapes = tuple((shape[0], *(_smaller(size, divisor) for size in shape[1:])) for shape in part.input_shapes)
        with suppress(Exception):
            module(*example_inputs(shapes, REAL_BATCH))
            return shapes
    return part.input_shapes


def _smaller(size: int, divisor: int) -> int:
    return max(1, round(size / divisor / 32)) * 32 if size >= 64 else size


def tensors(structure: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of a nested output."""
    if isinstance(structure, torch.Tensor):
        yield structure
    elif isinstance(structure, dict | list | tuple):
        for value in structure.values() if isinstance(structure, dict) else structure:
            yield from tensors(value)


# ---- processes


C = TypeVar("C", bound=Case)


class AnyRow(Protocol):
    """What all rows have."""

    result: str
    reason: str


R = TypeVar("R", bound=AnyRow)


@dataclass(slots=True)
class _Running(Generic[R]):
    process: BaseProcess
    row: R
    deadline_s: float
    is_late: bool = False


@dataclass(frozen=True, slots=True)
class Kind(Generic[C, R]):
    """What is done with each model.

    Attributes:
        trial: does it, and reports the row when a step begins and at the end.
        row: an empty one, from the fields of a case.
    """

    trial: Callable[[C, Settings, Callable[[R], None]], None]
    row: Callable[..., R]


def trials(cases: Sequence[C], settings: Settings, jobs: int, kind: Kind[C, R]) -> Iterator[R]:
    """Try models, each in a forked process, and yield their rows as they end.

    A process that hangs, dies or takes too much memory leaves a row that says where and how.
    Forked, because imports take longer than most models; this process must not run operators.
    """
    waiting, running = deque(cases), dict[Connection, _Running[R]]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                connection, started = _start(waiting.popleft(), settings, kind)
                running[connection] = started
            for connection in wait(list(running), timeout=POLL_S):
                assert isinstance(connection, Connection)
                try:
                    running[connection].row = connection.recv()
                except EOFError:
                    yield _ended(running.pop(connection), settings)
            for each in running.values():
                if time.monotonic() > each.deadline_s and not each.is_late:
                    each.process.kill()  # its end is seen as that of any other
                    each.is_late = True
    finally:
        for each in running.values():
            each.process.kill()


def _start(case: C, settings: Settings, kind: Kind[C, R]) -> tuple[Connection, _Running[R]]:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(theirs, case, settings, kind), daemon=True)
    process.start()
    theirs.close()  # so that its end is seen here
    return ours, _Running(process, kind.row(**asdict(case)), time.monotonic() + settings.timeout_s)


def _run(connection: Connection, case: C, settings: Settings, kind: Kind[C, R]) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    used_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used_bytes + settings.memory_bytes,) * 2)
    try:
        kind.trial(case, settings, partial(Connection.send, connection))
    except (MemoryError, OSError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "memory" in str(error):
            os._exit(OUT_OF_MEMORY)  # there may be too little left for a traceback
        raise


def _ended(ended: _Running[R], settings: Settings) -> R:
    ended.process.join()
    row, code = ended.row, ended.process.exitcode or 0
    if ended.is_late:
        how = f"timeout after {settings.timeout_s:g} s"
    elif code == OUT_OF_MEMORY:
        how = "ran out of memory"
    elif code:
        how = f"died of {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
    else:
        return row
    row.reason = f"{row.reason}: {how}" if row.reason else how
    return row
