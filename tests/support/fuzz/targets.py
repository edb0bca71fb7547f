"""What reads files: each kind with good files of it, and what else is done with one that is accepted.

An accepted file must hold what it promises: it is written and read again unchanged, and all that is computed or
printed of it works. What is not accepted is refused with ``LayerwiseError``, and each problem has a place.
"""

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from planner.devices.library import cluster
from planner.devices.schema import read_cluster, write_cluster
from planner.errors import FormatError, LayerwiseError, MismatchError
from planner.inference.schema import Partition
from planner.ir.canonical import decode_file
from planner.ir.graph import LayerGraph
from planner.plan import Plan
from planner.plan.check import refuse_other_model
from planner.plan.measured import Measured, layers_of, read_measured
from planner.plan.measured_stages import MeasuredPipeline, MeasuredStage
from planner.plan.stages import graphs_of, stage_plans
from planner.profile.file import ProfileFile, read_profile, text_of
from planner.profile.foreign import read_foreign
from planner.profile.pipedream_import import import_pipedream
from planner.report import differences, partitions, pipelines, tables
from support.fuzz import seeds

PLACE = re.compile(r"\$|line \d+|row \d+|the file")
"""How the place of a problem begins."""
MOST_CHARACTERS = 200_000
"""Of a message: fifty problems, of a file with a long path."""


@dataclass(frozen=True)
class Target:
    """A kind of file.

    Attributes:
        name: in the table of results.
        suffix: of its files.
        good: returns files that are accepted.
        use: reads a file and does with it what can be done; raises ``LayerwiseError`` where it is refused.
    """

    name: str
    suffix: str
    good: Callable[[], Sequence[bytes]]
    use: Callable[[Path], None]

    def is_accepted(self, raw: bytes, path: Path) -> bool:
        """Return whether a file is accepted, after using it; written to ``path``.

        Raises:
            AssertionError: it is refused without a place.
            Exception: whatever else went wrong, which nothing should.
        """
        path.write_bytes(raw)
        try:
            self.use(path)
        except LayerwiseError as error:
            refused = error
        else:
            return True
        assert 0 < len(str(refused)) < MOST_CHARACTERS
        if isinstance(refused, FormatError):
            assert refused.problems
            assert all(PLACE.match(place) for place, _ in refused.problems), refused
        return False


def _use_plan(path: Path) -> None:
    plan = Plan.load(path)
    assert Plan.from_json(plan.to_json()) == plan
    assert re.fullmatch("[0-9a-f]{64}", plan.digest)
    rows = tables.rows_of_plan(plan)
    shown = [tables.summary(plan), *tables.layers(plan, True), *tables.layers(plan), tables.strategies(rows)]
    shown += [pipelines.stages(plan)] if plan.is_pipelined else []
    assert all(len(row) == len(table.columns) for table in shown for row in table.rows)
    said = [*tables.standing_sentences(rows, plan.search.lower_bound_s), tables.source_sentence(plan)]
    said += tables.branch_sentences(plan.search.branches, plan.totals.step_s)
    said += pipelines.sentences(plan) if plan.is_pipelined else []
    said.append(tables.bound_sentence(plan.totals.step_s, plan.search.lower_bound_s))
    said.append(differences.sentence(plan, plan))
    assert all(said)
    graph = seeds.known_graphs().get(plan.model.graph_sha256)
    if graph is not None:
        _verify(plan, graph)


def _verify(plan: Plan, graph: LayerGraph) -> None:
    """Check a plan against its network: it is refused as a mismatch, or can be run."""
    try:
        stages = graphs_of(plan, graph) if plan.is_pipelined else None
        if stages is None:
            refuse_other_model(plan, graph)
    except MismatchError:
        return
    for one in stage_plans(plan, stages) if stages is not None else (plan,):
        assert set(one.strategy) == {layer.id for layer in (one.only_stage.layers)}


def _use_partition(path: Path) -> None:
    found = Partition.load(path)
    assert Partition.from_json(found.to_json()) == found
    assert all(len(row) == len(table.columns) for table in partitions.tables(found) for row in table.rows)
    assert partitions.bound_sentence(found)


def _use_cluster(path: Path) -> None:
    graph = read_cluster(path)
    assert len(graph.digest) == 64
    assert graph.mesh().size == len(graph.devices)
    write_cluster(graph, path)
    assert read_cluster(path) == graph
    ends = graph.devices[0].id, graph.devices[-1].id
    assert graph.paths is not None
    assert all(link.a != link.b for link in graph.links)
    assert ends


def _use_profile(path: Path) -> None:
    found = read_profile(path)
    assert text_of(ProfileFile.model_validate_json(text_of(found))) == text_of(found)
    for entry in found.layers:
        assert entry.layer.piece.text
        _ = entry.layer.piece.family
        if found.fit is not None:
            found.fit.seconds(entry.layer.piece)


def _use_measured(path: Path) -> None:
    read_measured(path, seeds.small_plan())


def _use_measured_pipeline(path: Path) -> None:
    assert decode_file(MeasuredPipeline, path, "measured run").slow_down >= -1


def _use_foreign(path: Path) -> None:
    found = read_foreign(path)
    assert found.entries
    assert all(entry.layer.piece.text for entry in found.entries)


def _use_pipedream(path: Path) -> None:
    assert all(entry.layer.piece.text for entry in import_pipedream(path).entries)


def _written(write: Callable[[Path], None]) -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "file.json")
        write(path)
        return path.read_bytes()


@functools.cache
def _clusters() -> Sequence[bytes]:
    names = ("2xa100-nvlink", "2x2-h100-ib400", "8xk20-pcie", "4xhmc-torus", "4x2-p100-fat100")
    found = [_written(functools.partial(write_cluster, cluster(name))) for name in names]
    measured = json.loads(found[1])
    points = [{"num_bytes": n, "seconds": n * 1e-9, "loaded_s": n * 1.1e-9, "lost_s": 0.0} for n in (1024, 2**20)]
    measured["collectives"] = [
        {"kind": kind, "levels": levels, "points": points}
        for kind in ("all_reduce", "all_gather") for levels in (["node"], ["node", "gpu"])
    ]  # fmt: skip
    return [*found, json.dumps(measured).encode()]


@functools.cache
def _profiles() -> Sequence[bytes]:
    whole = json.loads(seeds.SHIPPED.joinpath("devices", "cpu-core.json").read_text())
    few = whole | {"layers": whole["layers"][:: max(len(whole["layers"]) // 8, 1)]}
    bare = few | {"layers": few["layers"][:2], "fit": None}
    return [json.dumps(bare).encode(), json.dumps(few | {"fit": _thin(whole["fit"])}).encode()]


def _thin(fit: dict[str, list[dict[str, object]]]) -> object:
    """Return a fit with its first condition, so that mutations find other parts of the file too."""
    return fit | {"conditions": fit["conditions"][:1]}


@functools.cache
def _measured() -> Sequence[bytes]:
    plan = seeds.small_plan()
    run = Measured(
        plan_sha256=plan.digest, model="net", batch=8, num_ranks=2, environment={"torch": "2"}, rank=0,
        steps_s=[1.0, 1.1], step_s=1.0, step_iqr_s=0.0, compute_only_s=0.5, instrumented_steps_s=[1.0],
        instrumented_step_s=1.0, gathering_s=0.0, exposed_sync_s=0.0, optimizer_s=0.0, other_s=-0.5,
        layers=layers_of(plan, {"fc1": {"forward": (0.5, 0.25)}}),
    )  # fmt: skip
    return [_written(run.save)]


@functools.cache
def _measured_pipelines() -> Sequence[bytes]:
    stage = MeasuredStage(rank=0, forward_s=0.1, backward_s=0.2, tail_s=0.0, bubble_share=0.5)
    pipeline = MeasuredPipeline(
        plan_sha256="a" * 64, model="net", batch=8, num_ranks=2, environment={}, steps_s=[1.0], step_s=1.0,
        step_iqr_s=0.0, instrumented_step_s=1.0, stages=[stage, stage],
    )  # fmt: skip
    return [_written(pipeline.save)]


def _foreign_tables() -> Sequence[bytes]:
    lines = seeds.SHIPPED.joinpath("foreign", "convnet-benchmarks-vgg.csv").read_bytes().splitlines(keepends=True)
    return [b"".join(lines[:14]), b"".join(lines[:7])]


def _foreign_json() -> Sequence[bytes]:
    row = {
        "op": "conv", "batch": 8, "in_channels": 3, "out_channels": 8, "height": 32, "width": 32, "kernel": "3x3",
        "padding": 1, "bias": True, "forward_ms": 1.5, "backward_data_ms": 0, "backward_weight_ms": 2.25, "repeats": 5,
    }  # fmt: skip
    other = {"op": "linear", "batch": 8, "in_channels": 3, "out_channels": 8, "forward_ms": 0.5}
    return [json.dumps([row, other]).encode()]


def _pipedream() -> Sequence[bytes]:
    return [seeds.SHIPPED.joinpath("pipedream", "alexnet.txt").read_bytes()]


TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        Target("plan", ".json", seeds.plans, _use_plan),
        Target("partition", ".json", seeds.partitions, _use_partition),
        Target("cluster", ".json", _clusters, _use_cluster),
        Target("device profile", ".json", _profiles, _use_profile),
        Target("measured run", ".json", _measured, _use_measured),
        Target("measured pipeline", ".json", _measured_pipelines, _use_measured_pipeline),
        Target("measurements, CSV", ".csv", _foreign_tables, _use_foreign),
        Target("measurements, JSON", ".json", _foreign_json, _use_foreign),
        Target("PipeDream profile", ".txt", _pipedream, _use_pipedream),
    )
}
