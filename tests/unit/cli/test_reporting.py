"""``layerwise report``: what it refuses before anything is priced."""

import json
from pathlib import Path

import pytest

from support.command_line import layerwise
from support.plans import document


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("something was priced")

    monkeypatch.setattr("planner.api.reporting.report", fail)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(document()))
    return path


def test_what_cannot_be_is_refused_before_anything_is_priced(plan: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    trace = tmp_path / "trace.json"
    trace.write_text('{"otherData": {"plan_sha256": "0", "model": "another"}, "traceEvents": []}')
    for arguments, message, code in (
        (("-o", tmp_path / "nowhere" / "x.html"), "there is no folder", 2),
        (("-o", out, "--measured", tmp_path / "none.json"), "cannot read measured run", 2),
        (("-o", out, "--measured", plan), "measured run", 2),
        (("-o", out, "--trace", plan), "no list of events, such as `layerwise run --trace` writes", 2),
        (("-o", out, "--trace", trace), "is of another plan (of 'another')", 2),
        (("-o", out, "--cluster", "moon"), "moon", 2),
        (("-o", out, "--scale", "two"), "--scale 'two' is not a number", 2),
        ((), "--output", 2),
    ):
        ran = layerwise("report", plan, *arguments)
        assert message in ran.error
        assert ran.code == code
        assert not out.exists()
