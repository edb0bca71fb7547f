"""FlexFlow [FlexFlow19]: its search, its speed-ups over data parallelism, and its incremental simulation.

Machines are the shipped graphs of its cluster of 4 nodes of 4 P100 and of one of them, with the data sheet's roofline;
64 images for each GPU, AlexNet 256, as there. Steps are those of our simulator: bucketed all-reduces behind backward.
"""

import math
import statistics
import time
from collections.abc import Iterator, Mapping
from typing import Final

import numpy as np

from planner.api import Options, Origin, Planner, example_inputs, machine_of, prepare
from planner.cost.resimulate import Resimulation
from planner.cost.simulate import simulated_step_s
from planner.cost.table import CostTable
from planner.errors import LayerwiseError
from planner.frontend.source import load_model
from planner.ir.bucket import DEFAULT_BUCKET_BYTES
from planner.ir.dimension import Dimension
from planner.reproduce.figures import Figure, Reproduction, paragraphs
from planner.search.formulate import Formulation, formulate
from planner.search.mcmc import SEED, Rules, mcmc_choice
from planner.search.problem import Choice, Costs, Problem
from planner.space.enumerate import DEFAULT_DIMENSIONS

NODE, NODE_MESHES = "4xp100-nvlink", {"4": "gpu=4", "2 x 2": "gpu=2x2"}
CLUSTER, MESH, GPUS = "4x4-p100-ib100", "node=4,gpu=4", 16
LENET_BATCH: Final = 256
DIMENSIONS: Final = DEFAULT_DIMENSIONS | {Dimension.HEIGHT, Dimension.WIDTH}
NETWORKS: Final = {
    "AlexNet": ("alexnet", {}, 256),
    "Inception-v3": ("torchvision:inception_v3", {"aux_logits": False}, 64),
    "ResNet-101": ("torchvision:resnet101", {}, 64),
}
"""MODEL, its arguments, images for each GPU."""
PUBLISHED_SPEED_UP: Final = {
    "AlexNet": "1.3 to 3.3", "Inception-v3": "1.3 to 3.3", "ResNet-101": "near 1: it stays close to data parallelism",
}  # fmt: skip
PUBLISHED_DELTA: Final = {
    "AlexNet": (0.11 / 0.04, 18 / 5.9),
    "Inception-v3": (14 / 4.1, 8817 / 1278),
    "ResNet-101": (1.4 / 0.4, 515 / 158),
}
"""Seconds of a search with full simulation / with delta simulation, on 4 and on 64 GPUs; its Table 4."""
PUBLISHED_IMAGES_PER_S: Final = {"Inception-v3": 2208.0}
"""On 16 P100; the paper gives no other network's rate in numbers."""
PUBLISHED_LENET_S: Final = (1.0, 0.8 * 3600)
"""MCMC takes less than the first, its exhaustive search the second."""
TRIALS, ROUNDS = 100, 5
"""Proposals that are timed, and how often."""


def planner_of(
    reference: str, arguments: Mapping[str, str | int | float | bool], batch: int, cluster: str, mesh: str
) -> Planner:
    """Return a network on a mesh, everything to be split, batch norms on each GPU's own samples."""
    loaded = load_model(reference, arguments)
    options = Options(sync_batch_norm=False, dimensions=DIMENSIONS, mesh=mesh, io="per-rank")
    images = example_inputs(loaded.input_shapes, batch)
    return prepare(loaded.module, images, machine_of(cluster), options, Origin(reference, reference))


# --- the shortest step of all


def shortest_step(table: CostTable, formulation: Formulation, bucket_bytes: int) -> tuple[float, int]:
    """Return the shortest simulated step of all strategies, and how many had to be simulated to know.

    Depth first. A strategy is left out only where the part that is chosen and the least that the rest can cost, both
    without gradient sync, are no shorter than a step that was simulated: no sync can make up for that.
    """
    problem = formulate(table, sync_weight=0.0).problem
    sizes = [len(costs) for costs in problem.node_s]
    rest = _least_behind(problem)
    best_s, simulated = math.inf, 0
    steps = Resimulation(table, formulation.layer_choice((0,) * len(sizes)), bucket_bytes)
    stack: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    while stack:
        cost_s, options = stack.pop()
        v = len(options)
        if cost_s >= best_s:
            continue
        if v == len(sizes):
            simulated += 1
            best_s = min(best_s, steps.step_s(dict(enumerate(formulation.layer_choice(options)))))
            continue
        found = []
        for option in range(sizes[v]):
            own_s = float(problem.node_s[v][option])
            own_s += sum(float(c[options[i], option]) for (i, j), c in problem.edge_s.items() if j == v)
            so_far = cost_s - (float(rest[v - 1][options[-1]]) if v else 0.0) + own_s
            bound_s = so_far + float(rest[v][option])
            if bound_s * (1 - 1e-12) < best_s:
                found.append((bound_s, (*options, option)))
        stack.extend(sorted(found, reverse=True))  # the most promising is next
    return best_s, simulated


def _least_behind(problem: Problem) -> list[Costs]:
    """Return for every variable, by its option, the least that all later ones cost: exact on a chain, else below."""
    rest = [np.zeros(len(costs)) for costs in problem.node_s]
    for v in range(len(rest) - 2, -1, -1):
        behind = problem.node_s[v + 1] + rest[v + 1]
        edge = problem.edge_s.get((v, v + 1), np.zeros((len(rest[v]), len(behind))))
        rest[v] = (edge + behind).min(axis=1)
    return rest


def lenet_figures() -> Iterator[Figure]:
    """Yield what MCMC finds for LeNet on 4 devices beside the shortest step of all strategies."""
    for shape, mesh in NODE_MESHES.items():
        planner = planner_of("lenet5", {}, LENET_BATCH, NODE, mesh)
        table = planner.table(planner.meshes()[0])
        formulation = formulate(table)
        count = math.prod(len(costs) for costs in formulation.problem.node_s)
        start_s = time.perf_counter()
        choice = mcmc_choice(table, formulation)
        mcmc_s = time.perf_counter() - start_s
        start_s = time.perf_counter()
        best_s, simulated = shortest_step(table, formulation, DEFAULT_BUCKET_BYTES)
        exhaustive_s = time.perf_counter() - start_s
        found_s = simulated_step_s(table, choice, DEFAULT_BUCKET_BYTES)
        name = f"LeNet on {shape} P100"
        yield Figure(f"{name}, MCMC's step / the shortest of all", 1.0, found_s / best_s, digits=6)
        below = f"below {PUBLISHED_LENET_S[0]:.2g} s"
        ours, remark = below if mcmc_s < PUBLISHED_LENET_S[0] else f"{mcmc_s:.2g} s", f"ours {mcmc_s:.2g} s"
        yield Figure(f"{name}, seconds of MCMC", below, ours, remark=remark)
        remark = f"{count} strategies; {simulated} simulated, the others cannot be shorter"
        yield Figure(f"{name}, seconds of the proof", PUBLISHED_LENET_S[1], exhaustive_s, "s", digits=2, remark=remark)


# --- networks on 16 GPUs


def network_figures() -> Iterator[tuple[str, tuple[Figure, ...]]]:
    """Yield the parts on 16 GPUs: speed and traffic, MCMC beside other solvers, incremental simulation."""
    speed: list[Figure] = []
    beside: list[Figure] = []
    delta: list[Figure] = []
    for name, (reference, arguments, images) in NETWORKS.items():
        try:
            planner = planner_of(reference, arguments, images * GPUS, CLUSTER, MESH)
        except LayerwiseError as error:
            speed.append(Figure(f"{name}, all", None, None, remark=str(error)))
            continue
        search = planner.search(planner.meshes()[0])
        fixed, exact = search.fixed("data"), search.solve("dp")
        rules = Rules(planner.limit_bytes, fixed.bucket_bytes)  # with what is best for its first start
        start_s = time.perf_counter()
        choice = mcmc_choice(search.table, search.formulation, rules=rules)
        mcmc_s = time.perf_counter() - start_s
        found, data = search.forced(choice).timeline, fixed.timeline
        remark = f"the paper: {PUBLISHED_SPEED_UP[name]}"
        speed.append(Figure(f"{name}, speed-up over data", None, data.step_s / found.step_s, remark=remark))
        ratio = additive_s(search.table, fixed.choice) / additive_s(search.table, exact.choice)
        speed.append(Figure(f"{name}, dp over data, nothing overlapped", None, ratio))
        traffic = data.communication_bytes / found.communication_bytes
        speed.append(Figure(f"{name}, traffic of data / its own", None, traffic, remark="the paper: up to 5"))
        paper = PUBLISHED_IMAGES_PER_S.get(name)
        remark = "our compute is the data sheet's, nothing is fitted" if paper else ""
        rate = images * GPUS / found.step_s
        speed.append(Figure(f"{name}, images per second", paper, rate, "images/s", digits=4, remark=remark))
        start_s = time.perf_counter()
        auto = planner.best()[1].timeline
        auto_s = time.perf_counter() - start_s
        beside.append(Figure(f"{name}, step", None, found.step_s, "s", remark=f"search {mcmc_s:.2g} s"))
        beside.append(Figure(f"{name}, step of auto", None, auto.step_s, "s", remark=f"search {auto_s:.2g} s"))
        beside.append(Figure(f"{name}, step of dp", None, exact.timeline.step_s, "s"))
        beside.append(Figure(f"{name}, step of data", None, data.step_s, "s"))
        few, many = PUBLISHED_DELTA[name]
        full_s, delta_s = simulation_s(search.table, search.formulation, choice)
        remark = f"the paper: {few:.2g} on 4 GPUs, {many:.2g} on 64; ours {1e3 * full_s:.2g} / {1e3 * delta_s:.2g} ms"
        delta.append(Figure(f"{name}, full / incremental", None, full_s / delta_s, remark=remark))
    yield "speed and traffic on 16 P100", tuple(speed)
    yield "its search beside others", tuple(beside)
    yield "seconds of a full simulation over those of an incremental one", tuple(delta)


def additive_s(table: CostTable, choice: Choice) -> float:
    """Return the length of a step in which nothing is overlapped."""
    formulation = formulate(table)
    problem = formulation.problem
    options = [0] * len(problem.node_s)
    for j, v in enumerate(formulation.variable_of):
        options[v] = formulation.options[j].index(choice[j])
    return Problem(problem.node_s, problem.edge_s).cost_s(options)


def simulation_s(table: CostTable, formulation: Formulation, choice: tuple[int, ...]) -> tuple[float, float]:
    """Return the seconds of a whole simulation and of an incremental one, for changes of one variable at a time."""
    rng = np.random.default_rng(SEED)
    free = [v for v, costs in enumerate(formulation.problem.node_s) if len(costs) > 1]
    trials = []
    for v in rng.choice(free, TRIALS):
        option = int(rng.integers(len(formulation.problem.node_s[v])))
        layers = [j for j, u in enumerate(formulation.variable_of) if u == v]
        trials.append({j: formulation.options[j][option] for j in layers})
    steps = Resimulation(table, choice, DEFAULT_BUCKET_BYTES)
    full, incremental = [], []
    for _ in range(ROUNDS):
        start_s = time.perf_counter()
        for changes in trials:
            changed = [changes.get(j, c) for j, c in enumerate(choice)]
            simulated_step_s(table, changed, DEFAULT_BUCKET_BYTES)
        full.append(time.perf_counter() - start_s)
        start_s = time.perf_counter()
        for changes in trials:
            steps.step_s(changes)
        incremental.append(time.perf_counter() - start_s)
    return statistics.median(full) / TRIALS, statistics.median(incremental) / TRIALS


_REMARKS: Final = """
Not the same simulator: FlexFlow's schedules every part of every operator on every device, ours one device that stands
for all, with reductions behind it. So ours is quicker as a whole, and the ratio of full to incremental is what can be
compared. Not the same space either: FlexFlow puts any part on any device; our meshes say which device computes what.

Data parallelism is our runtime's: all-reduces in buckets, hidden behind backward. At these batches nearly all of them
hide on 100 Gbit/s, so the paper's 1.3 to 3.3 over its own data parallelism are not reproduced; where nothing is
overlapped, dp is faster than data parallelism by the ratio beside it. AlexNet with less traffic, and ResNet-101 near
data parallelism, come out as there; Inception-v3 stays near it too.

Speed-ups of single networks are bars without labels in the paper; the ranges are those of its text. Traffic is what
the busiest rank sends in a step.

Seconds are of this machine, one run (incremental simulation: median of five), on one core, cost tables left out.
"""


def reproduce() -> Reproduction:
    """Compute the figures of the paper."""
    return Reproduction(
        "[FlexFlow19] Beyond data and model parallelism for deep neural networks",
        "layerwise reproduce flexflow",
        (("LeNet on 4 devices: MCMC and the optimum", tuple(lenet_figures())), *network_figures()),
        paragraphs(_REMARKS),
    )
