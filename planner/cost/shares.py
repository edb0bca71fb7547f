"""In which shares devices of unequal speed should cut a layer: in proportion to what they are predicted to do."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from planner.cost.model import CostModel
from planner.ir.dimension import Dimension
from planner.ir.graph import Layer, is_boundary
from planner.ir.ops import Redistribute
from planner.ir.split import Split, plain_shares

ShareSet = Mapping[str, tuple[int, ...]]
"""Weights by mesh axis; axes whose coordinates are equally fast are left out."""
MAX_WEIGHT: Final = 16
"""Of the slowest coordinate."""
TOLERANCE: Final = 0.02
"""Relative error of a weight that is as good as none; smaller numbers are easier to read."""


@dataclass(frozen=True)
class Proportions:
    """Which shares are worth a look for each layer: those of the whole network, and those of the layer itself.

    Kinds of devices may differ more in one operator than in another. The network's shares let neighbours agree, so
    that nothing moves between them.

    Attributes:
        model: times every layer on every kind of device.
    """

    model: CostModel
    _known: dict[object, tuple[float, ...]] = field(default_factory=dict, compare=False, repr=False)

    def of_network(self) -> tuple[ShareSet, ...]:
        """Return the shares of the whole network; none where all devices are equally fast."""
        if len(self.model.crew.different) == 1:
            return ()
        layers = [layer for layer in self.model.graph.layers if _computes(layer)]
        return self._sets([math.fsum(each) for each in zip(*map(self._seconds, layers), strict=True)])

    def of_layer(self, layer: Layer) -> tuple[ShareSet, ...]:
        """Return the shares to try for a layer, the network's first."""
        found = self.of_network()
        if len(self.model.crew.different) > 1 and _computes(layer):
            found += self._sets(self._seconds(layer))
        return tuple(own for k, own in enumerate(found) if own not in found[:k])

    def _seconds(self, layer: Layer) -> tuple[float, ...]:
        """Return how long each different device takes for an equal piece."""
        lies, mesh = self.model.partition(layer), self.model.mesh
        key = lies, *(p.trainable for p in layer.params), *(a.op for a in layer.absorbed)
        if key not in self._known:
            by_sample = Split.of(mesh, (Dimension.SAMPLE,) * len(mesh.axes))
            whole = Split.of(mesh, (Dimension.REPLICATE,) * len(mesh.axes))
            local = self.model.local(layer, by_sample if lies.is_legal(by_sample) else whole)
            times = (worker.time(local) for worker in self.model.crew.different)
            self._known[key] = tuple(t.forward_s + t.backward_s for t in times)
        return self._known[key]

    def _sets(self, seconds: Sequence[float]) -> tuple[ShareSet, ...]:
        """Return shares for devices that take so long for the same; none where they are equal."""
        mesh, crew = self.model.mesh, self.model.crew
        if not all(seconds):
            return ()
        rate = {id(worker): 1 / each for worker, each in zip(crew.different, seconds, strict=True)}
        found: dict[str, tuple[int, ...]] = {}
        for k, axis in enumerate(mesh.axes):
            rates = [0.0] * axis.size
            for position, worker in enumerate(crew.workers):
                rates[mesh.coordinates(position)[k]] += rate[id(worker)]
            weights = plain_shares(whole_numbers(rates))
            if weights is not None:
                found[axis.name] = weights
        return (found,) if found else ()


def _computes(layer: Layer) -> bool:
    return not is_boundary(layer.op) and not isinstance(layer.op, Redistribute)


def whole_numbers(rates: Sequence[float]) -> tuple[int, ...]:
    """Return small whole numbers in the proportion of some rates, all positive."""
    least = min(rates)

    def weights(of_least: int) -> tuple[int, ...]:
        return tuple(round(rate / least * of_least) for rate in rates)

    def error(of_least: int) -> float:
        return max(abs(w * least / (rate * of_least) - 1) for w, rate in zip(weights(of_least), rates, strict=True))

    good = (k for k in range(1, MAX_WEIGHT + 1) if error(k) <= TOLERANCE)
    return weights(next(good, None) or min(range(1, MAX_WEIGHT + 1), key=error))
