"""``layerwise inspect``: the table, its totals, JSON and CSV, and what is refused."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from planner.models import entry
from support.command_line import layerwise, process

NETWORKS = '''
import torch
from torch import nn


class Attention(nn.Module):
    """A convolution, attention over its pixels, a similarity between all samples."""

    def __init__(self):
        super().__init__()
        self.conv, self.attention = nn.Conv2d(3, 8, 1), nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, image):
        tokens = self.conv(image).flatten(2).transpose(1, 2)
        tokens, _ = self.attention(tokens, tokens, tokens)  # per sample
        pooled = tokens.mean(1)
        return torch.mm(pooled, pooled.t())  # all samples at once


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, image, *, mask=None, age=None):
        image = image if mask is None else image * mask
        found = self.conv(image).mean((2, 3))
        return found if age is None else found * age[:, None]


class Nothing(nn.Module):
    def forward(self, x):
        return x.exp()
'''


@pytest.fixture(scope="session")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inspect") / "networks.py"
    path.write_text(NETWORKS)
    return path


def inspected(*arguments: str | Path) -> Any:
    ran = layerwise("inspect", *arguments, "--format", "json")
    assert (ran.code, ran.err) == (0, "")
    return json.loads(ran.out)


def test_the_table_has_a_row_per_layer_and_the_sums_in_the_last() -> None:
    ran = layerwise("inspect", "alexnet")
    assert (ran.code, ran.err) == (0, "")
    title, heading, _, first, *rest = ran.out.splitlines()
    assert title.strip() == "alexnet"
    assert heading.split("  ")[0] == "layer"
    assert " ".join(first.split()) == "input input 1 x 3 x 224 x 224 N O H W 588 KiB 588 KiB"
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in rest if line.strip()}
    assert rows["features.0"] == "conv + relu 1 x 64 x 55 x 55 N O I H W 23.3k 141M 141M 756 KiB 756 KiB"
    assert rows["classifier.6"] == "linear 1 x 1000 N O I 4.1M 8.19M 16.4M 3.91 KiB"
    assert rows["total"].startswith("13 layers 61.1M 1.43G 2.72G ")
    assert "alexnet, batch 1, training: 13 layers, 61.1M trainable parameters, 1.428 GFLOP forward" in ran.out
    assert "Every layer can be split by more than samples." in ran.out


def test_layers_that_only_samples_split_are_listed_with_their_place_and_share(networks: Path) -> None:
    ran = layerwise("inspect", f"{networks}:Attention", "--input", "3,4,4", "--batch", "2")
    start = ran.out.index("Split by samples only, or not at all")
    lines = ran.out[start:].splitlines()
    line_of = {text.strip(): i for i, text in enumerate(NETWORKS.splitlines(), 1)}
    attention = next(line for line in lines if line.startswith("MultiheadAttention"))
    place = line_of["tokens, _ = self.attention(tokens, tokens, tokens)  # per sample"]
    assert attention.split()[1:4] == ["attention", "N", f"{networks}:{place}"]
    similarity = next(line for line in lines if line.startswith("mm"))
    place = line_of["return torch.mm(pooled, pooled.t())  # all samples at once"]
    assert similarity.split()[1:4] == ["mm", "-", f"{networks}:{place}"]
    assert "can be split by samples only; 1 layer with " in lines[-1]
    assert lines[-1].endswith("% of the FLOP can be split not at all: every device computes all of them.")


def test_json_has_plain_numbers_that_add_up(networks: Path) -> None:
    found = inspected("resnet18", "--batch", "2")
    layers, totals = found["layers"], found["totals"]
    assert (found["model"], found["batch"], found["mode"]) == ("resnet18", 2, "training")
    for key in ("num_params", "forward_flop", "backward_flop", "saved_bytes"):
        assert sum(layer[key] for layer in layers) == totals[key]
    assert totals["layers"] == len(layers) - 1  # the input is none
    assert totals["num_params"] == sum(p.numel() for p in entry("resnet18").build().parameters())
    stem = next(layer for layer in layers if layer["name"] == "conv1")
    assert stem["absorbed"] == ["batch_norm", "relu"]
    assert stem["shape"] == [2, 64, 112, 112]
    assert (stem["dtype"], stem["output_bytes"]) == ("float32", 2 * 64 * 112 * 112 * 4)
    assert stem["forward_flop"] == stem["backward_flop"] == 2 * 2 * 64 * 112 * 112 * 3 * 49
    assert set(stem["split_by"]) == {"sample", "out_channel", "in_channel", "in_channel_scatter", "height", "width"}
    parts = inspected(f"{networks}:Attention", "--input", "3,4,4")["by_sample_or_whole"]
    assert [part["names"] for part in parts if not part["per_sample"]] == [["mm"]]
    assert 0 < sum(part["flop_share"] for part in parts) < 1


def test_figures_are_those_of_the_batch() -> None:
    one, many = inspected("lenet5")["totals"], inspected("lenet5", "--batch", "3")["totals"]
    for key in ("forward_flop", "backward_flop", "saved_bytes"):
        assert many[key] == 3 * one[key]
    assert many["num_params"] == one["num_params"]


def test_csv_has_a_row_per_layer() -> None:
    ran = layerwise("inspect", "lenet5", "--format", "csv")
    assert (ran.code, ran.err) == (0, "")
    rows = list(csv.DictReader(io.StringIO(ran.out)))
    layers = inspected("lenet5")["layers"]
    assert [row["name"] for row in rows] == [layer["name"] for layer in layers]
    assert [int(row["forward_flop"]) for row in rows] == [layer["forward_flop"] for layer in layers]
    assert rows[1]["shape"] == " ".join(map(str, layers[1]["shape"]))
    assert rows[1]["split_by"].split() == layers[1]["split_by"]


@pytest.mark.parametrize("form", ["table", "json", "csv"])
def test_a_file_gets_what_stdout_would_have_got(form: str, tmp_path: Path) -> None:
    path = tmp_path / "layers"
    path.write_text("old")
    ran = layerwise("inspect", "lenet5", "--format", form, "-o", path)
    assert (ran.code, ran.out) == (0, "")
    assert ran.err.splitlines()[-1] == f"wrote {path}"
    assert "lenet5, batch 1, training: " in ran.err
    assert path.read_text() == layerwise("inspect", "lenet5", "--format", form).out
    assert list(tmp_path.iterdir()) == [path]
    assert layerwise("inspect", "lenet5", "--format", form, "-o", path, "--quiet").err == ""


def test_evaluation_has_no_dropout() -> None:
    training, evaluation = inspected("alexnet"), inspected("alexnet", "--eval")
    operators = [[x for layer in found["layers"] for x in layer["absorbed"]] for found in (training, evaluation)]
    assert "dropout" in operators[0]
    assert evaluation["mode"] == "evaluation"
    assert evaluation["totals"]["forward_flop"] == training["totals"]["forward_flop"]
    assert evaluation["totals"]["saved_bytes"] < training["totals"]["saved_bytes"]


def test_inputs_by_name_and_of_one_number(networks: Path) -> None:
    model, image = f"{networks}:Masked", ("--input", "3,8,8")
    assert inspected(model, *image)["layers"][0]["name"] == "image"
    found = inspected(model, *image, "--input", "mask=1,8,8", "--input", "age=", "--batch", "5")
    shapes = {layer["name"]: layer["shape"] for layer in found["layers"] if layer["operator"] == "input"}
    assert shapes == {"image": [5, 3, 8, 8], "mask": [5, 1, 8, 8], "age": [5]}
    alone = inspected(model, "--input", "image=3,8,8")
    assert alone["layers"] == inspected(model, *image)["layers"]


def test_arguments_reach_the_model() -> None:
    assert inspected("lenet5", "--model-args", "num_classes=7")["layers"][-1]["shape"] == [1, 7]


def test_a_model_without_products_has_no_shares(networks: Path) -> None:
    ran = layerwise("inspect", f"{networks}:Nothing", "--input", "3,4,4")
    assert ran.code == 0
    assert "0 trainable parameters, 0 GFLOP forward" in ran.out


@pytest.mark.zoo
def test_models_of_the_libraries_are_inspected() -> None:
    found = inspected("torchvision:mobilenet_v2")
    assert found["totals"]["num_params"] == 3_504_872  # published
    assert found["totals"]["forward_flop"] / 2e9 == pytest.approx(0.301, rel=0.005)  # published


@pytest.mark.slow
def test_json_is_all_that_a_pipe_gets() -> None:
    ran = process("-m", "planner", "inspect", "lenet5", "--format", "json")
    assert (ran.code, ran.err) == (0, "")
    assert json.loads(ran.out)["model"] == "lenet5"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "MODEL"),
        (["vgg17"], "unknown model 'vgg17'. Did you mean 'vgg1"),
        (["net.py"], "is a file: say which function of it returns the module, as net.py:FUNCTION"),
        (["lenet5", "--batch", "0"], "'--batch'"),
        (["lenet5", "--format", "yaml"], "'--format'"),
        (["lenet5", "--input", "3xy"], "--input '3xy' is not a size of one sample"),
        (["lenet5", "--input", ""], "--input '' is not a size of one sample"),
        (["lenet5", "--input", "=1,2"], "--input '=1,2': '' cannot be the name of an argument"),
        (["lenet5", "--input", "a=3", "--input", "a=4"], "--input a= is given twice"),
        (["lenet5", "--input", "masc=1,32,32"], "takes the inputs input, but 1 were given"),
        (["lenet5", "--input", "3,8,8"], "fails on inputs of shape (1, 3, 8, 8)"),
        (["lenet5", "--model-args", "width"], "--model-args 'width'"),
        (["torch.nn:Identity"], "give --input"),
        (["lenet5", "-o", "no/such/layers.json"], "there is no folder 'no/such'"),
        (["lenet5", "-o", "."], "it is a folder"),
        (["nets.py:net"], "there is no file 'nets.py'"),
    ],
)
def test_wrong_input_exits_with_2_and_says_what(arguments: list[str], words: str) -> None:
    ran = layerwise("inspect", *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert words in ran.error
    assert "Traceback" not in ran.err


def test_a_failed_inspection_leaves_an_old_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "layers.json"
    path.write_text("old")
    assert layerwise("inspect", "lenet5", "--input", "3,8,8", "-o", path).code == 2
    assert path.read_text() == "old"
