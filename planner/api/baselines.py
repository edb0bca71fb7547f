"""The fixed strategies beside a plan.

Each needs one split of each layer, so all of them are priced on a small space of their own, which does not depend on
what the user allows: a strategy that splits what the user does not allow is shown, but the plan is not held against it.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from planner.cost.sharding import ParameterSharding
from planner.cost.table import CostTable
from planner.errors import InfeasibleError
from planner.ir.dimension import Dimension
from planner.ir.mesh import Mesh
from planner.ir.split import LayerId, Split, Strategy
from planner.search.auto import Planned, Search
from planner.search.fixed import FIXED, fixed_splits
from planner.search.problem import Limits
from planner.space.constraints import is_chosen
from planner.space.enumerate import pinned_space

if TYPE_CHECKING:
    from planner.api.planning import Planner

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Baseline:
    """A fixed strategy, whether or not it fits in memory.

    Attributes:
        planned: its figures; no bound is known for it.
        search: that it comes from, on a space of fixed strategies only.
        note: why it could not have been planned; empty where it could.
    """

    planned: Planned
    search: Search
    note: str

    @property
    def strategy(self) -> Strategy:
        """The split of every layer."""
        return self.search.table.strategy(self.planned.choice)


def baselines(planner: "Planner") -> tuple[Baseline, ...]:
    """Return every fixed strategy that the network and the machine allow, in the order of ``FIXED``."""
    splits: dict[str, Mapping[LayerId, Split]] = {}
    groups: dict[tuple[Mesh, ParameterSharding], list[str]] = {}
    graph = planner.traced.layers
    impossible = []
    for name, rule in FIXED.items():
        mesh = planner.fixed_mesh(name)
        try:
            splits[name] = fixed_splits(name, graph, mesh, own_statistics=not planner.options.sync_batch_norm)
        except InfeasibleError as error:  # the mesh is too large for the network
            _log.info("no baseline %s: %s", name, error)
            impossible.append(name)
            continue
        groups.setdefault((mesh, rule.sharding or planner.sharding), []).append(name)
    if impossible:
        size = len(planner.machine.graph.devices) if planner.options.mesh is None else planner.meshes()[0].size
        _log.warning("no layer can be split over %d ranks as these ask for: %s", size, ", ".join(impossible))
    found: dict[str, Baseline] = {}
    for (mesh, sharding), names in groups.items():
        own = {
            layer.id: tuple(dict.fromkeys(splits[name][layer.id] for name in names))
            for layer in graph.layers if is_chosen(layer)
        }  # fmt: skip
        _log.info("pricing %s", ", ".join(names))
        model = planner.cost_model(mesh)
        model = replace(model, settings=replace(model.settings, parameter_sharding=sharding))
        table = CostTable.of(pinned_space(graph, mesh, planner.io(mesh), own), model)
        search = Search(table, planner.limit_bytes, Limits(planner.options.time_limit_s))
        for name in names:
            found[name] = Baseline(search.fixed(name), search, _note(planner, splits[name], sharding))
    return tuple(found[name] for name in FIXED if name in found)


def _note(planner: "Planner", splits: Mapping[LayerId, Split], sharding: ParameterSharding) -> str:
    """Return what the user does not allow of a strategy; nothing where it could have been planned."""
    if sharding is not planner.sharding:
        return f"it needs parameter sharding: {sharding}"
    used = {d for split in splits.values() for d in split.dimensions} - {Dimension.REPLICATE}
    if missing := [d.value for d in Dimension if d in used and d not in planner.dimensions]:
        return f"it needs --dims with {', '.join(missing)}"
    constraints, graph = planner.options.constraints, planner.traced.layers
    for layer in graph.layers:
        if is_chosen(layer) and not constraints.limits(layer).allows(splits[layer.id], planner.dimensions):
            return f"--pin or --forbid does not allow {splits[layer.id]} for {layer.id!r}"
    for group in constraints.tied(graph):
        if len({splits[layer] for layer in group}) > 1:
            return f"--tie does not allow {group[0]!r} and others to differ"
    return ""
