"""Networks whose branches may run on different ranks, and random plans that run them so."""

from collections.abc import Callable

import torch
from torch import nn

from planner.api import Options, Origin, machine_of, prepare
from planner.cost.table import CostTable
from planner.frontend.lower import TracedModel
from planner.ir.branches import fork_join_regions
from planner.plan import Plan
from planner.search.auto import Search
from planner.search.branches import Assignment, alone_splits, assigned_space
from runtime.data import own_samples
from runtime.module import ParallelModule
from support.equality import own_parts, run_ranks

BATCH = 4


def conv(inside: int, out: int, kernel: int = 3) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inside, out, kernel, padding=kernel // 2), nn.BatchNorm2d(out), nn.ReLU(inplace=True)
    )


class Inception(nn.Module):
    """A block of four branches, one of which forks again, between a stem and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 6)
        self.one, self.three = conv(6, 4, 1), nn.Sequential(conv(6, 4, 1), conv(4, 6))
        self.five = conv(6, 4, 5)
        self.five_a, self.five_b = conv(4, 3, 1), conv(4, 5)
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), conv(6, 4, 1))
        self.head = nn.Sequential(conv(22, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        five = self.five(x)
        inner = torch.cat([self.five_a(five), self.five_b(five)], 1)
        return self.head(torch.cat([self.one(x), self.three(x), inner, self.pool(x)], 1))


class TwoTowers(nn.Module):
    """AlexNet as it was trained first: two towers that meet at the third convolution and in the linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (self._early() for _ in range(2))
        self.third_one, self.third_two = (nn.Conv2d(12, 6, 3, padding=1) for _ in range(2))
        self.late_one, self.late_two = (
            nn.Sequential(nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1), nn.ReLU(),
                          nn.MaxPool2d(2), nn.Flatten())
            for _ in range(2)
        )  # fmt: skip
        self.head = nn.Sequential(nn.Linear(32, 12), nn.ReLU(), nn.Linear(12, 5))

    @staticmethod
    def _early() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 4, 5, stride=2, padding=2), nn.ReLU(), nn.LocalResponseNorm(3), nn.MaxPool2d(2),
            nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        both = torch.cat([self.one(x), self.two(x)], 1)
        late = [self.late_one(self.third_one(both)), self.late_two(self.third_two(both))]
        return self.head(torch.cat(late, 1))


class Joined(nn.Module):
    """Two networks on one image, or an image each, whose features a linear layer joins."""

    def __init__(self, num_inputs: int) -> None:
        super().__init__()
        self.num_inputs = num_inputs
        self.plain = nn.Sequential(conv(3, 6), nn.MaxPool2d(2), conv(6, 4), nn.Flatten(), nn.Linear(256, 10))
        self.deep, self.skip, self.mean = conv(3, 6), conv(6, 6), nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        deep = self.deep(x if y is None else y)
        deep = self.mean(self.skip(deep) + deep).flatten(1)
        return self.head(torch.cat([self.plain(x), deep], 1))


class Bytes(nn.Module):
    """Parallel convolutions of several lengths on the raw bytes of a file."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 6)
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv1d(6, 4, k, padding=k // 2), nn.ReLU(), nn.Conv1d(4, 4, 3), nn.AdaptiveMaxPool1d(1))
            for k in (3, 5, 7)
        )
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embedding(x).transpose(1, 2)
        return self.head(torch.cat([branch(x) for branch in self.branches], 1))


class Volumes(nn.Module):
    """Branches whose results have other types under autocast: pools of volumes are computed in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(1, 4, 3, padding=1)
        self.pool, self.norm = nn.AvgPool3d(3, 1, 1), nn.Sequential(nn.Conv3d(4, 4, 1), nn.GroupNorm(2, 4))
        self.plain = nn.Sequential(nn.Conv3d(4, 4, 3, padding=1), nn.ReLU())
        self.head = nn.Sequential(nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(12, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head(torch.cat([self.pool(x), self.norm(x), self.plain(x)], 1))


class Single(nn.Module):
    """A branch whose result is float32 whatever the model's type is, as attention is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = conv(3, 4), conv(4, 4), nn.Conv2d(4, 4, 1)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        queries, keys = self.two(x).flatten(2).chunk(2, 1)
        weights = queries.float() @ keys.float().transpose(1, 2)
        attended = weights.to(x.dtype) @ x.flatten(2)[:, :2]
        return self.head(torch.cat([self.one(x), attended.unflatten(2, x.shape[2:]), x], 1))


def images(count: int) -> Callable[[torch.Generator], tuple[torch.Tensor, ...]]:
    return lambda g: tuple(torch.randn(BATCH, 3, 16, 16, generator=g, dtype=torch.float64) for _ in range(count))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[torch.Generator], tuple[torch.Tensor, ...]]]] = {
    "inception": (Inception, images(1)),
    "two towers": (TwoTowers, images(1)),
    "joined": (lambda: Joined(1), images(1)),
    "an input each": (lambda: Joined(2), images(2)),
    "volumes": (Volumes, lambda g: (torch.randn(BATCH, 1, 6, 6, 6, generator=g, dtype=torch.float64),)),
    "single": (Single, images(1)),
    "bytes": (Bytes, lambda g: (torch.randint(0, 256, (BATCH, 40), generator=g),)),
}


def built(name: str) -> nn.Module:
    """Return a network with fixed weights, whose batch norms have seen a batch."""
    torch.manual_seed(0)
    model = NETWORKS[name][0]().double()
    with torch.no_grad():
        model(*inputs_of(name, seed=2))
    return model


def inputs_of(name: str, seed: int = 1) -> tuple[torch.Tensor, ...]:
    """Return the whole batch."""
    return NETWORKS[name][1](torch.Generator().manual_seed(seed))


def random_assignment(search: Search, pick: Callable[[int], int]) -> Assignment | None:
    """Return some branches of a random region on random coordinates of a random axis; None where none can be."""
    space = search.table.space
    regions = fork_join_regions(space.graph)
    region, axis = regions[pick(len(regions))], pick(len(space.mesh.axes))
    coordinates = {}
    for branch in region.branches:
        if all(alone_splits(space, i, axis, 0) for i in branch) and pick(4):
            coordinates.update(dict.fromkeys(branch, pick(space.mesh.shape[axis])))
    return Assignment(region, axis, coordinates, 0.0) if coordinates else None


def random_plan(name: str, seed: int) -> Plan:
    """Return a plan with branches on coordinates of their own, and random splits of everything else."""
    generator = torch.Generator().manual_seed(seed)

    def pick(count: int) -> int:
        return int(torch.randint(count, (), generator=generator))

    machine = machine_of(devices=(2, 4, 3)[seed % 3])
    planner = prepare(built(name), inputs_of(name), machine, Options(all_devices=True), Origin(name, name))
    meshes = planner.meshes()
    search = planner.search(meshes[pick(len(meshes))])
    taken: list[Assignment] = []
    for _ in range(20):
        new = random_assignment(search, pick)
        if new is not None and all(new.region.layers.isdisjoint(own.region.layers) for own in taken):
            taken.append(new)
        if len(taken) == 2:
            break
    table = CostTable.of(assigned_space(search.table.space, taken), search.table.model)
    found = Search(table, None)
    options = tuple(pick(len(costs)) for costs in found.formulation.problem.node_s)
    return planner.plan_of(found, found.forced(found.formulation.layer_choice(options)))


def branched_plan(name: str, ranks: dict[str, int]) -> Plan:
    """Return a plan for two devices in which these layers run on one rank each; other splits are drawn."""
    planner = prepare(
        built(name), inputs_of(name), machine_of(devices=2), Options(all_devices=True), Origin(name, name)
    )
    search = planner.search(planner.meshes()[0])
    graph = search.table.space.graph
    region, *_ = fork_join_regions(graph)
    placed = {i: ranks[layer.id] for i, layer in enumerate(graph.layers) if layer.id in ranks}
    table = CostTable.of(assigned_space(search.table.space, [Assignment(region, 0, placed, 0.0)]), search.table.model)
    found = Search(table, None)
    options = tuple(0 for _ in found.formulation.problem.node_s)
    return planner.plan_of(found, found.forced(found.formulation.layer_choice(options)))


def scalar(output: torch.Tensor) -> torch.Tensor:
    """Return a mean over samples, so that ranks with equal shares average to the whole."""
    return (output * torch.linspace(-1, 1, output[0].numel(), dtype=output.dtype)).sum(1).mean()


def assert_equals_one_device(name: str, plan: Plan, tolerance: float = 1e-9) -> None:
    """Hold outputs in training and evaluation, every gradient and every buffer against one device's."""
    inputs, alone = inputs_of(name), built(name)
    expected_eval = alone.eval()(*inputs).detach()
    expected = alone.train()(*inputs)
    scalar(expected).backward()
    gradients = {n: p.grad for n, p in alone.named_parameters()}
    buffers = dict(alone.named_buffers())

    def work(net: ParallelModule, traced: TracedModel, position: int) -> None:
        part = own_samples(plan, plan.mesh.ranks[position])
        own = tuple(x[part] for x in inputs)
        net.eval()
        with torch.no_grad():
            torch.testing.assert_close(net(*own), expected_eval[part], rtol=tolerance, atol=tolerance)
        net.train()
        found = net(*own)
        torch.testing.assert_close(found, expected[part], rtol=tolerance, atol=tolerance)
        scalar(found).backward()
        parts = own_parts(plan, traced, position)
        for key, parameter in net.named_parameters():
            whole = gradients[key]
            assert whole is not None
            mine = whole[parts[key]]
            if mine.numel():
                assert parameter.grad is not None, key
                torch.testing.assert_close(
                    parameter.grad, mine, rtol=tolerance, atol=tolerance * float(whole.abs().max()) + 1e-14
                )
            else:
                assert parameter.numel() == 0
        for key, buffer in net.named_buffers():
            torch.testing.assert_close(buffer, buffers[key][parts.get(key, ())], rtol=tolerance, atol=tolerance)

    run_ranks(lambda: built(name), plan, work)
