"""``layerwise plan --objective`` as a user meets it, and ``show`` of what it writes."""

import json
from pathlib import Path

import jsonschema
import pytest

from planner.inference.schema import Partition
from support.command_line import layerwise

PLAN = ("plan", "lenet5", "--cluster", "4xsamg55-wlan4", "--time-limit", "2s")


def test_a_partition_is_written_shown_and_valid(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    ran = layerwise(*PLAN, "--objective", "inference-rate", "--group", "4", "--input-device", "cpu1", "-o", path)
    assert ran.code == 0, ran.err
    assert "this partition" in ran.err
    found = Partition.load(path)
    assert set(found.layers[0].devices) == {1}
    assert all(device.memory_bytes <= device.limit_bytes for device in found.devices)
    busiest = max([device.busy_s for device in found.devices] + [link.busy_s for link in found.links])
    assert found.rate_per_s == pytest.approx(1 / busiest)
    assert found.rate_per_s <= found.search.rate_bound_per_s * (1 + 1e-9)
    jsonschema.validate(json.loads(path.read_text()), json.loads(layerwise("schema", "--partition").out))
    shown = layerwise("show", path)
    assert shown.code == 0
    assert all(text in shown.out for text in ("inference-rate", "4 devices", "squares of 4 x 4", "cpu1", "greedy"))
    for command in (("check", path), ("run", path), ("explain", path), ("diff", path, path)):
        ran = layerwise(*command)
        assert ran.code == 2
        assert ran.error.endswith(
            "is a partition for inference, which `layerwise show` prints; a training plan is needed"
        )


def test_communication_is_nothing_where_one_device_is_enough() -> None:
    ran = layerwise("plan", "lenet5", "--devices", "2", "--objective", "communication", "--time-limit", "2s")
    assert (ran.code, json.loads(ran.out)["communication_bytes"]) == (0, 0)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((*PLAN, "--objective", "communication", "--batch", "3"), 2, "--batch is for training"),
        ((*PLAN, "--group", "2"), 2, "--group is for inference: add --objective"),
        (
            (*PLAN, "--objective", "communication", "--input-device", "gpu0"),
            2,
            "unknown device of 4xsamg55-wlan4 'gpu0'",
        ),
        (("plan", "alexnet", *PLAN[2:], "--objective", "communication"), 3, "the largest device has 176 KiB"),
        ((*PLAN[:2], "--cluster", "2xstm32l433-wlan11", "--objective", "communication", "--group", "2"), 3, "together"),
    ],
)
def test_what_cannot_be_is_refused(arguments: tuple[str, ...], code: int, message: str) -> None:
    ran = layerwise(*arguments)
    assert (ran.code, message in ran.error) == (code, True), ran.err


def test_a_file_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    ran = layerwise("plan", "lenet5", "--devices", "2", "--objective", "communication", "--time-limit", "1s")
    content = json.loads(ran.out)
    content["layers"][1]["devices"] = [0, 1]
    path = tmp_path / "p.json"
    path.write_text(json.dumps(content))
    assert "has 1 groups, not 2" in layerwise("show", path).error
    content["layers"][1]["devices"] = [7]
    path.write_text(json.dumps(content))
    assert "device 7 is used, and there are 2" in layerwise("show", path).error
