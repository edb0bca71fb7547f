"""Solvers against each other and against brute force."""

import itertools
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from planner.errors import UsageError
from planner.search import lagrange, minimum
from planner.search.elimination import solve_dp
from planner.search.exhaustive import solve_exhaustively
from planner.search.ilp import cbc_path, solve_ilp, status_of
from planner.search.lagrange import least_memory
from planner.search.minimum import minimise
from planner.search.order import elimination_order
from planner.search.problem import Chain, Choice, Limits, Problem, Solution, Status
from planner.search.reduction import undominated
from planner.search.tables import schedule
from planner.search.verify import problems_of
from support.problems import problems

SCALE = 10 if os.environ.get("LAYERWISE_FULL") else 1
MANY = settings(max_examples=250 * SCALE, deadline=None)
FEW = settings(max_examples=100 * SCALE, deadline=None)  # each solves an integer program


def agrees(problem: Problem, found: Solution, wanted: Solution, rel: float = 1e-9) -> None:
    """Both are proven, cost the same, and the first verifies."""
    assert found.status is wanted.status
    assert found.status in {Status.OPTIMAL, Status.INFEASIBLE}
    assert problems_of(problem, found) == []
    if wanted.choice is not None:
        assert found.cost_s == pytest.approx(wanted.cost_s, rel=rel, abs=0)
        assert found.lower_bound_s <= wanted.cost_s * (1 + 1e-12)


@MANY
@given(problems())
def test_dp_finds_what_brute_force_finds(problem: Problem) -> None:
    agrees(problem, solve_dp(problem), solve_exhaustively(problem), rel=1e-12)


@MANY
@given(problems(memory=True))
def test_under_a_memory_limit_dp_finds_what_brute_force_finds(problem: Problem) -> None:
    agrees(problem, solve_dp(problem), solve_exhaustively(problem))


@MANY
@given(problems())
def test_sweeps_and_elimination_of_what_they_leave_find_what_brute_force_finds(problem: Problem) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(minimum, "SHORT_WORK", 0.0)
        agrees(problem, solve_dp(problem), solve_exhaustively(problem))


@MANY
@given(problems())
def test_where_nothing_may_be_eliminated_bound_and_choice_enclose_the_optimum(problem: Problem) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("SHORT_WORK", "MAX_WORK"):
            patch.setattr(minimum, name, -1.0)
        found, wanted = minimise(problem), solve_exhaustively(problem)
    assert problems_of(problem, found) == []
    assert found.lower_bound_s <= wanted.cost_s * (1 + 1e-12)
    assert found.cost_s >= wanted.cost_s * (1 - 1e-12)
    if found.status is Status.OPTIMAL:
        assert found.cost_s == pytest.approx(wanted.cost_s, rel=1e-8, abs=0)


@MANY
@given(problems(memory=True))
def test_without_the_integer_program_the_bound_holds_under_a_memory_limit(problem: Problem) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lagrange, "MAX_COLUMNS", -1)
        found, wanted = solve_dp(problem), solve_exhaustively(problem)
    assert problems_of(problem, found) == []
    assert (found.choice is None) == (wanted.choice is None)
    if wanted.choice is not None:
        assert found.lower_bound_s <= wanted.cost_s * (1 + 1e-12)
        assert found.cost_s >= wanted.cost_s * (1 - 1e-12)
        if found.status is Status.OPTIMAL:
            assert found.cost_s == pytest.approx(wanted.cost_s, rel=1e-8, abs=0)


@FEW
@given(problems())
def test_the_integer_program_finds_what_dp_finds(problem: Problem) -> None:
    agrees(problem, solve_ilp(problem), solve_dp(problem))


@FEW
@given(problems(memory=True))
def test_under_a_memory_limit_the_integer_program_finds_what_brute_force_finds(problem: Problem) -> None:
    agrees(problem, solve_ilp(problem), solve_exhaustively(problem))


@FEW
@given(problems(chain=True, max_count=5))
def test_with_reductions_behind_backward_the_integer_program_finds_what_brute_force_finds(problem: Problem) -> None:
    agrees(problem, solve_ilp(problem), solve_exhaustively(problem))


@FEW
@given(problems(chain=True, memory=True, max_count=5))
def test_with_both_the_integer_program_finds_what_brute_force_finds(problem: Problem) -> None:
    wanted = solve_exhaustively(problem)
    agrees(problem, solve_ilp(problem, start=wanted.choice), wanted)


@MANY
@given(problems(chain=True, memory=True))
def test_with_reductions_behind_backward_dp_gives_a_bound(problem: Problem) -> None:
    found, wanted = solve_dp(problem), solve_exhaustively(problem)
    assert problems_of(problem, found) == []
    assert (found.choice is None) == (wanted.choice is None)
    assert found.lower_bound_s <= wanted.cost_s * (1 + 1e-12)


@MANY
@given(problems(chain=True))
def test_a_chain_costs_what_the_streams_take_and_its_longest_path(problem: Problem) -> None:
    chain = problem.chain
    assert chain is not None
    for choice in itertools.islice(itertools.product(*map(range, problem.sizes)), 0, None, 7):
        cost_s = problem.cost_s(choice)
        assert cost_s == pytest.approx(_streams_s(problem, chain, choice), rel=1e-12, abs=0)
        assert cost_s == pytest.approx(_longest_path_s(problem, chain, choice), rel=1e-12, abs=0)


def _streams_s(problem: Problem, chain: Chain, choice: Choice) -> float:
    """The step as a clock of the device and one per level."""
    update_s = sum(own[c] for own, c in zip(chain.update_s, choice, strict=True))
    behind = sum(own[c] for own, c in zip(chain.backward_s, choice, strict=True))
    behind += sum(own[choice[i], choice[j]] for (i, j), own in chain.transfer_s.items())
    now_s = replace(problem, chain=None).cost_s(choice) - update_s - behind  # forward
    ends_s = [0.0] * chain.num_levels
    for v in chain.order:
        now_s += chain.backward_s[v][choice[v]]
        for level in range(chain.num_levels):
            ends_s[level] = max(ends_s[level], now_s) + chain.sync_s[v][level][choice[v]]
        now_s += sum(own[choice[i], choice[j]] for (i, j), own in chain.transfer_s.items() if j == v)
    return max(now_s, *ends_s, now_s) + update_s


def _longest_path_s(problem: Problem, chain: Chain, choice: Choice) -> float:
    """The longest of: everything but reductions; all up to a variable's backward, then reductions from it on."""
    paths_s = [replace(problem, chain=None).cost_s(choice)]
    for position, v in enumerate(chain.order):
        later = chain.order[position + 1 :]
        missing_s = sum(chain.backward_s[u][choice[u]] for u in later)
        missing_s += sum(own[choice[i], choice[j]] for (i, j), own in chain.transfer_s.items() if j in {v, *later})
        paths_s += [
            paths_s[0] - missing_s + sum(chain.sync_s[u][level][choice[u]] for u in (v, *later))
            for level in range(chain.num_levels)
        ]
    return max(paths_s)


def test_reductions_hide_behind_backward_and_behind_each_other_on_other_levels_only() -> None:
    chain = Chain(
        (1, 0), (np.array([2.0]), np.array([3.0])), (np.array([0.5]), np.array([0.5])), {(0, 1): np.array([[1.0]])},
        (np.array([[1.0], [2.0]]), np.array([[5.0], [0.0]])),
    )  # fmt: skip
    problem = Problem((np.array([3.5]), np.array([5.5])), {(0, 1): np.array([[3.0]])}, chain=chain)
    # forward 1 + 2 + 2 = 5; backward of 1 ends at 8; its reduction on level 0 at 13; the transfer at 9; backward of 0
    # at 11; its reductions at max(13, 11) + 1 = 14 and at 11 + 2 = 13; updates 1
    assert problem.cost_s((0, 0)) == 15.0
    assert replace(problem, chain=None).cost_s((0, 0)) == 12.0


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"order": (0, 0)}, "every variable once"),
        ({"backward_s": (np.ones(1), np.ones(2))}, "backward_s"),
        ({"sync_s": (np.ones((1, 1)), np.ones((2, 1)))}, "one row per level"),
        ({"transfer_s": {(0, 0): np.ones((1, 1))}}, "does not fit to an edge"),
        ({"transfer_s": {(1, 0): np.full((1, 1), 2.0)}}, "costs more than its edge"),
        ({"update_s": (np.ones(1), np.zeros(1))}, "variable 0 cost more"),
        ({"sync_s": (np.full((1, 1), math.inf),) * 2}, "finite"),
    ],
)
def test_a_chain_fits_to_its_problem(changed: dict[str, Any], says: str) -> None:
    one, none = np.ones(1), np.zeros(1)
    right = Chain((1, 0), (one, one), (none, none), {(1, 0): np.ones((1, 1))}, (np.ones((1, 1)),) * 2)
    problem = Problem((one, one), {(0, 1): np.ones((1, 1))}, chain=right)
    with pytest.raises(ValueError, match=says):
        replace(problem, chain=replace(right, **changed))


@MANY
@given(problems(chain=True, memory=True, max_count=5))
def test_what_is_removed_as_dominated_is_not_missed(problem: Problem) -> None:
    for each in (problem, replace(problem, chain=None), problem.additive()):
        wanted = solve_exhaustively(each)
        found = solve_exhaustively(each.restricted(undominated(each, math.inf)))
        assert found.status is wanted.status
        assert found.cost_s == pytest.approx(wanted.cost_s, rel=1e-12, abs=0)


def test_an_option_is_removed_where_another_is_better_beside_every_neighbour() -> None:
    edges = {(0, 1): np.array([[1.0, 1.0], [2.0, 4.0], [4.0, 2.0]])}

    def left(node_s: float, max_work: float = math.inf) -> list[list[int]]:
        problem = Problem((np.array([node_s, 1.0, 1.0]), np.zeros(2)), edges)
        return [[int(o) for o in kept] for kept in undominated(problem, max_work)]

    # on the edge option 1 costs up to 4 - 1 = 3 more than option 0: its node must cost 3 less
    assert left(3.0) == [[0, 1, 2], [0, 1]]
    assert left(4.0) == [[1, 2], [0, 1]]
    # option 0 costs at least 1 less on the edge than either: its node may cost 1 more; then its neighbour's are equal
    assert left(2.0) == [[0], [0]]
    assert left(4.0, max_work=0.0) == [[0, 1, 2], [0, 1]]


@MANY
@given(problems(memory=True))
def test_the_least_memory_is_that_of_brute_force(problem: Problem) -> None:
    every = itertools.product(*map(range, problem.sizes))
    assert problem.memory_bytes(least_memory(problem)) == min(map(problem.memory_bytes, every))


@given(problems())
def test_where_all_costs_are_equal_dp_takes_the_first_options(problem: Problem) -> None:
    flat = Problem(
        tuple(np.full_like(c, 0.25) for c in problem.node_s),
        {pair: np.full_like(c, 0.5) for pair, c in problem.edge_s.items()},
    )
    assert solve_dp(flat).choice == (0,) * len(flat.node_s)
    assert solve_exhaustively(flat).choice == (0,) * len(flat.node_s)


@given(problems(memory=True))
def test_solvers_are_deterministic(problem: Problem) -> None:
    assert solve_dp(problem) == solve_dp(problem)


def test_equal_blocks_are_eliminated_once() -> None:
    rng = np.random.default_rng(0)
    node, edge, skip = rng.random(9), rng.random((9, 9)), rng.random((9, 9))

    def network(blocks: int) -> Problem:
        edges = {(i, i + 1): edge for i in range(4 * blocks)}
        edges.update({(i, i + 4): skip for i in range(0, 4 * blocks, 4)})
        return Problem((node,) * (4 * blocks + 1), edges)

    # inside a block, two eliminations between two neighbours; their work does not grow with the blocks
    cubes = [sum(step.work == 9**3 for step in schedule(network(blocks)).steps) for blocks in (2, 20)]
    assert cubes[0] == cubes[1] <= 4
    apart = network(5)
    apart = Problem(tuple(own.copy() for own in apart.node_s), {p: own.copy() for p, own in apart.edge_s.items()})
    assert solve_dp(apart).choice == solve_dp(network(5)).choice
    assert schedule(apart).work > schedule(network(5)).work


def test_a_long_chain_is_solved_in_small_tables() -> None:
    rng = np.random.default_rng(0)
    nodes = tuple(rng.random(20) for _ in range(300))
    edges = {(i, i + 1): rng.random((20, 20)) for i in range(299)}
    assert schedule(Problem(nodes, edges)).largest == 20 * 20
    found = solve_dp(Problem(nodes, edges))
    assert found.cost_s == pytest.approx(_shortest_path_s(nodes, edges))


def _shortest_path_s(nodes: tuple[np.ndarray, ...], edges: dict[tuple[int, int], np.ndarray]) -> float:
    best = nodes[0]
    for i, own in enumerate(nodes[1:]):
        best = (best[:, None] + edges[i, i + 1]).min(axis=0) + own
    return float(best.min())


def test_tables_that_would_not_fit_leave_a_bound_and_a_choice() -> None:
    rng = np.random.default_rng(0)
    sizes = [100] * 5
    nodes = tuple(rng.random(n) for n in sizes)
    edges = {(i, j): rng.random((100, 100)) for j in range(5) for i in range(j)}
    problem = Problem(nodes, edges)
    assert elimination_order(sizes, edges)[1] == 100**5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(minimum, "MAX_WORK", 1e6)
        found = solve_dp(problem)
        assert found == solve_dp(problem)
    assert found.status is Status.FEASIBLE
    assert problems_of(problem, found) == []
    assert sum(own.min() for own in (*nodes, *edges.values())) < found.lower_bound_s < found.cost_s
    assert found.gap < 0.5
    with pytest.raises(UsageError, match="hopeless"):
        solve_exhaustively(problem)


def test_blocks_of_a_large_table_are_put_together() -> None:
    rng = np.random.default_rng(1)
    sizes = (40, 37, 41, 43)
    nodes = tuple(rng.random(n) for n in sizes)
    edges = {(i, j): rng.random((sizes[i], sizes[j])) for i, j in itertools.combinations(range(4), 2)}
    every = np.zeros(sizes)
    for scope, own in (*(((i,), own) for i, own in enumerate(nodes)), *edges.items()):
        every += own.reshape([n if k in scope else 1 for k, n in enumerate(sizes)])
    found = solve_dp(Problem(nodes, edges))
    assert found.choice == tuple(int(c) for c in np.unravel_index(every.argmin(), sizes))
    assert found.cost_s == pytest.approx(every.min())


@given(problems())
def test_an_order_names_every_variable_once_and_knows_its_largest_table(problem: Problem) -> None:
    order, largest = elimination_order(problem.sizes, problem.edge_s)
    assert sorted(order) == list(range(len(problem.sizes)))
    assert largest == _largest_table(problem.sizes, order, list(problem.edge_s))


def _largest_table(sizes: Sequence[int], order: Sequence[int], scopes: Sequence[Sequence[int]]) -> float:
    left, largest = [set(scope) for scope in scopes], 0.0
    for v in order:
        joined = {v}.union(*(scope for scope in left if v in scope))
        largest = max(largest, math.prod(float(sizes[u]) for u in joined))
        left = [scope for scope in left if v not in scope] + [joined - {v}]
    return largest


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


def _hard(count: int = 12, options: int = 30) -> Problem:
    rng = np.random.default_rng(0)
    nodes = tuple(rng.random(options) for _ in range(count))
    pairs = [(i, j) for j in range(count) for i in range(j) if (i + j) % 3]
    return Problem(nodes, {pair: rng.random((options, options)) for pair in pairs})


def test_stopped_before_the_first_solution_is_not_feasible() -> None:
    found = solve_ilp(_hard(), Limits(time_s=0.0))
    assert (found.status, found.choice) == (Status.NO_INCUMBENT, None)


def test_stopped_with_a_start_is_no_worse_than_it() -> None:
    problem = _hard()
    start = minimise(problem).choice
    assert start is not None
    found = solve_ilp(problem, Limits(time_s=0.5), start=start)
    assert found.status is Status.FEASIBLE
    assert problems_of(problem, found) == []
    assert found.cost_s <= problem.cost_s(start) * (1 + 1e-9)


has_cbc = pytest.mark.skipif(cbc_path() is None, reason="there is no CBC")


@has_cbc
@settings(max_examples=20 * SCALE, deadline=None)
@given(problems(memory=True, chain=True, max_count=4))
def test_cbc_finds_what_brute_force_finds(problem: Problem) -> None:
    wanted = solve_exhaustively(problem)
    found = solve_ilp(problem, program="CBC", start=wanted.choice)
    agrees(problem, found, wanted, rel=1e-6)  # it reads its program from a file of 12 digits


@has_cbc
def test_a_stopped_cbc_is_not_optimal() -> None:
    problem = _hard(8, 12)
    stopped = solve_ilp(problem, Limits(time_s=0.0), program="CBC")
    assert stopped.status in {Status.NO_INCUMBENT, Status.FEASIBLE}
    started = solve_ilp(problem, Limits(time_s=0.1), start=minimise(problem).choice, program="CBC")
    assert started.status is not Status.OPTIMAL
    assert problems_of(problem, started) == []
    assert started.lower_bound_s < started.cost_s


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


def test_a_start_keeps_costs_visible_beside_ones_that_no_good_choice_has() -> None:
    """Node costs of seconds beside an edge of 1e12 s: scaled by the edge, the program would not see the nodes."""
    rng = np.random.default_rng(11)
    node_s = tuple(rng.random(4) + 1 for _ in range(6))
    edge_s = {(i, i + 1): np.where(rng.random((4, 4)) < 0.3, 1e12, rng.random((4, 4))) for i in range(5)}
    problem = Problem(node_s, edge_s)
    wanted = solve_exhaustively(problem)
    found = solve_ilp(problem, start=solve_dp(problem).choice)
    assert found.status is Status.OPTIMAL
    assert found.cost_s == pytest.approx(wanted.cost_s, rel=1e-6)
    assert found.lower_bound_s <= wanted.cost_s * (1 + 1e-9)
