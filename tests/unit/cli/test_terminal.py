"""What a table looks like in a terminal that is too narrow for it."""

import io

import pytest
from rich.console import Console

from planner.cli import terminal
from planner.cli.terminal import rendered
from planner.report.tables import Table
from support.command_line import layerwise

TABLE = Table(
    "", ("name", "first", "second", "third"), (("conv-data-fc-model", "1.1111", "2.2222", "3.3333"),),
    spare=("second", "third"),
)  # fmt: skip


def lines(table: Table, width: int) -> list[str]:
    return [" ".join(line.split()) for line in printed(table, width)]


def printed(table: Table, width: int) -> list[str]:
    stream = io.StringIO()
    Console(file=stream, width=width).print(rendered(table))
    return stream.getvalue().splitlines()


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


def test_figures_without_room_stand_below_with_the_names_again_and_none_is_cut() -> None:
    names, speeds = ("conv-data-fc-model", "fsdp"), ("1.23k", "45.6k", "789k", "12.3M", "4.56M")
    machines = tuple(f"4x{number}-a100-eth10" for number in range(len(speeds)))
    wide = Table("Samples per second, by cluster", ("strategy", *machines), tuple((name, *speeds) for name in names))
    for width in (32, 40, 80):
        found = printed(wide, width)
        assert max(map(len, found)) <= width
        words = " ".join(found[1:]).split()
        assert [words.count(word) for word in (*machines, *speeds)] == [1] * len(machines) + [2] * len(speeds)
    assert printed(wide, 80)[1].split() == ["strategy", *machines[:3]]
    assert printed(wide, 80)[6].split() == ["strategy", *machines[3:]]
    assert printed(wide, 80)[8].split() == ["conv-data-fc-model", *speeds[3:]]


def test_a_title_is_no_narrower_than_the_terminal() -> None:
    assert printed(Table("Samples per second of every strategy", ("a", "b"), (("c", "1"),)), 80)[0] == (
        "Samples per second of every strategy"
    )


def test_what_is_left_out_is_named_without_the_blank_that_tells_two_headings_apart() -> None:
    twice = Table("", ("name", "seconds", "seconds "), (("conv", "1.111", "2.222"),), spare=("seconds ",))
    assert lines(twice, 20)[-2:] == ["Left out, for want", "of room: seconds."]


@pytest.mark.parametrize("command", [("clusters",), ("inspect", "lenet5"), ("models", "l*")])
def test_tables_of_commands_fit_into_80_columns_with_all_their_headings(
    command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "_PIPE_WIDTH", 80)
    found = layerwise(*command).out
    assert "…" not in found
    assert command != ("clusters",) or {"fp32", "tf32", "bf16"} <= set(found.split())
    assert command != ("inspect", "lenet5") or "forward FLOP" in found
