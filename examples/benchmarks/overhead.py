"""What the runtime costs more than torch: single operators, and steps of a data-parallel plan against DDP.

    OMP_NUM_THREADS=1 python -m examples.benchmarks.overhead

lowers networks of one layer for one of two ranks, and times the modules that come out, forward and backward, with a
communicator that sends nothing, in turns with the plain operator on tensors of the same sizes. The tensors are tiny, so
that the time is that of the calls. A conversion has no plain operator beside it: its time is all there is.

    OMP_NUM_THREADS=1 python -m examples.benchmarks.overhead --steps

trains networks on two local ranks, a step of DDP and a step of the data-parallel plan in turns, with buckets of the
same size, and prints the median of the ratios with its 95 % interval.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from examples.benchmarks import on_hosts
from planner.api import Constraints, Options, Origin, example_inputs, machine_of, prepare
from planner.errors import LayerwiseError
from planner.frontend.source import load_model
from planner.ir.dimension import SPATIAL_DIMENSIONS
from planner.plan import Plan
from planner.space.enumerate import DEFAULT_DIMENSIONS
from runtime.launch import run_local
from runtime.lowering.rewriting import LAYER
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
        plain: the operator from input, parameters and buffers.
        sync_batch_norm: of the plan.
    """

    name: str
    module: Callable[[], nn.Module]
    shape: tuple[int, ...]
    dimension: str
    plain: Call
    sync_batch_norm: bool = True


def _conv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return functional.conv2d(x, weight, bias, padding=1)


def _norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *buffers: torch.Tensor) -> torch.Tensor:
    mean, variance, batches = buffers
    batches.add_(1)
    return functional.batch_norm(x, mean, variance, weight, bias, True, 0.1)


def _pool(x: torch.Tensor) -> torch.Tensor:
    return functional.max_pool2d(x, 2)


IMAGE = (CHANNELS, 8, 8)
CASES = (
    Case("conv", lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), IMAGE, "sample", _conv),
    Case("conv", lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), IMAGE, "out_channel", _conv),
    Case("conv", lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), IMAGE, "in_channel", _conv),
    Case("conv", lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), IMAGE, "height", _conv),
    Case("linear", lambda: nn.Linear(CHANNELS, CHANNELS), (CHANNELS,), "out_channel", functional.linear),
    Case("linear", lambda: nn.Linear(CHANNELS, CHANNELS), (CHANNELS,), "in_channel", functional.linear),
    Case("batch norm, local", lambda: nn.BatchNorm2d(CHANNELS), IMAGE, "sample", _norm, sync_batch_norm=False),
    Case("batch norm", lambda: nn.BatchNorm2d(CHANNELS), IMAGE, "out_channel", _norm),
    Case("batch norm, global", lambda: nn.BatchNorm2d(CHANNELS), IMAGE, "sample", _norm),
    Case("max pool", lambda: nn.MaxPool2d(2), IMAGE, "sample", _pool),
    Case("max pool", lambda: nn.MaxPool2d(2), IMAGE, "out_channel", _pool),
    Case("max pool", lambda: nn.MaxPool2d(2), IMAGE, "height", _pool),
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
    print(f"{'operator':20}{'split':13}{'module':26}{'plain us':>9}{'here us':>9}{'more us':>9}")
    for case in CASES:
        try:
            for name, plain_s, here_s in timed(case, repeats):
                plain = f"{plain_s * 1e6:9.1f}" if plain_s else f"{'':9}"
                text = f"{case.name:20}{case.dimension:13}{name:26}{plain}{here_s * 1e6:9.1f}"
                print(f"{text}{(here_s - plain_s) * 1e6:9.1f}", flush=True)
        except LayerwiseError as error:
            print(f"{case.name:20}{case.dimension:13}{error}")
    return 0


def timed(case: Case, repeats: int) -> Iterator[tuple[str, float, float]]:
    """Yield the name of every module of the layer, the seconds of the plain operator, if it has one, and its own."""
    net, plan = lowered(case)
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
    for node, module in wanted.items():
        is_operator = str(node.meta[LAYER]) not in {"input", "output"} and not _moves(module)
        arguments = tuple(a.detach().requires_grad_() for a in inputs[node] if isinstance(a, torch.Tensor))
        plain = None
        if is_operator:
            tensors = list(module.parameters(recurse=False))
            buffers = [b.clone() for b in module.buffers(recurse=False)]
            plain = _step(lambda a, every=(*tensors, *buffers): case.plain(a, *every), arguments[:1], tensors)
        here = _step(module, arguments, list(module.parameters(recurse=False)))
        samples = interleaved([plain or (lambda: None), here], repeats)
        yield type(module).__name__, samples[0] if plain else 0.0, samples[1]


def _moves(module: nn.Module) -> bool:
    return type(module).__name__ in {"Redistribution", "Bias"}


def lowered(case: Case) -> tuple[ParallelModule, Plan]:
    """Return the first of two ranks' part of a network of one layer."""
    torch.manual_seed(0)
    net = nn.Sequential(case.module())
    options = Options(
        "dp", all_devices=True, constraints=Constraints.of(pin=[f"*={case.dimension}"]),
        sync_batch_norm=case.sync_batch_norm, dimensions=frozenset({*DEFAULT_DIMENSIONS, *SPATIAL_DIMENSIONS}),
    )  # fmt: skip
    x = torch.empty((4, *case.shape), device="meta")
    planner = prepare(net, (x,), machine_of(devices=2), options, Origin(case.name, case.name))
    plan = planner.plan()
    return lower(net, trace_for(net, plan), plan, SilentCommunicator(plan.mesh, 0)), plan


def _step(call: Call, arguments: tuple[torch.Tensor, ...], parameters: list[nn.Parameter]) -> Callable[[], object]:
    result = call(*arguments)
    result = result[0] if isinstance(result, tuple) else result
    gradient = torch.ones_like(result)
    wanted = [*arguments, *parameters]
    return lambda: torch.autograd.grad(call(*arguments), wanted, gradient, allow_unused=True)


def interleaved(calls: list[Callable[[], object]], repeats: int) -> list[float]:
    """Return the seconds of each of several functions, called in turns: their lower deciles, which noise spares."""
    found: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, samples in zip(calls, found, strict=True):
            start = time.perf_counter()
            call()
            samples.append(time.perf_counter() - start)
    return [statistics.quantiles(samples, n=10)[0] for samples in found]


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
