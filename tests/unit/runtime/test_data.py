"""What each rank reads: its part of every batch and of every sample, and nothing else."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import IterableDataset, TensorDataset

from planner.api import Options, Origin, Planner, machine_of, plan_model, prepare
from planner.errors import MismatchError, UsageError
from planner.frontend.lower import TracedModel
from planner.ir.dimension import Dimension
from planner.ir.split import Split
from planner.plan import Plan
from runtime.data import ArrayDataset, Batches, loader, own_part, own_samples, smallest_batch
from runtime.module import ParallelModule
from support.equality import run_ranks
from support.loops import assert_equal, build, images, loss_of, planned

H, S, R, W = Dimension.HEIGHT, Dimension.SAMPLE, Dimension.REPLICATE, Dimension.WIDTH


def epochs(batches: list[Batches]) -> list[list[list[int]]]:
    """Return, for every batch, the samples of every rank."""
    return [list(each) for each in zip(*batches, strict=True)]


@pytest.mark.parametrize(("num_samples", "devices"), [(37, 2), (35, 4), (8, 3), (30, 4)])
def test_ranks_share_the_batches_of_one_device(num_samples: int, devices: int) -> None:
    plan = planned(devices=devices)

    def made(rank: int, **options: Any) -> Batches:
        return Batches(num_samples, plan, rank, shuffle=True, seed=7, **options)

    everyone = [made(rank) for rank in range(devices)]
    alone = made(0)
    orders = []
    for epoch in (0, 3):
        for batches in [*everyone, alone]:
            batches.set_epoch(epoch)
        found, whole = epochs(everyone), list(alone.global_batches())
        assert [
            list(itertools.chain(*parts)) for parts in found
        ] == whole  # in order: sample k of a step is that of one device
        assert all(parts and max(map(len, parts)) - min(map(len, parts)) <= 1 for parts in found)
        assert all(min(map(len, parts)) > 0 for parts in found)
        seen = list(itertools.chain(*whole))
        rest = num_samples % 8
        assert len(seen) == len(set(seen)) == num_samples - (rest if rest < devices else 0)
        assert alone.num_dropped == num_samples - len(seen)
        orders.append(seen)
    assert orders[0] != orders[1]
    assert sum(1 for _ in made(0, drop_last=True)) == len(made(0, drop_last=True)) == num_samples // 8


def test_a_resumed_epoch_goes_on_where_it_was() -> None:
    batches = Batches(40, planned(), 1, shuffle=True)
    whole = list(batches)
    batches.set_epoch(0, start=3)
    assert len(batches) == 2
    assert list(batches) == whole[3:]
    assert list(batches) == whole


def test_too_few_samples_and_datasets_without_length_are_refused() -> None:
    plan = planned(devices=4)
    with pytest.raises(UsageError, match="at least 4 samples"):
        Batches(3, plan, 0)
    with pytest.raises(UsageError, match="drop_last"):
        Batches(7, plan, 0, drop_last=True)

    class Endless(IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            yield 1

    with pytest.raises(UsageError, match="length"):
        loader(Endless(), plan, rank=0)
    with pytest.raises(UsageError, match="equally many"):
        ArrayDataset(np.zeros((3, 2)), np.zeros(4))


@pytest.mark.parametrize("io", ["per-rank", "global"])
@pytest.mark.parametrize("solver", ["data", "model"])
def test_an_epoch_from_the_loader_is_that_of_one_device(io: str, solver: str) -> None:
    model, (x, target) = build(), images(21)
    plan = planned(solver, io=io)
    order = Batches(21, plan, 0, shuffle=True, seed=1)

    def train(net: nn.Module, batches: Any) -> None:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for own_x, own_target in batches:
            optimizer.zero_grad()
            loss_of(net, own_x, own_target).backward()
            optimizer.step()

    train(model, [(x[k], target[k]) for k in order.global_batches()])

    def work(net: ParallelModule, _: TracedModel, position: int) -> int:
        batches = loader(TensorDataset(x, target), plan, rank=plan.mesh.ranks[position], shuffle=True, seed=1)
        batches.set_epoch(0)
        train(net, batches)
        assert_equal(net, model, 1e-8)
        return len(batches)

    assert run_ranks(build, plan, work) == [3, 3]


# ---- regions


class Dense(nn.Module):
    """Scores for every position of an image."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(functional.relu(self.a(x)))


class Counted:
    """An array that counts the elements that are read of it."""

    def __init__(self, values: np.ndarray) -> None:
        self.values, self.shape, self.num_read = values, values.shape, 0

    def __getitem__(self, index: tuple[Any, ...]) -> np.ndarray:
        found = np.asarray(self.values[index])
        self.num_read += found.size
        return found


def dense() -> nn.Module:
    torch.manual_seed(0)
    return Dense().double()


def local_plan(
    build_net: Callable[[], nn.Module], x: torch.Tensor, inputs: tuple[Dimension, ...], outputs: tuple[Dimension, ...]
) -> Plan:
    """Return a plan whose inputs and outputs are split so; every other layer is split by samples or not at all."""
    devices = 2 ** len(inputs)
    mesh = f"gpu={'x'.join(['2'] * len(inputs))}"
    options = Options(mesh=mesh, all_devices=True, io="local", dimensions=("sample", "height", "width"))  # type: ignore[arg-type]
    planner: Planner = prepare(build_net(), (x,), machine_of(devices=devices), options, Origin("net"))
    plan = planner.plan()
    (stage,) = plan.stages
    wanted = {"input": Split.of(plan.mesh, inputs), "output": Split.of(plan.mesh, outputs)}
    layers = [
        layer.model_copy(update={"split": dict(wanted[layer.op].axes)}) if layer.op in wanted else layer
        for layer in stage.layers
    ]
    return plan.model_copy(update={"stages": [stage.model_copy(update={"layers": layers})]})


def test_a_rank_reads_only_its_rows_of_a_big_file(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(6, 2, 9, 6))
    classes = np.random.default_rng(1).integers(0, 3, size=(6, 9, 6))
    np.save(tmp_path / "x.npy", values)
    plan = local_plan(dense, torch.zeros(4, 2, 9, 6, dtype=torch.float64), (S, H), (S, H))
    for rank in range(4):
        x, y = Counted(np.load(tmp_path / "x.npy", mmap_mode="r")), Counted(classes)
        batches = loader(ArrayDataset(x, y), plan, rank=rank, targets=[("height", "width")])
        found = list(batches)
        rows = slice(0, 4) if rank % 2 == 0 else slice(4, 9)
        samples = [(0, 2), (4, 5)] if rank < 2 else [(2, 4), (5, 6)]
        assert len(found) == 2
        for (a, b), (images_, targets) in zip(samples, found, strict=True):
            np.testing.assert_array_equal(images_, values[a:b, :, rows])
            np.testing.assert_array_equal(targets, classes[a:b, rows])
        num_samples = sum(b - a for a, b in samples)
        assert x.num_read == num_samples * 2 * (rows.stop - rows.start) * 6
        assert y.num_read == num_samples * (rows.stop - rows.start) * 6


def test_a_rank_may_pass_rows_of_all_samples_and_get_the_scores_of_some() -> None:
    """A classifier whose images are cut and whose outputs are split by samples: targets are those of the outputs."""

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(functional.relu(self.conv(x)).mean((2, 3)))

    def made() -> nn.Module:
        torch.manual_seed(0)
        return Classifier().double()

    x, labels = torch.randn(5, 2, 8, 6, dtype=torch.float64), torch.arange(5) % 3
    plan = local_plan(made, x[:4], (H,), (S,))
    data = ArrayDataset(Counted(x.numpy()), Counted(labels.numpy()))
    first, last = (list(loader(data, plan, rank=rank, batch=5)) for rank in range(2))
    assert torch.equal(first[0][0], x[:, :, :4])
    assert torch.equal(last[0][0], x[:, :, 4:])
    assert torch.equal(first[0][1], labels[:2])
    assert torch.equal(last[0][1], labels[2:])
    assert own_part(plan, 1) == (slice(0, 4), slice(0, 2), slice(4, 8), slice(0, 6))
    assert own_samples(plan, 1, 3) == slice(0, 3)
    assert smallest_batch(plan) == 2

    model = made()
    loss_of(model, x, labels).backward()

    def work(net: ParallelModule, _: TracedModel, position: int) -> None:
        ((part, target),) = loader(data, plan, rank=position, batch=5)
        loss_of(net, part, target).backward()
        assert_equal(net, model)

    run_ranks(made, plan, work)


def test_whole_samples_are_cut_where_a_dataset_cannot_read_parts() -> None:
    x, classes = torch.randn(4, 2, 8, 6, dtype=torch.float64), torch.arange(4 * 48).view(4, 8, 6) % 3
    plan = local_plan(dense, x, (W, H), (W, H))
    found = [list(loader(TensorDataset(x, classes), plan, rank=r, targets=[(H, W)])) for r in range(4)]
    for rank, ((part, target),) in enumerate(found):
        rows, columns = slice(4 * (rank % 2), 4 * (rank % 2) + 4), slice(3 * (rank // 2), 3 * (rank // 2) + 3)
        assert torch.equal(part, x[:, :, rows, columns])
        assert torch.equal(target, classes[:, rows, columns])
    with pytest.raises(MismatchError, match="no such dimension"):
        list(loader(TensorDataset(x, classes), plan, rank=0, targets=[(H, None)]))
    with pytest.raises(MismatchError, match="said to be"):
        list(loader(TensorDataset(x, classes), plan, rank=0, targets=[(H,)]))


def test_every_input_of_a_model_has_its_part() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(2, 3, 3, padding=1)

        def forward(self, x: torch.Tensor, *, mask: torch.Tensor) -> torch.Tensor:
            return self.a(x) * mask

    x, mask = torch.randn(4, 2, 6, 6), torch.ones(4, 1, 6, 6)
    plan = plan_model(Two(), (x,), example_keywords={"mask": mask}, devices=2, solver="data", all_devices=True)
    assert {i.name for i in plan.model.inputs} == {"x", "mask"}
    assert own_part(plan, 1, "mask") == (slice(2, 4), slice(0, 1), slice(0, 6), slice(0, 6))
