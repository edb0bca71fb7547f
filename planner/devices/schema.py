"""Files about machines: one cluster; the known kinds of devices and links."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Final, Literal, Self

from pydantic import FailFast, Field, PositiveInt, StringConstraints, model_validator

from planner.devices.graph import Cluster, Device, Level, Link
from planner.devices.measured import CollectiveKind, CollectivePoint, MeasuredCollective
from planner.errors import FormatError
from planner.ir.canonical import Memory, PositiveSeconds, Rate, StrictModel, decode_file, write_atomically

MAX_DEVICES: Final = 65_536  # a typing error must not fill the memory
Name = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Source = Annotated[str, StringConstraints(min_length=1, max_length=500)]
Latency = Annotated[float, Field(ge=0, le=1e6)]
Peaks = dict[Literal["fp32", "tf32", "bf16"], Rate]
Duplex = Literal["full", "half"]


class DeviceEntry(StrictModel):
    """One device of a cluster file; the fields of ``graph.Device``."""

    id: Name
    kind: Name
    memory_bytes: Memory
    peak_flop_per_s: Peaks
    memory_bandwidth_bytes_per_s: Rate
    speed: Annotated[float, Field(ge=1e-6, le=1e6)] = 1.0


class LinkEntry(StrictModel):
    """One link of a cluster file; the fields of ``graph.Link``."""

    a: Name
    b: Name
    kind: Name
    latency_s: Latency
    bandwidth_bytes_per_s: Rate
    duplex: Duplex = "full"


class LevelEntry(StrictModel):
    """One level of a cluster file; the fields of ``graph.Level``."""

    name: Name
    size: Annotated[int, Field(ge=1, le=MAX_DEVICES)]


class PointEntry(StrictModel):
    """One size of a measured collective; the fields of ``measured.CollectivePoint``."""

    num_bytes: Memory
    seconds: PositiveSeconds
    loaded_s: PositiveSeconds
    lost_s: Latency


class CollectiveEntry(StrictModel):
    """A measured collective; the fields of ``measured.MeasuredCollective``."""

    kind: CollectiveKind
    levels: Annotated[tuple[Name, ...], Field(min_length=1, max_length=16)]
    points: Annotated[tuple[PointEntry, ...], Field(min_length=2, max_length=1000)]

    def collective(self) -> MeasuredCollective:
        """Return it as the cost model takes it."""
        points = tuple(CollectivePoint(**point.model_dump()) for point in self.points)
        return MeasuredCollective(self.kind, self.levels, points)


class ClusterFile(StrictModel):
    """A cluster as a file; the fields of ``graph.Cluster``."""

    schema_version: Literal[1]
    name: Name
    levels: Annotated[tuple[LevelEntry, ...], Field(max_length=16)]
    devices: Annotated[tuple[DeviceEntry, ...], FailFast(), Field(max_length=MAX_DEVICES)]
    switches: Annotated[tuple[Name, ...], FailFast(), Field(max_length=2 * MAX_DEVICES)]
    links: Annotated[tuple[LinkEntry, ...], FailFast(), Field(max_length=4 * MAX_DEVICES)]
    collectives: Annotated[tuple[CollectiveEntry, ...], Field(max_length=1000)] = ()


class DeviceKind(StrictModel):
    """Data-sheet values of one kind of device.

    Attributes:
        level: what a mesh axis over such devices is called.
        links: the buses it has, by name; the usual one first.
        source: where the figures are from.
    """

    name: Name
    memory_bytes: Memory
    peak_flop_per_s: Peaks
    memory_bandwidth_bytes_per_s: Rate
    level: Literal["gpu", "cpu"]
    links: Annotated[tuple[Name, ...], Field(min_length=1)]
    source: Source


class OneSwitch(StrictModel):
    """Every end on one switch: NVSwitch, or an Ethernet switch."""

    kind: Literal["switch"]


class Switches(StrictModel):
    """A PCIe tree: so many ends under each switch, the switches under one host.

    Attributes:
        uplink_bandwidth_bytes_per_s: of the link from a switch to the host.
    """

    kind: Literal["switches"]
    per_switch: PositiveInt
    uplink_bandwidth_bytes_per_s: Rate


class Sockets(StrictModel):
    """A PCIe tree under each of several processors, which are joined pairwise.

    Attributes:
        per_switch: ends under each PCIe switch.
        uplink_bandwidth_bytes_per_s: of the link from a switch to its processor.
        socket_latency_s, socket_bandwidth_bytes_per_s: of the link between two processors, such as
            QPI or UPI.
    """

    kind: Literal["sockets"]
    per_switch: PositiveInt
    uplink_bandwidth_bytes_per_s: Rate
    sockets: Annotated[int, Field(ge=2, le=64)]
    socket_latency_s: Latency
    socket_bandwidth_bytes_per_s: Rate


class FatTree(StrictModel):
    """Leaf switches with so many ends each, all of them linked to all spine switches.

    Attributes:
        uplink_bandwidth_bytes_per_s: of the link between one leaf and one spine; less than
            ``per_switch`` x the ends' bandwidth / ``spines`` is oversubscribed.
    """

    kind: Literal["fat_tree"]
    per_switch: PositiveInt
    spines: Annotated[int, Field(ge=1, le=1024)]
    uplink_bandwidth_bytes_per_s: Rate


class Torus(StrictModel):
    """A two-dimensional torus of the ends themselves, as square as their number allows."""

    kind: Literal["torus"]


class HTree(StrictModel):
    """A binary tree whose links double in bandwidth from level to level; the kind's is that of the ends."""

    kind: Literal["h_tree"]


class Pairs(StrictModel):
    """A link of its own between any two ends: a shared medium, of which each pair has its part."""

    kind: Literal["pairs"]


Topology = Annotated[OneSwitch | Switches | Sockets | FatTree | Torus | HTree | Pairs, Field(discriminator="kind")]


class LinkKind(StrictModel):
    """Values of one kind of link: latency of one link, bandwidth per direction, their source.

    Attributes:
        topology: how such links join what they join.
    """

    name: Name
    latency_s: Latency
    bandwidth_bytes_per_s: Rate
    duplex: Duplex
    topology: Topology = OneSwitch(kind="switch")
    source: Source


class BusKind(LinkKind):
    """Joins the devices of one node."""


class NetworkKind(LinkKind):
    """Joins nodes; each node, or each device, has a network card of its own."""

    card_per: Literal["node", "device"]


class DeviceKindsFile(StrictModel):
    """``profiles/devices/kinds.json``."""

    schema_version: Literal[1]
    kinds: tuple[DeviceKind, ...]


class LinkKindsFile(StrictModel):
    """``profiles/links/kinds.json``."""

    schema_version: Literal[1]
    buses: tuple[BusKind, ...]
    networks: tuple[NetworkKind, ...]

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [kind.name for kind in (*self.buses, *self.networks)]
        if len(set(names)) != len(names):
            raise ValueError(f"a link kind appears twice in {names}")
        return self


def read_cluster(path: Path) -> Cluster:
    """Return the cluster that a file describes.

    Raises:
        UsageError: the file cannot be read.
        FormatError: every problem of the file, with its JSON path.
    """
    file = decode_file(ClusterFile, path, "cluster file")
    try:
        return Cluster(
            name=file.name,
            devices=tuple(Device(**entry.model_dump()) for entry in file.devices),
            switches=file.switches,
            links=tuple(Link(**entry.model_dump()) for entry in file.links),
            levels=tuple(Level(**entry.model_dump()) for entry in file.levels),
            collectives=tuple(entry.collective() for entry in file.collectives),
        )
    except FormatError as error:
        raise FormatError(f"cluster file {path}", error.problems) from error


def write_cluster(graph: Cluster, path: Path) -> None:
    """Write a cluster as a file; ``read_cluster`` returns it unchanged."""
    file = ClusterFile.model_validate({"schema_version": 1, **asdict(graph)})
    write_atomically(path, file.model_dump_json(indent=2) + "\n")
