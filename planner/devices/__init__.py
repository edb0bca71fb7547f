"""The machine: devices, switches, links; what routes cost; clusters by name or file."""

from planner.devices.files import profiles_path
from planner.devices.graph import Cluster, Device, Level, Link
from planner.devices.library import (
    bus_kinds,
    cluster,
    clusters,
    device_kinds,
    equal_devices,
    network_kinds,
    two_level,
)
from planner.devices.route import PathCost, Router
from planner.devices.schema import BusKind, DeviceKind, NetworkKind, read_cluster, write_cluster

__all__ = [
    "BusKind",
    "Cluster",
    "Device",
    "DeviceKind",
    "Level",
    "Link",
    "NetworkKind",
    "PathCost",
    "Router",
    "bus_kinds",
    "cluster",
    "clusters",
    "device_kinds",
    "equal_devices",
    "network_kinds",
    "profiles_path",
    "read_cluster",
    "two_level",
    "write_cluster",
]
