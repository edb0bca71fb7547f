import hashlib
import os
from pathlib import Path

import pytest

from planner.errors import FormatError, UsageError
from planner.ir import canonical
from planner.ir.canonical import (
    StrictModel,
    canonical_bytes,
    decode,
    decode_file,
    json_path,
    sha256_of,
    write_atomically,
)


class Layer(StrictModel):
    split: dict[str, int]


class Stage(StrictModel):
    layers: tuple[Layer, ...]
    seconds: float = 0.0


def problems(text: str | bytes) -> dict[str, str]:
    with pytest.raises(FormatError, match="plan p is not valid") as caught:
        decode(Stage, text, "plan p")
    return dict(caught.value.problems)


def test_canonical_bytes_sort_keys_and_write_whole_floats_as_integers() -> None:
    assert canonical_bytes({"b": (1.0, 0.5), "a": "é"}) == '{"a":"é","b":[1,0.5]}'.encode()
    assert sha256_of({"x": 3e11}) == sha256_of({"x": 300_000_000_000})
    assert sha256_of([]) == hashlib.sha256(b"[]").hexdigest()


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_canonical_bytes_refuse_what_json_cannot_say(number: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_bytes({"x": number})


def test_a_valid_text_is_decoded_from_str_and_bytes() -> None:
    stage = decode(Stage, '{"layers": [{"split": {"gpu": 4}}]}', "plan p")
    assert stage.layers[0].split == {"gpu": 4}
    assert decode(Stage, b'{"layers": [], "seconds": 1}', "plan p").seconds == 1.0


def test_every_problem_is_reported_with_its_path_and_value() -> None:
    found = problems('{"layers": [{"split": {"a b": "4"}}, {"spilt": 1}], "seconds": "1"}')
    assert found == {
        '$.layers[0].split["a b"]': 'Input should be a valid integer, found "4"',
        "$.layers[1].split": "Field required",
        "$.layers[1].spilt": "Extra inputs are not permitted, found 1",
        "$.seconds": 'Input should be a valid number, found "1"',
    }


def test_repeated_keys_are_refused_wherever_they_are() -> None:
    assert problems('{"layers": [{"split": {"gpu": 2, "gpu": 4}}], "layers": []}') == {
        "$.layers": "this key appears twice"
    }
    assert list(problems('{"layers": [{"split": {"gpu": 2, "gpu": 4}}]}')) == ["$.layers[0].split.gpu"]


@pytest.mark.parametrize(
    "text",
    ["", "{", '{"layers": [], "seconds": NaN}', b"\xff\xfe", "\ud800", "[" * 100_000],
    ids=["empty", "cut", "nan", "not utf-8", "surrogate", "deep"],
)
def test_what_is_not_json_is_refused(text: str | bytes) -> None:
    assert problems(text)["$"].startswith("is not JSON: ")


def test_an_infinite_number_is_refused() -> None:
    assert list(problems('{"layers": [], "seconds": 1e999}')) == ["$.seconds"]


def test_too_large_a_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(canonical, "MAX_FILE_BYTES", 2**20)
    assert problems(" " * (2**20 + 1)) == {"$": "is larger than 1 MiB"}


def test_long_values_are_cut_in_messages() -> None:
    message = problems('{"layers": [], "seconds": "' + "9" * 500 + '"}')["$.seconds"]
    assert message.endswith("9…")
    assert len(message) < 120


def test_json_paths_quote_keys_that_are_no_identifiers() -> None:
    assert json_path(("stages", 0, "layer1.conv")) == '$.stages[0]["layer1.conv"]'


def test_a_missing_file_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read plan .*No such file"):
        decode_file(Stage, tmp_path / "none.json", "plan")


def test_a_file_is_named_in_its_problems(tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text("{}")
    with pytest.raises(FormatError, match=r"plan .*bad\.json is not valid"):
        decode_file(Stage, path, "plan")


def test_writing_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    write_atomically(path, "old")
    write_atomically(path, "é\n")
    assert path.read_bytes() == "é\n".encode()
    assert list(tmp_path.iterdir()) == [path]


def test_writing_follows_a_symbolic_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "plan.json")
    write_atomically(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "plan.json").read_text() == "text"


def test_writing_says_that_the_folder_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no folder .*none'"):
        write_atomically(tmp_path / "none" / "plan.json", "")


def test_writing_refuses_what_is_no_regular_file(tmp_path: Path) -> None:
    circle, nowhere = tmp_path / "circle", tmp_path / "nowhere"
    circle.symlink_to(circle)
    nowhere.symlink_to(tmp_path / "none" / "plan.json")
    refused = {
        tmp_path: "it is a folder", Path(os.devnull): "not a regular file", circle: "[Ll]oop|not a regular file",
        nowhere: "there is no folder .*none'", tmp_path / ("n" * 300): "File name too long",
    }  # fmt: skip
    for path, why in refused.items():
        with pytest.raises(UsageError, match=f"cannot write .*({why})"):
            write_atomically(path, "")
    assert {path.name for path in tmp_path.iterdir()} == {"circle", "nowhere"}


def test_a_name_may_be_as_long_as_the_system_lets_it(tmp_path: Path) -> None:
    path = tmp_path / ("é" * 127)
    write_atomically(path, "text")
    assert path.read_text() == "text"


def test_a_failed_write_leaves_the_old_file_and_no_temporary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "plan.json"
    path.write_text("old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UsageError, match="No space left on device"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
