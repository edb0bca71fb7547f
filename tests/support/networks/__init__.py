"""Small networks that do what real ones do in odd ways; by name."""

from support.networks import attention, gates, interfaces, shapes, weights, writes
from support.networks.network import CLASSES, Input, Network
from support.networks.writes import REFUSABLE

__all__ = ["CLASSES", "NETWORKS", "REFUSABLE", "Input", "Network"]

NETWORKS: dict[str, Network] = {
    name: network
    for module in (interfaces, shapes, gates, weights, attention, writes)
    for name, network in module.NETWORKS.items()
}
