"""PipeDream's profiles: order by edges, every bad line named, and what is imported of the shipped ones."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.devices.files import profiles_path
from planner.errors import FormatError, UsageError
from planner.ir.ops import BatchNorm, Conv, Linear, Pool
from planner.profile.pipedream import PipeDreamProfile, parse_pipedream, read_pipedream
from planner.profile.pipedream_import import entries_of, import_pipedream

FOLDER = profiles_path() / "pipedream"


def line(
    number: int, description: str, size: float, parameters: float = 0.0, times: tuple[float, float] = (1, 2)
) -> str:
    return (
        f"node{number} -- {description} -- forward_compute_time={times[0]:.3f}, backward_compute_time={times[1]:.3f}, "
        f"activation_size={size:.3f}, parameter_size={parameters:.3f}"
    )


CONV = "Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))"
LINES = (
    line(4, "Linear(in_features=128, out_features=10, bias=True)", 80, 5160, (0.5, 0.7)),
    line(10, "View(-1)", 1024, 0, (0, 0)),
    line(3, "MaxPool2d(kernel_size=2, stride=2, padding=0, dilation=1, ceil_mode=False)", 1024, 0, (0.1, 0.2)),
    line(2, CONV, 4096, 896, (3, 5)),
    line(1, "Input", 1536, 0, (99, 0)),
    "\tnode10 -- node4", "\tnode3 -- node10", "\tnode2 -- node3", "\tnode1 -- node2",
)  # fmt: skip


def test_layers_are_in_the_order_of_the_edges_and_the_input_is_none() -> None:
    found = parse_pipedream("\n".join(LINES))
    assert [layer.name for layer in found.layers] == ["node2", "node3", "node10", "node4"]
    assert [layer.reads for layer in found.layers] == [(), (0,), (1,), (2,)]
    assert found.input_bytes == 1536
    conv = found.layers[0]
    assert (conv.forward_s, conv.backward_s) == pytest.approx((0.003, 0.005))
    assert (conv.output_bytes, conv.weight_bytes, conv.description) == (4096, 896, CONV)


@given(st.permutations(LINES))
def test_the_order_of_the_lines_says_nothing(lines: list[str]) -> None:
    found, expected = parse_pipedream("\n".join(lines)), parse_pipedream("\n".join(LINES))
    assert [(x.name, x.reads, x.forward_s) for x in found.layers] == [
        (x.name, x.reads, x.forward_s) for x in expected.layers
    ]


def test_several_results_of_a_layer_count_together() -> None:
    text = line(1, "Split()", 0).replace("activation_size=0.000", "activation_size=[4.0; 6.0]")
    assert parse_pipedream(text).layers[0].output_bytes == 10


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["node1"], "line 1: is no layer of the form"),
        ([line(1, "A", 1), "\tnode1"], "line 2: is no edge of the form"),
        ([line(1, "A", 1), "\tnode1 -- node2"], "line 2: names node2, which has no line"),
        ([line(1, "A", 1), line(1, "B", 1)], "line 2: repeats node1 of line 1"),
        ([line(1, "A", 1).replace("1.000", "soon")], "line 1: forward_compute_time: 'soon' is no number"),
        ([line(1, "A", 1).replace("=2.000", "=-2")], "line 1: backward_compute_time: -2 is no time"),
        ([line(1, "A", 1).replace("=1.000", "=nan")], "is no time"),
        ([line(1, "A", 1).replace("parameter_size", "weights")], "'weights' is none of"),
        ([line(1, "A", 1).split(", ")[0]], "line 1: backward_compute_time is missing"),
        ([line(1, "A", 1), line(2, "B", 1), "\tnode1 -- node2", "\tnode2 -- node1"], "go round in a cycle"),
        ([line(1, "Input", 1)], "no layer but the input"),
        ([""], "there is no layer"),
    ],
)
def test_every_bad_line_is_named(lines: list[str], said: str) -> None:
    with pytest.raises(FormatError) as caught:
        parse_pipedream("\n".join(lines), "PipeDream profile x.txt")
    assert said in str(caught.value)
    assert "x.txt" in str(caught.value)


def test_a_file_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read PipeDream profile"):
        read_pipedream(tmp_path / "none.txt")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="not UTF-8"):
        read_pipedream(tmp_path / "b.txt")


# --- as entries of a device profile


def imported(*lines: str) -> PipeDreamProfile:
    return parse_pipedream("\n".join(lines))


def test_shapes_come_from_the_modules_and_the_bytes() -> None:
    conv, pool, linear = entries_of(imported(*LINES))
    piece = conv.layer.piece
    assert piece.op == Conv(3, 8, (3, 3), (1, 1), (1, 1), (1, 1), 1)
    assert (piece.inputs, piece.output, piece.bias) == (((2, 3, 8, 8),), (2, 8, 8, 8), True)
    assert (piece.input_gradient, piece.weight_gradient) == (False, True)
    assert (conv.backward_data_s, conv.backward_weight_s) == (0.0, 0.005)  # nothing is in front of it
    assert pool.layer.piece.op == Pool("max", (2, 2), (2, 2), (0, 0), (1, 1))
    assert (pool.backward_data_s, pool.backward_weight_s) == (0.0002, 0.0)
    assert (linear.layer.piece.op, linear.layer.piece.output) == (Linear(128, 10), (2, 10))
    assert (linear.backward_data_s, linear.backward_weight_s) == pytest.approx((0.00035, 0.00035))


def test_equal_layers_are_one_entry_with_the_median() -> None:
    norm = "BatchNorm2d(8, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True)"
    norms = [line(20 + i, norm, 4096, 64, (t, 2 * t)) for i, t in enumerate((1, 4, 3))]
    edges = ["\tnode2 -- node20", "\tnode20 -- node21", "\tnode21 -- node22", "\tnode22 -- node3"]
    lines = [x for x in LINES if x != "\tnode2 -- node3"]
    found = [e for e in entries_of(imported(*lines, *norms, *edges)) if e.layer.piece.op == BatchNorm(8)]
    assert len(found) == 1
    assert (found[0].forward_s, found[0].num_repeats) == (0.003, 3)
    assert found[0].backward_data_s == found[0].backward_weight_s == pytest.approx(0.003)
    assert found[0].iqr_s == pytest.approx(0.0015 + 0.003)  # quartiles 2 and 3.5 of 1, 3, 4; twice that backward


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("activation_size=1024.000", "activation_size=1000.000", "which is 1024 bytes; the file says 1000"),
        ("in_features=128", "in_features=64", "Linear of 64 features reads 128"),
        ("Linear", "Bilinear", "nothing tells the batch"),
        ("MaxPool2d", "LPPool2d", "LPPool2d is none of Conv2d"),
        ("kernel_size=(3, 3)", "kernel_size=(3, 3", "is no module as torch prints it"),
        ("ceil_mode=False", "ceil_mode=True", "ceil_mode is not known"),
        ("1536", "1500", "is no batch of 2 square images of 3 channels"),
        ("Input", "Conv2d(3, 3, kernel_size=(1, 1))", "nothing tells the size of the images"),
    ],
)
def test_modules_that_do_not_fit_the_bytes_are_named(old: str, new: str, said: str) -> None:
    with pytest.raises(FormatError) as caught:
        entries_of(imported(*(text.replace(old, new, 1) for text in LINES)), "PipeDream profile x.txt")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("name", "batch", "layers", "entries", "megabytes"),
    [("vgg16", 128, 40, 23, 553.4), ("alexnet", 256, 22, 16, 244.4), ("resnet50", 128, 176, 50, 102.2)],
)
def test_the_shipped_profiles(name: str, batch: int, layers: int, entries: int, megabytes: float) -> None:
    profile = read_pipedream(FOLDER / f"{name}.txt")
    assert len(profile.layers) == layers
    assert sum(layer.weight_bytes for layer in profile.layers) / 1e6 == pytest.approx(megabytes, abs=0.05)
    found = import_pipedream(FOLDER / f"{name}.txt", "lab")
    assert found.device == "lab"
    assert len(found.entries) == entries
    assert {entry.layer.inputs[0][0] for entry in found.entries} == {batch}
    timed = [x for x in profile.layers if x.forward_s > 0]
    assert sum(entry.num_repeats for entry in found.entries) == len(timed)
