"""A bound of what a changed choice costs, kept up to date while local search goes from choice to choice."""

from collections.abc import Sequence

from planner.search.problem import Costs, Problem


class Floor:
    """The additive cost of a choice with one variable changed, for all options of the variable at once.

    Where the additive cost bounds the simulated step from below, a change whose cost is no better than the best
    step needs no simulation.

    Args:
        problem: the additive costs.
        picked: option of every variable.
    """

    def __init__(self, problem: Problem, picked: Sequence[int]) -> None:
        self._problem, self._picked = problem, list(picked)
        self._around: list[list[tuple[int, Costs]]] = [[] for _ in problem.node_s]
        for (a, b), costs in problem.edge_s.items():
            self._around[a].append((b, costs))
            self._around[b].append((a, costs.T))
        self._total_s = problem.cost_s(tuple(self._picked))
        self._own: tuple[int, Costs] | None = None

    def with_option(self, variable: int, option: int) -> float:
        """Return the cost of the choice with another option of one variable."""
        if self._own is None or self._own[0] != variable:
            own = self._problem.node_s[variable].copy()
            for other, costs in self._around[variable]:
                own += costs[:, self._picked[other]]
            self._own = variable, self._total_s - own[self._picked[variable]] + own
        return float(self._own[1][option])

    def pick(self, variable: int, option: int) -> None:
        """Change the choice."""
        self._total_s = self.with_option(variable, option)
        self._picked[variable] = option
