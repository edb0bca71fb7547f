"""Which collectives a step posts, counted: what the cost model prices is what the runtime sends."""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import nn

from planner.api import Options, Origin, machine_of, prepare
from planner.frontend.lower import TracedModel
from planner.ir.dimension import Dimension
from planner.ir.split import LayerId
from planner.plan import Plan
from runtime.comm.communicator import Axes, ThreadCommunicator
from runtime.parallel import ParallelModule
from support.equality import run_ranks

BATCH = 4


class Counting(ThreadCommunicator):
    """Counts collectives and the bytes that this rank sends in all-gathers, reduce-scatters and exchanges."""

    counts: Counter[str]

    def all_reduce(self, buffer: torch.Tensor, axes: Axes) -> None:
        self._count("all_reduce")
        super().all_reduce(buffer, axes)

    def all_gather(self, buffer: torch.Tensor, counts: Sequence[int], axes: Axes) -> torch.Tensor:
        self._count("all_gather", buffer.nbytes * (len(counts) - 1))
        return super().all_gather(buffer, counts, axes)

    def reduce_scatter(self, buffer: torch.Tensor, counts: Sequence[int], axes: Axes) -> torch.Tensor:
        self._count("reduce_scatter", buffer.nbytes // len(counts) * (len(counts) - 1))
        return super().reduce_scatter(buffer, counts, axes)

    def exchange(
        self, buffer: torch.Tensor, send_counts: Sequence[int], receive_counts: Sequence[int], axes: Axes
    ) -> torch.Tensor:
        kept = send_counts[self.position] * buffer.element_size()
        self._count("exchange", buffer.nbytes - kept)
        return super().exchange(buffer, send_counts, receive_counts, axes)

    def _count(self, name: str, num_bytes: int = 0) -> None:
        counts: Counter[str] = self.__dict__.setdefault("counts", Counter())
        counts[name] += 1
        counts["bytes"] += num_bytes


class Inception(nn.Module):
    """One tensor with four readers whose results are joined."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.branches = nn.ModuleList(nn.Conv2d(8, 4, k, padding=k // 2) for k in (1, 3, 5, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        return torch.cat([branch(x) for branch in self.branches], 1)


def forced_plan(model: nn.Module, x: torch.Tensor, dimension_of: dict[str, Dimension]) -> Plan:
    """Return the plan on two ranks that splits every layer as asked."""
    planner = prepare(model, (x,), machine_of(devices=2), Options(), Origin())
    search = planner.search(planner.meshes()[0])
    strategy = {}
    for layer in planner.traced.layers.layers:
        wanted = dimension_of.get(layer.id, Dimension.SAMPLE)
        strategy[LayerId(layer.id)] = next(s for s in search.table.space.splits[layer.id] if s.dimensions == (wanted,))
    return planner.plan_of(search, search.forced(search.table.choice(strategy)))


def test_readers_of_one_tensor_share_one_gather_and_one_gradient_reduction() -> None:
    torch.manual_seed(0)
    x = torch.randn(BATCH, 3, 8, 8)
    branches = {f"branches.{i}": Dimension.OUT_CHANNEL for i in range(4)}
    plan = forced_plan(Inception(), x, {**branches, "stem:shared": Dimension.BROADCAST})

    def work(net: ParallelModule, _: TracedModel, position: int) -> dict[str, int]:
        net(x[position * 2 : position * 2 + 2]).sum().backward()
        return dict(net._state.communicator.__dict__["counts"])

    for counts in run_ranks(Inception, plan, work, Counting):
        sent = counts.pop("bytes")
        assert counts == {"all_gather": 1, "reduce_scatter": 1, "exchange": 8, "all_reduce": 1}
        stem, branch = BATCH * 8 * 64 * 4, BATCH * 4 * 64 * 4
        assert sent == 2 * stem // 2 + 8 * branch // 4


def test_the_cost_model_prices_the_bytes_that_the_runtime_sends() -> None:
    x = torch.randn(BATCH, 3, 8, 8)
    branches = {f"branches.{i}": Dimension.OUT_CHANNEL for i in range(4)}
    plan = forced_plan(Inception(), x, {**branches, "stem:shared": Dimension.BROADCAST})

    def work(net: ParallelModule, _: TracedModel, position: int) -> int:
        net(x[position * 2 : position * 2 + 2]).sum().backward()
        reduced = sum(p.numel() * 4 for p in net.get_submodule("stem").parameters())
        return net._state.communicator.__dict__["counts"]["bytes"] + reduced

    for sent in run_ranks(Inception, plan, work, Counting):
        assert sent == plan.totals.communication_bytes
