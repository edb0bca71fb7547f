"""Solvers against each other and against brute force."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings

from planner.errors import UsageError
from planner.search.elimination import elimination_order, solve_dp
from planner.search.exhaustive import solve_exhaustively
from planner.search.ilp import solve_ilp, status_of
from planner.search.problem import Limits, Problem, Solution, Status
from planner.search.verify import problems_of
from support.problems import problems

FEW = settings(max_examples=60, deadline=None)  # each solves an integer program


@given(problems())
def test_dp_finds_what_brute_force_finds(problem: Problem) -> None:
    found, wanted = solve_dp(problem), solve_exhaustively(problem)
    assert found.status is wanted.status is Status.OPTIMAL
    assert found.cost_s == pytest.approx(wanted.cost_s, rel=1e-12, abs=0)
    assert found.lower_bound_s <= wanted.cost_s * (1 + 1e-12)
    assert problems_of(problem, found) == problems_of(problem, wanted) == []


@FEW
@given(problems())
def test_the_integer_program_finds_what_dp_finds(problem: Problem) -> None:
    found, wanted = solve_ilp(problem), solve_dp(problem)
    assert found.status is Status.OPTIMAL
    assert found.cost_s == pytest.approx(wanted.cost_s, rel=1e-9, abs=0)
    assert found.lower_bound_s <= wanted.cost_s * (1 + 1e-9)
    assert problems_of(problem, found) == []


@FEW
@given(problems(memory=True))
def test_under_a_memory_limit_the_integer_program_finds_what_brute_force_finds(
    problem: Problem,
) -> None:
    found, wanted = solve_ilp(problem), solve_exhaustively(problem)
    assert found.status is wanted.status
    assert found.status in {Status.OPTIMAL, Status.INFEASIBLE}
    assert problems_of(problem, found) == []
    if wanted.choice is not None:
        assert found.cost_s == pytest.approx(wanted.cost_s, rel=1e-9, abs=0)
        assert found.lower_bound_s <= wanted.cost_s * (1 + 1e-9)


@given(problems(memory=True))
def test_dp_never_returns_a_choice_that_breaks_the_memory_limit(problem: Problem) -> None:
    found, wanted = solve_dp(problem), solve_exhaustively(problem)
    assert problems_of(problem, found) == []
    assert found.lower_bound_s <= wanted.cost_s * (1 + 1e-12)
    if found.choice is None:
        assert found.status is Status.NO_INCUMBENT
    else:
        assert found.cost_s == pytest.approx(wanted.cost_s, rel=1e-12, abs=0)


@given(problems())
def test_where_all_costs_are_equal_dp_takes_the_first_options(problem: Problem) -> None:
    flat = Problem(
        tuple(np.full_like(c, 0.25) for c in problem.node_s),
        {pair: np.full_like(c, 0.5) for pair, c in problem.edge_s.items()},
    )
    assert solve_dp(flat).choice == (0,) * len(flat.node_s)
    assert solve_exhaustively(flat).choice == (0,) * len(flat.node_s)


@given(problems())
def test_solvers_are_deterministic(problem: Problem) -> None:
    assert solve_dp(problem).choice == solve_dp(problem).choice


def test_a_long_chain_is_solved_in_small_tables() -> None:
    rng = np.random.default_rng(0)
    nodes = tuple(rng.random(20) for _ in range(300))
    edges = {(i, i + 1): rng.random((20, 20)) for i in range(299)}
    found = solve_dp(Problem(nodes, edges))
    assert found.stats["largest_table"] == 20 * 20
    assert found.cost_s == pytest.approx(_shortest_path_s(nodes, edges))


def _shortest_path_s(nodes: tuple[np.ndarray, ...], edges: dict[tuple[int, int], np.ndarray]) -> float:
    best = nodes[0]
    for i, own in enumerate(nodes[1:]):
        best = (best[:, None] + edges[i, i + 1]).min(axis=0) + own
    return float(best.min())


def test_dp_refuses_tables_that_would_not_fit() -> None:
    sizes = [100] * 5
    nodes = tuple(np.ones(n) for n in sizes)
    edges = {(i, j): np.ones((100, 100)) for j in range(5) for i in range(j)}
    assert elimination_order(sizes, set(edges))[1] == 100**5
    with pytest.raises(UsageError, match="table of 1e\\+10 entries"):
        solve_dp(Problem(nodes, edges))
    with pytest.raises(UsageError, match="hopeless"):
        solve_exhaustively(Problem(nodes, edges))


def test_a_variable_without_edges_is_decided_alone() -> None:
    problem = Problem((np.array([2.0, 1.0]), np.array([1.0, 1.0])), {})
    assert solve_dp(problem).choice == (1, 0)


def test_no_variables_cost_nothing() -> None:
    assert solve_dp(Problem((), {})).cost_s == 0
    assert solve_exhaustively(Problem((), {})).cost_s == 0


@pytest.mark.parametrize("base", [0, 10**6, 80 * 10**9])
def test_the_integer_program_tells_single_bytes_apart(base: int) -> None:
    rng = np.random.default_rng(base)
    for _ in range(10):
        nodes = tuple(rng.random(3) for _ in range(4))
        edges = {(i, i + 1): rng.random((3, 3)) for i in range(3)}
        held, needed = (tuple(base + rng.integers(0, 10, 3) for _ in nodes) for _ in range(2))
        free = Problem(nodes, edges, held, needed)
        least = min(free.memory_bytes(c) for c in itertools.product(range(3), repeat=4))
        for more in (-1, 0, 1, 5):
            problem = replace(free, limit_bytes=max(least + more, 0))
            found, wanted = solve_ilp(problem), solve_exhaustively(problem)
            assert (found.status, found.choice) == (wanted.status, wanted.choice)


@pytest.mark.parametrize(
    ("native", "has_incumbent", "status"),
    [
        ("kOptimal", True, Status.OPTIMAL),
        ("kTimeLimit", True, Status.FEASIBLE),
        ("kTimeLimit", False, Status.NO_INCUMBENT),
        ("kInterrupt", False, Status.NO_INCUMBENT),
        ("kInfeasible", False, Status.INFEASIBLE),
        ("kUnbounded", True, Status.FAILED),
        ("kNotset", True, Status.FAILED),
        ("kSomethingNew", True, Status.FAILED),
    ],
)
def test_a_native_status_that_is_not_listed_is_a_failure(native: str, has_incumbent: bool, status: Status) -> None:
    assert status_of(native, has_incumbent=has_incumbent) is status


def test_stopped_before_the_first_solution_is_not_feasible() -> None:
    rng = np.random.default_rng(0)
    nodes = tuple(rng.random(30) for _ in range(12))
    edges = {(i, j): rng.random((30, 30)) for j in range(12) for i in range(j) if (i + j) % 3}
    found = solve_ilp(Problem(nodes, edges), Limits(time_s=0.0))
    assert (found.status, found.choice) == (Status.NO_INCUMBENT, None)


def test_a_status_and_its_choice_go_together() -> None:
    with pytest.raises(ValueError, match="does not go with"):
        Solution(Status.OPTIMAL, None, math.inf, 0.0)
    with pytest.raises(ValueError, match="does not go with"):
        Solution(Status.INFEASIBLE, (0,), 1.0, 0.0)


def test_verify_finds_every_lie() -> None:
    problem = Problem((np.array([1.0, 2.0]),), {}, (np.array([5, 1]),), (np.array([0, 0]),), limit_bytes=3)

    def lies(choice: tuple[int, ...], cost_s: float, bound_s: float) -> int:
        return len(problems_of(problem, Solution(Status.FEASIBLE, choice, cost_s, bound_s)))

    assert lies((1,), 2.0, 1.0) == 0
    assert lies((2,), 2.0, 1.0) == lies((), 2.0, 1.0) == 1  # out of range
    assert lies((1,), 1.5, 1.0) == 1  # wrong cost
    assert lies((0,), 1.0, 1.0) == 1  # too much memory
    assert lies((1,), 2.0, 2.5) == 1  # a bound above the cost
    assert lies((0,), 0.5, 1.5) == 3


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_costs_are_finite_and_not_negative(bad: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        Problem((np.array([1.0, bad]),), {})
