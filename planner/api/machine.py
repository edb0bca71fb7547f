"""The machine a plan is made for: by name, from a file, or measured."""

import json
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from planner.devices.files import profiles_path
from planner.devices.graph import Cluster, Device
from planner.devices.library import cluster as find_cluster
from planner.devices.library import device_kinds, equal_devices
from planner.devices.schema import DeviceKind
from planner.errors import UnknownNameError, UsageError
from planner.profile.file import ProfileFile, processor_of, read_profile
from planner.profile.roofline import DATA_SHEET_EFFICIENCY, Roofline
from planner.profile.shipped import profiles_for, with_profiles
from planner.profile.table import Measurement, ProfileTable

if TYPE_CHECKING:
    from planner.measure.host import HostRates
    from runtime.namespaces import Hosts

_log = logging.getLogger(__name__)

MEASURE_TIMEOUT_S = 600.0
"""For the processes that time layers and links."""


PROFILE_TIMEOUT_S = 86_400.0
"""For timing all layers of a model."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What a plan is made for: a cluster and what is known of the speed of its devices.

    Attributes:
        graph: the devices and their links.
        profile: of the slowest kind of device.
        others: of the other kinds, by their names.
    """

    graph: Cluster
    profile: ProfileTable
    others: Mapping[str, ProfileTable] = field(default_factory=dict)


def machine_of(
    cluster: str | Path | Cluster | None = None,
    devices: int | None = None,
    precision: str = "fp32",
    profile: str | Path | None = None,
) -> Machine:
    """Return a machine: exactly one of a cluster (name, path or graph; ``local-N`` is this host) and a number.

    Layers are priced by the device profile given, else by the shipped ones of the (slowest) device's kind, else by its
    data sheet; ``local-N`` by the profile given, else by the rates measured on this host.

    Args:
        cluster: name, path or graph.
        devices: number of equal accelerators.
        precision: that its data sheet is read for.
        profile: path of a file of ``layerwise profile``.

    Raises:
        UsageError: both or none is given, the cluster is unknown, or the profile cannot be read.
    """
    count: object = devices  # of any kind, where nothing checks types
    if count is not None and not (isinstance(count, Integral) and int(count) >= 1):
        raise UsageError(f"devices is {count!r}, which is not a number of at least 1")
    machine = _plain_machine(cluster, devices, precision)
    if profile is not None:
        asked = read_profile(Path(profile))
        kinds = sorted({device.kind for device in machine.graph.devices})
        if asked.device not in kinds and not (kinds == ["cpu"] and _is_of_this_processor(asked)):
            _log.warning("%s was measured on %s, this machine has %s", profile, asked.device, ", ".join(kinds))
        if asked.device in machine.others:
            of_kind = with_profiles(machine.others[asked.device], [asked])
            return replace(machine, others={**machine.others, asked.device: of_kind})
        return replace(machine, profile=with_profiles(machine.profile, [asked]))
    if machine.profile.roofline.measured:
        return machine

    def shipped(table: ProfileTable) -> ProfileTable:
        return with_profiles(table, profiles_for(profiles_path() / "devices", table.device))

    others = {kind: shipped(table) for kind, table in machine.others.items()}
    return replace(machine, profile=shipped(machine.profile), others=others)


def _is_of_this_processor(profile: ProfileFile) -> bool:
    from planner.measure.host import cpu_name

    return processor_of(profile.environment) == cpu_name()


def _plain_machine(cluster: str | Path | Cluster | None, devices: int | None, precision: str) -> Machine:
    if (cluster is None) == (devices is None):
        raise UsageError("give exactly one of --devices N and --cluster NAME (cluster= and devices= from Python)")
    if devices is not None:
        graph = equal_devices(devices)
    elif isinstance(cluster, Cluster):
        graph = cluster
    elif str(cluster).startswith("local-"):
        from planner.measure.host import local_machine, parse_local

        return Machine(*local_machine(parse_local(str(cluster)), measure_host))
    else:
        graph = find_cluster(str(cluster))
    profile = data_sheet_profile(graph, precision)
    kinds = sorted({device.kind for device in graph.devices} - {profile.device})
    others = {k: _by_data_sheet([d for d in graph.devices if d.kind == k], precision) for k in kinds}
    return Machine(graph, profile, others)


def data_sheet_profile(graph: Cluster, precision: str) -> ProfileTable:
    """Return the roofline of the slowest device's data sheet.

    Raises:
        UsageError: a device has no figure for the precision.
    """
    for device in graph.devices:
        if precision not in device.peak_flop_per_s:
            known = ", ".join(device.peak_flop_per_s)
            raise UsageError(f"device {device.id!r} ({device.kind}) has no {precision} rate, only {known}")
    return _by_data_sheet(graph.devices, precision)


def _by_data_sheet(devices: Sequence[Device], precision: str) -> ProfileTable:
    slowest = min(devices, key=lambda d: (d.peak_flop_per_s[precision], d.memory_bandwidth_bytes_per_s))
    roofline = Roofline.of_data_sheet(slowest.peak_flop_per_s[precision], slowest.memory_bandwidth_bytes_per_s)
    return ProfileTable(slowest.kind, roofline)


def measure_host(num_ranks: int, hosts: "Hosts | None" = None) -> "HostRates":
    """Measure this host with so many processes at once, a few seconds.

    Args:
        num_ranks: processes.
        hosts: network namespaces to spread them over; links are then those between the namespaces.
    """
    from planner.measure.host import HostRates, median_rates, threads_per_rank
    from runtime.launch import run_local

    argument = {"level": device_kinds()["cpu"].level}
    found = run_local(
        "runtime.measuring:host_rates", argument, num_ranks=num_ranks, timeout_s=MEASURE_TIMEOUT_S,
        threads_per_rank=threads_per_rank(num_ranks), hosts=hosts,
    )  # fmt: skip
    return median_rates([HostRates.model_validate_json(json.dumps(rates)) for rates in found])


def machine_of_links(
    name: str, nodes: int, ranks_per_node: int, found: Mapping[str, Any], device: str | None = None
) -> Cluster:
    """Return the machine whose links ``runtime.measuring.link_times`` timed.

    Args:
        name: of the machine.
        nodes: hosts.
        ranks_per_node: on each.
        found: what a rank returned.
        device: kind of its accelerators; found by their name where None.

    Raises:
        UnknownNameError: no such kind, or none fits the name of the accelerator.
    """
    from planner.devices.schema import CollectiveEntry
    from planner.measure.host import HostRates, device_of
    from planner.measure.links import measured_graph

    collectives = [
        CollectiveEntry.model_validate_json(json.dumps(entry)).collective() for entry in found["collectives"]
    ]
    if "rates" in found:
        reached = device_of(HostRates.model_validate_json(json.dumps(found["rates"])))
        kind = reached.model_copy(update={  # a cluster file holds peaks, of which devices reach this share
            "peak_flop_per_s": {p: v / DATA_SHEET_EFFICIENCY for p, v in reached.peak_flop_per_s.items()},
            "memory_bandwidth_bytes_per_s": reached.memory_bandwidth_bytes_per_s / DATA_SHEET_EFFICIENCY,
        })  # fmt: skip
    else:
        kind = _device_kind(device or found["accelerator"], named=device is not None)
    graph = measured_graph(name, nodes, ranks_per_node, kind, collectives)
    speeds = found.get("speeds", [1.0] * len(graph.devices))
    return replace(graph, devices=tuple(replace(d, speed=s) for d, s in zip(graph.devices, speeds, strict=True)))


def refuse_unknown_accelerator(device: str | None) -> None:
    """Refuse a kind of device that ``machine_of_links`` would not know, before anything is measured.

    Args:
        device: the kind asked for, if any.

    Raises:
        UnknownNameError: no such kind, or none fits the name of this host's accelerator.
        UsageError: a kind is asked for, and this host has processors only.
    """
    if torch.cuda.is_available():
        _device_kind(device or torch.cuda.get_device_name(0), named=device is not None)
    elif device is not None:
        raise UsageError("--device names the kind of accelerators, and there are none here: processors are measured")


def _device_kind(name: str, *, named: bool) -> DeviceKind:
    """Return a kind by its name, or by that of an accelerator such as ``NVIDIA H200``."""
    kinds = device_kinds()
    if name in kinds:
        return kinds[name]
    words = name.lower().replace("-", " ").split()
    fitting = [kind for kind in kinds if kind in words]
    if named or len(fitting) != 1:
        raise UnknownNameError("device", name, kinds, "Give its kind with --device, or write a cluster file.")
    return kinds[fitting[0]]


def time_layers(
    keys: Sequence[str],
    found: Callable[[str, Measurement | None], None],
    *,
    ranks_at_once: int = 1,
    threads: int | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    hosts: "Hosts | None" = None,
) -> None:
    """Time the layers behind ``LocalLayer.key`` in processes of their own.

    Args:
        keys: of the layers.
        found: is handed each layer as soon as it is timed, with the medians over the processes; None: no kernel.
        ranks_at_once: processes that time the same layer at the same time, as ranks of one host would.
        threads: of each; an equal part of the processors if left out.
        device: that they compute on.
        hosts: network namespaces to spread them over.

    Raises:
        UsageError: the device is missing, or cannot compute what a key asks for.
        RunError: a process died.
    """
    from planner.measure.host import threads_per_rank
    from planner.measure.journal import JournalReader
    from runtime.launch import run_local

    with tempfile.TemporaryDirectory(prefix="layerwise-") as folder:
        reader = JournalReader(Path(folder), ranks_at_once)

        def look() -> None:
            for key, measurement in reader.new():
                found(key, measurement)

        try:
            run_local(
                "runtime.measuring:layer_times", {"keys": list(keys), "folder": folder, "device": device},
                num_ranks=ranks_at_once, timeout_s=PROFILE_TIMEOUT_S,
                threads_per_rank=threads or threads_per_rank(ranks_at_once), hosts=hosts, while_waiting=look,
            )  # fmt: skip
        finally:
            look()
