"""Profile files: strict, complete, in one form, and put to use by device."""

import json
from pathlib import Path

import pytest

from planner.errors import FormatError, UsageError
from planner.ir.canonical import decode
from planner.ir.ops import BatchNorm, Elementwise
from planner.profile.file import ProfileFile, from_entries, profile_of, read_profile, text_of, write_profile
from planner.profile.fit import fit_profile
from planner.profile.key import AbsorbedKey, PieceKey
from planner.profile.shipped import profiles_for
from planner.profile.table import Measurement
from support.pieces import conv, entry, fit_of, timed

TAIL = (AbsorbedKey(BatchNorm(64), weight_gradient=True), AbsorbedKey(Elementwise("relu")))


def profile() -> ProfileFile:
    pieces = [conv(4), PieceKey(conv(4).op, TAIL, conv(4).inputs, conv(4).output, bias=True, synchronised=True)]
    return from_entries("lab", {"torch": "2"}, [entry(p, (1e-3, 2e-3, None)) for p in pieces])


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    found = profile()
    fitted = found.model_copy(update={"fit": fit_profile(found.layers)})
    for each in (found, fitted):
        write_profile(tmp_path / "lab.json", each)
        again = read_profile(tmp_path / "lab.json")
        assert text_of(again) == text_of(each)
        assert {e.layer.piece for e in again.layers} == {e.layer.piece for e in each.layers}
        assert again.fit == each.fit


def test_keys_of_a_file_are_those_of_local_layers() -> None:
    measured = Measurement(1e-3, 2e-3, 3e-3, 1e-5, 5)
    found = decode(ProfileFile, text_of(profile_of("lab", {}, {conv(4).text: measured})), "profile")
    assert found.measurements() == {conv(4).text: measured}


def test_a_layer_with_a_missing_phase_is_no_measurement() -> None:
    assert profile().measurements() == {}
    assert entry(conv(4), (1e-3, 0.0, 0.0)).measurement == Measurement(1e-3, 0.0, 0.0, 0.0, 5)


def test_attributes_that_a_file_leaves_out_have_their_defaults() -> None:
    text = text_of(profile_of("lab", {}, {conv(4).text: Measurement(1, 1, 1, 0, 1)}))
    shorter = text.replace('"groups": 1, ', "").replace('"padding_mode": "zeros", ', "")
    assert shorter != text
    assert decode(ProfileFile, shorter, "profile").measurements().keys() == {conv(4).text}


@pytest.mark.parametrize(
    ("old", "new", "path", "message"),
    [
        ('"schema_version": 1', '"schema_version": 2', "$.schema_version", "Input should be 1"),
        ('"device": "lab"', '"device": ""', "$.device", "at least 1 character"),
        ('"torch": "2"', '"torch": 2', "$.environment.torch", "valid string"),
        ('"forward_s": 0.001', '"forward_s": -1.0', "$.layers[0].forward_s", "greater than or equal to 0"),
        ('"forward_s": 0.001', '"forward_ms": 1', "$.layers[0].forward_s", "Field required"),
        ('"num_repeats": 5', '"num_repeats": 0', "$.layers[0].num_repeats", "greater than or equal to 1"),
        ('"op": "conv"', '"op": "convolution"', "$.layers[0].layer", "'convolution' is no kind of operator"),
        ('"kernel": [3, 3]', '"kernel": "3x3"', "$.layers[0].layer", "kernel: Input should be a valid"),
        ('"stride": [1, 1]', '"strides": [1, 1]', "$.layers[0].layer", "conv has no attribute 'strides'"),
        ('"in_channels": 32, ', "", "$.layers[0].layer", "in_channels: Field required"),
        ('"inputs": [[4, 32, 14, 14]]', '"inputs": [[4, 32, 0, 14]]', "$.layers[0].layer.inputs[0][2]", "equal to 1"),
        ('"precision": "fp32"', '"precision": "fp16"', "$.layers[0].layer.precision", "'fp32', 'tf32' or 'bf16'"),
        ('"fit": null', '"fit": {"form": 99, "left_out": "", "conditions": []}', "$.fit.form", "Input should be 1"),
        ('"function": "relu"', '"function": 7', "$.layers[1].layer.absorbed[1]", "function: Input should be a valid"),
    ],
)  # fmt: skip
def test_everything_wrong_is_named_with_its_path(old: str, new: str, path: str, message: str) -> None:
    text = text_of(profile())
    assert old in text
    with pytest.raises(FormatError) as caught:
        decode(ProfileFile, text.replace(old, new, 1) if '"relu"' not in old else text.replace(old, new), "profile")
    assert any(path == where and message in what for where, what in caught.value.problems), caught.value.problems


def test_a_layer_that_appears_twice_is_refused() -> None:
    data = json.loads(text_of(profile()))
    data["layers"].append(data["layers"][0])
    with pytest.raises(FormatError, match="appear more than once: 1"):
        decode(ProfileFile, json.dumps(data), "profile")


def test_a_file_that_cannot_be_read_or_written_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        read_profile(tmp_path / "none.json")
    with pytest.raises(UsageError, match="there is no folder"):
        write_profile(tmp_path / "none" / "lab.json", profile())


def test_profiles_of_a_folder_are_found_by_their_device(tmp_path: Path) -> None:
    entries = [timed(conv(4), lambda *_: 1e-3)]
    for name, device in (("b", "h200"), ("a", "h200"), ("c", "k20")):
        write_profile(tmp_path / f"{name}.json", from_entries(device, {"file": name}, entries))
    (tmp_path / "kinds.json").write_text('{"schema_version": 1, "kinds": []}')
    (tmp_path / "notes.json").write_text("not JSON at all")
    assert [p.environment["file"] for p in profiles_for(tmp_path, "h200")] == ["a", "b"]
    assert profiles_for(tmp_path, "v100") == ()
    assert profiles_for(tmp_path / "none", "h200") == ()


def test_the_fit_of_another_form_is_refused() -> None:
    text = text_of(profile().model_copy(update={"fit": fit_of(1e12)}))
    assert decode(ProfileFile, text, "profile").fit == fit_of(1e12)
    with pytest.raises(FormatError, match="flop_powers"):
        decode(ProfileFile, text.replace('"flop_powers": [0.0, ', '"flop_powers": ['), "profile")
