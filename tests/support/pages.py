"""The pages of the documentation as data: headings, links, commands with what they print."""

import io
import posixpath
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from planner.cli.main import main
from support.command_line import undo_logging

ROOT = Path(__file__).parents[2]
_HIDDEN = re.compile(r"(^|/)\.")


def pages() -> list[Path]:
    """Return all Markdown files of the repository."""
    found = (path for path in ROOT.rglob("*.md") if not _HIDDEN.search(str(path.relative_to(ROOT))))
    return sorted(found)


def name(page: Path) -> str:
    """Return the path of a page as links from the root give it."""
    return page.relative_to(ROOT).as_posix()


def prose(page: Path) -> list[str]:
    """Return the lines of a page that are not inside code blocks."""
    found, inside = [], False
    for line in page.read_text().splitlines():
        if line.lstrip().startswith("```"):
            inside = not inside
        elif not inside:
            found.append(line)
    return found


def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings, as GitHub makes them."""
    headings = (re.sub(r"^#+ ", "", line) for line in prose(page) if re.match(r"#+ ", line))
    texts = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "") for heading in headings)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in texts}


def links(page: Path) -> Iterator[tuple[str, str]]:
    """Yield the links of a page to others, or to its own headings: path from the root, anchor or nothing."""
    for target in re.findall(r"\]\(([^)\s]+)\)", "\n".join(prose(page))):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            yield (
                posixpath.normpath(posixpath.join(posixpath.dirname(name(page)), path)) if path else name(page),
                anchor,
            )


@dataclass(frozen=True)
class Shown:
    """A command on a page with what it printed.

    Attributes:
        page: that shows it.
        line: of the command, from 0.
        command: as it is typed.
        output: lines; one of ``…`` stands for lines that are left out.
        is_fixed: whether it prints the same on every machine.
    """

    page: Path
    line: int
    command: str
    output: tuple[str, ...]
    is_fixed: bool

    def is_what(self, printed: Sequence[str]) -> bool:
        """Return whether this is what a command has printed, but for what is left out."""
        head, *tail = _cut(self.output)
        if not tail:
            return list(head) == list(printed)
        (end,) = tail
        return list(printed[: len(head)]) == head and list(printed[len(printed) - len(end) :]) == end

    def written(self, printed: Sequence[str]) -> list[str]:
        """Return what to show of what a command has printed: as many lines before and behind the gap as there were."""
        head, *tail = _cut(self.output)
        if not tail:
            return list(printed)
        return [*printed[: len(head)], GAP, *printed[len(printed) - len(tail[0]) :]]


GAP = "…"
OWN_MACHINE = "<!-- printed on one machine, other figures on others -->"
"""Stands in front of blocks whose commands measure, so that nothing is compared."""


def shown(page: Path) -> list[Shown]:
    """Return the commands of a page whose output it shows: blocks that begin with ``$ layerwise``."""
    found: list[Shown] = []
    lines = page.read_text().splitlines()
    fences = [i for i, line in enumerate(lines) if line.startswith("```")]
    for start, stop in zip(fences[::2], fences[1::2], strict=True):
        is_fixed = OWN_MACHINE not in lines[max(start - 2, 0) : start]
        commands = [i for i in range(start + 1, stop) if lines[i].startswith("$ ")]
        for i, end in zip(commands, [*commands, stop][1:], strict=True):
            found.append(Shown(page, i, lines[i][2:], tuple(_stripped(lines[i + 1 : end])), is_fixed))
    return found


def rewrite(pairs: Sequence[tuple[Shown, Sequence[str]]]) -> None:
    """Put what commands have printed in place of what their page shows of them."""
    for page in {each.page for each, _ in pairs}:
        lines = page.read_text().splitlines()
        of_page = [(each, printed) for each, printed in pairs if each.page == page]
        for each, printed in sorted(of_page, key=lambda pair: pair[0].line, reverse=True):
            end = next(i for i in range(each.line + 1, len(lines)) if lines[i].startswith(("$ ", "```")))
            gap = [""] if lines[end].startswith("$ ") else []
            lines[each.line + 1 : end] = [*each.written(printed), *gap]
        page.write_text("\n".join(lines) + "\n")


def printed_by(command: str) -> list[str]:
    """Run a command of a page in this process; return what it prints, on stdout and stderr alike."""
    name, *arguments = shlex.split(command)
    assert name == "layerwise", command
    stream = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "stderr", stream)
        try:
            with pytest.raises(SystemExit):
                main(arguments)
        finally:
            undo_logging()
    return _stripped(stream.getvalue().splitlines())


def commands(page: Path) -> list[list[str]]:
    """Return every ``layerwise`` command that a page gives, in blocks and in sentences, in words."""
    text = page.read_text().replace("\\\n", " ")
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    typed = [line.removeprefix("$ ") for block in blocks for line in block.splitlines()]
    typed += re.findall(r"`([^`]+)`", " ".join(prose(page)))
    return [shlex.split(line, comments=True) for line in typed if re.match(r"layerwise [a-z]", line)]


def _cut(output: Sequence[str]) -> list[list[str]]:
    """Return the lines before and behind the gap, or all."""
    if GAP not in output:
        return [list(output)]
    place = list(output).index(GAP)
    assert GAP not in output[place + 1 :], "a block can leave out lines in one place only"
    return [list(output[:place]), list(output[place + 1 :])]


def _stripped(lines: Sequence[str]) -> list[str]:
    """Return lines without spaces behind them, and without empty ones around them."""
    return "\n".join(line.rstrip() for line in lines).strip("\n").splitlines()
