"""`layerwise doctor`: what it runs, that each check can fail, and how it ends."""

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from planner.errors import RunError
from planner.ir.mesh import Mesh
from planner.measure.surroundings import surroundings
from runtime import doctor
from runtime.comm.communicator import Communicator, ThreadCommunicator, ThreadWorld
from support.command_line import layerwise

METHODS = {name for name in vars(Communicator) if not name.startswith("_")}
MESH = Mesh.of(outer=2, inner=3)


@pytest.mark.dist
@pytest.mark.slow
def test_every_collective_and_every_strategy_passes_on_local_processes() -> None:
    ran = layerwise("doctor", "--ranks", "2")
    assert ran.code == 0, ran.out + ran.err
    lines = [line for line in ran.out.splitlines() if line.startswith("gloo, CPU, 2 ranks")]
    checks = [*(name.replace("_", " ") for name in sorted(METHODS)), "training, data", "training, conv-data-fc-model",
              "training, spatial", "training, sample-spatial"]  # fmt: skip
    for check in checks:
        assert any(f" {check}  " in line and " ok " in line for line in lines), f"{check} is missing:\n{ran.out}"
    assert "MALLOC_TRIM_THRESHOLD_" in ran.out
    assert f"all {len(ran.out.split('why')[1].splitlines()) - 2} checks passed" in ran.err


@pytest.mark.parametrize("arguments", [("--ranks", "0"), ("--ranks", "65"), ("--timeout", "0"), ("--ranks", "two")])
def test_senseless_requests_are_refused(arguments: tuple[str, ...]) -> None:
    ran = layerwise("doctor", *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert arguments[0] in ran.error


def test_torchrun_says_how_many_ranks_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    ran = layerwise("doctor", "--ranks", "2")
    assert ran.code == 2
    assert "torchrun has started this one" in ran.error


def row(reason: str = "") -> dict[str, Any]:
    return {"where": "somewhere", "check": "something", "seconds": 1.0, "reason": reason}


def test_a_check_that_fails_on_one_rank_ends_with_5_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.launch.run_local", lambda *_, **__: [[row(), row()], [row(), row("3 instead of 2")]])
    ran = layerwise("doctor", "--ranks", "2")
    assert ran.code == 5
    assert ran.out.count("FAILED") == 1
    assert "1 of 2 checks failed, the first: somewhere, something: rank 1: 3 instead of 2" in ran.err


def test_processes_that_die_end_with_5(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RunError("rank 1 was killed by SIGKILL")

    monkeypatch.setattr("runtime.launch.run_local", fail)
    ran = layerwise("doctor", "--ranks", "2")
    assert ran.code == 5
    assert "rank 1 was killed by SIGKILL" in ran.out


# ---- the checks themselves, on threads


def on_every_rank(
    check: Callable[[doctor.Station], None], kind: type[ThreadCommunicator]
) -> list[BaseException | None]:
    """Return what the ranks raise."""
    world, found = ThreadWorld(MESH, timeout_s=5.0), dict[int, BaseException | None]()

    def rank(position: int) -> None:
        try:
            check(doctor.Station("threads", torch.device("cpu"), kind(world, position), 10.0))
            found[position] = None
        except Exception as error:
            found[position] = error
            world.abort()

    threads = [threading.Thread(target=rank, args=(position,)) for position in range(MESH.size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[position] for position in range(MESH.size)]


def wrong(method: str) -> type[ThreadCommunicator]:
    """Return a communicator one of whose methods gives the last rank a number that is off by one."""

    def off(self: ThreadCommunicator, *arguments: Any) -> Any:
        result = getattr(super(Wrong, self), method)(*arguments)
        if self.position != MESH.size - 1:
            return result
        if method == "start_gather_ints":
            return lambda: [*result()[:-1], -1]
        if method == "start_exchange":
            return lambda: result() + 1
        tensor = result if isinstance(result, torch.Tensor) else arguments[method == "start_reduce_scatter"]
        tensor[-1] += 1
        return result

    Wrong = type("Wrong", (ThreadCommunicator,), {method: off})  # noqa: N806  a class
    return Wrong


def test_all_methods_of_the_communicator_are_checked() -> None:
    assert set(doctor.COLLECTIVES) == METHODS - {"mesh", "position"}


@pytest.mark.parametrize("method", doctor.COLLECTIVES)
def test_a_check_passes_what_is_right_and_finds_a_single_wrong_number(method: str) -> None:
    def everywhere(station: doctor.Station) -> None:
        for axes in doctor.axes_of(station.mesh):
            doctor.COLLECTIVES[method](station, axes)

    def among_all(station: doctor.Station) -> None:
        doctor.COLLECTIVES[method](station, doctor.axes_of(station.mesh)[-1])

    assert on_every_rank(everywhere, ThreadCommunicator) == [None] * MESH.size
    *_, last = on_every_rank(among_all, wrong(method))
    assert isinstance(last, doctor.WrongResultError)


def trained(seed: int) -> Any:
    """Return a network with gradients, which holds all of itself."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    net(torch.rand(4, 3)).square().sum().backward()
    for name, tensor in net.state_dict().items():
        region = SimpleNamespace(start=(0,) * tensor.dim(), stop=tuple(tensor.shape))
        vars(net).setdefault("held", {})[name] = SimpleNamespace(region=region)
    return net


def test_a_training_that_differs_is_found() -> None:
    y = torch.ones(4, 2)
    assert {value for value, _ in doctor._differences(trained(1), trained(1), y, y)} == {0.0}
    found = {name: value for value, name in doctor._differences(trained(1), trained(2), y, y + 1e-6)}
    same = {"1.weight", "1.bias", "1.num_batches_tracked"}  # ones, zeros and one
    assert {name for name, value in found.items() if value > doctor.TOLERANCE} == found.keys() - same
    names = {"0.weight", "0.bias", "1.weight", "1.bias"}
    buffers = {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert found.keys() == {"the output"} | names | {f"the gradient of {name}" for name in names} | buffers


# ---- the machine


def test_what_is_missing_comes_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MALLOC_MMAP_MAX_", raising=False)
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "2.36"))
    facts = {fact.name: fact for fact in surroundings(2)}
    assert "export MALLOC_MMAP_MAX_=0" in facts["MALLOC_MMAP_MAX_"].advice
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "0")
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    facts = {fact.name: fact for fact in surroundings(2)}
    assert (facts["MALLOC_MMAP_MAX_"].value, facts["MALLOC_MMAP_MAX_"].advice) == ("0", "")
    assert facts["torch"].value == torch.__version__
    many = {fact.name: fact for fact in surroundings(10_000)}
    assert "10000 ranks share" in many["cores this process may use"].advice
