"""Measurements of others: what each row means, and that every bad one is named and nothing is taken from it."""

import json
from pathlib import Path

import pytest

from planner.errors import FormatError, LayerwiseError, UsageError
from planner.ir.ops import BatchNorm, Conv, Elementwise, Linear, Pool
from planner.ir.tensor import DType
from planner.profile.file import Entry, from_entries, read_profile, write_profile
from planner.profile.fit import fit_profile
from planner.profile.foreign import Foreign, read_foreign

HEADER = "op,batch,in_channels,out_channels,height,width,kernel,stride,padding,groups,forward_ms"
GOOD = "conv,32,64,128,56,28,3x5,2,1x2,2,1.5"


def read(folder: Path, *lines: str, name: str = "t.csv", device: str | None = None) -> Foreign:
    path = folder / name
    path.write_text("\n".join(lines) + "\n")
    return read_foreign(path, device)


def only(found: Foreign) -> Entry:
    (entry,) = found.entries
    return entry


def test_a_convolution(tmp_path: Path) -> None:
    entry = only(read(tmp_path, HEADER, GOOD))
    piece = entry.layer.piece
    assert piece.op == Conv(64, 128, (3, 5), (2, 2), (1, 2), (1, 1), 2)
    assert piece.inputs == ((32, 64, 56, 28),)
    assert piece.output == (32, 128, 28, 14)  # (56 + 2 - 3) // 2 + 1, (28 + 4 - 5) // 2 + 1
    assert piece.bias is False
    assert (piece.precision, piece.memory_format, piece.dtype) == ("fp32", "contiguous", DType.FLOAT32)
    assert (entry.forward_s, entry.backward_data_s, entry.backward_weight_s) == (0.0015, None, None)
    assert (entry.iqr_s, entry.num_repeats) == (0.0, 1)


@pytest.mark.parametrize(
    ("cells", "op", "inputs", "output"),
    [
        ("linear,8,256,10,,,,", Linear(256, 10), ((8, 256),), (8, 10)),
        ("max_pool,8,16,,9,9,3,2", Pool("max", (3, 3), (2, 2), (0, 0), (1, 1)), ((8, 16, 9, 9),), (8, 16, 4, 4)),
        ("avg_pool,8,16,,9,9,3,", Pool("avg", (3, 3), (3, 3), (0, 0), (1, 1)), ((8, 16, 9, 9),), (8, 16, 3, 3)),
        ("batch_norm,8,16,,9,9,,", BatchNorm(16), ((8, 16, 9, 9),), (8, 16, 9, 9)),
        ("relu,8,16,,9,9,,", Elementwise("relu"), ((8, 16, 9, 9),), (8, 16, 9, 9)),
        ("add,8,16,,9,9,,", Elementwise("add"), ((8, 16, 9, 9), (8, 16, 9, 9)), (8, 16, 9, 9)),
    ],
)
def test_other_operators(tmp_path: Path, cells: str, op: object, inputs: object, output: object) -> None:
    header = "op,batch,in_channels,out_channels,height,width,kernel,stride,forward_s,backward_data_s"
    piece = only(read(tmp_path, header, f"{cells},1,1")).layer.piece
    assert (piece.op, piece.inputs, piece.output) == (op, inputs, output)


def test_units_phases_and_conditions(tmp_path: Path) -> None:
    header = (
        "op,batch,in_channels,out_channels,forward_s,backward_data_us,backward_weight_ms,iqr_us,repeats,precision,"
        "memory_format,bias"
    )
    entry = only(read(tmp_path, header, "linear,8,16,32,0.25,500,3,20,7,bf16,channels_last,yes"))
    assert (entry.forward_s, entry.backward_data_s, entry.backward_weight_s) == (0.25, 500e-6, 3e-3)
    assert entry.iqr_s == pytest.approx(20e-6)
    assert entry.num_repeats == 7
    piece = entry.layer.piece
    assert (piece.precision, piece.dtype, piece.bias) == ("bf16", DType.BFLOAT16, True)
    assert piece.memory_format == "channels_last"


def test_an_empty_time_was_not_measured_and_0_is_nothing_to_compute(tmp_path: Path) -> None:
    header = "op,batch,in_channels,out_channels,forward_s,backward_data_s,backward_weight_s"
    empty = only(read(tmp_path, header, "linear,8,16,32,1,,2"))
    assert (empty.backward_data_s, empty.layer.input_gradient) == (None, True)
    assert empty.measurement is None
    none = only(read(tmp_path, header, "linear,8,16,32,1,0,2"))
    assert (none.backward_data_s, none.layer.input_gradient) == (0.0, False)
    assert none.measurement is not None


def test_json_rows_are_the_same_rows(tmp_path: Path) -> None:
    names, cells = HEADER.split(","), GOOD.split(",")
    rows = [dict(zip(names, [*cells[:-1], 1.5], strict=True)) | {"bias": False, "stride": 2}]
    assert read(tmp_path, json.dumps(rows), name="t.json").entries == read(tmp_path, HEADER, GOOD).entries


def test_comments_say_where_measurements_are_from(tmp_path: Path) -> None:
    found = read(tmp_path, "# A lab,", "", "# 2014", HEADER, GOOD)
    assert found.notes == "A lab, 2014"
    assert len(found.entries) == 1


def test_devices_are_kept_apart(tmp_path: Path) -> None:
    lines = (f"device,{HEADER}", f"k20,{GOOD}", f"k40,{GOOD}")
    with pytest.raises(UsageError, match="holds 2 devices: name one with --device: k20, k40"):
        read(tmp_path, *lines)
    with pytest.raises(UsageError, match="has no device 'k80', only k20, k40"):
        read(tmp_path, *lines, device="k80")
    assert len(read(tmp_path, *lines, device="k40").entries) == 1
    assert read(tmp_path, *lines[:2]).device == "k20"
    assert read(tmp_path, HEADER, GOOD).device == ""
    assert read(tmp_path, HEADER, GOOD, device="lab").device == "lab"


@pytest.mark.parametrize(
    ("row", "column", "message"),
    [
        ("dense,32,64,128,56,56,3,1,1,1,1", "op", "'dense' is none of conv, linear"),
        (",32,64,128,56,56,3,1,1,1,1", "op", "is missing"),
        ("conv,0,64,128,56,56,3,1,1,1,1", "batch", "'0' is no whole number from 1"),
        ("conv,3.5,64,128,56,56,3,1,1,1,1", "batch", "'3.5' is no whole number from 1"),
        ("conv,32,,128,56,56,3,1,1,1,1", "in_channels", "is missing"),
        ("conv,32,64,-1,56,56,3,1,1,1,1", "out_channels", "'-1' is no whole number"),
        ("conv,32,64,128,,56,3,1,1,1,1", "height", "is missing"),
        ("conv,32,64,128,56,x,3,1,1,1,1", "width", "'x' is no whole number"),
        ("conv,32,64,128,56,56,,1,1,1,1", "kernel", "is missing"),
        ("conv,32,64,128,56,56,3x3x3,1,1,1,1", "kernel", "is not of the form 3 or 3x5"),
        ("conv,32,64,128,2,2,3,1,0,1,1", "kernel", "is larger than the padded input"),
        ("conv,32,64,128,56,56,3,0,1,1,1", "stride", "'0' is no whole number from 1"),
        ("conv,32,64,128,56,56,3,1,-1,1,1", "padding", "'-1' is no whole number from 0"),
        ("conv,32,64,128,56,56,3,1,1,3,1", "groups", "divides not both channels, 64 and 128"),
        ("conv,32,64,128,56,56,3,1,1,1,", "forward_ms", "no time is given"),
        ("conv,32,64,128,56,56,3,1,1,1,fast", "forward_ms", "'fast' is no number"),
        ("conv,32,64,128,56,56,3,1,1,1,nan", "forward_ms", "is no time"),
        ("conv,32,64,128,56,56,3,1,1,1,-2", "forward_ms", "is no time"),
        ("conv,32,64,128,56,56,3,1,1,1,0", "forward_ms", "0 is no time"),
    ],
)
def test_every_bad_cell_is_named_with_line_and_column(tmp_path: Path, row: str, column: str, message: str) -> None:
    with pytest.raises(FormatError) as caught:
        read(tmp_path, "# a comment", HEADER, GOOD, row)
    ((place, sentence),) = caught.value.problems
    assert place == f"line 4, column {column}"
    assert message in sentence


@pytest.mark.parametrize(
    ("column", "cell"), [("bias", "maybe"), ("precision", "fp16"), ("memory_format", "NHWC"), ("repeats", "0")]
)
def test_bad_words_are_named(tmp_path: Path, column: str, cell: str) -> None:
    with pytest.raises(FormatError, match=f"line 2, column {column}"):
        read(tmp_path, f"{HEADER},{column}", f"{GOOD},{cell}")


def test_all_bad_rows_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(FormatError) as caught:
        read(tmp_path, HEADER, GOOD.replace("32", "0"), GOOD, GOOD.replace("conv", "cone"), GOOD)
    assert [place for place, _ in caught.value.problems] == ["line 2, column batch", "line 4, column op", "line 5"]
    assert caught.value.problems[2][1] == "is the same layer as line 3"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "no line of column names"),
        ([HEADER], "no row of measurements"),
        ([HEADER, "conv,32"], "line 2: has 2 cells, the header has 11"),
        ([f"{HEADER},speed", f"{GOOD},1"], "line 1, column speed: is not known"),
        ([f"{HEADER},batch", f"{GOOD},1"], "line 1, column batch: appears twice"),
        ([f"{HEADER},forward_us", f"{GOOD},1"], "line 1, column forward_us: repeats forward_ms in another unit"),
        (["batch,forward_s", "1,1"], "there is no column op"),
        (["op,batch", "conv,1"], "no column of times, such as forward_ms"),
    ],
)
def test_bad_tables_are_refused(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        read(tmp_path, *lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ('{"op": "conv"}', "is not an array of objects"),
        ('[{"op": ["conv"], "forward_s": 1}]', "row 1, column op: is neither text nor a number"),
        ('[{"op": "relu", "forward_s": true, "batch": 1, "in_channels": 1, "height": 1, "width": 1}]', "'yes' is no"),
    ],
)  # fmt: skip
def test_bad_json_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        read(tmp_path, text, name="t.json")


def test_files_that_cannot_be_read_are_usage_errors(tmp_path: Path) -> None:
    (tmp_path / "latin.csv").write_bytes("opé".encode("latin-1"))
    for name in ("none.csv", "latin.csv", "."):
        with pytest.raises(LayerwiseError) as caught:
            read_foreign(tmp_path / name)
        assert caught.value.exit_code == 2


def test_the_shipped_example_can_be_imported_and_fitted(tmp_path: Path) -> None:
    path = Path(__file__).parents[3] / "profiles" / "foreign" / "convnet-benchmarks-vgg.csv"
    found = read_foreign(path, "titanblack-cudnn")
    assert len(found.entries) == 9
    assert "MIT licence" in found.notes
    # the second layer of VGG: 64 samples, 64 to 64 channels on 224 x 224
    second = max(found.entries, key=lambda entry: entry.forward_s or 0.0)
    assert second.forward_s == pytest.approx(0.20136)
    assert second.backward_weight_s == pytest.approx(0.80553 - 0.20136 - 0.24359)
    write_profile(tmp_path / "p.json", from_entries("titanblack-cudnn", {}, found.entries))
    again = read_profile(tmp_path / "p.json")
    assert {e.layer.piece: e.measurement for e in again.layers} == {e.layer.piece: e.measurement for e in found.entries}
    residuals = fit_profile(again.layers, max_refits=0).conditions[0].residuals
    assert {r.num_entries for r in residuals} == {9}
    assert all(r.median < 0.2 for r in residuals)
