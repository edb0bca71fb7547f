"""Why a layer of a plan is split as it is: what its other splits would cost, and when one of them would win."""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from planner.api.comparing import Priced, planner_of, price_with, table_with
from planner.api.machine import Machine
from planner.api.planning import Planner
from planner.api.tour import EQUAL
from planner.cost.simulate import simulated_step_s
from planner.cost.table import CostTable
from planner.errors import UnknownNameError, UsageError
from planner.ir.split import LayerId, Split
from planner.plan.schema import Plan
from planner.search.alternatives import Around, Explanation, Flip, Placed, Standing, least
from planner.search.formulate import formulate
from planner.search.placed import placed_branches
from planner.space.enumerate import DEFAULT_DIMENSIONS

FACTORS = (2, 4, 8, 16, 32, 64)
"""By which links are made faster and slower, and the batch larger and smaller, until another split wins."""


@dataclass(frozen=True, slots=True)
class Overview:
    """What could be otherwise in a plan.

    Attributes:
        standings: every layer with the best other split while no other layer changes.
        placed: regions whose branches run at the same time.
    """

    standings: tuple[Standing, ...]
    placed: tuple[Placed, ...]


def overview(plan: Plan, machine: Machine) -> Overview:
    """Return what could be otherwise in a plan, layer by layer and region by region.

    Raises:
        UsageError: it is a pipeline.
        LayerwiseError: as ``planner.api.price_plan``.
    """
    _, found = _around(plan, machine)
    return Overview(tuple(found.standings()), tuple(placed_branches(found)))


def explain(
    plan: Plan, machine: Machine, layer: str, *, flips: bool = True, progress: Callable[[str], None] = lambda _: None
) -> Explanation:
    """Explain the split of one layer.

    Args:
        plan: of one stage.
        machine: that it is priced on.
        layer: its id.
        flips: also look for link rates and batches under which another split wins; takes a plan for each.
        progress: is told what is being done.

    Halos that the plan recomputes are priced as exchanged here.

    Alternatives are made of the dimensions that are searched by default and those that the plan uses; what the user
    pinned, forbade or tied is left out of account.

    Raises:
        UnknownNameError: the plan has no such layer.
        UsageError: it is a pipeline.
        LayerwiseError: as ``planner.api.price_plan``.
    """
    planner, among = _around(plan, machine)
    graph = planner.traced.layers
    if layer not in graph.index:
        raise UnknownNameError("layer", layer, list(graph.index), "(`layerwise show` lists them)")
    name = LayerId(layer)
    wins = tuple(_Changes(planner, among, plan).flips(name, progress)) if flips else ()
    step_s = simulated_step_s(among.table, among.choice, among.bucket_bytes)
    found = among.alternatives(name, progress)
    placed = tuple(own for own in placed_branches(among) if own.place_of(name) is not None)
    return Explanation(name, graph[name].op.kind, among.tied(name), step_s, found, wins, placed)


def _around(plan: Plan, machine: Machine) -> tuple[Planner, Around]:
    refuse_pipelined(plan)
    used = {dimension for split in plan.strategy.values() for dimension in split.dimensions}
    planner = planner_of(plan, machine, DEFAULT_DIMENSIONS | used)
    priced = price_with(planner, plan.with_recomputing(()))  # one strategy's tiles have no other splits beside them
    return planner, around(plan, priced)


def around(plan: Plan, priced: Priced) -> Around:
    """Return a plan of one stage, priced with exchanged halos, among all other strategies of its space."""
    formulation = formulate(priced.table, limit_bytes=plan.search.memory_limit_bytes)
    return Around(priced.table, priced.choice, formulation, plan.bucket_bytes)


@dataclass(frozen=True)
class _Changes:
    """A plan's problem, and the same with other links or another batch."""

    planner: Planner
    around: Around
    plan: Plan

    def flips(self, layer: LayerId, progress: Callable[[str], None]) -> Iterator[Flip]:
        """Yield, of each kind and direction of change, the first at which a layer's planned split loses."""
        split = self._strategy[layer]
        for what in ("links", "batch"):
            for factors in (FACTORS, tuple(1 / f for f in FACTORS)):
                for factor in factors:
                    table = self._table(what, factor)
                    if table is None:
                        break
                    progress(f"planning for {what} x {factor:g}")
                    if (found := self._winner(table, layer, split)) is not None:
                        yield Flip(what, factor, *found)
                        break

    @functools.cached_property
    def _strategy(self) -> dict[LayerId, Split]:
        """The plan's, on the axes of the machine."""
        space = self.around.table.space
        pairs = zip(space.graph.layers, self.around.choice, strict=True)
        return {layer.id: space.splits[layer.id][position] for layer, position in pairs}

    def _table(self, what: str, factor: float) -> CostTable | None:
        """Return the costs with faster or slower links, or for another batch; None where there is no such batch."""
        planner = self.planner
        if what == "links":
            graph = planner.machine.graph
            links = tuple(
                replace(link, bandwidth_bytes_per_s=link.bandwidth_bytes_per_s * factor) for link in graph.links
            )
            scaled = replace(graph, links=links, collectives=())  # what was measured is of the links as they are
            changed = replace(planner, machine=Machine(scaled, planner.machine.profile))
        else:
            batch = self.plan.batch * factor
            if batch != int(batch) or batch < self.plan.mesh.size:
                return None
            changed = replace(planner, traced=planner.retraced(int(batch)))
        return table_with(changed, self.around.table.space.mesh, self._strategy)

    def _winner(self, table: CostTable, layer: LayerId, split: Split) -> tuple[Split, float] | None:
        """Return the split that a layer has in the plan of least cost, and the share of the step that it saves."""
        formulation = formulate(table, limit_bytes=self.plan.search.memory_limit_bytes)
        splits, j = table.space.splits[layer], table.space.graph.index[layer]
        best = least(table, formulation, {}, self.plan.bucket_bytes)
        if best is None or split not in splits:
            return None
        kept = least(table, formulation, {j: (splits.index(split),)}, self.plan.bucket_bytes)
        best_s, choice = best
        kept_s = math.inf if kept is None else kept[0]
        if choice[j] == splits.index(split) or best_s >= kept_s * (1 - EQUAL):
            return None
        return splits[choice[j]], 1 - best_s / kept_s


def refuse_pipelined(plan: Plan) -> None:
    """Raise where a plan has several stages.

    Raises:
        UsageError: it has.
    """
    if plan.is_pipelined:
        raise UsageError("layerwise explain takes plans of one stage; layerwise show prints the stages of a pipeline")
