"""The file of a measured run: strict, and of one plan only."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from planner.errors import FormatError, MismatchError, UsageError
from planner.plan.measured import Measured, layers_of, read_measured
from support.plans import Json, document, plan_of

PLAN = plan_of(document())


@pytest.fixture
def edited(tmp_path: Path) -> Callable[[Callable[[Json], object]], Path]:
    def edit(change: Callable[[Json], object]) -> Path:
        run = Measured(
            plan_sha256=PLAN.digest, model="net", batch=8, num_ranks=2, environment={"torch": "2"}, rank=0,
            steps_s=[1.0], step_s=1.0, step_iqr_s=0.0, compute_only_s=0.5, instrumented_steps_s=[1.0],
            instrumented_step_s=1.0, gathering_s=0.0, exposed_sync_s=0.0, optimizer_s=0.0, other_s=-0.5,
            layers=layers_of(PLAN, {"fc1": {"forward": (0.5, 0.25), "transfer_backward": (1.0, 0.125)}}),
        )  # fmt: skip
        path = tmp_path / "run.json"
        run.save(path)
        found = json.loads(path.read_text())
        change(found)
        path.write_text(json.dumps(found))
        return path

    return edit


def test_a_file_is_read_as_it_was_written_and_layers_without_marks_took_no_time(
    edited: Callable[[Callable[[Json], object]], Path],
) -> None:
    found = read_measured(edited(lambda _: None), PLAN)
    rows = {row.id: row for row in found.layers}
    assert list(rows) == ["input", "fc1", "fc2", "output"]
    assert (rows["fc1"].compute_s, rows["fc1"].transfer_s) == (0.5, 1.0)
    assert (rows["fc1"].forward_iqr_s, rows["fc1"].transfer_backward_iqr_s) == (0.25, 0.125)
    assert rows["fc2"].compute_s == rows["fc2"].transfer_s == 0


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda d: d.update(steps_s=[]), "$.steps_s"),
        (lambda d: d.update(step_s=0.0), "$.step_s"),
        (lambda d: d.update(schema_version=2), "$.schema_version"),
        (lambda d: d.update(extra=1), "$.extra"),
        (lambda d: d["layers"][1].update(forward_s=-1.0), "$.layers[1].forward_s"),
        (lambda d: d["layers"][1].pop("backward_s"), "$.layers[1].backward_s"),
    ],
)
def test_every_mistake_is_named_by_its_place(
    edited: Callable[[Callable[[Json], object]], Path], change: Callable[[Json], object], place: str
) -> None:
    with pytest.raises(FormatError) as caught:
        read_measured(edited(change), PLAN)
    assert [where for where, _ in caught.value.problems] == [place]


@pytest.mark.parametrize(
    "change", [lambda d: d.update(plan_sha256="0" * 64), lambda d: d["layers"].pop(), lambda d: d["layers"].reverse()]
)
def test_the_run_of_another_plan_is_refused(
    edited: Callable[[Callable[[Json], object]], Path], change: Callable[[Json], object]
) -> None:
    with pytest.raises(MismatchError, match="is of another plan"):
        read_measured(edited(change), PLAN)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"absent\.json"):
        read_measured(tmp_path / "absent.json", PLAN)
