"""What the runtime costs more than torch: single operators, and steps of a data-parallel plan against DDP.

    OMP_NUM_THREADS=1 python -m examples.benchmarks.overhead

lowers networks of one layer for one of two ranks, and times the modules that come out, forward and backward, with a
communicator that sends nothing, in turns with the plain module on tensors of the same sizes (of a convolution with a
halo: on all that its outputs read). The tensors are tiny, so that the time is that of the calls. The seconds inside of
the communicator's calls are a column of their own and no part of the overhead: what is left is autograd, packing of
messages, and putting together what came. A conversion at the end of a network takes the place of nothing; beside it is
a view, so that what every backward pass costs does not count.

    OMP_NUM_THREADS=1 python -m examples.benchmarks.overhead --steps

trains networks on two local ranks, a step of DDP and a step of the data-parallel plan in turns, with buckets of the
same size, and prints the median of the ratios with its 95 % interval.
"""

import argparse
import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial, reduce
from typing import Any, Literal

import torch
from torch import fx, nn

from examples.benchmarks import on_hosts
from planner.api import Constraints, Options, Origin, example_inputs, machine_of, prepare
from planner.errors import LayerwiseError
from planner.frontend.source import load_model
from planner.ir.dimension import SPATIAL_DIMENSIONS
from planner.plan import Plan
from planner.space.enumerate import DEFAULT_DIMENSIONS
from runtime.launch import run_local
from runtime.parallel import ParallelModule, lower, trace_for
from runtime.training import DDP, SilentCommunicator

Call = Callable[..., torch.Tensor]
CHANNELS = 8
BUCKET_BYTES = 25 * 2**20
"""As DDP's."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer and how it is split.

    Attributes:
        name: of the operator.
        module: the layer.
        shape: of a sample.
        dimension: that it is split by.
        sync_batch_norm: of the plan.
        num_before: layers alike in front of it; behind another one a window fetches its halo itself.
        halo: whether it fetches that (``exchanged``), beside computation (``overlapped``), or computes it itself.
    """

    name: str
    module: Callable[[], nn.Module]
    shape: tuple[int, ...]
    dimension: str
    sync_batch_norm: bool = True
    num_before: int = 0
    halo: Literal["exchanged", "overlapped", "recomputed"] = "exchanged"


IMAGE = (CHANNELS, 8, 8)
CONV = partial(nn.Conv2d, CHANNELS, CHANNELS, 3, padding=1)
CASES = (
    Case("conv", CONV, IMAGE, "sample"),
    Case("conv", CONV, IMAGE, "out_channel"),
    Case("conv", CONV, IMAGE, "in_channel"),
    Case("conv", CONV, IMAGE, "height"),
    Case("conv, halo", CONV, IMAGE, "height", num_before=1),
    Case("conv, overlapped halo", CONV, IMAGE, "height", num_before=1, halo="overlapped"),
    Case("conv, recomputed halo", CONV, IMAGE, "height", num_before=1, halo="recomputed"),
    Case("linear", lambda: nn.Linear(CHANNELS, CHANNELS), (CHANNELS,), "out_channel"),
    Case("linear", lambda: nn.Linear(CHANNELS, CHANNELS), (CHANNELS,), "in_channel"),
    Case("batch norm, local", lambda: nn.BatchNorm2d(CHANNELS), IMAGE, "sample", sync_batch_norm=False),
    Case("batch norm", lambda: nn.BatchNorm2d(CHANNELS), IMAGE, "out_channel"),
    Case("batch norm, global", lambda: nn.BatchNorm2d(CHANNELS), IMAGE, "sample"),
    Case("max pool", lambda: nn.MaxPool2d(2), IMAGE, "sample"),
    Case("max pool", lambda: nn.MaxPool2d(2), IMAGE, "out_channel"),
    Case("max pool", lambda: nn.MaxPool2d(2), IMAGE, "height"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1000)
    parser.add_argument("--steps", action="store_true", help="whole steps against DDP")
    parser.add_argument("--rounds", type=int, default=31)
    arguments = parser.parse_args()
    repeats = arguments.repeats
    torch.set_num_threads(1)
    if arguments.steps:
        print_steps(arguments.rounds)
        return 0
    print(f"{'operator':22}{'split':13}{'module':26}{'plain us':>9}{'here us':>9}{'calls us':>9}{'more us':>9}")
    for case in CASES:
        try:
            rows = list(timed(case, repeats))
        except LayerwiseError as error:
            print(f"{case.name:22}{case.dimension:13}{error}")
            continue
        for row in rows:
            print(f"{case.name:22}{case.dimension:13}{row}", flush=True)
    return 0


@dataclasses.dataclass(frozen=True)
class Row:
    """Seconds of what stands in an operator's place, forward and backward.

    Attributes:
        name: of its modules.
        plain_s: of the plain module; of a view, beside a conversion.
        here_s: of the module, but for ``calls_s``.
        calls_s: inside of the communicator.
    """

    name: str
    plain_s: float
    here_s: float
    calls_s: float

    def __str__(self) -> str:
        numbers = self.plain_s, self.here_s + self.calls_s, self.calls_s, self.here_s - self.plain_s
        return f"{self.name:26}" + "".join(f"{seconds * 1e6:9.1f}" for seconds in numbers)


def timed(case: Case, repeats: int) -> Iterator[Row]:
    """Yield the times of every module of a layer."""
    net, plan, clocked = lowered(case)
    wanted = {node: net.get_submodule(str(node.target)) for node in net.graph.nodes if node.op == "call_module"}
    inputs: dict[fx.Node, tuple[Any, ...]] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            if n in wanted:
                inputs[n] = self.fetch_args_kwargs_from_env(n)[0]
            return super().run_node(n)

    x = torch.randn(plan.batch // (plan.mesh.size if plan.io == "per-rank" else 1), *case.shape)
    net(x)  # lets the state know the batch
    Recorder(net).run(x)
    nodes = list(wanted)[2 * case.num_before :]  # and what brings their inputs
    for is_end, group in itertools.groupby(nodes, lambda node: str(node.target).startswith("transfers.")):
        for chain in [[node] for node in group] if is_end else [list(group)]:
            arguments = tuple(x.detach().requires_grad_() for x in inputs[chain[0]] if isinstance(x, torch.Tensor))
            modules = [wanted[node] for node in chain]
            parameters = [p for module in modules for p in module.parameters(recurse=False)]
            plain = _step(_view, arguments[:1], [])
            if not is_end:
                user = plain_module(case, modules[0])
                read = _whole_frame(user, modules[0](*arguments), arguments[0]) if _cuts_rows(case) else arguments[0]
                plain = _step(user, (read,), list(user.parameters()))
            first, *others = modules
            here = _step(lambda *xs, f=first, o=others: reduce(_called, o, f(*xs)), arguments, parameters)
            name = ", ".join(type(module).__name__ for module in modules)
            yield Row(f"{name} (end)" if is_end else name, *interleaved(plain, here, clocked, repeats))


def _cuts_rows(case: Case) -> bool:
    return case.dimension == "height" and "conv" in case.name


def _called(x: torch.Tensor, module: nn.Module) -> Any:
    return module(x)


def _view(x: torch.Tensor) -> torch.Tensor:
    return x.view_as(x)


def plain_module(case: Case, module: nn.Module) -> nn.Module:
    """Return the user's module with the sizes of this rank's piece."""
    user = case.module()
    user._parameters.update({name: p for name, p in module._parameters.items() if p is not None})
    user._buffers.update({name: b.clone() for name, b in module._buffers.items() if b is not None})
    return user


def _whole_frame(user: nn.Module, outputs: torch.Tensor, piece: torch.Tensor) -> torch.Tensor:
    """Return all that outputs of a convolution read, with neighbours' rows and zeros."""
    assert isinstance(user, nn.Conv2d)
    user.padding = (0, user.padding[1])
    rows = outputs.shape[2] + user.kernel_size[0] - 1
    return torch.randn(*piece.shape[:2], rows, piece.shape[3]).requires_grad_()


class Clocked:
    """A communicator that sends nothing, and adds up the seconds in its calls."""

    def __init__(self, inner: SilentCommunicator) -> None:
        self.mesh, self.position, self.seconds = inner.mesh, inner.position, 0.0
        self.broadcast, self.start_gather_ints = inner.broadcast, inner.start_gather_ints
        for name in ("all_reduce", "all_gather", "reduce_scatter", "exchange", "start_exchange"):
            setattr(self, name, self._clocked(getattr(inner, name)))

    def _clocked(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            start = time.perf_counter()
            found = call(*arguments)
            self.seconds += time.perf_counter() - start
            return found

        return run


def lowered(case: Case) -> tuple[ParallelModule, Plan, Clocked]:
    """Return the first of two ranks' part of a network of one layer, and how it talks."""
    torch.manual_seed(0)
    net = nn.Sequential(*(case.module() for _ in range(case.num_before + 1)))
    options = Options(
        "dp", all_devices=True, constraints=Constraints.of(pin=[f"*={case.dimension}"]),
        sync_batch_norm=case.sync_batch_norm,
        halo_overlap="always" if case.halo == "overlapped" else "never",
        halo_recompute="always" if case.halo == "recomputed" else "never",
        dimensions=frozenset({*DEFAULT_DIMENSIONS, *SPATIAL_DIMENSIONS}),
    )  # fmt: skip
    x = torch.empty((4, *case.shape), device="meta")
    planner = prepare(net, (x,), machine_of(devices=2), options, Origin(case.name, case.name))
    plan = planner.plan()
    communicator: Any = Clocked(SilentCommunicator(plan.mesh, 0))
    return lower(net, trace_for(net, plan), plan, communicator), plan, communicator


def _step(call: Call, arguments: tuple[torch.Tensor, ...], parameters: list[nn.Parameter]) -> Callable[[], object]:
    result = call(*arguments)
    result = result[0] if isinstance(result, tuple) else result
    gradient = torch.ones_like(result)
    wanted = [*arguments, *parameters]
    return lambda: torch.autograd.grad(call(*arguments), wanted, gradient, allow_unused=True)


def interleaved(
    plain: Callable[[], object], here: Callable[[], object], clocked: Clocked, repeats: int
) -> tuple[float, float, float]:
    """Return the seconds of the plain step, of ours but for the communicator's calls, and of these.

    The steps take turns; of each the lower decile counts, which noise spares.
    """
    found: list[tuple[float, float, float]] = []
    for _ in range(repeats):
        start = time.perf_counter()
        plain()
        between, clocked.seconds = time.perf_counter(), 0.0
        here()
        stop = time.perf_counter()
        found.append((between - start, stop - between - clocked.seconds, clocked.seconds))
    first, second, third = (statistics.quantiles(samples, n=10)[0] for samples in zip(*found, strict=True))
    return first, second, third


STEPS = {
    "alexnet": on_hosts.Case("alexnet", 16, (3, 112, 112)),
    "resnet50": on_hosts.Case("resnet50", 8, (3, 64, 64)),
    "mobilenet_v2": on_hosts.Case("torchvision:mobilenet_v2", 16, (3, 96, 96)),
}


def print_steps(rounds: int) -> None:
    """Race data-parallel plans with DDP on two local ranks."""
    for name, case in STEPS.items():
        module = load_model(case.model).module
        options = Options("data", all_devices=True, sync_batch_norm=False)
        inputs = example_inputs([case.image], case.batch)
        plan = prepare(module, inputs, machine_of(devices=2), options, Origin(case.model, case.model)).plan()
        plan = plan.model_copy(update={"bucket_bytes": BUCKET_BYTES})
        argument = {"plans": {"data": plan.to_json()}, "ddp": "data", "rounds": rounds, "warmup": 3}
        samples, _ = run_local("runtime.training:race", argument, num_ranks=2, timeout_s=600.0)
        assert isinstance(samples, dict)
        ours, theirs = samples["data"], samples[DDP]
        low, high = on_hosts.ratio_interval(ours, theirs)
        print(
            f"{name:14}DDP {statistics.median(theirs):.4f} s, data plan {statistics.median(ours):.4f} s, ratio "
            f"{on_hosts.ratio(ours, theirs):.3f} ({low:.3f} to {high:.3f}), {rounds} rounds",
            flush=True,
        )


if __name__ == "__main__":
    raise SystemExit(main())
