"""What comes in files is data: nothing of it runs, and nothing is read or written where the user did not say."""

import ast
import json
import os
import pickle
import re
import tomllib
from importlib.metadata import metadata
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader

from planner.errors import FormatError, LayerwiseError, UsageError
from planner.ir.canonical import write_atomically
from planner.plan import Plan
from runtime.checkpoint.metadata import SafeReader
from runtime.checkpoint.stored import Stored
from support.command_line import ROOT, layerwise
from support.fuzz.checkpoints import write
from support.plans import document, plan_of

SOURCES = [path for top in ("planner", "runtime") for path in sorted((ROOT / top).rglob("*.py"))]
RUNS_CODE = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load", "pickle.loads", "marshal.loads",
    "yaml.load", "yaml.unsafe_load", "shelve.open", "tempfile.mktemp",
}  # fmt: skip


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.path}",)


def called(node: ast.Call) -> str:
    return ast.unparse(node.func)


def runs_code(node: ast.Call) -> bool:
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    unpickles = called(node) == "torch.load" and given.get("weights_only") != "True"
    return called(node) in RUNS_CODE or unpickles or given.get("shell", "False") != "False"


def test_no_module_calls_what_runs_text_or_unpickles_anything() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}"
        for path in SOURCES for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and runs_code(node)
    ]  # fmt: skip
    assert found == []
    assert runs_code(ast.parse("torch.load(path)", mode="eval").body)  # type: ignore[arg-type]  # it is a call


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint that torch wrote."""
    write({"weight": torch.ones(3, 2), "step": 3}, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_metadata_of_torch_is_read_as_torch_reads_it(folder: Path) -> None:
    ours, theirs = SafeReader(folder).read_metadata(), FileSystemReader(folder).read_metadata()
    assert (ours.state_dict_metadata, ours.storage_data) == (theirs.state_dict_metadata, theirs.storage_data)
    assert Stored(folder).shapes == {"weight": (3, 2)}


def test_metadata_that_names_code_is_refused_and_runs_none(folder: Path, tmp_path: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(Trap(tmp_path / "ran")))
    with pytest.raises(UsageError, match=r"system, which describes no tensor; nothing was run"):
        Stored(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "linked.distcp", "a/b"])
def test_metadata_that_names_files_elsewhere_is_refused(name: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"0" * 10**6)
    (folder / "linked.distcp").symlink_to(tmp_path / "secret")
    metadata = SafeReader(folder).read_metadata()
    for info in metadata.storage_data.values():
        info.relative_path = name
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UsageError, match="is no file of this folder"):
        Stored(folder)


def test_names_in_a_plan_do_not_steer_the_terminal(tmp_path: Path) -> None:
    found = document()
    found["model"]["name"] = found["stages"][0]["layers"][1]["id"] = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202eevil[red]x"
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(found))
    ran = layerwise("show", path)
    assert ran.code == 0
    assert r"\x1b[2J\x9b31m\u202eevil[red]x" in ran.out
    assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(ran.out + ran.err)


@pytest.mark.parametrize("name", ["../cluster.json", "/etc/hostname", "secret.json", "local-2"])
def test_a_plan_does_not_choose_files_to_be_read_or_processes_to_be_started(name: str, tmp_path: Path) -> None:
    found = document()
    found["cluster"]["name"] = name
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(found))
    assert "machine: not checked" in layerwise("check", path).out or name == "local-2"
    ran = layerwise("explain", path)
    assert (ran.code, "give --cluster" in ran.error) == (2, True)


def test_check_builds_no_model_of_the_plans_choice(tmp_path: Path) -> None:
    code = tmp_path / "evil.py"
    code.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n\ndef net(): ...\n")
    found = document()
    found["model"] |= {"source": f"{code}:net", "arguments": {}}
    found["cluster"]["name"] = "mine"
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(found))
    for command in ("show", "check"):
        assert layerwise(command, path).code == 0
    assert not (tmp_path / "ran").exists()
    with pytest.raises(LayerwiseError):
        Plan.from_json(json.dumps(found | {"model": found["model"] | {"__class__": "os.system"}}))


def test_files_are_written_where_they_are_asked_for_and_nothing_beside_them(tmp_path: Path) -> None:
    target = tmp_path / "plan.json"
    target.write_text("old")
    (tmp_path / ".plan.json.1.tmp").symlink_to(tmp_path / "elsewhere")
    write_atomically(target, plan_of(document()).to_json())
    assert Plan.load(target) == plan_of(document())
    assert not (tmp_path / "elsewhere").exists()
    with pytest.raises(UsageError, match="not a regular file"):
        write_atomically(Path("/dev/null"), "text")
    assert {path.name for path in tmp_path.iterdir()} == {"plan.json", ".plan.json.1.tmp"}


def test_a_message_repeats_little_of_a_file() -> None:
    with pytest.raises(FormatError) as caught:
        Plan.from_json(json.dumps(document() | {"x" * 10**6: 1} | {f"key{k}": 1 for k in range(2000)}))
    assert len(caught.value.problems) == 2001
    assert len(str(caught.value)) < 20_000
    assert "and 1,951 more" in str(caught.value)


def licence_of(name: str) -> str:
    """Return what a package's metadata say of its licence, in any of the places for it."""
    found = metadata(name)
    return " ".join(text for field in ("License-Expression", "Classifier") for text in found.get_all(field) or ())


def test_the_page_lists_every_dependency_with_its_lower_bound_and_licence() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    wanted = {match[1]: match[2] for text in declared if (match := re.match(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)", text))}
    assert len(wanted) == len(declared)  # each has a lower bound
    page = (ROOT / "planner/docs/security.md").read_text().partition("## What is installed with it")[2]
    rows = re.findall(r"^\| ([\w-]+) \| ([\d.]+) \| ([\w.-]+) \| ", page, re.MULTILINE)
    assert {name: bound for name, bound, _ in rows} == wanted
    assert [name for name, _, licence in rows if licence not in licence_of(name)] == []
