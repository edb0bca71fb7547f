"""What a table looks like in a terminal that is too narrow for it."""

import io

from rich.console import Console

from planner.cli.terminal import rendered
from planner.report.tables import Table

TABLE = Table(
    "", ("name", "first", "second", "third"), (("conv-data-fc-model", "1.1111", "2.2222", "3.3333"),),
    spare=("second", "third"),
)  # fmt: skip


def lines(table: Table, width: int) -> list[str]:
    stream = io.StringIO()
    Console(file=stream, width=width).print(rendered(table))
    return [" ".join(line.split()) for line in stream.getvalue().splitlines()]


def test_a_wide_terminal_has_room_for_everything() -> None:
    heading, _, row = lines(TABLE, 80)
    assert (heading, row) == ("name first second third", "conv-data-fc-model 1.1111 2.2222 3.3333")


def test_a_narrow_one_leaves_out_what_can_be_spared_first_and_says_so() -> None:
    heading, _, row, note = lines(TABLE, 40)
    assert (heading, row) == ("name first third", "conv-data-fc-model 1.1111 3.3333")
    assert note == "Left out, for want of room: second."


def test_names_are_never_cut() -> None:
    found = lines(TABLE, 24)
    assert "".join(row.split()[0] for row in found[2:4]) == "conv-data-fc-model"
    assert "1.1111" in found[2]
    assert "second, third" in " ".join(found)
