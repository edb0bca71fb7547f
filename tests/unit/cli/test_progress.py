"""What a terminal shows while a command works, and who does not get to see it."""

import io
import logging
import re
import sys

import pytest

from planner.cli.main import main
from planner.cli.terminal import Terminal
from support.command_line import Ran, layerwise, undo_logging

COLOUR = re.compile(r"\x1b\[[\d;]*3[1-6]m")


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Screen:
    """A terminal; colours are wanted unless a test says otherwise."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    return Screen()


def on(screen: Screen, *arguments: str) -> int:
    """Return how a command ends whose stderr is a terminal."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", screen)
        with pytest.raises(SystemExit) as ended:
            main(arguments)
    undo_logging()
    assert isinstance(ended.value.code, int)
    return ended.value.code


def work(screen: Screen, *, quiet: bool = False, silent: bool = False) -> list[int]:
    """Do something that takes a while; return the log's levels before, meanwhile and behind it."""
    log = logging.getLogger("planner")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", screen)
        found = Terminal(quiet=quiet)
        levels = [log.level]
        with found.working("planning vgg16", silent=silent):
            levels.append(log.level)
            logging.getLogger("planner.api.tour").info("searching mesh 2x2")
        return [*levels, log.level]


def test_a_terminal_sees_what_is_done_and_the_latest_phase_of_the_log(screen: Screen) -> None:
    levels = work(screen)
    assert "planning vgg16" in screen.getvalue()
    assert "searching mesh 2x2" in screen.getvalue()
    assert screen.getvalue().endswith("\x1b[2K")  # and it is gone again
    assert levels == [logging.WARNING, logging.INFO, logging.WARNING]
    assert logging.getLogger("planner").handlers == []


@pytest.mark.parametrize(("quiet", "silent"), [(True, False), (False, True)], ids=["quiet", "json"])
def test_who_asks_for_quiet_or_json_sees_nothing(quiet: bool, silent: bool, screen: Screen) -> None:
    work(screen, quiet=quiet, silent=silent)
    assert screen.getvalue() == ""


def test_a_pipe_gets_the_result_only_even_where_colours_are_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    ran = layerwise("inspect", "lenet5", "--format", "csv")
    assert (ran.code, ran.err) == (0, "")


def test_a_command_shows_its_phases_on_a_terminal(screen: Screen, capsys: pytest.CaptureFixture[str]) -> None:
    assert on(screen, "plan", "lenet5", "--devices", "2") == 0
    assert "planning lenet5" in screen.getvalue()
    assert capsys.readouterr().out.startswith("{\n")


def test_colours_are_for_who_wants_them(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    assert on(screen, "plan", "lenet5", "--devices", "two") == 2
    assert COLOUR.search(screen.getvalue())
    monkeypatch.setenv("NO_COLOR", "1")
    plain = Screen()
    assert on(plain, "plan", "lenet5", "--devices", "two") == 2
    assert "Invalid value" in plain.getvalue()
    assert not COLOUR.search(plain.getvalue())


@pytest.mark.parametrize(
    ("typed", "found"), [("layerwise expl", "explain"), ("layerwise plan --halo-ov", "--halo-overlap")]
)
def test_a_shell_completes_commands_and_options(typed: str, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_LAYERWISE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(len(typed.split()) - 1))
    ran: Ran = layerwise()
    assert ran.out.split() == [found]
