"""All that the page of ``layerwise report`` says, as one JSON value."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from planner.cost.overlap import Event
from planner.cost.traffic import Traffic
from planner.devices.graph import Cluster
from planner.plan.measured import Measured
from planner.plan.measured_stages import MeasuredPipeline
from planner.plan.schema import Plan, StageCostPart
from planner.report import measured as measured_tables
from planner.report import measured_stages, pictures, pipelines, tables
from planner.report.pictures import Json, PricedStage
from planner.report.scaling import ScalePoint, scaling
from planner.report.tracks import COMPUTE, OTHER, TRANSFER, WAITING, predicted_tracks
from planner.search.alternatives import Standing
from planner.units import format_count, format_seconds


@dataclass(frozen=True, slots=True)
class Content:
    """What a report is made of.

    Attributes:
        plan: that it is about.
        machine: that the plan is priced on.
        is_as_planned: the machine has the figures that the plan was made with.
        stages: of the plan, priced.
        step_s: predicted on the machine.
        events: of the predicted step; of schedules in cycles, of a short run.
        stage_costs: of a pipeline, on the machine.
        sent: of a pipeline, from each stage to the next one, bytes of the tensors that it receives, in order.
        position_bytes: of a pipeline, the most that the devices of every position hold.
        traffic: between the devices; None where they are too many to be shown.
        devices: names of the ranks.
        standings: the next best split of every layer, where it was looked for.
        measured: a run.
        trace: a measured timeline, by rank.
        trace_facts: what its file says of it.
        scale: the same network on other numbers of devices.
        utc: when the report was made.
        versions: that made it.
    """

    plan: Plan
    machine: Cluster
    is_as_planned: bool
    stages: Sequence[PricedStage]
    step_s: float
    events: Sequence[Event]
    devices: Sequence[str]
    utc: str
    versions: Mapping[str, str]
    stage_costs: Sequence[StageCostPart] = ()
    sent: Sequence[Sequence[float]] = ()
    position_bytes: Sequence[int] = ()
    traffic: Traffic | None = None
    standings: Sequence[Standing] = ()
    measured: Measured | MeasuredPipeline | None = None
    trace: Mapping[str, Sequence[Event]] = field(default_factory=dict)
    trace_facts: Mapping[str, str] = field(default_factory=dict)
    scale: Sequence[ScalePoint] = ()

    @property
    def title(self) -> str:
        """In a line, what the plan is for."""
        plan = self.plan
        return f"{plan.model.name} on {plan.cluster.name}, batch {plan.batch}"


def document(content: Content) -> Json:
    """Return the document of a report."""
    plan, limit = content.plan, content.plan.search.memory_limit_bytes
    rows = tables.rows_of_plan(plan)
    layers = pictures.layers(content.stages)
    found: Json = {
        "title": content.title,
        "facts": _table(tables.summary(plan)),
        "key": [
            ["step", format_seconds(content.step_s, 4)],
            ["samples/s", format_count(plan.batch / content.step_s)],
            *_key(content),
        ],
        "sentences": list(_sentences(content, rows)),
        "layers": {**layers, **_of_layers(content)},
        "graph": pictures.graph(content.stages, content.sent),
        "timeline": {**_timelines(content).document(), "kinds": pictures.KINDS},
        "memory": (
            pictures.positions(content.position_bytes, limit) if plan.is_pipelined
            else pictures.memory(content.stages[0].timeline, limit)
        ),
        "strategies": _strategies(rows),
        "accuracy": _accuracy(content),
        "provenance": list(_provenance(content)),
    }  # fmt: skip
    if plan.is_pipelined:
        found["stages"] = _table(pipelines.stages(plan))
    if content.traffic is not None:
        found["traffic"] = pictures.traffic(content.devices, content.traffic)
    if content.scale:
        found["scaling"] = scaling(content.scale, plan.batch)
    return found


def _key(content: Content) -> Iterator[list[str]]:
    """Yield the figures that stand in front."""
    plan = content.plan
    rows = {row[0]: row[1] for row in tables.summary(plan).rows}
    data = next((b.step_s for b in plan.baselines if b.name == "data"), None)
    if data is not None and content.is_as_planned:
        yield ["over data parallelism", f"{data / content.step_s:.3f}x"]
    yield ["exposed communication", rows["exposed communication"]]
    yield ["memory per device", rows["memory per device"]]


def _sentences(content: Content, rows: Sequence[tables.StrategyRow]) -> Iterator[str]:
    plan = content.plan
    if not content.is_as_planned:
        yield (
            f"Layers, timelines, memory and traffic are predicted for {content.machine.name} with a step of "
            f"{format_seconds(content.step_s, 5)}; the table of the plan and the other strategies are those of "
            f"{plan.cluster.name} as it was when planned, with {format_seconds(plan.totals.step_s, 5)}."
        )
    what = "pipeline" if plan.is_pipelined else "strategy"
    if plan.is_pipelined:
        yield from pipelines.sentences(plan)
    yield tables.bound_sentence(plan.totals.step_s, plan.search.lower_bound_s, what)
    yield from tables.standing_sentences(rows, plan.search.lower_bound_s)
    yield from tables.branch_sentences(plan.search.branches, plan.totals.step_s)
    yield from tables.change_sentences(plan.model.changes)


def _of_layers(content: Content) -> Json:
    """Return what is known of layers beside the prediction: measured seconds, and the next best split."""
    found: Json = {}
    if isinstance(content.measured, Measured):
        found["measured"] = pictures.short(layer.compute_s for layer in content.measured.layers)
        found["measured_transfer"] = pictures.short(layer.transfer_s for layer in content.measured.layers)
    if content.standings:
        found["next"] = ["" if row.other is None else str(row.other) for row in content.standings]
        found["more"] = pictures.short(row.more_s / content.step_s for row in content.standings)
    return found


def _timelines(content: Content) -> pictures.Timelines:
    found = pictures.Timelines([layer.id for stage in content.stages for layer in stage.layers])
    found.add(predicted_tracks(content.plan, content.events), _predicted_note(content.plan))
    shown = pictures.within(content.trace)
    left_out = len(content.trace) - len(shown)
    found.add(shown, f"{tables.counted(left_out, 'further rank')} left out" if left_out else "")
    if not content.trace and isinstance(content.measured, Measured):
        found.add(
            {f"measured, rank {content.measured.rank}": list(_medians(content.measured))},
            "medians of the parts of a step, one after the other; --trace shows a step as it went",
        )
    return found


def _predicted_note(plan: Plan) -> str:
    if plan.schedule.kind in {"stale", "pipedream"}:
        return "a short run, from filling the pipeline to emptying it; its micro-batches are batches"
    return "ranks that compute the same do the same at the same time"


def _medians(found: Measured) -> Iterator[Event]:
    """Yield the parts of a measured step, one after the other."""
    parts = []
    for layer in found.layers:
        parts.append((f"{layer.id} transfer forward", TRANSFER, layer.transfer_forward_s))
        parts.append((f"{layer.id} forward", COMPUTE, layer.forward_s))
    for layer in reversed(found.layers):
        parts.append((f"{layer.id} backward", COMPUTE, layer.backward_s))
        parts.append((f"{layer.id} transfer backward", TRANSFER, layer.transfer_backward_s))
    parts.append(("gathering", COMPUTE, found.gathering_s))
    parts.append(("exposed sync", WAITING, found.exposed_sync_s))
    parts.append(("optimizer", COMPUTE, found.optimizer_s))
    parts.append(("other", OTHER, max(found.other_s, 0.0)))
    now_s = 0.0
    for name, track, seconds in parts:
        yield Event(name, track, now_s, now_s + seconds)
        now_s += seconds


def _strategies(rows: Sequence[tables.StrategyRow]) -> Json:
    return {
        **_table(tables.strategies(rows)),
        "seconds": pictures.short(row.step_s for row in rows),
        "usable": [row.fits and not row.note for row in rows],
        "notes": [
            row.note and f"{row.name} was not allowed: {row.note}." for row in rows
        ],
    }  # fmt: skip


def _accuracy(content: Content) -> Json:
    """Return how the prediction compares with a run; without one, where its seconds are from."""
    plan, measured = content.plan, content.measured
    found: Json = {"sentences": [tables.source_sentence(plan)], "tables": []}
    where = [(content.machine.name, content.step_s)]
    if not content.is_as_planned:
        where.insert(0, (f"{plan.cluster.name}, when planned", plan.totals.step_s))
    if isinstance(measured, MeasuredPipeline):
        found["tables"] = [
            _table(measured_stages.steps(plan, where, measured)),
            _table(measured_stages.stages(plan, content.machine.name, content.stage_costs, measured)),
        ]
        found["sentences"] = [tables.source_sentence(plan), measured_stages.marking_sentence(plan, measured)]
    elif measured is not None:
        (stage,) = content.stages
        ids = [layer.id for layer in stage.layers]
        said = measured_tables.predicted_parts(ids, stage.costs, stage.timeline)
        found["tables"] = [
            _table(measured_tables.steps(plan, where, measured)),
            _table(measured_tables.parts(measured, said)),
        ]
        found["sentences"] = [tables.source_sentence(plan), measured_tables.marking_sentence(measured)]
        found["points"] = [
            [i, *pictures.short((said.layers[layer.id].compute_s, layer.compute_s))]
            for i, layer in enumerate(measured.layers) if layer.compute_s and said.layers[layer.id].compute_s
        ]  # fmt: skip
    return found


def _provenance(content: Content) -> Iterator[list[str]]:
    plan, measured = content.plan, content.measured
    yield ["planned with", plan.provenance.command or "the Python interface"]
    yield ["planned at", plan.provenance.utc]
    yield ["with versions", _listed(plan.provenance.versions)]
    yield ["model from", f"{plan.model.source or 'unknown'} {_listed(plan.model.arguments)}".strip()]
    yield ["plan digest", plan.digest]
    yield ["graph digest", plan.model.graph_sha256]
    yield ["machine digest", plan.cluster.sha256]
    yield ["profile digest", plan.provenance.profile_sha256]
    if measured is not None:
        yield ["measured in", _listed(measured.environment)]
    elif content.trace_facts:
        yield ["measured in", _listed(content.trace_facts)]
    yield ["report made at", content.utc]
    yield ["report made with", _listed(content.versions)]


def _listed(found: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in found.items())


def _table(found: tables.Table) -> Json:
    return {
        "title": found.title, "columns": found.columns, "rows": found.rows, "text": found.num_text,
        "emphasis": found.emphasis,
    }  # fmt: skip
