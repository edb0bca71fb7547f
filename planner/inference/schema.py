"""The partition file: which device computes which group of neurons, what that achieves, and where it comes from.

Sizes are in bytes, times in seconds, rates per second; traffic is that of one inference.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Final, Literal, Self

from pydantic import FailFast, Field, model_validator

from planner.inference.problem import Objective, Problem
from planner.inference.search import Found, Limits
from planner.ir.canonical import (
    Bytes,
    Count,
    Rate,
    Seconds,
    Size,
    StrictModel,
    canonical_bytes,
    decode,
    decode_file,
    write_atomically,
)
from planner.plan.schema import ClusterPart, ModelPart, Name

KIND: Final = "partition"
Index = Annotated[int, Field(ge=0, lt=65_536)]


class LayerEntry(StrictModel):
    """One layer in groups.

    ``grid``: pieces along every dimension that is cut; groups are numbered row-major, and without a cut there is one.
    ``shared_bytes``: weights that every device with a group of the layer holds.
    ``devices``: of every group, a position in the file's ``devices``.
    """

    id: Name
    op: Name
    grid: dict[Name, Count]
    shared_bytes: Bytes
    devices: Annotated[list[Index], FailFast(), Field(min_length=1, max_length=1_000_000)]

    @model_validator(mode="after")
    def _fits_grid(self) -> Self:
        if len(self.devices) != math.prod(self.grid.values()):
            raise ValueError(
                f"a grid of {self.grid} has {math.prod(self.grid.values())} groups, not {len(self.devices)}"
            )
        return self


class DeviceEntry(StrictModel):
    """One device: how long it computes per inference, and its memory."""

    name: Name
    busy_s: Seconds
    memory_bytes: Bytes
    limit_bytes: Bytes


class LinkEntry(StrictModel):
    """Two devices that exchange something: both directions together, per inference."""

    a: Index
    b: Index
    num_bytes: Bytes
    busy_s: Seconds


class BaselineEntry(StrictModel):
    """What a simpler method finds; no figures where it found no place for everything."""

    name: Name
    fits: bool
    rate_per_s: Rate | None = None
    communication_bytes: Bytes | None = None


class SearchEntry(StrictModel):
    """How the partition was found; no partition has a higher rate than the bound."""

    start: Name
    num_starts: Count
    kicks: Size
    seed: Bytes
    rate_bound_per_s: Rate


class ProvenanceEntry(StrictModel):
    """Where the partition comes from."""

    versions: dict[str, str]
    command: str
    utc: str


class Partition(StrictModel):
    """A partition file."""

    kind: Literal["partition"]
    schema_version: Literal[1]
    objective: Objective
    model: ModelPart
    cluster: ClusterPart
    element_bytes: Count
    group: Count | None
    input_device: Index | None
    rate_per_s: Rate
    communication_bytes: Bytes
    layers: Annotated[list[LayerEntry], FailFast(), Field(min_length=1, max_length=200_000)]
    devices: Annotated[list[DeviceEntry], FailFast(), Field(min_length=1, max_length=65_536)]
    links: Annotated[list[LinkEntry], FailFast()]
    baselines: Annotated[list[BaselineEntry], Field(max_length=1000)]
    search: SearchEntry
    provenance: ProvenanceEntry

    @model_validator(mode="after")
    def _devices_exist(self) -> Self:
        used = {device for layer in self.layers for device in layer.devices} | {
            e for x in self.links for e in (x.a, x.b)
        }
        if max(used) >= len(self.devices):
            raise ValueError(f"device {max(used)} is used, and there are {len(self.devices)}")
        return self

    @staticmethod
    def load(path: str | Path) -> "Partition":
        """Read a partition file.

        Raises:
            UsageError: no such file.
            FormatError: every problem with its JSON path.
        """
        return decode_file(Partition, Path(path), "partition")

    @staticmethod
    def from_json(text: str | bytes, what: str = "partition") -> "Partition":
        """Read a partition from its JSON text, which messages call ``what``; raises as ``load``."""
        return decode(Partition, text, what)

    def to_json(self) -> str:
        """Return the file's text; the same partition gives the same bytes."""
        return self.model_dump_json(indent=2) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the partition; an existing file is replaced in one step."""
        write_atomically(Path(path), self.to_json())


@dataclass(frozen=True, slots=True)
class Request:
    """What a partition was asked for, beside its problem."""

    model: ModelPart
    cluster: ClusterPart
    element_bytes: int
    group: int | None
    input_device: int | None
    limits: Limits
    command: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    utc: str = ""


def partition_file(problem: Problem, found: Found, request: Request) -> Partition:
    """Return a search's result as a file."""
    graph, devices, figures = problem.graph, problem.devices, found.evaluation
    used = [(p, q) for q in range(len(devices)) for p in range(q) if figures.traffic_bytes[p, q]]
    return Partition(
        kind=KIND, schema_version=1, objective=problem.objective, model=request.model, cluster=request.cluster,
        element_bytes=request.element_bytes, group=request.group, input_device=request.input_device,
        rate_per_s=figures.rate_per_s, communication_bytes=int(figures.communication_bytes),
        layers=[
            LayerEntry(
                id=layer.id, op=layer.op, grid=dict(layer.grid), shared_bytes=layer.shared_bytes,
                devices=found.assignment[graph.layer_of == index].tolist(),
            )
            for index, layer in enumerate(graph.layers)
        ],
        devices=[
            DeviceEntry(
                name=name, busy_s=float(figures.load_flop[p] / devices.flop_per_s[p]),
                memory_bytes=int(figures.used_bytes[p]), limit_bytes=int(devices.memory_bytes[p]),
            )
            for p, name in enumerate(devices.names)
        ],
        links=[
            LinkEntry(
                a=p, b=q, num_bytes=int(figures.traffic_bytes[p, q]),
                busy_s=float(figures.traffic_bytes[p, q] / devices.link_bytes_per_s[p, q]),
            )
            for p, q in used
        ],
        baselines=[
            BaselineEntry(name=b.name, fits=False)
            if b.evaluation is None
            else BaselineEntry(
                name=b.name, fits=b.evaluation.fits, rate_per_s=b.evaluation.rate_per_s,
                communication_bytes=int(b.evaluation.communication_bytes),
            )
            for b in found.baselines
        ],
        search=SearchEntry(
            start=found.start, num_starts=found.num_starts, kicks=found.kicks, seed=request.limits.seed,
            rate_bound_per_s=problem.rate_bound_per_s,
        ),
        provenance=ProvenanceEntry(versions=dict(request.versions), command=request.command, utc=request.utc),
    )  # fmt: skip


def json_schema() -> str:
    """Return the JSON Schema of the partition file, as canonical text."""
    return canonical_bytes(Partition.model_json_schema()).decode()
