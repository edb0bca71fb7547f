"""Every command, its output and exit code, and every wrong input, as a user meets them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from planner.devices import cluster, clusters, device_kinds
from planner.devices.schema import write_cluster
from planner.plan import Plan
from planner.plan.schema import json_schema
from planner.search.auto import SOLVERS
from planner.search.fixed import FIXED
from support.command_line import ROOT, layerwise, process
from support.plans import Json, document

VGG16 = ("vgg16", "--cluster", "4xa100-nvlink", "--batch", "256")
SMALL = ("lenet5", "--devices", "2", "--batch", "64")


@pytest.fixture(scope="session")
def vgg16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plans") / "vgg16.json"
    ran = layerwise("plan", *VGG16, "-o", path)
    assert ran.code == 0, ran.err
    assert ran.out == ""
    assert "planned (auto)" in ran.err
    assert f"wrote {path}" in ran.err
    return path


@pytest.fixture
def edited(tmp_path: Path) -> Callable[[Callable[[Json], object]], Path]:
    def edit_document(edit: Callable[[Json], object]) -> Path:
        found, path = document(), tmp_path / "plan.json"
        edit(found)
        path.write_text(json.dumps(found))
        return path

    return edit_document


# What commands print


@pytest.mark.slow
def test_plan_prints_only_json_and_the_same_for_every_hash_seed() -> None:
    first, second = (
        process("-m", "planner", "plan", "alexnet", "--devices", "4", hash_seed=seed) for seed in ("1", "2")
    )
    plan = Plan.from_json(first.out)
    assert (first.code, first.err) == (0, "")
    assert plan.provenance.command == "layerwise plan alexnet --devices 4"
    assert (plan.batch, plan.model.inputs[0].shape) == (128, [128, 3, 224, 224])
    assert without_time(first.out) == without_time(second.out)


def test_the_same_command_gives_the_same_bytes_but_for_the_time() -> None:
    first, second = layerwise("plan", *SMALL), layerwise("plan", *SMALL)
    assert without_time(first.out) == without_time(second.out)


def without_time(text: str) -> list[str]:
    lines = text.splitlines()
    rest = [line for line in lines if '"utc"' not in line]
    assert len(rest) == len(lines) - 1
    return rest


def test_the_options_of_plan_reach_the_plan() -> None:
    options = (
        "--precision", "bf16", "--optimizer", "adam", "--io", "global", "--no-sync-batch-norm",
        "--mesh", "gpu=2x2", "--memory-limit", "16GiB", "--dims", "sample,in_channel", "--solver", "dp",
        "--model-args", "width=2,num_classes=7", "--input", "1,32,32",
    )  # fmt: skip
    ran = layerwise("plan", "lenet5", "--cluster", "4xa100-nvlink", "--batch", "12", *options)
    plan = Plan.from_json(ran.out)
    assert (plan.precision, plan.optimizer, plan.io, plan.sync_batch_norm) == ("bf16", "adam", "global", False)
    assert [axis.name for axis in plan.mesh.axes] == ["gpu0", "gpu1"]
    assert (plan.search.memory_limit_bytes, plan.search.solver) == (16 * 2**30, "dp")
    assert plan.model.arguments == {"width": 2, "num_classes": 7}
    assert plan.model.inputs[0].shape == [12, 1, 32, 32]
    found = {d.value for split in plan.strategy.values() for d in split.dimensions}
    assert found <= {"sample", "in_channel", "in_channel_scatter", "replicate", "broadcast"}
    assert plan.provenance.command.startswith("layerwise plan lenet5 --cluster 4xa100-nvlink --batch 12 ")


MASKED = """
from torch import nn

class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, image, *, mask=None, age=None):
        return self.conv(image * mask).mean((2, 3)) * age[:, None]
"""


def test_inputs_by_name_reach_the_plan(tmp_path: Path) -> None:
    path = tmp_path / "masked.py"
    path.write_text(MASKED)
    sizes = ("--input", "3,8,8", "--input", "mask=1,8,8", "--input", "age=")
    ran = layerwise("plan", f"{path}:Masked", "--devices", "2", "--batch", "6", *sizes)
    inputs = [(x.name, x.shape, x.keyword) for x in Plan.from_json(ran.out).model.inputs]
    assert inputs == [("image", [6, 3, 8, 8], False), ("mask", [6, 1, 8, 8], True), ("age", [6], True)]
    again = layerwise("check", "-", "--model", stdin=ran.out)
    assert "every split is legal" in again.out
    assert layerwise("compare", f"{path}:Masked", "--devices", "2", *sizes).code == 0


def test_a_batch_that_does_not_divide_is_planned_with_a_note() -> None:
    ran = layerwise("plan", "lenet5", "--devices", "2", "--batch", "7")
    assert ran.code == 0
    assert Plan.from_json(ran.out).batch == 7
    assert "note: batch 7 does not divide by 2 devices" in ran.err
    quiet = layerwise("plan", "lenet5", "--devices", "2", "--batch", "7", "--quiet")
    assert (quiet.code, quiet.err) == (0, "")


def test_verbose_logs_the_phases_on_stderr_only() -> None:
    ran = layerwise("plan", *SMALL, "-v")
    assert "trace: " in ran.err
    Plan.from_json(ran.out)


def test_show_prints_totals_splits_and_strategies(vgg16: Path) -> None:
    ran = layerwise("show", vgg16)
    assert (ran.code, ran.err) == (0, "")
    assert "vgg16, 138M parameters" in ran.out
    for words in ("classifier.6", "conv-data-fc-model", "Bound: ", "from a roofline of data-sheet rates"):
        assert words in ran.out
    assert sum(line.startswith("features.") for line in ran.out.splitlines()) == 18


def test_show_joins_layers_only_when_asked(vgg16: Path) -> None:
    ran = layerwise("show", vgg16, "--group")
    assert "features.10 … features.14 (3)" in ran.out


def test_show_reads_stdin(vgg16: Path) -> None:
    assert layerwise("show", "-", stdin=vgg16.read_text()).out == layerwise("show", vgg16).out


def test_show_starts_without_torch(vgg16: Path) -> None:
    code = (
        "import sys; from planner.cli.main import main\n"
        "try: main(['show', sys.argv[1]])\n"
        "finally: print('torch' in sys.modules, file=sys.stderr)"
    )
    ran = process("-c", code, str(vgg16))
    assert (ran.code, ran.err.strip()) == (0, "False")


def test_show_says_where_the_compute_times_are_from(edited: Callable[..., Path]) -> None:
    ran = layerwise("show", edited(lambda d: d))
    assert "Compute: 50 % measured layer by layer, 16.7 % from a roofline fitted" in ran.out
    assert "could save at most 25 %" in ran.out


def test_check_builds_a_shipped_model_and_knows_its_machine(vgg16: Path) -> None:
    ran = layerwise("check", vgg16)
    assert (ran.code, ran.err) == (0, "")
    assert "every split is legal" in ran.out
    assert "4xa100-nvlink is the one" in ran.out


def test_compare_lists_every_fixed_strategy_and_the_planned_one() -> None:
    ran = layerwise("compare", *VGG16, "--fail-if-lost")
    assert (ran.code, ran.err) == (0, "")
    lines = ran.out.splitlines()
    heading = next(line for line in lines if line.startswith("strategy"))
    columns = "strategy step samples/s over data communication exposed memory replaced fits allowed"
    assert heading.split() == columns.split()
    for name in (*FIXED, "planned (auto)"):
        assert any(line.startswith(f"{name} ") for line in lines)
    assert "Bound: " in ran.out


def test_compare_as_json_has_the_figures() -> None:
    ran = layerwise("compare", *SMALL, "--json")
    found = json.loads(ran.out)
    *fixed, planned = found["strategies"]
    assert planned["is_planned"]
    assert not found["planned_lost"]
    assert found["lower_bound_s"] <= planned["step_s"] <= min(row["step_s"] for row in fixed if not row["note"])
    assert next(row["speed_up"] for row in fixed if row["name"] == "data") == 1


def test_a_planned_strategy_that_lost_is_said_and_exits_with_6() -> None:
    ran = layerwise("compare", *SMALL, "--solver", "model", "--fail-if-lost")
    assert ran.code == 6
    assert "data is faster than the planned strategy by" in ran.out


def test_compare_explains_a_tie_by_the_bound() -> None:
    ran = layerwise("compare", "lenet5", "--devices", "1")
    assert ran.code == 0
    assert "As fast as the planned strategy: data, " in ran.out
    assert "the bound proves that nothing on the searched meshes is faster" in ran.out


def test_the_lists_name_everything() -> None:
    models, found = layerwise("models"), layerwise("clusters")
    assert "vgg16" in models.out
    assert "3 x 224 x 224" in models.out
    for name in (*clusters(), *device_kinds(), "{nodes}x{devices}-{device}-{link}", "--devices N"):
        assert name in found.out


def test_a_pattern_chooses_models() -> None:
    found = layerwise("models", "vgg1?_bn").out
    assert [name for name in ("vgg11_bn", "vgg13_bn", "vgg16_bn", "vgg19_bn") if name not in found] == []
    assert "resnet18" not in found
    nothing, library = layerwise("models", "vgg7*"), layerwise("models", "tim:*")
    assert (nothing.code, library.code) == (2, 2)
    assert "unknown model 'vgg7*'. Did you mean 'vgg" in nothing.error
    assert "unknown library of models 'tim'. Did you mean 'timm'?" in library.error


@pytest.mark.zoo
def test_a_pattern_lists_the_models_of_a_library() -> None:
    rows = [line.split() for line in layerwise("models", "torchvision:fcn_*").out.splitlines()]
    assert rows[-2:] == [[f"torchvision:fcn_{name}", "segmentation.fcn"] for name in ("resnet101", "resnet50")]
    assert "timm:resnet18" in layerwise("models", "timm:resnet1*").out


def test_schema_prints_the_json_schema() -> None:
    assert layerwise("schema").out == json_schema() + "\n"


def test_help_names_every_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    text = layerwise("plan", "--help").out
    assert [name for name in SOLVERS if name not in text] == []


def test_version() -> None:
    ran = layerwise("--version")
    assert (ran.code, ran.out[:9]) == (0, "layerwise")


# What is refused


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan", "vgg17", "--devices", "4"], "unknown model 'vgg17'. Did you mean 'vgg1"),
        (["plan", "lenet5", "--cluster", "4xa100-nvlnk"], "Did you mean 'nvlink'"),
        (["plan", "lenet5", "--cluster", "nonsense"], "unknown cluster 'nonsense'"),
        (["plan", "lenet5", "--cluster", "no/such.json"], "cannot read"),
        (["plan", "lenet5"], "exactly one of --devices N and --cluster"),
        (["plan", "lenet5", "--devices", "2", "--cluster", "8xa100-nvlink"], "exactly one of --devices N"),
        (["plan", "lenet5", "--devices", "0"], "'--devices'"),
        (["plan", "lenet5", "--devices", "two"], "'--devices'"),
        (["plan", "lenet5", "--devices", "99999"], "99999 devices"),
        (["plan", "lenet5", "--devices", "2", "--batch", "0"], "--batch '0' is not a number of at least 1"),
        (["plan", "lenet5", "--devices", "2", "--batch", "64,128"], "--batch 64,128: only compare takes several"),
        (["plan", "lenet5", "--devices", "2", "--solver", "magic"], "unknown solver 'magic'"),
        (["plan", "lenet5", "--devices", "2", "--dims", "sample,out_chanel"], "Did you mean 'out_channel'"),
        (["plan", "lenet5", "--devices", "2", "--memory-limit", "16GiBs"], "size '16GiBs'"),
        (["plan", "lenet5", "--devices", "2", "--time-limit", "soon"], "duration 'soon'"),
        (["plan", "lenet5", "--devices", "2", "--mesh", "gpu=3"], "mesh 'gpu=3'"),
        (["plan", "lenet5", "--devices", "2", "--input", "3xy"], "--input '3xy'"),
        (["plan", "lenet5", "--devices", "2", "--input", "3,8,8"], "fails on inputs of shape"),
        (["plan", "lenet5", "--devices", "2", "--model-args", "width"], "--model-args 'width'"),
        (["plan", "lenet5", "--devices", "2", "--model-args", "colour=1"], "colour"),
        (["plan", "lenet5", "--devices", "2", "--model-args", f"colour={'[' * 5000}"], "colour"),
        (["plan", "lenet5", "--devices", "2", "--batch", str(2**50)], "more than 1125899906842624 elements"),
        (["plan", "lenet5", "--devices", "2", "--batch", "9" * 5000], "not a number of at least 1"),
        (["plan", "lenet5", "--devices", "2", "--input", f"3,{'9' * 5000}"], "not a size of one sample"),
        (["plan", "lenet5", "--devices", "2", "--model-args", "colour=\udcff"], "is not UTF-8 text"),
        (["profile", "layers", "lenet5", "--devices", "1", "--microbatches", "0", "-o", "p"], "'0' is not a number"),
        (["plan", "lenet5", "--cluster", "4xv100-nvlink", "--precision", "bf16"], "no bf16 rate"),
        (["plan", "nets.py:net", "--devices", "2"], "there is no file 'nets.py'"),
        (["plan", f"{'n' * 300}.py:net", "--devices", "2"], "there is no file 'nnn"),
        (["plan", "torch.nn:Identity", "--devices", "2"], "give --input"),
        (["plan", "lenet5", "--devices", "2", "--clustr", "x"], "--cluster"),
        (["plan", "lenet5", "--devices", "2", "-o", "no/such/plan.json"], "there is no folder 'no/such'"),
        (["plan", "lenet5", "--devices", "2", "-o", "."], "it is a folder"),
        (["plan"], "MODEL"),
        (["shwo", "plan.json"], "Did you mean 'show'"),
        (["show", "no-such-plan.json"], "No such file"),
    ],
)  # fmt: skip
def test_wrong_input_exits_with_2_and_says_what(arguments: list[str], words: str) -> None:
    ran = layerwise(*arguments)
    assert (ran.code, ran.out) == (2, "")
    assert words in ran.error
    assert "Traceback" not in ran.err


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full")
@pytest.mark.parametrize(
    ("stdout", "code", "said"),
    [
        ("> /dev/full", 2, "error: cannot write the result: No space left on device\n"),
        ("| true", 1, ""),
        (">&-", 0, ""),
    ],
)
def test_a_result_that_cannot_be_written_is_no_bug(
    stdout: str, code: int, said: str, edited: Callable[[Callable[[Json], object]], Path]
) -> None:
    command = f"set -o pipefail; {sys.executable} -m planner show {edited(lambda _: None)} {stdout}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (code, said)


def test_a_model_in_a_folder_that_is_a_link_to_itself_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "circle").symlink_to("circle")
    ran = layerwise("plan", f"{tmp_path}/circle/nets.py:net", "--devices", "2")
    assert (ran.code, "there is no file" in ran.error) == (2, True)


def test_ctrl_c_while_the_commands_are_imported_is_said_in_a_line() -> None:
    code = (
        "import sys\n"
        "class Interrupted:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'networkx': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupted())\n"
        "import runpy; runpy.run_module('planner', run_name='__main__')\n"
    )
    ran = process("-c", code)
    assert (ran.code, ran.out, ran.err) == (130, "", "error: interrupted\n")


def test_a_command_that_is_no_text_is_in_the_plan_as_it_would_be_printed(tmp_path: Path) -> None:
    output = tmp_path / os.fsdecode(b"\xff.json")
    assert layerwise("plan", *SMALL, "-o", output).code == 0
    assert r"\udcff.json" in Plan.load(output).provenance.command


@pytest.mark.parametrize("options", [("--all-devices",), ("--stages", "2")], ids=" ".join)
def test_a_machine_too_slow_for_the_figures_of_a_plan_is_refused(options: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "slow.json"
    write_cluster(cluster("2xt4-pcie"), path)
    slow = json.loads(path.read_text())
    for device in slow["devices"]:
        device["peak_flop_per_s"] = {"fp32": 1e-6}
    path.write_text(json.dumps(slow))
    ran = layerwise("plan", "lenet5", "--cluster", path, "--batch", "8192", *options, "-o", tmp_path / "plan.json")
    assert (ran.code, ran.out) == (2, "")
    assert "the plan of this model on this machine is not valid: $." in ran.error
    assert "should be less than or equal to 1000000000000000, found" in ran.error
    assert [each.name for each in tmp_path.iterdir()] == ["slow.json"]


def test_a_missing_folder_is_refused_before_the_model_is_looked_at() -> None:
    ran = layerwise("plan", "no-such-model", "--devices", "2", "-o", "no/such/plan.json")
    assert "there is no folder 'no/such'" in ran.error


def test_a_failed_plan_leaves_an_old_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("old")
    assert layerwise("plan", *SMALL, "--memory-limit", "1KiB", "-o", path).code == 3
    assert path.read_text() == "old"
    assert layerwise("plan", *SMALL, "-o", path).code == 0
    assert Plan.load(path).batch == 64
    assert [found.name for found in tmp_path.iterdir()] == ["plan.json"]


def test_too_little_memory_exits_with_3_and_names_layer_and_numbers() -> None:
    ran = layerwise("plan", "alexnet", "--devices", "2", "--batch", "64", "--memory-limit", "100MiB")
    assert (ran.code, ran.out) == (3, "")
    for words in ("100 MiB", "layer 'classifier.1' (linear)", "--memory-limit"):
        assert words in ran.error


def test_a_forced_strategy_that_does_not_fit_exits_with_3() -> None:
    ran = layerwise("plan", *SMALL, "--solver", "data", "--memory-limit", "1MiB")
    assert ran.code == 3
    assert "strategy 'data' needs" in ran.error
    assert "1 MiB" in ran.error


@pytest.mark.parametrize("command", ["show", "check"])
@pytest.mark.parametrize(
    ("edit", "path"),
    [
        (lambda d: d.update(colour="red"), "$.colour"),
        (lambda d: d["stages"][0]["layers"][1]["split"].update(gpu="chanel"), "$.stages[0].layers[1].split.gpu"),
        (lambda d: d["stages"][0]["mesh"]["axes"][0].update(size=3), "$.stages[0].mesh"),
    ],
    ids=["unknown key", "unknown dimension", "mesh"],
)
def test_an_edited_plan_is_refused_with_the_place(
    command: str, edit: Callable[[Json], object], path: str, edited: Callable[..., Path]
) -> None:
    ran = layerwise(command, edited(edit))
    assert (ran.code, ran.out) == (2, "")
    assert f" {path}: " in ran.error


def test_a_repeated_key_is_refused_with_the_place(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(document()).replace('"batch": 8', '"batch": 8, "batch": 9'))
    assert "$.batch: this key appears twice" in layerwise("show", path).error
    path.write_text("{")
    assert "$: is not JSON" in layerwise("show", path).error


def test_a_plan_of_another_model_or_with_an_illegal_split_is_refused(vgg16: Path, tmp_path: Path) -> None:
    found = json.loads(vgg16.read_text())
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(found | {"model": found["model"] | {"source": "vgg11"}}))
    other = layerwise("check", path)
    assert other.code == 2
    assert "not for this 'vgg11'" in other.error
    path.write_text(json.dumps(found | {"model": found["model"] | {"arguments": {"num_classes": 7}}}))
    assert "operators, shapes or parameters differ" in layerwise("check", path).error
    axis = found["stages"][0]["mesh"]["axes"][0]["name"]
    flatten = next(layer for layer in found["stages"][0]["layers"] if layer["id"] == "flatten")
    flatten["split"][axis] = "height"
    path.write_text(json.dumps(found))
    illegal = layerwise("check", path)
    assert illegal.code == 2
    assert "layer 'flatten' (reshape) cannot be split" in illegal.error


def test_a_plan_for_another_machine_is_refused(vgg16: Path, tmp_path: Path) -> None:
    ran = layerwise("check", vgg16, "--cluster", "4xt4-pcie")
    assert ran.code == 2
    assert "the plan is for cluster '4xa100-nvlink'" in ran.error
    found = json.loads(vgg16.read_text())
    found["cluster"]["sha256"] = "0" * 64
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(found))
    assert layerwise("check", path).code == 2


NETS = """
from pathlib import Path
from torch import nn

def net():
    Path("was_run").touch()
    return nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
"""


def test_check_runs_code_of_the_user_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(NETS)
    assert layerwise("plan", "nets.py:net", "--devices", "2", "--input", "6", "-o", "plan.json").code == 0
    Path("was_run").unlink()
    ran = layerwise("check", "plan.json")
    assert ran.code == 0
    assert "not checked, because 'nets.py:net' is no shipped model" in ran.out
    assert not Path("was_run").exists()
    assert "every split is legal" in layerwise("check", "plan.json", "--model").out
    assert Path("was_run").exists()


def test_a_plan_cannot_make_check_read_a_file_as_its_machine(edited: Callable[..., Path]) -> None:
    path = edited(lambda d: d["cluster"].update(name="secret/cluster.json"))
    ran = layerwise("check", path)
    assert ran.code == 0
    assert "machine: not checked" in ran.out


def test_a_bug_is_reported_with_traceback_and_an_interrupt_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(error: BaseException) -> Callable[[object], None]:
        def raise_error(_: object) -> None:
            raise error

        return raise_error

    monkeypatch.setattr("planner.api.Planner.plan", fail(ZeroDivisionError("oops")))
    bug = layerwise("plan", *SMALL)
    assert bug.code == 1
    assert "Traceback" in bug.err
    assert "Please report it" in bug.err
    assert "layerwise plan lenet5 --devices 2 --batch 64" in bug.err
    monkeypatch.setattr("planner.api.Planner.plan", fail(KeyboardInterrupt()))
    interrupted = layerwise("plan", *SMALL)
    assert (interrupted.code, interrupted.err) == (130, "error: interrupted\n")


def test_twice_verbose_adds_the_traceback_of_an_error() -> None:
    ran = layerwise("show", "no-such-plan.json", "-vv")
    assert ran.code == 2
    assert "Traceback" in ran.err
    assert ran.err.splitlines()[-1].startswith("error: ")
