"""Mutated files of every kind that is read: each is refused with the place of what is wrong, or holds its promises."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from planner.errors import FormatError
from planner.ir.canonical import decode
from planner.plan.schema import Plan, json_schema
from support.fuzz.campaign import campaign
from support.fuzz.checkpoints import METADATA
from support.fuzz.mutations import mutated
from support.fuzz.schemas import values
from support.fuzz.targets import TARGETS, Target

FULL = bool(os.environ.get("LAYERWISE_FULL"))
PLANS, OTHERS = 500, 100
"""A sample of what ``python -m examples.benchmarks.faults --full`` tries."""
ACCEPTED = 1000 if FULL else 20
SCHEMA_EXAMPLES = 2000 if FULL else 10


@pytest.mark.parametrize("target", [*TARGETS.values(), METADATA], ids=lambda target: target.name)
def test_a_mutated_file_is_refused_or_holds(target: Target, tmp_path: Path) -> None:
    count = PLANS if target.name == "plan" else OTHERS
    found = campaign(target, count, keep=tmp_path / "kept")
    assert not found.failures, f"files in {tmp_path / 'kept'}:\n" + "\n".join(found.failures)
    assert found.accepted + found.refused == found.tried == count
    assert found.refused > 0
    assert found.distinct > 0.7 * count


def test_mutations_are_drawn_from_the_seed_alone() -> None:
    good = TARGETS["cluster"].good()
    first, again = ([mutated(good, rng) for _ in range(9)] for rng in map(np.random.default_rng, (3, 3)))
    assert first == again


def test_what_is_accepted_is_valid_under_the_published_schema() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(json_schema())
    validator = jsonschema.validators.validator_for(schema)(schema)
    rng, good = np.random.default_rng(1), TARGETS["plan"].good()[:1]
    accepted = 0
    while accepted < ACCEPTED:
        raw = mutated(good, rng)
        try:
            Plan.from_json(raw)
        except FormatError:
            continue
        accepted += 1
        assert validator.is_valid(json.loads(raw)), raw


def test_what_the_published_schema_allows_fails_only_where_parts_do_not_fit_each_other() -> None:
    @settings(max_examples=SCHEMA_EXAMPLES, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(values(json.loads(json_schema())))
    def check(value: object) -> None:
        plan = decode(Plan, json.dumps(value), "plan")
        try:
            plan.validated("plan")
        except FormatError as error:
            found = error
        else:
            return
        assert all(place.startswith("$.") for place, _ in found.problems)

    check()
