"""What ``coverage.py --training`` does with one model: a training step of two ranks against one device, in float64.

The ranks are threads of one process that run the real lowered modules. Compared are the outputs, every gradient, the
updated weights and the buffers. Dropout and the like are off, because masks depend on the plan; batch norms take the
statistics of the whole batch.
"""

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from examples.benchmarks.coverage_models import Case
from examples.benchmarks.coverage_trial import OK, Settings, small_shapes, tensors
from planner.api import Options, Origin, Planner, machine_of
from planner.frontend.lower import trace_layers
from planner.frontend.source import LoadedModel, load_model
from planner.ir.dimension import Dimension
from runtime.comm.threads import run_ranks
from runtime.data import own_samples
from runtime.module import ParallelModule
from runtime.parameters.local import Held

PLANNED = "auto"
STRATEGIES = (PLANNED, "data", "model", "spatial")
RANKS = 2
BATCH = 5  # uneven pieces
TOLERANCE = 1e-9
"""Of a tensor's largest difference, relative to its largest value on one device."""
NOISE_FLOOR = 1e-5
"""A tensor's scale is at least this share of the largest one's: a bias in front of a batch norm has rounding noise only
as its gradient."""
ROUNDING = 4.0
"""Times what one device differs from itself: so much may ranks differ where that is more than the tolerance."""
MOST_ROUNDING = 1e-7
"""What differs by more is no rounding."""
PERTURBATION = 0.02
"""Added to the weights, normally distributed: layers that start as zeros would hide what comes behind them."""

_RANDOM = ("drop_prob", "drop_rate", "dropout", "attention_dropout", "stochastic_depth_prob")


@dataclass(frozen=True, slots=True)
class TrainingCase(Case):
    """A model and how it is split.

    Attributes:
        strategy: a solver's or a fixed one's name.
    """

    strategy: str


@dataclass(slots=True)
class TrainingRow:
    """A line of the result; what was not reached stays empty.

    Attributes:
        input: one sample.
        layers: of the layer graph.
        split: of them, those that are cut; the others are run whole by both ranks.
        tensors: compared on each rank.
        difference: the largest of all tensors, relative to the tensor's largest value on one device.
        worst: the tensor with it.
        result: ``ok`` or the step that failed.
        reason: what was said or happened then.
    """

    source: str
    family: str
    model: str
    kind: str
    strategy: str
    input: str = ""
    layers: int | None = None
    split: int | None = None
    tensors: int | None = None
    difference: float | None = None
    worst: str = ""
    result: str = "build"
    reason: str = ""


def training_cases(cases: Sequence[Case], output: Path, resume: bool) -> tuple[list[TrainingCase], list[TrainingRow]]:
    """Return what is to be tried, and the rows of what went well in an earlier run, if that goes on."""
    kept = [row for row in _read(output) if row.result == OK] if resume and output.exists() else []
    done = {(row.source, row.model, row.strategy) for row in kept}
    wanted = [TrainingCase(**asdict(case), strategy=strategy) for case in cases for strategy in STRATEGIES]
    return [case for case in wanted if (case.source, case.model, case.strategy) not in done], kept


def training_trial(case: TrainingCase, settings: Settings, report: Callable[[TrainingRow], None]) -> None:  # noqa: ARG001
    """Train a model under one strategy, reporting the row when a step begins and at the end."""
    row = TrainingRow(**asdict(case))
    try:
        _try(case, row, report)
    except Exception as error:  # one model's trouble is one row
        row.reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    report(row)


def _try(case: TrainingCase, row: TrainingRow, report: Callable[[TrainingRow], None]) -> None:
    def begin(step: str) -> None:
        row.result = step
        report(row)

    begin("build")
    loaded = load_model(case.reference)
    shapes = small_shapes(loaded)
    row.input = " ".join("x".join(map(str, shape)) for shape in shapes)
    generator = torch.Generator().manual_seed(1)
    inputs = tuple(torch.randn(BATCH, *shape, generator=generator, dtype=torch.float64) for shape in shapes)
    alone = _built(loaded)
    begin("plan")
    traced = trace_layers(alone, inputs, loaded.name)
    options = Options(solver=case.strategy, all_devices=True)
    plan = Planner(traced, machine_of(devices=RANKS), options, Origin(loaded.name, loaded.source)).plan()
    row.layers = len(plan.strategy)
    row.split = sum(any(d is not Dimension.REPLICATE for d in s.dimensions) for s in plan.strategy.values())
    begin("one device")
    wanted = _trained(alone, inputs)

    def work(net: ParallelModule, _: object, position: int) -> list[tuple[float, str]]:
        own = own_samples(plan, plan.mesh.ranks[position])
        found = _trained(net, tuple(x[own] for x in inputs))
        return list(_differences(alone, net, [y[own] for y in wanted], found, net.held))

    begin("run")
    ranks = run_ranks(lambda: _built(loaded), plan, work)
    begin("compare")
    row.tensors = len(ranks[0])
    row.difference, row.worst = max(each for rank in ranks for each in rank)
    if row.difference < TOLERANCE:
        row.result = OK
        return
    limits = _rounding(loaded, inputs, alone, wanted)
    different = sorted({name for rank in ranks for worst, name in rank if not worst < limits[name]})
    if different:
        raise ValueError(f"{len(different)} of {row.tensors} tensors differ: {', '.join(different[:5])}")
    row.result = OK


def _rounding(
    loaded: LoadedModel, inputs: Sequence[torch.Tensor], alone: nn.Module, wanted: Sequence[torch.Tensor]
) -> dict[str, float]:
    """Return by how much each tensor may differ, where rounding alone makes more than the tolerance.

    Sums of values that cancel, such as the gradient of a bias in front of a batch norm, are nothing but rounding, which
    grows with what is summed. One device tells how much: what it finds when the samples come in reverse order.
    """
    again = _built(loaded)
    reverse = [y.flip(0) for y in _trained(again, [x.flip(0) for x in inputs])]
    found = {name: worst for worst, name in _differences(alone, again, wanted, reverse, {})}
    return {name: max(TOLERANCE, min(ROUNDING * worst, MOST_ROUNDING)) for name, worst in found.items()}


def _built(loaded: LoadedModel) -> nn.Module:
    """Return the model with weights that are the same at every call, and nothing random inside."""
    torch.manual_seed(0)
    module = load_model(loaded.source, device="cpu").module.double().train()
    for part in module.modules():
        if isinstance(part, nn.modules.dropout._DropoutNd) or type(part).__name__ == "StochasticDepth":
            part.p = 0.0
        for name in _RANDOM:
            if isinstance(getattr(part, name, None), float):
                setattr(part, name, 0.0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=PERTURBATION)
    return module


def _trained(net: nn.Module, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Train one step; return the outputs, the samples first in each."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    outputs = list(tensors(net(*inputs)))
    sum((y.square() + y).mean() for y in outputs).backward()
    optimizer.step()
    return [y.detach() for y in outputs]


def _differences(
    alone: nn.Module,
    net: nn.Module,
    wanted: Sequence[torch.Tensor],
    found: Sequence[torch.Tensor],
    held: Mapping[str, Held],
) -> Iterator[tuple[float, str]]:
    """Yield by how much each tensor of a rank, which holds parts of them, differs from one device's, and its name."""
    outputs = {f"output {i}": pair for i, pair in enumerate(zip(found, wanted, strict=True))}
    yield from _relative(outputs)
    mine = dict(net.named_parameters())
    for name, parameter in alone.named_parameters():
        if (parameter.grad is None) != (mine[name].grad is None):
            raise ValueError(f"only one has a gradient of {name}")
    parameters = {name: p for name, p in alone.named_parameters() if p.grad is not None}
    yield from _relative({f"gradient of {n}": (mine[n].grad, _own(held, n, p.grad)) for n, p in parameters.items()})
    yield from _relative({n: (mine[n].detach(), _own(held, n, p.detach())) for n, p in alone.named_parameters()})
    yield from _relative({n: (net.get_buffer(n), _own(held, n, b)) for n, b in alone.named_buffers()})


def _own(held: Mapping[str, Held], name: str, whole: Any) -> torch.Tensor:
    """Return what this rank holds of a whole tensor; all of one that no layer reads."""
    if name not in held:
        return whole
    region = held[name].region
    return whole[tuple(slice(i, j) for i, j in zip(region.start, region.stop, strict=True))]


def _relative(pairs: dict[str, tuple[Any, torch.Tensor]]) -> Iterator[tuple[float, str]]:
    largest = max((float(b.abs().max()) for _, b in pairs.values() if b.numel()), default=0.0)
    for name, (a, b) in pairs.items():
        if a.shape != b.shape:
            raise ValueError(f"{name} is {tuple(a.shape)} instead of {tuple(b.shape)}")
        if b.numel():
            scale = max(float(b.abs().max()), NOISE_FLOOR * largest) or 1.0
            difference = float((a - b).abs().max()) / scale
            yield (difference if difference == difference else float("inf")), name


def write_training(rows: Sequence[TrainingRow], path: Path) -> None:
    """Write the rows, in order."""
    ordered = sorted(rows, key=lambda row: (row.source, row.family, row.model, STRATEGIES.index(row.strategy)))
    partial = path.with_suffix(".part")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, [each.name for each in fields(TrainingRow)], lineterminator="\n")
        writer.writeheader()
        for row in ordered:
            values = {name: "" if value is None else value for name, value in asdict(row).items()}
            difference = "" if row.difference is None else f"{row.difference:.1e}"
            writer.writerow(values | {"difference": difference})
    partial.replace(path)


def _read(path: Path) -> list[TrainingRow]:
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    numbers = {"layers": int, "split": int, "tensors": int, "difference": float}
    return [
        TrainingRow(**line | {name: kind(line[name]) if line[name] else None for name, kind in numbers.items()})
        for line in lines
    ]
