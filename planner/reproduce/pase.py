"""PaSE [PaSE21]: its plans, its optima and its search times, on its graphs and cost rebuilt here."""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from planner.reproduce.figures import Figure, Reproduction
from planner.reproduce.pase_networks import alexnet, inception_v3, resnet101
from planner.search.elimination import solve_dp
from planner.search.exhaustive import solve_exhaustively
from planner.search.problem import Choice, Problem
from planner.search.published.pase import PaseProblem, pase_problem
from planner.search.published.pase_cost import BALANCE, Degrees
from planner.search.published.pase_operators import B, C, Graph, Kind, N, Node

BATCH: Final = 128
NETWORKS: Final[dict[str, Callable[[int], Graph]]] = {
    "AlexNet": alexnet, "Inception-v3": inception_v3, "ResNet-101": resnet101,
}  # fmt: skip
PUBLISHED_ALEXNET: Final = {
    "conv1": "b32", "conv2": "b32", "conv3": "b32", "conv4": "b32", "conv5": "b16 c2",
    "FC1": "n4 c8", "FC2": "n8 c4", "FC3": "n4 c8", "softmax": "c4",
}  # fmt: skip
"""Its plan for 32 devices: pieces of samples (b), input (c) and output channels (n)."""
PUBLISHED_INCEPTION: Final = {"A": "b32", "B": "b32", "C": "b32", "D": "b32", "E": "b16 n2", "FC": "n2 c16"}
"""Likewise, by kind of block."""
CODE_OPTIMA: Final = {
    ("AlexNet", 8): (97098296512, 28), ("AlexNet", 64): (41120456048, 163),
    ("Inception-v3", 8): (782140602432, 30), ("Inception-v3", 16): (673045949344, 57),
    ("Inception-v3", 32): (602425599824, 105), ("Inception-v3", 64): (553203648656, 176),
    ("ResNet-101", 8): (1425262849920, 35), ("ResNet-101", 16): (1244493633088, 68),
    ("ResNet-101", 32): (1086268826784, 117), ("ResNet-101", 64): (881764728352, 184),
}  # fmt: skip
"""The published code, unmodified, with ``-b 128 --flops 10 --bw 16``: optimum, largest number of splits of a layer."""
PUBLISHED_S: Final = {
    "AlexNet": {4: 0.23, 8: 0.25, 16: 0.30, 32: 0.36, 64: 0.48},
    "Inception-v3": {4: 14.4, 8: 20.0, 16: 39.8, 32: 86.0, 64: 196.0},
}
"""Printed search times."""
MAX_CHOICES: Final = 4000
"""Of a cut-out for brute force."""
BALANCES: Final = (100.0, 1000.0, 10_000.0, 50_000.0)

CODE_S: Final = {"Inception-v3": 82.5, "ResNet-101": 704.0}
"""The published code, unmodified, on 64 devices: its dynamic programming alone, on one core."""

_OTHER: Final = "the published code's formulas have another optimum than the paper prints; why is not known"
_HERE: Final = "this machine, one run, cost tables included"


@dataclass(frozen=True, slots=True)
class Solved:
    """A problem of PaSE's with its optimum and the seconds that both took."""

    graph: Graph
    found: PaseProblem
    choice: Choice
    cost: float
    tables_s: float
    solve_s: float

    def split(self, k: int) -> str:
        """Return the configuration of a node, such as ``b16 c2``."""
        return _text(self.found.degrees[k][self.choice[k]])


def _text(degrees: Degrees) -> str:
    return " ".join(f"{name}{degrees[d]}" for name, d in (("b", B), ("n", N), ("c", C)) if degrees[d] > 1) or "1"


def solved(graph: Graph, devices: int, balance: float = BALANCE) -> Solved:
    """Build a network's problem and solve it by elimination."""
    start_s = time.perf_counter()
    found = pase_problem(graph, devices, balance=balance)
    built_s = time.perf_counter()
    solution = solve_dp(found.problem)
    end_s = time.perf_counter()
    assert solution.choice is not None  # there is no memory limit
    return Solved(graph, found, solution.choice, solution.cost_s, built_s - start_s, end_s - built_s)


def reproduce() -> Reproduction:
    """Return PaSE's plans, optima and search times beside ours."""
    graphs = {name: build(BATCH) for name, build in NETWORKS.items()}
    wanted = [*CODE_OPTIMA, *((name, devices) for name, times in PUBLISHED_S.items() for devices in times)]
    every = {(name, devices): solved(graphs[name], devices) for name, devices in dict.fromkeys(wanted)}
    every["AlexNet", 32] = solved(graphs["AlexNet"], 32)
    return Reproduction(
        "[PaSE21] Elango, PaSE: parallelization strategies for efficient DNN training, IPDPS 2021",
        "layerwise reproduce pase",
        (
            ("AlexNet on 32 devices, pieces of samples, output and input channels", _alexnet(every["AlexNet", 32])),
            ("Inception-v3 on 32 devices, by kind of block", _inception(every["Inception-v3", 32])),
            ("optimum, in FLOP as it counts them (paper: its code, unmodified)", tuple(_optima(every))),
            ("search time", tuple(_times(every))),
            ("elimination against brute force", (_brute_force(graphs),)),
        ),
        (
            (
                "Graphs, configurations and costs are built here from the formulas of the published code "
                "(baidu-research/PaSE, nn_ops.py at 02d6915): batch 128, 10 TFLOP/s, 16 GB/s, words of 8 bytes."
            ),
            (
                "Its batch norm is charged per channel, row and column instead of per channel; it is kept, because the "
                "optima are those of this cost."
            ),
            "Speed-ups over data parallelism were measured on hardware and are not reproduced.",
        ),
    )


def _alexnet(found: Solved) -> tuple[Figure, ...]:
    order = [k for k, node in enumerate(found.graph) if node.operator.kind in {Kind.PRODUCT, Kind.LOSS}]
    plan = {name: found.split(k) for name, k in zip(PUBLISHED_ALEXNET, order, strict=True)}
    figures = [
        Figure(name, printed, plan[name], remark="" if plan[name] == printed else _OTHER)
        for name, printed in PUBLISHED_ALEXNET.items()
    ]
    conv4 = order[list(PUBLISHED_ALEXNET).index("conv4")]
    others = {solved(found.graph, 32, balance).split(conv4) for balance in BALANCES}
    printed = dict(zip(order, PUBLISHED_ALEXNET.values(), strict=True))
    return (
        *figures,
        Figure("conv4, 100 to 50,000 FLOP per word", None, " or ".join(sorted(others))),
        Figure("cost of the printed plan over the optimum", None, _cost_of(found, printed) / found.cost, digits=4),
    )


def _cost_of(found: Solved, plan: dict[int, str]) -> float:
    """Return the least cost with the configurations of some nodes given."""
    problem = found.found.problem
    keep = [
        [o for o, row in enumerate(rows) if k not in plan or _text(row) == plan[k]]
        for k, rows in enumerate(found.found.degrees)
    ]
    nodes = tuple(costs[k] for costs, k in zip(problem.node_s, keep, strict=True))
    edges = {(i, j): costs[np.ix_(keep[i], keep[j])] for (i, j), costs in problem.edge_s.items()}
    return solve_dp(Problem(nodes, edges)).cost_s


def _inception(found: Solved) -> tuple[Figure, ...]:
    products = [k for k, node in enumerate(found.graph) if node.operator.kind is Kind.PRODUCT]
    figures, plan = [], {}
    for block, printed in PUBLISHED_INCEPTION.items():
        mine = [k for k in products if found.graph[k].name.startswith(f"{block}:")] or products[-1:]
        plan.update(dict.fromkeys(mine, printed))
        counts = Counter(found.split(k) for k in mine)
        ours = ", ".join(f"{count} x {split}" if len(counts) > 1 else split for split, count in counts.most_common())
        name = f"convolutions of {block}" if len(mine) > 1 else block
        figures.append(Figure(name, printed, ours, remark="" if ours == printed else _OTHER))
    ratio = _cost_of(found, plan) / found.cost
    return (*figures, Figure("cost of the printed plan over the optimum", None, ratio, digits=4))


def _optima(every: dict[tuple[str, int], Solved]) -> Iterator[Figure]:
    for (name, devices), (cost, largest) in CODE_OPTIMA.items():
        found = every[name, devices]
        yield Figure(f"{name}, {devices} devices", cost, found.cost, "FLOP", digits=len(str(cost)))
        yield Figure(f"{name}, {devices} devices, most configurations", str(largest), str(found.found.largest))


def _times(every: dict[tuple[str, int], Solved]) -> Iterator[Figure]:
    for name, times in PUBLISHED_S.items():
        for devices, published_s in times.items():
            found = every[name, devices]
            yield Figure(f"{name}, {devices} devices", published_s, found.tables_s + found.solve_s, "s", 2, _HERE)
    for name, code_s in CODE_S.items():
        about = f"{name}, 64 devices, search alone"
        yield Figure(about, code_s, every[name, 64].solve_s, "s", 3, "its code, unmodified, on another core")


def _brute_force(graphs: dict[str, Graph]) -> Figure:
    """Compare the two on every different run of three or four nodes that brute force does in a moment."""
    parts = {
        tuple((node.operator, node.inputs) for node in part): part
        for graph in graphs.values()
        for size in (3, 4)
        for first in range(len(graph) - size + 1)
        for part in [cut_out(graph, range(first, first + size))]
    }
    problems = [pase_problem(part, 4).problem for part in parts.values()]
    small = [p for p in problems if math.prod(len(costs) for costs in p.node_s) <= MAX_CHOICES]
    equal = sum(solve_exhaustively(p).cost_s == solve_dp(p).cost_s for p in small)
    return Figure("cut-outs of 3 and 4 nodes on 4 devices with the same optimum", None, f"{equal} of {len(small)}")


def cut_out(graph: Graph, positions: range) -> Graph:
    """Return a run of nodes; what they read from outside is an input of the network."""
    first = positions.start
    return tuple(
        Node(graph[k].name, graph[k].operator, tuple(i - first for i in graph[k].inputs if i in positions))
        for k in positions
    )
