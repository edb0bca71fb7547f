"""What the ranks of the tests of synchronous pipelines run, and the same on one device."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import runtime
from planner.errors import LayerwiseError
from planner.models.resnet import cifar_resnet
from planner.models.unet import unet
from planner.plan import Plan
from planner.plan.schema import SchedulePart
from runtime import checkpoint
from runtime.data import own_samples
from runtime.launch import Process
from runtime.parallel import parallelize
from runtime.pipeline.module import Pipeline, pipelined
from support.equality import relative
from support.pipelines import staged_plan

STEPS = 3
CLASSES = 10
MAX_NORM = 0.05
"""Below the norms of all gradients, so that clipping changes them."""
LEFT_OVER = 3
"""Samples of evaluation beyond whole batches."""


class Skips(nn.Module):
    """Integers that go to later stages, a tensor that is relayed over two stages, views and writes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.table = nn.Embedding(CLASSES, 6)
        self.mix = nn.Conv2d(6, 6, 1)
        self.late = nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6 * 4, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        chosen = x.flatten(2).mean(2).argmax(1)
        y = functional.relu(self.norm(x), inplace=True)
        y = self.mix(y) + self.table(chosen)[:, :, None, None]
        y = functional.relu(self.late(y).mul(0.5), inplace=True)
        y = functional.adaptive_avg_pool2d(y + x, 2).flatten(1)
        out: torch.Tensor = self.head(y + self.table(chosen).repeat(1, 4))
        return out


class Asks(nn.Module):
    """A second head in training, as Inception has it, and a scaled output in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.early, self.late = nn.Linear(6, CLASSES), nn.Conv2d(6, 8, 3, padding=1)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> Any:
        x = torch.relu(self.norm(self.stem(x)))
        early = self.early(x.mean((2, 3))) if self.training else None
        out = self.head(torch.relu(self.late(x)).mean((2, 3)))
        return out * 2 if early is None else (out, early)


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet8": (lambda: cifar_resnet(8, width=0.5), (3, 8, 8)),
    "unet": (lambda: unet(width=0.0625, num_classes=CLASSES), (1, 16, 16)),
    "skips": (Skips, (3, 6, 6)),
    "asks": (Asks, (3, 6, 6)),
}


@dataclass(frozen=True)
class Case:
    """A pipelined plan and how it is trained; arguments as of ``staged_plan``.

    ``frozen``: beginnings of names of parameters that are not trained.
    """

    net: str
    meshes: tuple[tuple[int, ...], ...]
    kind: str
    num_microbatches: int
    batch: int = 8
    cuts: int | tuple[str, ...] = 2
    seed: int | None = None
    frozen: tuple[str, ...] = ()
    recompute: bool = False
    sharding: str = "none"

    def plan(self) -> Plan:
        """Return the plan."""
        cuts = self.cuts if isinstance(self.cuts, int) else list(self.cuts)
        found = staged_plan(
            build(self), NETS[self.net][1], self.batch, self.num_microbatches, cuts, self.meshes, self.kind, self.seed
        )
        changes = {"recompute": self.recompute, "parameter_sharding": self.sharding}
        return found.model_copy(update={"stages": [s.model_copy(update=changes) for s in found.stages]})


def build(case: Case) -> nn.Module:
    """Return the network with fixed weights."""
    torch.manual_seed(0)
    net = NETS[case.net][0]().double()
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(not name.startswith(case.frozen or ("-",)))
    return net


def data(case: Case, step: int, size: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a batch."""
    generator = torch.Generator().manual_seed(step)
    count = size or case.batch
    x = torch.randn(count, *NETS[case.net][1], generator=generator, dtype=torch.float64)
    return x, torch.randint(0, CLASSES, (count,), generator=generator)


def loss_of(output: Any, target: torch.Tensor) -> torch.Tensor:
    """Return the mean loss, of several outputs the sum of theirs."""
    if isinstance(output, tuple):
        return sum((loss_of(each, target) for each in output), torch.zeros(()))
    return functional.cross_entropy(output.flatten(2).mean(2) if output.dim() > 2 else output, target)


@dataclass
class Found:
    """What training leaves: losses and norms of the gradients of each step, gradients of the last one, and the rest."""

    losses: list[float]
    norms: list[float]
    output: torch.Tensor | None
    gradients: dict[str, torch.Tensor]
    state: dict[str, torch.Tensor]


def optimizer_of(net: nn.Module) -> torch.optim.Optimizer:
    """Return an optimizer with a state."""
    return torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)


def on_one_device(case: Case) -> Found:
    """Train on one device, one micro-batch after the other."""
    net = build(case)
    optimizer, found = optimizer_of(net), Found([], [], None, {}, {})
    for step in range(STEPS):
        optimizer.zero_grad()
        total = 0.0
        for x, target in zip(*(t.chunk(case.num_microbatches) for t in data(case, step)), strict=True):
            loss = loss_of(net(x), target) / case.num_microbatches
            loss.backward()
            total += float(loss.detach())
        found.losses.append(total)
        found.norms.append(float(nn.utils.clip_grad_norm_(net.parameters(), MAX_NORM)))
        optimizer.step()
    found.gradients = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
    found.state = {n: t.detach() for n, t in net.state_dict().items()}
    net.eval()
    with torch.no_grad():
        found.output = net(data(case, 9, 2 * case.batch + LEFT_OVER)[0])
    return found


def on_rank(case: Case, net: Pipeline) -> Found:
    """Train this rank's stages."""
    optimizer, found = optimizer_of(net), Found([], [], None, {}, {})
    for step in range(STEPS):
        optimizer.zero_grad()
        x, target = data(case, step)
        loss = net.step(x, target=target, everywhere=step > 0)
        if loss is not None:
            found.losses.append(float(loss))
        found.norms.append(float(net.clip_grad_norm_(MAX_NORM)))
        optimizer.step()
    found.gradients = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
    found.state = {n: t.detach() for n, t in net.state_dict().items()}
    net.eval()
    found.output = net.evaluate(data(case, 9, 2 * case.batch + LEFT_OVER)[0])
    return found


def differences(net: Pipeline, found: Found, expected: Found) -> Iterator[tuple[str, float]]:
    """Yield by how much a rank's tensors differ from one device's, by name."""
    is_last = net.held_stages[-1].stage.index == len(net.plan.stages) - 1
    losses = expected.losses if is_last else expected.losses[1:]
    yield "loss", max(abs(a - b) for a, b in zip(found.losses, losses, strict=True))
    yield "norm", max(abs(a - b) for a, b in zip(found.norms, expected.norms, strict=True))
    assert (found.output is not None) == is_last
    if found.output is not None and expected.output is not None:
        yield "output", relative(found.output, expected.output, 1.0)
    held = {name: place for stage in net.held_stages for name, place in stage.held.items()}
    largest = max(float(g.abs().max()) for g in expected.gradients.values())
    wanted = {n for n in expected.gradients if n in held}
    assert wanted == set(found.gradients), f"gradients of {sorted(wanted ^ set(found.gradients))}"
    for kind, mine, wholes in ("gradient", found.gradients, expected.gradients), ("state", found.state, expected.state):
        for name, tensor in mine.items():
            region = held[name].region
            own = tuple(slice(a, b) for a, b in zip(region.start, region.stop, strict=True))
            scale = max(float(wholes[name].abs().max()), largest if kind == "gradient" else 1e-3)
            yield f"{kind} of {name}", relative(tensor.double(), wholes[name][own].double(), scale)


def check(argument: list[dict[str, Any]], process: Process) -> list[dict[str, Any]]:
    """Train every case; return the names that this rank has and what differs from one device."""
    torch.set_num_threads(1)
    results = []
    for fields in argument:
        case = case_of(fields)
        net = pipelined(build(case), case.plan(), loss_of)
        worst = {n: v for n, v in differences(net, on_rank(case, net), on_one_device(case)) if not v < 1e-9}
        results.append({"rank": process.rank, "names": sorted(net.state_dict()), "worst": worst})
    return results


def check_all(argument: dict[str, Any], process: Process) -> dict[str, Any]:
    """Check cases, checkpoints and errors in one job of two ranks."""
    return {
        "cases": check(argument["cases"], process),
        "checkpoint": checkpoint_there_and_back(argument["folder"], process),
        "misused": misused(),
        "scaled": scaled(),
        "autocast": under_autocast(),
        "copied": copied_and_converted(),
        "hung": lose_a_stage({"how": "hang", "timeout_s": 2.0, "folder": argument["folder"]}, process),
    }


def case_of(fields: dict[str, Any]) -> Case:
    """Return a case of its fields as JSON has them."""
    named: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    named["meshes"] = tuple(tuple(m) for m in fields["meshes"])
    return Case(**named)


CHECKPOINTED = Case("resnet8", ((1,), (1,)), "1f1b", 2)
"""Batch norm sees micro-batches, so the plan without stages has as many ranks as there are micro-batches, and each
its own statistics."""


def checkpoint_there_and_back(folder: str, process: Process) -> dict[str, Any]:
    """Train with stages, go on without them, and again with other stages; return what differs from one device."""
    torch.set_num_threads(1)
    case, other = CHECKPOINTED, Case("resnet8", ((1,), (1,)), "zero-bubble", 2, cuts=4)
    first = pipelined(build(case), case.plan(), loss_of)
    optimizer = optimizer_of(first)
    stepped(first, optimizer, case, 0)
    checkpoint.save(first, optimizer, f"{folder}/a", step=1, extra={"rank": process.rank})

    single = staged_plan(build(case), NETS[case.net][1], case.batch, 1, 1, [(2,)], seed=None)
    single = single.model_copy(update={"io": "per-rank", "sync_batch_norm": False})
    second = parallelize(blank(case), single)
    optimizer = optimizer_of(second)
    resumed = checkpoint.load(second, optimizer, f"{folder}/a")
    optimizer.zero_grad()
    x, target = (t[own_samples(single, process.rank)] for t in data(case, 1))
    loss_of(second(x), target).backward()
    optimizer.step()
    checkpoint.save(second, optimizer, f"{folder}/b", step=2)

    third = pipelined(blank(other), other.plan(), loss_of)
    optimizer = optimizer_of(third)
    checkpoint.load(third, optimizer, f"{folder}/b")
    stepped(third, optimizer, other, 2)
    state = checkpoint.full_optimizer_state_dict(third, optimizer, everywhere=True)
    weights = checkpoint.full_state_dict(third, everywhere=True)
    checkpoint.export(third, f"{folder}/model.pt")
    expected, theirs = one_device_steps(case, 3)
    wholes = expected.state_dict()
    learned = {n: t for n, t in weights.items() if n in dict(expected.named_parameters())}
    worst = {n: relative(t, wholes[n], 1.0) for n, t in learned.items()}
    names = [name for name, _ in expected.named_parameters()]
    for name, parameter in expected.named_parameters():
        own = state["state"][name]["momentum_buffer"]
        worst[f"momentum of {name}"] = relative(own, theirs.state[parameter]["momentum_buffer"], 1.0)
    wrong = pipelined(blank(case), case.plan(), loss_of)
    text = error_of(lambda: checkpoint.load(wrong, torch.optim.Adam(wrong.parameters()), f"{folder}/a"))
    return {
        "worst": {name: value for name, value in worst.items() if not value < 1e-9},
        "names": [sorted(wholes) == sorted(weights), sorted(names) == sorted(state["state"])],
        "resumed": [resumed.step, resumed.extra],
        "wrong": text,
    }


def stepped(net: Pipeline, optimizer: torch.optim.Optimizer, case: Case, step: int) -> None:
    """Do a step of training."""
    optimizer.zero_grad()
    x, target = data(case, step)
    net.step(x, target=target)
    optimizer.step()


def one_device_steps(case: Case, count: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Train on one device, one micro-batch after the other, without clipping."""
    net = build(case)
    optimizer = optimizer_of(net)
    for step in range(count):
        optimizer.zero_grad()
        for x, target in zip(*(t.chunk(case.num_microbatches) for t in data(case, step)), strict=True):
            (loss_of(net(x), target) / case.num_microbatches).backward()
        optimizer.step()
    return net, optimizer


def blank(case: Case) -> nn.Module:
    """Return the network with other weights."""
    net = build(case)
    for tensor in (*net.parameters(), *net.buffers()):
        tensor.detach().fill_(3)
    return net


def error_of(work: Callable[[], Any]) -> str:
    """Return the error that a call raises, as text."""
    try:
        work()
    except LayerwiseError as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def lose_a_stage(argument: dict[str, Any], process: Process) -> str:
    """Let the last stage hang or die in its second step; return what the first one says."""
    case = CHECKPOINTED
    seen: list[float] = []

    def mortal(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if len(seen) >= case.num_microbatches:
            if argument["how"] == "hang":
                time.sleep(3 * argument["timeout_s"])
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        seen.append(0.0)
        return loss_of(output, target)

    net = pipelined(build(case), case.plan(), mortal, timeout_s=argument["timeout_s"])
    optimizer = optimizer_of(net)
    stepped(net, optimizer, case, 0)
    found = error_of(lambda: stepped(net, optimizer, case, 1))
    Path(argument["folder"], str(process.rank)).write_text(found)
    return found


class Bare(nn.Module):
    """A network whose last stage has no parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, CLASSES, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = functional.relu(self.conv(x)).mean((2, 3))
        return out


class Mixed(nn.Module):
    """Under autocast a product with a parameter is float32, and crosses so."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.late = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.scale, self.head = nn.Parameter(torch.rand(6, 1, 1) + 0.5), nn.Linear(6, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.first(x)) * self.scale
        out: torch.Tensor = self.head((torch.relu(self.late(y)) + y).mean((2, 3)))
        return out


NETS |= {"bare": (Bare, (3, 6, 6)), "mixed": (Mixed, (3, 6, 6))}
SCALED = Case("resnet8", ((1,), (1,)), "1f1b", 2), Case("bare", ((1,), (1,)), "1f1b", 2, cuts=("mean",))


def scaled() -> list[dict[str, Any]]:
    """Train with a scaler, whose second step overflows in the first stage; compare with one device."""
    found = []
    for case in SCALED:
        net = pipelined(build(case), case.plan(), loss_of)
        parameters = list(net.parameters())
        optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9) if parameters else None
        scaler = runtime.GradScaler(net, init_scale=2.0**6)
        scales = []
        for step in range(STEPS):
            if optimizer is not None:
                optimizer.zero_grad()
            x, target = data(case, 0 if step < 2 else 1)
            net.step(x, target=target, scale=scaler.scale)
            if step == 1 and net.held_stages[0].stage.index == 0:
                grads = [p.grad for p in parameters if p.grad is not None]
                grads[0].view(-1)[0] = torch.inf
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        whole = one_device_steps(case, 2)[0].state_dict()
        trained = {name for name, _ in build(case).named_parameters()}
        worst = {n: relative(t, whole[n], 1.0) for n, t in net.state_dict().items() if n in trained}
        found.append({"worst": {n: v for n, v in worst.items() if not v < 1e-9}, "scales": scales, "count": len(worst)})
    return found


def under_autocast() -> dict[str, float]:
    """Train in bf16 where float32 crosses the stages; return by how much gradients differ from one device's."""
    case = Case("mixed", ((1,), (1,)), "1f1b", 2, cuts=("late",))
    plan = staged_plan(build(case).float(), NETS[case.net][1], case.batch, 2, list(case.cuts), case.meshes, case.kind)  # type: ignore[arg-type]
    net, whole = pipelined(build(case).float(), plan, loss_of), build(case).float()
    x, target = data(case, 0)
    with torch.autocast("cpu", torch.bfloat16):
        net.step(x.float(), target=target)
        for a, b in zip(x.float().chunk(2), target.chunk(2), strict=True):
            loss = loss_of(whole(a), b) / 2
            with torch.autocast("cpu", enabled=False):
                loss.backward()
    expected = dict(whole.named_parameters())
    worst = {n: relative(p.grad, expected[n].grad, 1e-3) for n, p in net.named_parameters() if p.grad is not None}  # type: ignore[arg-type]
    ports = [port for stage in net._steps._stages for port in (*stage.receives, *stage.sends)]
    return {"worst": max(worst.values()), "float32": float(sum(port.dtype is torch.float32 for port in ports))}


def copied_and_converted() -> dict[str, bool]:
    """Average a pipeline's weights in a copy, and convert it to float32 and back."""
    case = CHECKPOINTED
    net = pipelined(build(case), case.plan(), loss_of)
    average = torch.optim.swa_utils.AveragedModel(net)
    before = {n: t.clone() for n, t in net.state_dict().items()}
    stepped(net, optimizer_of(net), case, 0)
    x, target = data(case, 9)
    copied: Any = average.module
    found = {"own": all(torch.equal(t, before[n]) for n, t in copied.state_dict().items())}
    average.update_parameters(net)
    pairs = zip(copied.parameters(), net.parameters(), strict=True)
    found["averaged"] = all(torch.equal(a, b) for a, b in pairs)
    for each in (net, copied):
        for module in each.held_stages:
            for name, buffer in module.named_buffers():
                buffer.copy_(before[name])
        each.eval()
    outputs = net.evaluate(x), copied.evaluate(x)
    found["same output"] = outputs[0] is None or torch.equal(*outputs)
    net.train().to(torch.float32)
    loss = net.step(x.float(), target=target)
    found["converted"] = loss is None or loss.dtype is torch.float32
    found["gradients"] = all(p.grad.dtype is torch.float32 for p in net.parameters() if p.grad is not None)
    found["refused"] = "stays on the device" in error_of(lambda: net.to("meta"))
    return found


def misused() -> list[str]:
    """Return the errors of calls that cannot work."""
    case = CHECKPOINTED
    net = pipelined(build(case), case.plan(), loss_of)
    x, target = data(case, 0, 7)
    y, _ = data(case, 0)
    stale = case.plan().model_copy(update={"schedule": SchedulePart(kind="stale")})
    return [
        error_of(lambda: net.step(x, target=target)),
        error_of(lambda: net.step(y, target=target)),
        error_of(lambda: net.evaluate(x[:3])),
        error_of(lambda: net(x)),
        error_of(lambda: pipelined(build(case), stale, loss_of)),
        error_of(lambda: pipelined(build(case), Case("resnet8", ((1,), (2,)), "gpipe", 2).plan(), loss_of)),
    ]
