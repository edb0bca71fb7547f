"""What ``layerwise doctor`` runs on every rank: collectives with known results, training against one device."""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import torch
from torch import nn
from torch.nn import functional

from planner.ir.mesh import Mesh
from planner.plan.schema import Plan
from runtime.comm.communicator import Axes, Communicator, members_of
from runtime.comm.groups import ProcessGroups
from runtime.comm.staging import communicator_of
from runtime.data import own_samples
from runtime.launch import Process
from runtime.module import ParallelModule
from runtime.parallel import parallelize

Row: TypeAlias = dict[str, Any]
"""``where``, ``check``, ``seconds``, and a ``reason`` that is empty where the check passed."""

COUNT: Final = 65_537  # elements of a buffer: large enough to be cut into chunks, and odd
FLOATS: Final = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INPUT_SHAPE: Final = (3, 16, 16)
SAMPLES_PER_RANK: Final = 3
STEPS: Final = 2
TOLERANCE: Final = 1e-9
NOISE_FLOOR: Final = 1e-5
"""A tensor's scale is at least this share of the largest one's: a bias in front of a batch norm has rounding noise only
as its gradient."""
NOT_RUN: Final = "not run: an earlier check broke the group"


class WrongResultError(Exception):
    """A check ended with other numbers than it should have."""


@dataclass(frozen=True)
class Station:
    """Where checks run: ranks, a kind of device, a way to talk.

    Attributes:
        name: for the report.
        device: of the tensors.
        communicator: how the ranks talk.
        timeout_s: of a collective.
    """

    name: str
    device: torch.device
    communicator: Communicator
    timeout_s: float

    @property
    def mesh(self) -> Mesh:
        """The ranks."""
        return self.communicator.mesh

    def members(self, axes: Axes) -> tuple[int, ...]:
        """Return the positions of this rank's group."""
        return members_of(self.mesh, self.communicator.position, axes)

    def values(self, seed: int, count: int = COUNT, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return 0, 1 and 2 in turn; sums over a hundred ranks of them are exact in every precision."""
        return ((torch.arange(count, device=self.device) + seed) % 3).to(dtype)


def examine(argument: Mapping[str, Any], process: Process) -> list[Row]:
    """Run all checks that this job can run.

    Args:
        argument: ``plans`` for :func:`network` by name, as JSON; ``timeout_s`` of a collective; ``shared``: the ranks
            share the GPUs of the machine, over gloo.
        process: of this rank.

    Returns:
        The rows of this rank.
    """
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    found: list[Row] = []
    for station in _stations(process, argument["shared"], argument["timeout_s"]):
        rows: list[Row] = []
        broken = False
        for name, run in _checks(station, argument["plans"], process.rank):
            start_s = time.perf_counter()
            reason = NOT_RUN if broken else ""
            try:
                if not broken:
                    run()
            except WrongResultError as error:
                reason = str(error)
            except Exception as error:  # whatever a backend raises is what the user has to know
                reason, broken = f"{type(error).__name__}: {error}", True
            seconds = time.perf_counter() - start_s
            rows.append({"where": station.name, "check": name, "seconds": seconds, "reason": reason})
        num_failed = sum(bool(row["reason"]) for row in rows)
        elsewhere = [] if broken else station.communicator.start_gather_ints(num_failed)()
        failed = [rank for rank, count in zip(station.mesh.ranks, elsewhere, strict=False) if count]
        reason = NOT_RUN if broken else f"checks failed on ranks {failed}, see what they print" if failed else ""
        rows.append({"where": station.name, "check": "all of this on every rank", "seconds": 0.0, "reason": reason})
        found += rows
    return found


def _stations(process: Process, shared: bool, timeout_s: float) -> Iterator[Station]:
    mesh = _mesh(process.world_size)
    communicator = communicator_of(mesh, ProcessGroups(mesh, axes_of(mesh), timeout_s))
    ranks = f"{mesh.size} ranks" if mesh.size > 1 else "1 rank"
    if shared:
        device = torch.device("cuda", process.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        yield Station(f"gloo, GPU shared, {ranks}", device, communicator, timeout_s)
        return
    yield Station(f"gloo, CPU, {ranks}", torch.device("cpu"), communicator, timeout_s)
    if process.device.type == "cuda":
        yield Station(f"NCCL, GPU, {ranks}", process.device, communicator, timeout_s)


def _mesh(num_ranks: int) -> Mesh:
    """Return a mesh of two axes where the number has two factors."""
    inner = next((n for n in range(2, num_ranks + 1) if num_ranks % n == 0), 1)
    return Mesh.of(outer=num_ranks // inner, inner=inner)


def axes_of(mesh: Mesh) -> list[Axes]:
    """Return all sets of axes; the empty one, groups of a single rank, where there is no other."""
    count = len(mesh.axes)
    return [axes for size in range(1, count + 1) for axes in itertools.combinations(range(count), size)] or [()]


def _checks(station: Station, plans: Mapping[str, str], rank: int) -> Iterator[tuple[str, Callable[[], None]]]:
    def collective(check: Callable[[Station, Axes], None]) -> Callable[[], None]:
        def run() -> None:
            for axes in axes_of(station.mesh):
                check(station, axes)

        return run

    for name, check in COLLECTIVES.items():
        yield name.replace("_", " "), collective(check)
    if station.device.type == "cuda":
        yield "order of kernels and messages", collective(_kernels_in_order)
    for name, text in plans.items():
        plan = Plan.from_json(text)
        yield f"training, {name}", lambda plan=plan: train_and_compare(plan, rank, station)  # type: ignore[misc]


def _expect(found: torch.Tensor, expected: torch.Tensor) -> None:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        raise WrongResultError(
            f"{tuple(found.shape)} of {found.dtype} arrived instead of {tuple(expected.shape)} of {expected.dtype}"
        )
    wrong = found != expected
    if bool(wrong.any()):
        first = int(wrong.nonzero()[0])
        raise WrongResultError(
            f"{int(wrong.sum())} of {found.numel()} elements of {found.dtype} are wrong, the first at {first}: "
            f"{found[first].item():g} instead of {expected[first].item():g}"
        )


# ---- collectives


def _all_reduce(station: Station, axes: Axes) -> None:
    for dtype in FLOATS:
        everyone = [station.values(m, dtype=dtype) for m in station.members(axes)]
        mine = station.values(station.communicator.position, dtype=dtype)
        station.communicator.all_reduce(mine, axes)
        _expect(mine, torch.stack(everyone).sum(0))


def _start_all_reduce(station: Station, axes: Axes) -> None:
    """Several at once, and one of the other kind in between."""
    communicator, count = station.communicator, 4
    mine = [station.values(communicator.position + i) for i in range(count)]
    pending = [communicator.start_all_reduce(buffer, axes) for buffer in mine]
    between = station.values(communicator.position)
    communicator.all_reduce(between, axes)
    for i, (work, buffer) in enumerate(zip(pending, mine, strict=True)):
        work.wait()
        _expect(buffer, torch.stack([station.values(m + i) for m in station.members(axes)]).sum(0))
    _expect(between, torch.stack([station.values(m) for m in station.members(axes)]).sum(0))


def _uneven(size: int) -> list[list[int]]:
    return [[COUNT] * size, [COUNT + 10 * i for i in range(size)], [i % 2 + 1 for i in range(size)]]


def _all_gather(station: Station, axes: Axes) -> None:
    members, position = station.members(axes), station.communicator.position
    for counts in _uneven(len(members)):
        everyone = [station.values(m, count) for m, count in zip(members, counts, strict=True)]
        mine = station.values(position, counts[members.index(position)])
        _expect(station.communicator.all_gather(mine, counts, axes), torch.cat(everyone))


def _reduce_scatter(station: Station, axes: Axes) -> None:
    members, position = station.members(axes), station.communicator.position
    for counts in _uneven(len(members)):
        total = torch.stack([station.values(m, sum(counts)) for m in members]).sum(0)
        found = station.communicator.reduce_scatter(station.values(position, sum(counts)), counts, axes)
        _expect(found, total.split(counts)[members.index(position)])


def _start_all_gather(station: Station, axes: Axes) -> None:
    """Two at once."""
    members, position = station.members(axes), station.communicator.position
    pending = []
    for i in range(2):
        result = torch.empty(COUNT * len(members), device=station.device)
        mine = station.values(position + i)
        pending.append((station.communicator.start_all_gather(result, mine, axes), result, mine))
    for i, (work, result, _) in enumerate(pending):
        work.wait()
        _expect(result, torch.cat([station.values(m + i) for m in members]))


def _start_reduce_scatter(station: Station, axes: Axes) -> None:
    """Two at once; one of them into its own part of the buffer."""
    members, position = station.members(axes), station.communicator.position
    index, count = members.index(position), COUNT * len(members)
    pending = []
    for i in range(2):
        buffer = station.values(position + i, count)
        own = torch.empty(COUNT, device=station.device) if i else buffer[index * COUNT :][:COUNT]
        pending.append((station.communicator.start_reduce_scatter(buffer, own, axes), own, buffer))
    for i, (work, own, _) in enumerate(pending):
        work.wait()
        _expect(own, torch.stack([station.values(m + i, count) for m in members]).sum(0)[index * COUNT :][:COUNT])


def _exchange(station: Station, axes: Axes) -> None:
    """Messages of all lengths, none at all included."""
    buffer, send_counts, receive_counts, expected = _messages(station, axes)
    _expect(station.communicator.exchange(buffer, send_counts, receive_counts, axes), expected)


def _start_exchange(station: Station, axes: Axes) -> None:
    buffer, send_counts, receive_counts, expected = _messages(station, axes)
    arrived = station.communicator.start_exchange(buffer, send_counts, receive_counts, axes)
    station.values(0).sum()  # meanwhile
    _expect(arrived(), expected)


def _messages(station: Station, axes: Axes) -> tuple[torch.Tensor, list[int], list[int], torch.Tensor]:
    """Return what a rank sends, how much to and from each member, and what it has to receive."""
    members, size = station.members(axes), len(station.members(axes))
    own = members.index(station.communicator.position)

    def message(source: int, target: int) -> torch.Tensor:
        return station.values(source + target, 100 * ((2 * source + 3 * target) % 4))

    sent, received = [message(own, i) for i in range(size)], [message(i, own) for i in range(size)]
    return torch.cat(sent), [x.numel() for x in sent], [x.numel() for x in received], torch.cat(received)


def _start_gather_ints(station: Station, _: Axes) -> None:
    communicator = station.communicator
    pending = [communicator.start_gather_ints(100 * i + communicator.position) for i in range(2)]
    for i, result in enumerate(pending):
        expected = [100 * i + position for position in range(station.mesh.size)]
        if (found := result()) != expected:
            raise WrongResultError(f"{found} arrived instead of {expected}")


def _broadcast(station: Station, _: Axes) -> None:
    for dtype in (*FLOATS, torch.int64):
        buffer = station.values(station.communicator.position, dtype=dtype)
        station.communicator.broadcast(buffer)
        _expect(buffer, station.values(0, dtype=dtype))


def _kernels_in_order(station: Station, axes: Axes) -> None:
    """A message waits for the kernels that make its buffer, and kernels behind it wait for the message."""
    stream, members = torch.cuda.Stream(station.device), station.members(axes)
    stream.wait_stream(torch.cuda.current_stream(station.device))
    with torch.cuda.stream(stream):
        slow = torch.ones(2048, 2048, device=station.device)
        for _ in range(50):
            slow = slow @ slow / 2048  # stays all ones
        mine = station.values(station.communicator.position) * slow[0, 0]
        others = mine.clone()
        work = station.communicator.start_all_reduce(mine, axes)
        gathered = station.communicator.all_gather(others, [COUNT] * len(members), axes)
        work.wait()
        doubled, behind = mine * 2, gathered * 2
    torch.cuda.current_stream(station.device).wait_stream(stream)
    everyone = [station.values(m) for m in members]
    _expect(doubled, torch.stack(everyone).sum(0) * 2)
    _expect(behind, torch.cat(everyone) * 2)


COLLECTIVES: Final[Mapping[str, Callable[[Station, Axes], None]]] = {
    "all_reduce": _all_reduce,
    "start_all_reduce": _start_all_reduce,
    "all_gather": _all_gather,
    "start_all_gather": _start_all_gather,
    "reduce_scatter": _reduce_scatter,
    "start_reduce_scatter": _start_reduce_scatter,
    "exchange": _exchange,
    "start_exchange": _start_exchange,
    "start_gather_ints": _start_gather_ints,
    "broadcast": _broadcast,
}
"""By method of ``Communicator``: all of them."""


# ---- training


def network() -> nn.Module:
    """Return the network that is trained: the same weights on every rank."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1, groups=4), nn.ReLU(),
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 10),
    ).double()  # fmt: skip


def train_and_compare(plan: Plan, rank: int, station: Station) -> None:
    """Train the network under a plan and on this device alone; compare outputs, gradients, weights and buffers.

    Raises:
        WrongResultError: with the tensor that is farthest from one device's.
    """
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(plan.batch, *INPUT_SHAPE, generator=generator, dtype=torch.float64).to(station.device)
    target = torch.randint(0, 10, (plan.batch,), generator=generator).to(station.device)
    alone = network().to(station.device)
    net = parallelize(network().to(station.device), plan, timeout_s=station.timeout_s)
    own = own_samples(plan, rank)
    wanted, found = _trained(alone, x, target), _trained(net, x[own], target[own])
    worst, name = max(_differences(alone, net, wanted[own], found))
    if not worst < TOLERANCE:
        raise WrongResultError(f"{name} differs from one device's by {worst:.1e}, relative to its largest value")


def _trained(net: nn.Module, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for _ in range(STEPS):
        optimizer.zero_grad()
        output: torch.Tensor = net(x)
        functional.cross_entropy(output, target).backward()
        optimizer.step()
    return output.detach()


def _differences(
    alone: nn.Module, net: ParallelModule, wanted: torch.Tensor, found: torch.Tensor
) -> Iterator[tuple[float, str]]:
    yield float((found - wanted).abs().max() / wanted.abs().max()), "the output"
    whole, mine = dict(alone.named_parameters()), dict(net.named_parameters())
    gradients = {f"the gradient of {name}": (mine[name].grad, p.grad, name) for name, p in whole.items()}
    weights = {name: (mine[name].detach(), p.detach(), name) for name, p in whole.items()}
    buffers = {name: (net.get_buffer(name), b, name) for name, b in alone.named_buffers()}
    for group in (gradients, weights, buffers):
        largest = max(float(b.abs().max()) for _, b, _ in group.values() if b is not None)
        for what, (a, b, name) in group.items():
            assert b is not None
            if a is None:
                raise WrongResultError(f"{what} is missing")
            region = net.held[name].region
            part = b[tuple(slice(i, j) for i, j in zip(region.start, region.stop, strict=True))]
            scale = max(float(b.abs().max()), NOISE_FLOOR * largest)
            yield float((a - part).abs().max()) / scale, what
