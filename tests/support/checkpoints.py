"""A hard little network, optimizers of all kinds, and what the ranks of the checkpoint tests run."""

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from planner.api import Options, Origin, Planner, machine_of, prepare
from planner.errors import LayerwiseError
from planner.ir.region import Region
from planner.plan import Plan
from runtime import checkpoint
from runtime.checkpoint import storage
from runtime.checkpoint.whole import Part
from runtime.data import own_samples
from runtime.launch import Process
from runtime.parallel import parallelize
from support.random_plans import random_plan

BATCH = 8
CLASSES = 10
TOLERANCE = 1e-9
STEPS = 3

Make = Callable[[Any], torch.optim.Optimizer]


class Odd(nn.Module):
    """Tied layers, a frozen one, one that forward does not use, uneven channels, buffers of all kinds."""

    mean: torch.Tensor
    shift: torch.Tensor

    def __init__(self, dropout: float = 0.0, hidden: int = 10) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, hidden, 3, padding=1)
        self.norm = nn.BatchNorm2d(hidden)
        self.second = nn.Conv2d(hidden, hidden, 3, padding=1, groups=2)
        self.again = nn.Conv2d(hidden, hidden, 3, padding=1, groups=2)
        self.again.weight = self.second.weight
        self.unused = nn.Linear(3, 5)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(hidden * 4, CLASSES)
        self.first.bias.requires_grad_(False)  # type: ignore[union-attr]  # it has one
        self.register_buffer("mean", torch.full((3, 1, 1), 0.1))
        self.register_buffer("shift", torch.full((1,), 0.2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.norm(self.first(x - self.mean + self.shift)))
        x = functional.relu(self.again(functional.relu(self.second(x))))
        x = functional.max_pool2d(self.drop(x), 4)
        out: torch.Tensor = self.head(x.flatten(1))
        return out


def build(dropout: float = 0.0, seed: int = 0, hidden: int = 10) -> Odd:
    torch.manual_seed(seed)
    return Odd(dropout, hidden).double()


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH, 3, 8, 8, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, CLASSES, (BATCH,), generator=generator)


@functools.cache
def planner_for(num_ranks: int, dropout: float = 0.0) -> Planner:
    machine = machine_of(devices=num_ranks)
    return prepare(build(dropout), (data()[0],), machine, Options(all_devices=True), Origin("odd", "odd"))


def any_plan(num_ranks: int, seed: int, sharding: str = "none", dropout: float = 0.0) -> Plan:
    rng = np.random.default_rng(seed)
    plan = random_plan(planner_for(num_ranks, dropout), lambda n: int(rng.integers(n)))
    document = json.loads(plan.to_json())
    document["stages"][0]["parameter_sharding"] = sharding
    return Plan.from_json(json.dumps(document))


def train(net: nn.Module, optimizer: torch.optim.Optimizer, part: slice = slice(None), steps: int = STEPS) -> None:
    x, target = data()
    for _ in range(steps):
        optimizer.zero_grad()
        functional.cross_entropy(net(x[part]), target[part]).backward()
        optimizer.step()


def groups(net: nn.Module) -> list[dict[str, Any]]:
    """Two groups with options of their own, in an order that is not the model's."""
    named = dict(net.named_parameters())
    biases = [p for name, p in named.items() if name.endswith("bias")]
    rest = [p for name, p in named.items() if not name.endswith("bias")]
    return [{"params": biases, "lr": 0.02, "weight_decay": 0.0}, {"params": rest[::-1]}]


OPTIMIZERS: dict[str, Make] = {
    "sgd": functools.partial(torch.optim.SGD, lr=0.01),
    "momentum": functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9, weight_decay=0.01, nesterov=True),
    "amsgrad": functools.partial(torch.optim.AdamW, lr=0.01, amsgrad=True, foreach=True),
    "fused": functools.partial(torch.optim.AdamW, lr=0.01, fused=True),
    "rmsprop": functools.partial(torch.optim.RMSprop, lr=0.01, momentum=0.9, centered=True),
    "asgd": functools.partial(torch.optim.ASGD, lr=0.01),
    "nadam": functools.partial(torch.optim.NAdam, lr=0.01),
}


def assert_equal(
    part: Part, optimizer: torch.optim.Optimizer, expected: nn.Module, theirs: torch.optim.Optimizer
) -> None:
    """Compare a rank's weights, buffers and state of the optimizer with those of one device."""
    whole = expected.state_dict(keep_vars=True)
    for name, tensor in part.tensors.items():
        place = part.held[name]
        region = place.region.slices_in(Region((0,) * len(place.shape), place.shape))
        assert difference(tensor, whole[name][region]) < TOLERANCE, name
        state, other = optimizer.state.get(tensor, {}), theirs.state.get(whole[name], {})
        assert state.keys() == other.keys(), name
        for key, value in state.items():
            reference = other[key]
            if isinstance(value, torch.Tensor):
                cut = reference[region] if reference.shape == whole[name].shape else reference
                assert difference(value, cut) < TOLERANCE, (name, key)
            else:
                assert value == reference


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return float((a.detach().double() - b.detach().double()).abs().max()) if a.numel() else 0.0


def save_part(argument: dict[str, Any], process: Process) -> dict[str, Any]:
    """Train under a plan and save; then what goes on behind training, and what fails on one rank."""
    torch.set_num_threads(1)
    plan, folder = Plan.from_json(argument["plan"]), Path(argument["folder"])
    net = parallelize(build(dropout=0.0), plan)
    optimizer = OPTIMIZERS["amsgrad"](groups(net))
    part = own_samples(plan, process.rank)
    train(net, optimizer, part)
    checkpoint.save(net, optimizer, folder / "a", step=3, extra={"epoch": 1})
    checkpoint.start_saving(net, optimizer, folder / "b", step=4)
    train(net, optimizer, part)
    checkpoint.start_saving(net, optimizer, folder / "b", step=5).wait()
    checkpoint.start_saving(net, optimizer, folder / "b", step=6)
    train(net, optimizer, part, steps=1)
    before = copy.deepcopy(net.state_dict())
    step = checkpoint.load(net, optimizer, folder / "b").step  # waits for what is under way
    changed = any(not torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    (folder / "file").touch()
    return {
        "step": step,
        "changed": changed,
        "no folder": _error(lambda: checkpoint.save(net, optimizer, folder / "file" / "c", step=7)),
        "one rank": _fails_on_one(net, folder / "a", process),
        "extra": _error(lambda: checkpoint.save(net, None, folder / "d", step=7, extra=print if process.rank else 1)),
        "files": sorted(path.name for path in (folder / "a").iterdir()),
    }


def _fails_on_one(net: nn.Module, folder: Path, process: Process) -> str:
    def fail(*_: Any) -> None:
        raise OSError("no space left")

    works = storage._Saved.resolve_data
    if process.rank == 1:
        storage._Saved.resolve_data = fail  # type: ignore[assignment,method-assign]  # as on a full disk
    saving = checkpoint.start_saving(net, None, folder, step=7)
    found = _error(saving.wait)
    storage._Saved.resolve_data = works  # type: ignore[method-assign]
    return found


def load_part(argument: dict[str, Any], process: Process) -> dict[str, Any]:
    """Load under another plan, go on, compare with one device, and export."""
    torch.set_num_threads(1)
    plan, folder = Plan.from_json(argument["plan"]), Path(argument["folder"])
    net = parallelize(build(seed=8), plan)
    wrong = OPTIMIZERS["momentum" if process.rank == 1 else "amsgrad"](groups(net))
    error = _error(lambda: checkpoint.load(net, wrong, folder / "a"))
    optimizer = OPTIMIZERS["amsgrad"](groups(net)[::-1])
    resumed = checkpoint.load(net, optimizer, folder / "a")
    train(net, optimizer, own_samples(plan, process.rank))
    assert_equal(Part.of(net), optimizer, *reference())
    checkpoint.export(net, folder / "model.pt")
    whole = checkpoint.full_state_dict(net, everywhere=True)
    return {
        "step": resumed.step,
        "extra": resumed.extra,
        "error": error,
        "sum": float(sum(tensor.double().sum() for tensor in whole.values())),
        "unwritable": _error(lambda: checkpoint.export(net, folder / "nowhere" / "model.pt")),
    }


def reference() -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return what one device has after all steps."""
    net = build()
    optimizer = OPTIMIZERS["amsgrad"](groups(net))
    train(net, optimizer, steps=2 * STEPS)
    return net, optimizer


def _error(work: Callable[[], Any]) -> str:
    try:
        work()
    except (LayerwiseError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"
