"""Checkpoints: any plan to any other, against one device that trains without a break."""

import copy
import json
import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict
from torch.optim.lr_scheduler import StepLR
from torch.optim.swa_utils import AveragedModel

from planner.errors import MismatchError, RunError, UsageError
from planner.frontend.lower import TracedModel
from planner.ir.region import Region
from planner.plan import Plan
from runtime import checkpoint
from runtime.checkpoint import saving, storage
from runtime.checkpoint.generators import generators, restore_generators
from runtime.checkpoint.stored import Stored
from runtime.checkpoint.whole import Part
from runtime.data import own_samples
from runtime.module import ParallelModule
from support.checkpoints import (
    OPTIMIZERS,
    TOLERANCE,
    Make,
    any_plan,
    assert_equal,
    build,
    difference,
    groups,
    train,
)
from support.equality import run_ranks


def save_on_threads(plan: Plan, folder: Path, make: Make, dropout: float = 0.0, seed: int = 0) -> None:
    """Train a model under a plan, ranks as threads, and save it."""

    def work(net: ParallelModule, _: TracedModel, position: int) -> storage.Job:
        optimizer = make(groups(net))
        scheduler = StepLR(optimizer, 1, 0.5)
        train(net, optimizer, own_samples(plan, plan.mesh.ranks[position]))
        scheduler.step()
        extra = {"scheduler": scheduler.state_dict(), "note": "here"}
        return saving._job(Part.of(net), optimizer, folder, 3, extra)

    storage.write_together(run_ranks(lambda: build(dropout, seed), plan, work))


@pytest.mark.parametrize(("number", "name"), list(enumerate(OPTIMIZERS)))
def test_six_steps_are_three_and_three_under_another_plan(number: int, name: str, tmp_path: Path) -> None:
    make, folder = OPTIMIZERS[name], tmp_path / "checkpoint"
    ranks = ((2, 4), (4, 2), (3, 2), (4, 4), (2, 3))[number % 5]
    sharding = ("none", "full", "optimizer")
    before, after = (any_plan(count, number + 7 * k, sharding[(number + k) % 3]) for k, count in enumerate(ranks))
    save_on_threads(before, folder, make)
    reference = build()
    theirs = make(groups(reference))
    train(reference, theirs)
    theirs.load_state_dict(copy.deepcopy(theirs.state_dict()))  # torch casts some states when it loads them
    for group in theirs.param_groups:
        group["lr"] *= 0.5
    train(reference, theirs)

    def work(net: ParallelModule, _: TracedModel, position: int) -> None:
        optimizer = make(groups(net)[::-1])
        scheduler = StepLR(optimizer, 1, 0.5)
        resumed = checkpoint.load(net, optimizer, folder)
        scheduler.load_state_dict(resumed.extra["scheduler"])
        assert (resumed.step, resumed.extra["note"]) == (3, "here")
        assert scheduler.get_last_lr()[0] == optimizer.param_groups[1]["lr"]
        train(net, optimizer, own_samples(after, after.mesh.ranks[position]))
        assert_equal(Part.of(net), optimizer, reference, theirs)

    run_ranks(lambda: build(seed=7), after, work)


def test_a_run_with_dropout_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    plan, folder, make = any_plan(2, 3, dropout=0.5), tmp_path / "checkpoint", OPTIMIZERS["amsgrad"]
    save_on_threads(plan, folder, make, dropout=0.5)

    def work(net: ParallelModule, _: TracedModel, position: int) -> dict[str, torch.Tensor]:
        optimizer, part = make(groups(net)), own_samples(plan, position)
        if resume:
            checkpoint.load(net, optimizer, folder)
        else:
            train(net, optimizer, part)
            for group in optimizer.param_groups:
                group["lr"] *= 0.5
        train(net, optimizer, part)
        return copy.deepcopy(net.state_dict())

    resume = True
    resumed = run_ranks(lambda: build(0.5, seed=5), plan, work)
    resume = False
    uninterrupted = run_ranks(lambda: build(0.5), plan, work)
    for mine, theirs in zip(resumed, uninterrupted, strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("sharding", ["none", "full"])
def test_full_states_are_those_of_one_device(sharding: str, tmp_path: Path) -> None:
    plan, make, file = any_plan(4, 1, sharding), OPTIMIZERS["amsgrad"], tmp_path / "model.pt"
    reference = build()
    theirs = make(groups(reference))
    train(reference, theirs)

    def work(net: ParallelModule, _: TracedModel, position: int) -> tuple[dict[str, Any], dict[str, Any]]:
        optimizer = make(groups(net))
        train(net, optimizer, own_samples(plan, position))
        checkpoint.export(net, file)
        averaged = AveragedModel(net)
        with pytest.raises(UsageError, match="'module' of this AveragedModel"):
            checkpoint.full_state_dict(averaged)
        everywhere = checkpoint.full_state_dict(averaged.module, everywhere=True)
        assert (checkpoint.full_state_dict(net) == {}) is (position > 0)
        state = checkpoint.full_optimizer_state_dict(net, optimizer, everywhere=True)
        pieces = copy.deepcopy(net.state_dict())
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.zero_()
        checkpoint.load_full(net, everywhere)
        assert all(torch.equal(pieces[name], tensor) for name, tensor in net.state_dict().items())
        fresh = make(groups(net))
        checkpoint.load_full_optimizer(net, fresh, state)
        assert_equal(Part.of(net), fresh, reference, theirs)
        return everywhere, state

    for full, state in run_ranks(build, plan, work):
        alone = build(seed=3)
        alone.load_state_dict(full)  # strict: no name is missing or too many
        optimizer = make(groups(alone)[::-1])
        set_optimizer_state_dict(alone, optimizer, state, options=StateDictOptions(strict=False))  # not all have one
        assert_equal(Part.of(alone), optimizer, reference, theirs)
        assert [g["lr"] for g in optimizer.param_groups] == [0.01, 0.02]
    plain = build(seed=3)
    plain.load_state_dict(torch.load(file, weights_only=True))
    assert plain.state_dict().keys() == torch.load(file, weights_only=True).keys()
    for name, tensor in reference.state_dict().items():
        assert difference(plain.state_dict()[name], tensor) < TOLERANCE
    assert list(tmp_path.iterdir()) == [file]


def test_what_lies_under_the_temporary_name_of_an_export_is_not_written_to(tmp_path: Path) -> None:
    file, other = tmp_path / "model.pt", tmp_path / "other"
    other.write_text("mine")
    (tmp_path / ".model.pt.unfinished").symlink_to(other)
    checkpoint.export(build(), file)
    assert torch.load(file, weights_only=True).keys() == build().state_dict().keys()
    assert (other.read_text(), sorted(tmp_path.iterdir())) == ("mine", [file, other])


def test_a_plain_module_saves_and_loads_and_torch_reads_the_weights(tmp_path: Path) -> None:
    net, make = build(), OPTIMIZERS["momentum"]
    optimizer = make(groups(net))
    train(net, optimizer)
    saving = checkpoint.start_saving(net, optimizer, tmp_path / "a", step=1, extra=[1.5])
    before, state = copy.deepcopy(net), copy.deepcopy(optimizer.state_dict())
    train(net, optimizer)  # does not change what is saved
    saving.wait()
    other = build(seed=4)
    theirs = make(groups(other))
    assert checkpoint.load(other, theirs, tmp_path / "a") == checkpoint.Resumed(1, [1.5])
    assert all(
        torch.equal(a, b) for a, b in zip(other.state_dict().values(), before.state_dict().values(), strict=True)
    )
    assert theirs.state_dict()["param_groups"] == state["param_groups"]
    for index, values in theirs.state_dict()["state"].items():
        assert torch.equal(values["momentum_buffer"], state["state"][index]["momentum_buffer"])
    torchs = {"model": {name: torch.zeros_like(t) for name, t in before.state_dict().items() if name != "again.weight"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is used in a single process
        state_dict_loader.load(torchs, checkpoint_id=tmp_path / "a")
    assert all(torch.equal(tensor, before.state_dict()[name]) for name, tensor in torchs["model"].items())


def test_torchs_generators_go_on(tmp_path: Path) -> None:
    net = build()
    torch.manual_seed(11)
    torch.rand(5)
    checkpoint.save(net, None, tmp_path / "a", step=0)
    expected = torch.rand(3)
    torch.manual_seed(12)
    checkpoint.load(net, None, tmp_path / "a")
    assert torch.equal(torch.rand(3), expected)
    saved, drawn = generators(torch.device("cpu")), set()
    for rank in (1, 2):
        restore_generators(saved, torch.device("cpu"), apart=rank)
        drawn.add(float(torch.rand(())))
    assert len(drawn) == 2


class TestReplacing:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        checkpoint.save(build(), None, tmp_path / "a", step=1)
        return tmp_path / "a"

    @pytest.mark.parametrize("moment", ["prepare", "write", "before the renames", "between the renames"])
    def test_a_save_that_is_killed_leaves_a_checkpoint(
        self, folder: Path, moment: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Killed(BaseException):
            pass

        def die(*_: Any) -> None:
            raise Killed

        with monkeypatch.context() as patch:
            match moment:
                case "prepare":
                    patch.setattr(storage._Writer, "write_data", die)
                case "write":
                    patch.setattr(storage._Saved, "resolve_data", die)
                case "before the renames":
                    patch.setattr(storage, "_sync", die)
                case _:
                    rename = Path.rename
                    patch.setattr(Path, "rename", lambda a, b: die() if a.name.endswith("hed") else rename(a, b))
            with pytest.raises(Killed):
                checkpoint.save(build(seed=1), None, folder, step=2)
        assert checkpoint.exists(folder)
        net = build(seed=2)
        assert checkpoint.load(net, None, folder).step == 1
        assert torch.equal(net.state_dict()["head.weight"], build().state_dict()["head.weight"])
        checkpoint.save(build(seed=1), None, folder, step=2)
        assert checkpoint.load(net, None, folder).step == 2
        assert sorted(p.name for p in folder.parent.iterdir()) == ["a"]

    def test_what_is_no_checkpoint_is_not_replaced(self, folder: Path) -> None:
        (folder / "notes.txt").write_text("mine")
        with pytest.raises(UsageError, match=r"notes\.txt"):
            checkpoint.save(build(), None, folder, step=2)
        with pytest.raises(UsageError, match="is a file"):
            checkpoint.save(build(), None, folder / "notes.txt", step=2)
        assert checkpoint.load(build(), None, folder).step == 1

    def test_links_in_a_circle_are_no_checkpoint_and_are_not_replaced(self, tmp_path: Path) -> None:
        (circle := tmp_path / "circle").symlink_to("circle")
        with pytest.raises(RunError, match=r"saving .*circle failed"):
            checkpoint.save(build(), None, circle, step=2)
        with pytest.raises(UsageError, match=r"there is no checkpoint .*circle"):
            checkpoint.load(build(), None, circle)
        assert checkpoint.load_newest(build(), None, circle) is None
        assert circle.is_symlink()

    @pytest.mark.parametrize("about", [b"", b"no archive", pickle.dumps(os.system), saving._packed([1])])
    def test_what_a_checkpoint_says_of_itself_may_be_anything(
        self, about: bytes, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Stored, "blobs", lambda _, *keys: dict.fromkeys(keys, about))
        with pytest.raises(UsageError, match=r"is damaged|was not written by this version"):
            checkpoint.load(build(), None, folder)

    def test_an_error_behind_training_is_raised_by_wait_or_by_the_next_save(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: Any) -> None:
            raise OSError("no space left")

        with monkeypatch.context() as patch:
            patch.setattr(storage._Saved, "resolve_data", fail)
            saving = checkpoint.start_saving(build(), None, folder, step=2)
            with pytest.raises(RunError, match="no space left"):
                saving.wait()
            checkpoint.start_saving(build(), None, folder, step=3)
            with pytest.raises(RunError, match="no space left"):
                checkpoint.save(build(), None, folder, step=4)
        checkpoint.save(build(), None, folder, step=5)
        assert checkpoint.load(build(), None, folder).step == 5

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda folder: (folder / ".metadata").unlink(), r"a is no complete checkpoint: \.metadata is missing"),
            (
                lambda folder: next(folder.glob("*.distcp")).unlink(),
                "a is no complete checkpoint: __0_0.distcp is miss",
            ),
            (lambda folder: os.truncate(next(folder.glob("*.distcp")), 99), "__0_0.distcp is damaged: it has 99 bytes"),
            (lambda folder: (folder / ".metadata").write_bytes(b"?"), "metadata is damaged: its checksum"),
            (lambda folder: (folder / ".checksums").write_text("{"), "checksums is damaged"),
            (lambda folder: without_checksums(folder).write_bytes(b"?"), "metadata cannot be read"),
            (
                lambda folder: folder.rename(folder.with_name(".a.unfinished")),
                "there is no checkpoint .*a, only .*unfin",
            ),
        ],
    )
    def test_damage_is_named(self, folder: Path, damage: Callable[[Path], Any], message: str) -> None:
        damage(folder)
        with pytest.raises(UsageError, match=message):
            checkpoint.load(build(), None, folder)

    def test_any_changed_byte_of_a_weight_is_found_before_anything_is_overwritten(self, folder: Path) -> None:
        file = next(folder.glob("*.distcp"))
        whole, weight = file.read_bytes(), build().state_dict()["first.weight"].numpy().tobytes()
        place = whole.index(weight)
        net = build(seed=5)
        before = copy.deepcopy(net.state_dict())
        for offset in (0, 7, len(weight) - 1):
            changed = bytearray(whole)
            changed[place + offset] ^= 1 << (offset % 8)
            file.write_bytes(changed)
            with pytest.raises(UsageError, match=r"damaged: the bytes of model.first.weight are not those written"):
                checkpoint.load(net, None, folder)
        assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
        without_checksums(folder)  # as of an older version: it loads, unchecked
        assert checkpoint.load(net, None, folder).step == 1

    def test_damage_to_anything_that_is_loaded_is_found_before_anything_is_overwritten(self, folder: Path) -> None:
        net = build(seed=5)
        before = copy.deepcopy(net.state_dict())
        generator = torch.get_rng_state()
        pieces = json.loads((folder / ".checksums").read_text())["pieces"]
        found = set()
        for name, offset, length, _ in pieces:
            whole = (folder / name).read_bytes()
            changed = bytearray(whole)
            changed[offset + length // 2] ^= 1
            (folder / name).write_bytes(changed)
            with pytest.raises(UsageError, match=r"damaged: the bytes of \S+ are not") as caught:
                checkpoint.load(net, None, folder)
            found.add(str(caught.value).partition("the bytes of ")[2].split()[0])
            (folder / name).write_bytes(whole)
        assert {"random.0", "model.first.weight"} <= found
        assert len(found) == len(pieces)
        assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
        assert torch.equal(torch.get_rng_state(), generator)


def without_checksums(folder: Path) -> Path:
    (folder / ".checksums").unlink()
    return folder / ".metadata"


class TestMismatch:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        net = build()
        optimizer = OPTIMIZERS["momentum"](groups(net))
        train(net, optimizer, steps=1)
        checkpoint.save(net, optimizer, tmp_path / "a", step=1)
        return tmp_path / "a"

    def test_another_model_lists_all_differences_and_overwrites_nothing(self, folder: Path) -> None:
        net: nn.Module = build(hidden=12)
        net.unused = nn.Identity()
        net.extra = nn.Linear(2, 2)
        before = copy.deepcopy(net.state_dict())
        with pytest.raises(MismatchError) as caught:
            checkpoint.load(net, None, folder)
        lines = str(caught.value).splitlines()
        assert "  extra.weight is missing" in lines
        assert "  unused.bias is not in the model" in lines
        assert "  first.weight has shape (10, 3, 3, 3), the model's has (12, 3, 3, 3)" in lines
        assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())

    def test_tied_weights_load_into_untied_ones(self, folder: Path) -> None:
        net, saved = build(seed=1), build()
        net.again.weight = nn.Parameter(torch.zeros_like(net.second.weight))
        checkpoint.load(net, None, folder)
        assert torch.equal(net.again.weight, net.second.weight)
        assert not torch.equal(net.again.weight, saved.again.weight)  # it was trained
        with pytest.raises(MismatchError, match="shift is not in the model"):
            checkpoint.load_full(net, {**net.state_dict(), "shift": torch.zeros(1)})

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda net: torch.optim.Adam(net.parameters()), "the state is of SGD, the optimizer is Adam"),
            (lambda net: torch.optim.SGD(net.head.parameters(), lr=1.0), "norm.bias is not in the optimizer"),
            (lambda net: torch.optim.SGD(net.parameters(), lr=1.0), r"group 0 .* of the saved groups \[0, 1\]"),
        ],
    )
    def test_another_optimizer(self, folder: Path, make: Make, message: str) -> None:
        net = build(seed=1)
        before = copy.deepcopy(net.state_dict())
        with pytest.raises(MismatchError, match=message):
            checkpoint.load(net, make(net), folder)
        assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())

    def test_what_cannot_be_saved(self, tmp_path: Path) -> None:
        net = build()
        with pytest.raises(UsageError, match=r"extra\['best'\] is a Odd"):
            checkpoint.save(net, None, tmp_path / "b", step=0, extra={"fine": 1, "best": net})
        with pytest.raises(UsageError, match="not of the given module"):
            checkpoint.save(net, torch.optim.SGD(build().parameters()), tmp_path / "b", step=0)
        lbfgs = torch.optim.LBFGS(net.parameters())
        lbfgs.state[next(net.parameters())]["old_dirs"] = [torch.zeros(2)]
        with pytest.raises(UsageError, match="LBFGS keeps a list as 'old_dirs'"):
            checkpoint.save(net, lbfgs, tmp_path / "b", step=0)
        assert list(tmp_path.iterdir()) == []


def test_every_region_is_written_once_and_bytes_are_balanced() -> None:
    halves = tuple(Region((i * 5, 0), (i * 5 + 5, 8)) for i in (0, 0, 1, 1))
    whole = (Region((0, 0), (10, 8)),) * 4
    entries = [storage.Entry(("halves", str(i)), torch.zeros(5, 8), (10, 8), halves) for i in range(4)] + [
        storage.Entry(("whole", str(i)), torch.zeros(10, 8), (10, 8), whole) for i in range(4)
    ]
    shares = storage.shares(entries, 4)
    written = [(entry.path, entry.regions[position]) for position, share in enumerate(shares) for entry in share]
    assert len(written) == len(set(written)) == 4 * 2 + 4
    num_bytes = [sum(r.volume for e in share if (r := e.regions[p])) for p, share in enumerate(shares)]
    assert max(num_bytes) - min(num_bytes) <= 80
