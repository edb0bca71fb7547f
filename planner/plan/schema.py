"""The plan file: decisions, digests, prediction and provenance. Consequences are derived, not stored.

Transfers, groups and local shapes follow from the splits (``planner.ir``), so they are not here.
Sizes are in bytes, times in seconds per step.
"""

import itertools
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Final, Literal, Self

from pydantic import FailFast, Field

from planner import html
from planner.errors import FormatError, MismatchError, UsageError
from planner.ir.canonical import (
    Amount,
    Bytes,
    Count,
    PositiveSeconds,
    Seconds,
    Size,
    StrictModel,
    canonical_bytes,
    decode,
    read_bytes,
    sha256_of,
    write_atomically,
)
from planner.ir.dimension import Dimension
from planner.ir.graph import LayerGraph
from planner.ir.mesh import Mesh, MeshAxis
from planner.ir.recompute import enlarged
from planner.ir.rules import InputOutput
from planner.ir.split import LayerId, Split, Strategy
from planner.ir.tensor import DType
from planner.units import format_bytes, format_count, format_seconds

SCHEMA_VERSION: Final = 1

MAX_RANKS: Final = 65_536
MAX_MICROBATCHES: Final = 65_536
Share = Annotated[int, Field(ge=0, le=1_000_000)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(min_length=1, max_length=1000)]


class InputTensor(StrictModel):
    """A model input; the first size is the global batch. ``keyword``: it is passed by name."""

    name: Name
    shape: Annotated[list[Count], Field(min_length=1, max_length=8)]
    dtype: DType
    keyword: bool = False


class ModelPart(StrictModel):
    """Which network the plan is for.

    ``changes``: how it differs from the network it was made of, where a transform made it another one. Strategies never
    do: they compute what one device would.
    """

    name: Name
    source: Annotated[str, Field(max_length=10_000)]
    arguments: dict[str, str | int | float | bool] = Field(default_factory=dict)
    graph_sha256: Sha256
    num_params: Size
    inputs: Annotated[list[InputTensor], Field(min_length=1, max_length=100)]
    changes: Annotated[list[Name], Field(max_length=100)] = Field(default_factory=list)


class ClusterPart(StrictModel):
    """Which machine the plan is for."""

    name: Name
    sha256: Sha256
    num_devices: Annotated[int, Field(ge=1, le=MAX_RANKS)]


class AxisPart(StrictModel):
    """One mesh axis."""

    name: Name
    size: Annotated[int, Field(ge=2, le=MAX_RANKS)]


class MeshPart(StrictModel):
    """The devices of a stage; outermost axis first, ranks row-major."""

    axes: Annotated[list[AxisPart], Field(max_length=12)]
    ranks: Annotated[
        list[Annotated[int, Field(ge=0, lt=MAX_RANKS)]], FailFast(), Field(min_length=1, max_length=MAX_RANKS)
    ]

    def mesh(self) -> Mesh:
        """Return the mesh.

        Raises:
            ValueError: sizes and ranks do not fit.
        """
        return Mesh(tuple(MeshAxis(a.name, a.size) for a in self.axes), tuple(self.ranks))


class CostPart(StrictModel):
    """Predicted seconds of one layer; ``exposed_s`` is communication that nothing hides."""

    compute_s: Seconds
    transfer_s: Seconds
    halo_s: Seconds
    sync_s: Seconds
    exposed_s: Seconds


class LayerPart(StrictModel):
    """One layer: its split and what that is predicted to cost.

    ``shares``: of axes whose pieces are not equal, the weight of each coordinate; with 0 it has no part in the layer.
    ``overlap``: compute while rows of neighbours are on their way, forward and backward (``runtime.lowering.halo``); of
    no effect where the layer needs none, or gets them by another exchange.
    ``halo``: where what reads this layer needs rows of neighbours: they come in an exchange, or every rank computes
    them too (``planner.ir.recompute``).
    """

    id: Name
    op: Name
    split: dict[Name, Dimension]
    shares: dict[Name, Annotated[list[Share], FailFast(), Field(min_length=2, max_length=MAX_RANKS)]] = Field(
        default_factory=dict
    )
    overlap: bool = False
    halo: Literal["exchange", "recompute"] = "exchange"
    cost: CostPart
    memory_bytes: Bytes

    def assigned(self) -> Split:
        """Return the split with its shares."""
        shares = ((axis, tuple(weights)) for axis, weights in self.shares.items())
        return Split(tuple(self.split.items()), tuple(shares))


class StageCostPart(StrictModel):
    """Predicted numbers of one stage of several, on its busiest rank.

    ``forward_s``, ``backward_s``: of one micro-batch, transfers inside the stage included, recomputing too.
    ``sent_bytes``: to the next stage with each micro-batch; gradients come back as large.
    ``tail_s``: gradient sync that nothing hides and the update, each step.
    ``bubble_share``: of the step, what the stage's ranks wait.
    ``staleness``: by how many updates the weights change between a batch's forward pass and its backward pass.
    ``weight_versions``: that are held at once.
    ``num_in_flight``: micro-batches whose activations are held at once.
    """

    forward_s: Seconds
    backward_s: Seconds
    sent_bytes: Bytes
    tail_s: Seconds
    bubble_share: Annotated[float, Field(ge=0, le=1)]
    staleness: Size
    weight_versions: Count
    num_in_flight: Count
    memory_bytes: Bytes


class StagePart(StrictModel):
    """Layers that run on one mesh.

    ``devices``: of the cluster, in the order of the ranks, where not all of it is used; else empty.
    ``parameter_sharding``: what of the parameters is cut over the ranks that synchronise them.
    ``recompute``: keep only what the stage receives, and compute its activations again in backward.
    ``cost``: where the plan has several stages.
    """

    mesh: MeshPart
    devices: Annotated[list[Name], FailFast(), Field(max_length=MAX_RANKS)] = Field(default_factory=list)
    parameter_sharding: Literal["none", "optimizer", "full"] = "none"
    recompute: bool = False
    cost: StageCostPart | None = None
    layers: Annotated[list[LayerPart], FailFast(), Field(min_length=1, max_length=200_000)]

    def strategy(self) -> dict[LayerId, Split]:
        """Return the split of every layer."""
        return {LayerId(layer.id): layer.assigned() for layer in self.layers}

    def recomputing(self) -> frozenset[LayerId]:
        """Return the layers whose readers get no rows of neighbours."""
        return frozenset(LayerId(layer.id) for layer in self.layers if layer.halo == "recompute")


class SchedulePart(StrictModel):
    """Order of micro-batches over stages; one stage has one.

    ``kind``: of ``planner.ir.schedule``.
    ``num_microbatches``: that a batch is cut in; 1 where stages work on whole batches (``stale``, ``pipedream``).
    """

    kind: Literal["single", "gpipe", "1f1b", "interleaved", "zero-bubble", "stale", "pipedream"] = "single"
    num_microbatches: Annotated[int, Field(ge=1, le=MAX_MICROBATCHES)] = 1


class TotalsPart(StrictModel):
    """The predicted step; forward and backward compute by where its seconds are from.

    ``measured_s``: of layers that were timed; ``fitted_s``: of a roofline fitted to measurements; ``data_sheet_s``: of
    a roofline of data-sheet rates.
    """

    step_s: PositiveSeconds
    samples_per_s: Amount
    compute_s: Seconds
    exposed_s: Seconds
    measured_s: Seconds
    fitted_s: Seconds
    data_sheet_s: Seconds
    communication_bytes: Amount
    memory_bytes: Bytes


class BaselinePart(StrictModel):
    """A fixed strategy on the same problem.

    ``num_replaced`` layers could not follow its rule; ``note`` says why it could not have been planned, as it needs
    what was not allowed, and is empty where it could.
    """

    name: Name
    step_s: PositiveSeconds
    exposed_s: Seconds
    communication_bytes: Amount
    memory_bytes: Bytes
    num_replaced: Size
    note: str = ""


class ConstraintPart(StrictModel):
    """What the user fixed beforehand, as written after ``--pin``, ``--forbid`` or ``--tie``."""

    kind: Literal["pin", "forbid", "tie"]
    text: Name


class BranchesPart(StrictModel):
    """Branches of the network that may run at the same time, on different ranks.

    ``regions``: of the network that fork and join.
    ``bound``: by how much computing their branches at the same time can shorten compute, by FLOP.
    ``step_s``: the shortest predicted step with it, where one was simulated.
    ``taken``: the regions that this plan computes so, in words.
    """

    regions: Count
    bound: Annotated[float, Field(ge=1, le=1e9)]
    step_s: PositiveSeconds | None = None
    taken: Annotated[list[Name], Field(max_length=1000)] = Field(default_factory=list)


class SearchPart(StrictModel):
    """How the plan was found and how good it is proven to be.

    ``branches``: where they were asked for, and the network has any.
    """

    solver: Name
    status: Literal["optimal", "feasible"]
    lower_bound_s: Seconds
    gap: Annotated[float, Field(ge=0, le=1)]
    num_strategies: Name
    memory_limit_bytes: Bytes
    constraints: Annotated[list[ConstraintPart], Field(max_length=1000)] = Field(default_factory=list)
    branches: BranchesPart | None = None


class ProvenancePart(StrictModel):
    """Where the plan comes from."""

    profile_sha256: Sha256
    versions: dict[str, str]
    command: str
    utc: str


class Plan(StrictModel):
    """A plan file."""

    schema_version: Literal[1] = SCHEMA_VERSION
    model: ModelPart
    batch: Count
    precision: Literal["fp32", "tf32", "bf16"]
    optimizer: Literal["sgd", "momentum", "adam"]
    io: Literal["per-rank", "global", "local"]
    sync_batch_norm: bool
    bucket_bytes: Annotated[int, Field(ge=1, le=2**40)]
    cluster: ClusterPart
    schedule: SchedulePart
    stages: Annotated[list[StagePart], Field(min_length=1, max_length=1000)]
    totals: TotalsPart
    baselines: Annotated[list[BaselinePart], Field(max_length=1000)]
    search: SearchPart
    provenance: ProvenancePart

    @staticmethod
    def load(path: str | Path) -> "Plan":
        """Read a plan file. Never executes code.

        Raises:
            UsageError: no such file.
            FormatError: every problem with its JSON path.
        """
        place = Path(path)
        return Plan.from_json(read_bytes(place, "plan"), f"plan {place}")

    @staticmethod
    def from_json(text: str | bytes, what: str = "plan") -> "Plan":
        """Read a plan from its JSON text, which messages call ``what``; raises as ``load``."""
        try:
            return decode(Plan, text, what).validated(what)
        except FormatError as error:
            if any(path == "$.kind" and message.endswith('"partition"') for path, message in error.problems):
                said = "is a partition for inference, which `layerwise show` prints; a training plan is needed"
                raise FormatError(what, [("$", said)]) from None
            raise

    def validated(self, what: str) -> Self:
        """Return this plan after the checks that go across fields.

        Raises:
            FormatError: sizes, axes or layers do not fit each other.
        """
        from planner.plan.check import refuse_inconsistent

        refuse_inconsistent(self, what)
        return self

    def to_json(self) -> str:
        """Return the file's text; the same plan gives the same bytes."""
        return self.model_dump_json(indent=2) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the plan; an existing file is replaced in one step."""
        write_atomically(Path(path), self.to_json())

    def _repr_html_(self) -> str:
        """Return what a notebook shows: what the plan is for and promises, and how layers are split."""
        totals, search = self.totals, self.search
        facts = [
            ("model", f"{self.model.name}, {format_count(self.model.num_params)} parameters"),
            ("machine", f"{self.cluster.name}, {self.num_ranks} of {self.cluster.num_devices} devices"),
            ("batch", f"{self.batch}, {self.precision}, {self.optimizer}"),
            ("step", f"{format_seconds(totals.step_s, 5)}, {format_count(totals.samples_per_s)} samples/s"),
            ("exposed communication", format_seconds(totals.exposed_s)),
            ("memory per device", f"{format_bytes(totals.memory_bytes)} of {format_bytes(search.memory_limit_bytes)}"),
            ("bound", f"{format_seconds(search.lower_bound_s, 5)}, at most {100 * search.gap:.3g} % faster"),
            *(("changes the model", change) for change in self.model.changes),
        ]
        tables = [html.table(("", ""), facts, num_text=2)]
        for s, stage in enumerate(self.stages):
            runs = [list(run) for _, run in itertools.groupby(stage.layers, lambda part: (part.assigned(), part.halo))]
            rows = [(run[0].id, run[-1].id, f"{len(run)}", str(run[0].assigned())) for run in runs]
            named = f"splits of stage {s}" if self.is_pipelined else "splits"
            tables.append(html.folded(named, html.table(("from", "to", "layers", "split"), rows, num_text=4)))
        return html.titled(f"Plan of {self.model.name}", *tables)

    @property
    def num_ranks(self) -> int:
        """The ranks of all stages together."""
        return len({rank for stage in self.stages for rank in stage.mesh.ranks})

    @property
    def is_pipelined(self) -> bool:
        """Whether there are several stages."""
        return len(self.stages) > 1

    @property
    def microbatch(self) -> int:
        """The samples that a stage works on at once."""
        return self.batch // self.schedule.num_microbatches

    @property
    def only_stage(self) -> StagePart:
        """The stage of a plan that has one.

        Raises:
            UsageError: it has several.
        """
        if self.is_pipelined:
            raise UsageError(
                f"this is a pipelined plan of {len(self.stages)} stages, and one of a single stage is needed. "
                "runtime.pipelined and layerwise run train it; --stages 1 plans without a pipeline."
            )
        return self.stages[0]

    @property
    def mesh(self) -> Mesh:
        """The mesh of the only stage; raises as ``only_stage``."""
        return self.only_stage.mesh.mesh()

    @property
    def strategy(self) -> dict[LayerId, Split]:
        """The split of every layer; raises as ``only_stage``."""
        return self.only_stage.strategy()

    def enlarged(self, graph: LayerGraph) -> Strategy:
        """Return the split of every layer with the tiles of those that recompute halos.

        Raises:
            UsageError: as ``only_stage``.
            MismatchError: a layer cannot recompute.
        """
        stage = self.only_stage
        try:
            return enlarged(graph, stage.mesh.mesh(), stage.strategy(), stage.recomputing())
        except ValueError as error:
            raise MismatchError(f"the plan says halo: recompute, but {error}. Plan again, or say exchange.") from error

    def with_overlap(self, layers: Collection[LayerId]) -> Self:
        """Return this plan with halo exchanges overlapped in these layers and in no others."""
        stages = [
            stage.model_copy(update={
                "layers": [layer.model_copy(update={"overlap": layer.id in layers}) for layer in stage.layers]
            })
            for stage in self.stages
        ]  # fmt: skip
        return self.model_copy(update={"stages": stages})

    def with_recomputing(self, layers: Collection[LayerId]) -> Self:
        """Return this plan with halos recomputed in these layers and in no others (``LayerPart``)."""
        stages = [
            stage.model_copy(update={
                "layers": [
                    part.model_copy(update={"halo": "recompute" if part.id in layers else "exchange"})
                    for part in stage.layers
                ]
            })
            for stage in self.stages
        ]  # fmt: skip
        return self.model_copy(update={"stages": stages})

    @property
    def input_output(self) -> InputOutput:
        """How ranks pass the batch and get the output."""
        return InputOutput(self.io)

    @property
    def digest(self) -> str:
        """Hash of everything that decides what the ranks do; prediction and provenance are left out."""
        decisions = self.model_dump(mode="json", include={
            "model", "batch", "precision", "io", "sync_batch_norm", "bucket_bytes", "schedule"},
            exclude={"model": {"changes"}})  # fmt: skip
        splits = [[layer.id, layer.split] for stage in self.stages for layer in stage.layers]
        meshes = [stage.mesh.model_dump(mode="json") for stage in self.stages]
        sharding = [stage.parameter_sharding for stage in self.stages if stage.parameter_sharding != "none"]
        shares = [["shares", x.id, x.shares] for stage in self.stages for x in stage.layers if x.shares]
        overlap = [["overlap", layer.id] for stage in self.stages for layer in stage.layers if layer.overlap]
        recomputed = [["recompute", s] for s, stage in enumerate(self.stages) if stage.recompute]
        halos = [["halo", layer] for stage in self.stages for layer in sorted(stage.recomputing())]
        return sha256_of([decisions, splits, meshes, *sharding, *shares, *overlap, *recomputed, *halos])


def json_schema() -> str:
    """Return the JSON Schema of the plan file, as canonical text."""
    return canonical_bytes(Plan.model_json_schema()).decode()


def require_single_rank_count(plan: Plan, world_size: int) -> None:
    """Raise if the plan is for another number of ranks.

    Raises:
        UsageError: with both numbers and what to do.
    """
    if world_size != plan.num_ranks:
        raise UsageError(
            f"the plan is for {plan.num_ranks} ranks, but {world_size} are running. Start {plan.num_ranks} ranks "
            "(torchrun --nproc-per-node), or plan again for this number."
        )
