"""What the pages say is there, and their commands print what they show."""

import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from examples.benchmarks import faults
from examples.benchmarks.rows import read_rows
from planner.cli.main import app
from support import pages, typed
from support.command_line import layerwise

PAGES = pages.pages()
QUICK = ("README.md", "planner/docs/how_it_chooses.md")
"""Pages whose commands are run always; those of all others with LAYERWISE_FULL."""
TROUBLES = pages.ROOT / "planner" / "docs" / "troubleshooting.md"
OF_THE_C_LIBRARY = "terminate called without an active exception"
WRITES = "LAYERWISE_WRITE_PAGES"
"""Set, pages get what commands print now instead of being held against it."""


@pytest.mark.parametrize("page", PAGES, ids=pages.name)
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    lost = []
    for path, anchor in pages.links(page):
        target = pages.ROOT / path
        if not target.exists() or (anchor and anchor not in pages.anchors(target)):
            lost.append(f"{path}#{anchor}")
    assert not lost


def test_every_page_is_reached_from_the_readme() -> None:
    reached, ahead = set(), {"README.md"}
    while ahead:
        page = ahead.pop()
        reached.add(page)
        ahead |= {path for path, _ in pages.links(pages.ROOT / page) if path.endswith(".md")} - reached
    assert {pages.name(page) for page in PAGES} <= reached


@pytest.mark.parametrize("page", PAGES, ids=pages.name)
def test_every_command_of_a_page_is_known_with_its_options(page: Path) -> None:
    assert [wrong for words in pages.commands(page) for wrong in unknown(words[1:])] == []


def unknown(words: list[str]) -> Iterator[str]:
    """Yield the command, or its options, that ``layerwise`` does not know."""
    command = typer.main.get_command(app)
    while (known := getattr(command, "commands", None)) is not None:
        if not words or words[0].startswith("-"):
            break
        if words[0].rstrip(",") not in known:
            yield f"{command.name} {words[0]}"
            return
        command, words = known[words[0].rstrip(",")], words[1:]
    options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    context = typer.Context(command)
    options |= {"--help", *command.get_help_option_names(context)}
    for word in words:
        if word.startswith("--") and word.partition("=")[0].rstrip(",") not in options:
            yield f"{command.name} {word}"


def test_the_messages_by_which_a_symptom_is_found_are_those_of_the_code() -> None:
    rows = [line.split("|")[1] for line in pages.prose(TROUBLES) if line.startswith("| ")]
    messages = [
        message for row in rows for message in re.findall(r"`([^`]+ [^`]+)`", row) if message != OF_THE_C_LIBRARY
    ]
    assert len(messages) >= 8
    sources = [path.read_text() for folder in ("planner", "runtime") for path in (pages.ROOT / folder).rglob("*.py")]
    code = "\n".join(re.sub(r'"\s*\n\s*f?"', "", text) for text in sources)
    assert [part for message in messages for part in message.split("…") if part.strip() not in code] == []


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=pages.name)
def test_commands_print_what_their_page_shows(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [each for each in pages.shown(page) if each.is_fixed]
    if not found:
        pytest.skip("it shows no command whose output is the same on every machine")
    if pages.name(page) not in QUICK and not any(map(os.environ.get, ("LAYERWISE_FULL", WRITES))):
        pytest.skip("run with LAYERWISE_FULL=1")
    (tmp_path / "examples").symlink_to(pages.ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    pairs = [(each, pages.printed_by(each.command)) for each in found]
    if os.environ.get(WRITES):
        pages.rewrite(pairs)
        return
    for each, printed in pairs:
        assert each.is_what(printed), f"{each.command}: write it anew with {WRITES}=1\n" + "\n".join(printed)


def test_the_table_of_faults_is_that_of_the_counts() -> None:
    assert faults.table(read_rows(faults.OUTPUT, faults.Row)) in (pages.ROOT / "README.md").read_text()


def test_every_command_of_a_page_runs_somewhere_or_says_why_it_does_not() -> None:
    commands = {command for page in PAGES for command in typed.typed(page)}
    assert [start for start in typed.never() if not any(each.startswith(start) for each in commands)] == []
    measured = {each.command for page in PAGES for each in pages.shown(page) if not each.is_fixed}
    assert sorted({*typed.ELSEWHERE, *typed.SMALLER} - commands - measured) == []
    for file, text in typed.ELSEWHERE.values():
        assert text in (pages.ROOT / file).read_text(), file
    assert sorted(measured - commands - set(typed.ELSEWHERE)) == []
    for command in (each for page in PAGES for each in typed.runs(page)):
        assert re.match(r"(sudo python|python|torchrun|bash|layerwise) ", command), f"{command}: what runs it?"


def test_a_plan_for_this_host_is_read_with_the_machine_named() -> None:
    readers, unnamed = ("layerwise explain ", "layerwise report ", "layerwise trace "), []
    for page in PAGES:
        is_here = False
        for command in typed.typed(page):
            if command.startswith("layerwise plan "):
                is_here = "--cluster local-" in command
            elif is_here and command.startswith(readers) and "--cluster" not in command:
                unnamed.append(f"{pages.name(page)}: {command}")
    assert not unnamed


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if any(map(typed.quick, typed.runs(page)))], ids=pages.name)
def test_commands_of_a_page_that_start_no_process_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "examples").symlink_to(pages.ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    for command in filter(None, map(typed.quick, [*typed.given(page), *typed.runs(page)])):
        ran = layerwise(*shlex.split(command)[1:])
        assert ran.code == 0, f"{command}\n{ran.err}"
