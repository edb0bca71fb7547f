"""The examples, run by the very commands that their texts give."""

import csv
import importlib.util
import os
import re
import runpy
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.domain_decomposition.data import load
from examples.domain_decomposition.networks import small_cnn
from planner.frontend import zoo
from planner.plan import Plan
from runtime.decomposition import Decomposition, Recipe, Settings, fit
from runtime.launch import run_local
from support import pages, typed
from support.command_line import layerwise

pytestmark = [pytest.mark.dist, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
SCRIPTS = {
    "bash": ["bash"],
    "layerwise": [sys.executable, "-m", "planner"],
    "torchrun": [sys.executable, "-m", "torch.distributed.run"],
    "python": [sys.executable],
}
COVERAGE = ["python", "-m", "examples.benchmarks.coverage"]
ENVIRONMENT = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def commands_of(file: str) -> list[list[str]]:
    """Return the commands in the text on top of an example: its indented lines."""
    text = (ROOT / file).read_text()
    if file.endswith(".sh"):
        lines = [line.removeprefix("#") for line in text.splitlines() if line.startswith("#     ")]
    else:
        lines = text.split('"""')[1].splitlines()
    return [shlex.split(line) for line in lines if line.startswith("    ")]


def resumed() -> list[list[str]]:
    """Return the commands by which the page of the examples goes on under another plan."""
    (block,) = re.findall(r"```sh\n([^`]*--checkpoint[^`]*)```", (ROOT / "examples" / "README.md").read_text())
    lines = [shlex.split(line, comments=True) for line in block.splitlines()]
    return [[word for word in line if word not in {"--checkpoint", "digits"}] for line in lines]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


@pytest.fixture
def folder(tmp_path: Path, host_cache: Path) -> Path:
    """A folder in which the examples can be named as from the repository root."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "cache").symlink_to(host_cache)
    return tmp_path


def run(command: list[str], folder: Path, exit_code: int = 0) -> str:
    """Return what a command prints."""
    name, *arguments = command if command[0] != "sudo" else command[1:]
    environment = os.environ | ENVIRONMENT | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]), "XDG_CACHE_HOME": str(folder / "cache"),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]), "PORT": str(free_port()),
    }  # fmt: skip
    done = subprocess.run(
        [*SCRIPTS[name], *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=900,
        check=False,
    )  # fmt: skip
    assert done.returncode == exit_code, (
        f"{shlex.join(command)} exited with {done.returncode}\n{done.stdout}\n{done.stderr}"
    )
    return done.stdout


@pytest.mark.skipif(not os.environ.get("LAYERWISE_FULL"), reason="run with LAYERWISE_FULL=1")
@pytest.mark.parametrize("page", [page for page in pages.pages() if typed.runs(page)], ids=pages.name)
def test_commands_of_a_page_run_a_smaller_size_where_they_take_long(page: Path, folder: Path) -> None:
    for command in (*typed.given(page), *typed.runs(page)):
        words = shlex.split(typed.SMALLER.get(command, "{}").format(command))
        if words[0] != "sudo" or os.geteuid() == 0:
            run(words, folder)


def test_the_training_script_learns_the_digits_under_a_plan_made_for_it(folder: Path) -> None:
    plan_it, _ = commands_of("examples/train.py")
    run(plan_it, folder)
    assert Plan.load(folder / "plan.json").mesh.size == 2
    _, two_nodes = commands_of("examples/two_nodes.sh")
    kept = ["--checkpoint", "digits"]
    printed = run([*two_nodes, *kept], folder)
    for words in resumed():
        printed += run([*words, *kept, "--export", "digits.pt"] if words[0] == "torchrun" else words, folder)
    epochs = re.findall(r"^epoch (\d): loss ([\d.]+), test accuracy ([\d.]+)%$", printed, re.MULTILINE)
    assert [int(epoch) for epoch, _, _ in epochs] == [1, 2, 3, 4, 5]
    losses, accuracies = zip(*((float(loss), float(share)) for _, loss, share in epochs), strict=True)
    assert losses[-1] < losses[0] / 5
    assert accuracies[-1] > 95
    build_model = runpy.run_path(str(ROOT / "examples/train.py"))["build_model"]
    build_model().load_state_dict(torch.load(folder / "digits.pt", weights_only=True))


# The commands that plan the examples of one job; the rest of their texts starts this job with torchrun.
HAS_LIGHTNING = importlib.util.find_spec("lightning") is not None
PLANNED: dict[str, tuple[dict[str, str], int]] = {  # what makes it smaller, and steps
    "own_cnn.py": ({"--model-args": "width=8"}, 6),
    "resnet_images.py": ({"--batch": "16", "--model-args": "width=0.5"}, 2),
    "large_images.py": ({"--input": "1,64,64", "--model-args": "width=0.125"}, 6),
    "lightning_loop.py": ({}, 12),
}


def with_options(words: list[str], options: dict[str, str]) -> list[str]:
    """Return a command with other values of some options."""
    kept = [word for i, word in enumerate(words) if word not in options and words[i - 1] not in options]
    return [*kept, *(word for pair in options.items() for word in pair)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, host_cache: Path) -> list[dict[str, Any]]:
    """What ``main`` of each example returns on each of two ranks, under the plan of its text, made smaller."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "examples").symlink_to(ROOT / "examples")
    argument = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("XDG_CACHE_HOME", str(host_cache))
        patch.syspath_prepend(ROOT)
        for name, (smaller, steps) in PLANNED.items():
            if name == "lightning_loop.py" and not HAS_LIGHTNING:
                continue
            plan_it, train_it = commands_of(f"examples/{name}")
            planned = layerwise(*with_options(plan_it[1:], smaller | {"-o": f"{name}.json"}))
            assert planned.code == 0, planned.err
            assert train_it[3:5] == [f"examples/{name}", "plan.json"]
            argument[name] = [str(folder / f"{name}.json"), "--steps", str(steps)]
        ranks: Any = run_local("support.example_ranks:run_examples", argument, num_ranks=2, timeout_s=600.0)
    return ranks


def test_a_network_with_a_module_of_its_own_learns(trained: list[dict[str, Any]]) -> None:
    for rank in trained:
        assert len(rank["own_cnn.py"]) == 6
        assert rank["own_cnn.py"][-1] < rank["own_cnn.py"][0]


def test_a_resnet_trains_on_images_and_all_ranks_print_the_same_loss(trained: list[dict[str, Any]]) -> None:
    first, second = (rank["resnet_images.py"] for rank in trained)
    assert first == second
    assert 0 < first[0] < 10


@pytest.mark.zoo
def test_a_folder_of_images_is_data_too(tmp_path: Path) -> None:
    from PIL import Image

    for number, colour in enumerate(("red", "green", "red", "green")):
        (tmp_path / colour).mkdir(exist_ok=True)
        Image.new("RGB", (40, 30), colour).save(tmp_path / colour / f"{number}.png")
    zoo.families("torchvision")  # imports it, beside a CPU build of torch too
    dataset = runpy.run_path(str(ROOT / "examples/resnet_images.py"))["folder"](tmp_path, 24)
    assert [(tuple(image.shape), label) for image, label in dataset] == [((3, 24, 24), k) for k in (0, 0, 1, 1)]
    assert dataset[3][0][0].eq(1).all()  # the red channel


def test_each_rank_has_its_rows_of_a_large_image(trained: list[dict[str, Any]]) -> None:
    for rank in trained:
        losses, shape = rank["large_images.py"]
        assert shape == [1, 32, 64]
        assert losses[-1] < losses[0]


@pytest.mark.skipif(not HAS_LIGHTNING, reason="needs pip install 'layerwise[lightning]'")
def test_lightning_trains_under_a_plan(trained: list[dict[str, Any]]) -> None:
    for rank in trained:
        losses = rank["lightning_loop.py"]
        assert len(losses) == 12
        assert sum(losses[-3:]) < sum(losses[:3])


def test_a_machine_of_ones_own_is_planned_for(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(folder)
    runpy.run_path(str(ROOT / "examples/custom_cluster.py"))["main"]()
    slow, _, fast = (float(line.split()[-2]) for line in capsys.readouterr().out.splitlines())
    assert slow > fast >= 1
    ran = layerwise("plan", "lenet5", "--cluster", "./lab.json")
    assert Plan.from_json(ran.out).cluster.name == "lab"


def test_a_plan_is_made_again_from_a_run_of_it(folder: Path, host_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(host_cache))
    monkeypatch.syspath_prepend(ROOT)
    lines = [shlex.split(line) for line in (ROOT / "examples/calibrate.sh").read_text().splitlines()]
    for words in (line for line in lines if line[:1] == ["layerwise"]):
        ran = layerwise(*words[1:], *(["--steps", "2"] if words[1] == "run" else []))
        assert ran.code == 0, ran.err
    before, after = Plan.load(folder / "plan.json"), Plan.load(folder / "calibrated.json")
    assert before.totals.measured_s == 0  # after: not 0 where a layer is split as it was when it ran
    assert before.provenance.profile_sha256 != after.provenance.profile_sha256


def test_a_plan_made_in_python_says_what_the_saved_file_says(folder: Path) -> None:
    (command,) = commands_of("examples/plan_in_python.py")
    printed = run(command, folder)
    plan = Plan.load(folder / "alexnet.json")
    assert plan.mesh.size == 16
    assert plan.model.source == "alexnet"
    for name in (*(baseline.name for baseline in plan.baselines), *plan.strategy):
        assert f"\n  {name} " in printed


def test_ranks_train_the_cnn_dnn_that_one_process_trains_bit_for_bit(folder: Path) -> None:
    _, on_ranks = commands_of("examples/domain_decomposition/__main__.py")
    printed = run([*on_ranks, "--size", "12", "--epochs", "1", "--coarse-epochs", "2"], folder)
    accuracy = re.search(r"^CNN-DNN +([\d.]+)%", printed, re.MULTILINE)
    assert accuracy is not None
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    data, cut = load("digits", 12), Decomposition((1, 12, 12), (2, 2), 2)
    alone = fit(small_cnn, cut, data.train, Recipe(Settings(1), Settings(2)))
    torch.set_num_threads(threads)
    stored = {path.stem: torch.load(path, weights_only=True) for path in (folder / "trained").iterdir()}
    assert sorted(stored) == ["coarse", "local-0", "local-1", "local-2", "local-3"]
    for name, trained in [*((f"local-{i}", t) for i, t in enumerate(alone.local)), ("coarse", alone.coarse)]:
        assert stored[name]["losses"] == trained.losses
        for key, tensor in trained.state.items():
            assert torch.equal(stored[name]["net"][key], tensor), (name, key)
    with torch.no_grad():
        right = (alone.net(data.test.inputs).argmax(1) == data.test.labels).float().mean()
    assert float(accuracy[1]) == pytest.approx(100 * float(right), abs=0.06)


@pytest.mark.zoo
def test_coverage_chooses_every_model_of_torchvision_and_every_family_of_timm(folder: Path) -> None:
    listed = [line.split() for line in run([*COVERAGE, "--list"], folder).splitlines()]
    (torchvision, timm) = ([row for row in listed if row[0].startswith(name)] for name in ("torchvision:", "timm:"))
    assert [row[0] for row in torchvision] == sorted(f"torchvision:{name}" for name in zoo.families("torchvision"))
    assert {family for _, family, _ in timm} == set(zoo.families("timm").values())
    assert len(timm) >= 250
    assert {kind for *_, kind in timm} == {"cnn", "hybrid", "transformer"}


@pytest.mark.zoo
def test_coverage_has_a_row_for_a_model_that_works_and_for_one_that_ran_out_of_memory(folder: Path) -> None:
    works = [*COVERAGE, "--only", "torchvision:squeezenet1_1", "--numbers", "-o", "rows.csv"]
    assert "100.0%" in run(works, folder)
    (row,) = csv.DictReader((folder / "rows.csv").read_text().splitlines())
    assert (row["family"], row["kind"], row["result"], row["reason"]) == ("squeezenet", "classification", "ok", "")
    assert int(row["layers"]) > 26  # convolutions
    assert all(float(row[name]) > 0 for name in ("trace_s", "count_s", "plan_s", "peak_mib", "forward_flop"))
    run([*COVERAGE, "--only", "torchvision:regnet_y_32gf", "--memory", "1MiB", "-o", "rows.csv"], folder, exit_code=1)
    (row,) = csv.DictReader((folder / "rows.csv").read_text().splitlines())
    assert row["result"] != "ok"
    assert "emory" in row["reason"]
