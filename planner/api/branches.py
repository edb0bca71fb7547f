"""Branch parallelism beside the search over meshes."""

from dataclasses import replace

from planner.api.tour import EQUAL
from planner.cost.sharding import ParameterSharding
from planner.ir.branches import fork_join_regions
from planner.search.auto import Planned, Search
from planner.search.branches import Branched, branch_floor_s, with_branches

Found = tuple[Search, Planned]


def best_with_branches(best: Found, found: list[Found], limit_bytes: int) -> tuple[Found, list[Found]]:
    """Return the best plan where branches may run at the same time, and all plans, with bounds that hold for it too.

    Branches are placed on the mesh of the best plan and on the first one, which has all devices. For the other meshes
    the bound is lowered to the compute that no placement of branches there can undercut.

    Args:
        best: the best plan without branches, with its search.
        found: the plans of all meshes that were searched.
        limit_bytes: of memory per device.
    """
    regions = fork_join_regions(best[0].table.space.graph)
    if not regions or best[0].table.model.settings.parameter_sharding is not ParameterSharding.NONE:
        return best, found
    plans, tried = [], list[Branched]()
    for search in dict.fromkeys(search for search, _ in (*found, best)):
        plan = min((p for s, p in (*found, best) if s is search), key=lambda p: p.timeline.step_s)
        if search in (best[0], found[0][0]):
            tried.append(with_branches(search, plan, limit_bytes=limit_bytes))
            bound_s, more = tried[-1].lower_bound_s, tried[-1].found
            plans += [more] if more is not None else []
        else:
            bound_s = min(plan.lower_bound_s, branch_floor(search))
        plans.append((search, replace(plan, lower_bound_s=bound_s)))
    fastest = min((b.found for b in tried if b.found), key=lambda p: p[1].timeline.step_s, default=best)
    is_faster = fastest[1].timeline.step_s < best[1].timeline.step_s * (1 - EQUAL)
    search, planned = fastest if is_faster else best
    source = next((b for b in tried if b.found is fastest), None) if is_faster else None
    steps = [b.tried_s for b in tried if b.tried_s is not None]
    summary = (source or max(tried, key=lambda b: b.bound)).summary(taken=is_faster)
    return (search, replace(planned, branches=replace(summary, step_s=min(steps, default=None)))), plans


def branch_floor(search: Search) -> float:
    """Return what no plan on the mesh of a search is faster than, with branches or without, in seconds."""
    return branch_floor_s(search.table, fork_join_regions(search.table.space.graph))
