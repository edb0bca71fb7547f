"""Rows and columns of a partition for inference."""

from collections import Counter
from collections.abc import Iterator
from itertools import groupby

from planner.inference.schema import LayerEntry, Partition
from planner.report.tables import UNKNOWN, Table
from planner.units import format_bytes, format_seconds

_MAX_DEVICES = 6


def tables(found: Partition) -> Iterator[Table]:
    """Yield totals, devices, layers, and what simpler methods find."""
    yield summary(found)
    yield devices(found)
    yield layers(found)
    yield methods(found)


def summary(found: Partition) -> Table:
    """Return the totals."""
    group = "whole layers" if found.group is None else f"squares of {found.group} x {found.group}"
    where = "anywhere" if found.input_device is None else f"on {found.devices[found.input_device].name}"
    rows = (
        ("model", found.model.name),
        ("machine", f"{found.cluster.name}, {found.cluster.num_devices} devices"),
        ("objective", found.objective),
        ("groups", f"{sum(len(layer.devices) for layer in found.layers)}, {group}"),
        ("numbers of", format_bytes(found.element_bytes)),
        ("inputs", where),
        ("inferences per second", f"{found.rate_per_s:.4g}"),
        ("communication", f"{format_bytes(found.communication_bytes)} per inference"),
        ("bottleneck", bottleneck(found)),
    )
    return Table("", ("", ""), rows, num_text=2)


def bottleneck(found: Partition) -> str:
    """Return the device or link that decides the rate."""
    device = max(found.devices, key=lambda each: each.busy_s)
    link = max(found.links, key=lambda each: each.busy_s, default=None)
    if link is None or device.busy_s >= link.busy_s:
        return f"{device.name}, {format_seconds(device.busy_s)} of computing"
    ends = f"{found.devices[link.a].name} - {found.devices[link.b].name}"
    return f"the link {ends}, {format_seconds(link.busy_s)} for {format_bytes(link.num_bytes)}"


def devices(found: Partition) -> Table:
    """Return one row per device."""
    groups = Counter(device for layer in found.layers for device in layer.devices)
    sent = Counter[int]()
    for link in found.links:
        sent.update({link.a: link.num_bytes, link.b: link.num_bytes})
    rows = tuple(
        (
            each.name, str(groups[index]), f"{each.busy_s * found.rate_per_s:.0%}", format_bytes(sent[index]),
            format_bytes(each.memory_bytes), format_bytes(each.limit_bytes),
        )
        for index, each in enumerate(found.devices)
    )  # fmt: skip
    return Table("Devices", ("device", "groups", "busy", "sent and received", "memory", "of"), rows)


def layers(found: Partition) -> Table:
    """Return one row per layer."""
    rows = tuple(
        (
            layer.id, layer.op, " x ".join(map(str, layer.grid.values())) or "1", _where(found, layer),
            format_bytes(layer.shared_bytes),
        )
        for layer in found.layers
    )  # fmt: skip
    return Table("Layers", ("layer", "operator", "groups", "on", "shared weights"), rows, num_text=4)


def methods(found: Partition) -> Table:
    """Return what simpler methods find, and the partition, last."""
    rows = [
        (
            each.name, "yes" if each.fits else "no", UNKNOWN if each.rate_per_s is None else f"{each.rate_per_s:.4g}",
            UNKNOWN if each.communication_bytes is None else format_bytes(each.communication_bytes),
        )
        for each in found.baselines
    ]  # fmt: skip
    rows.append(("this partition", "yes", f"{found.rate_per_s:.4g}", format_bytes(found.communication_bytes)))
    columns = ("method", "fits", "inferences per second", "communication")
    return Table("Beside simpler methods", columns, tuple(rows), num_text=2, emphasis=len(rows) - 1)


def bound_sentence(found: Partition) -> str:
    """Return how far the rate is from what no partition exceeds."""
    bound = found.search.rate_bound_per_s
    return (
        f"No partition exceeds {bound:.4g} inferences per second, all devices computing all the time; this one reaches "
        f"{found.rate_per_s / bound:.0%} of it."
    )


def _where(found: Partition, layer: LayerEntry) -> str:
    """Return the devices of a layer with their groups, those with most first."""
    counts = Counter(layer.devices).most_common()
    if len(counts) <= _MAX_DEVICES:
        return ", ".join(f"{found.devices[device].name}: {count}" for device, count in counts)
    sizes = ((count, sum(1 for _ in same)) for count, same in groupby(counts, key=lambda pair: pair[1]))
    return f"{len(counts)} devices: " + ", ".join(f"{count} on {num}" for count, num in sizes)
