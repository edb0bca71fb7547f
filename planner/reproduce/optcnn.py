"""OptCNN [OptCNN18]: its plan of VGG-16, its communication, its speeds and its search times.

Machines are the shipped graphs of its cluster: ``4x4-p100-ib100``, and one node of it. Costs are those of
``planner.search.published.optcnn``; the compute in them is the data sheet's roofline, scaled so that one GPU reaches
the published rate of the network (``optcnn_cluster.compute_factor``). The paper measured each layer's configurations.
"""

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from planner.api import Machine, Planner, machine_of
from planner.errors import LayerwiseError
from planner.ir.dimension import Dimension
from planner.ir.split import Split
from planner.reproduce.figures import Figure, Reproduction, paragraphs
from planner.reproduce.optcnn_cluster import (
    BATCH,
    CLUSTER,
    EXAMPLE_BATCH,
    MODELS,
    PUBLISHED_EXAMPLE_MB,
    PUBLISHED_GIB,
    PUBLISHED_IMAGES_PER_S,
    STRATEGIES,
    compute_factor,
    first_linear_layer_bytes,
    planner_of,
    server_rates,
    slower,
    volumes,
)
from planner.search.auto import Search
from planner.search.elimination import solve_dp
from planner.search.problem import Choice, Costs, Problem
from planner.search.published.optcnn import OptcnnProblem, optcnn_problem, with_redistribution
from planner.units import GIB

NODE, MESH = "4xp100-nvlink", "gpu=2x2"
BLOCKS: Final = (2, 2, 3, 3, 3)
"""Convolutions of VGG-16 before each of its pools."""
NAMES: Final = {Dimension.SAMPLE: "n", Dimension.OUT_CHANNEL: "c", Dimension.HEIGHT: "h", Dimension.WIDTH: "w"}
SEARCHED: Final = {"LeNet-5": "lenet5", "AlexNet": "alexnet", "VGG-16": "vgg16", "Inception-v3": "inception-v3"}
PUBLISHED_SEARCH_S: Final = {"LeNet-5": 0.01, "AlexNet": 0.02, "VGG-16": 0.1, "Inception-v3": 0.4}
"""For 4 GPUs; its Table 3."""
BELOW: Final = {"one weird trick": (1.2, 2.5), "data and model parallelism": (1.3, 23.0)}
"""By what factor its strategies communicate less: least and most over the networks."""


@dataclass(frozen=True, slots=True)
class Solved:
    """A network searched as OptCNN does.

    Attributes:
        planner: of the network on the machine.
        search: all solvers on its table.
        found: OptCNN's problem.
        options: its optimum.
        tables_s, problem_s, solve_s: seconds that took: the cost table, OptCNN's costs from it, the elimination.
    """

    planner: Planner
    search: Search
    found: OptcnnProblem
    options: Choice
    tables_s: float
    problem_s: float
    solve_s: float

    @property
    def choice(self) -> Choice:
        """The position of every layer's split."""
        return with_redistribution(self.search.table, self.found, self.options)

    def splits(self, layer: int) -> tuple[Split, ...]:
        """Return the splits of a layer in the table."""
        space = self.search.table.space
        return space.splits[space.graph.layers[layer].id]

    def restricted(
        self,
        nodes: Sequence[Costs],
        edges: Mapping[tuple[int, int], Costs],
        allowed: Mapping[int, Collection[int]],
    ) -> float:
        """Return the least sum of costs of OptCNN's variables when some layers may take only these of their splits."""
        formulation = self.found.formulation
        keep = [np.arange(len(costs)) for costs in nodes]
        for j, positions in allowed.items():
            if self.found.has_costs(j):
                v, options = formulation.variable_of[j], formulation.options[j]
                keep[v] = np.array([o for o in keep[v] if options[o] in positions], dtype=np.int64)
        return solve_dp(
            Problem(
                tuple(costs[k] for costs, k in zip(nodes, keep, strict=True)),
                {(i, j): costs[np.ix_(keep[i], keep[j])] for (i, j), costs in edges.items()},
            )
        ).cost_s

    @property
    def num_layers(self) -> int:
        """How many layers OptCNN's problem has."""
        return sum(map(self.found.has_costs, range(len(self.search.table.space.graph.layers))))


def solved(network: str, machine: Machine, mesh: str | None = None) -> Solved:
    """Search a network as OptCNN does, with 32 images for each GPU."""
    planner = planner_of(network, BATCH * len(machine.graph.devices), machine, mesh)
    start_s = time.perf_counter()
    search = planner.search(planner.meshes()[0])
    tables_s = time.perf_counter()
    found = optcnn_problem(search.table, search.formulation)
    problem_s = time.perf_counter()
    options = found.solve()
    return Solved(
        planner, search, found, options, tables_s - start_s, problem_s - tables_s, time.perf_counter() - problem_s
    )  # fmt: skip


def fitted(network: str, cluster: str) -> Machine:
    """Return a machine on which one GPU reaches the published rate of a network."""
    return slower(machine_of(cluster), compute_factor(network))


# --- the plan of VGG-16


def vgg_names() -> dict[str, tuple[str, str]]:
    """Return the layers of VGG-16 that the paper speaks of, by our name: its name and its configuration."""
    found, number = {}, 0
    for block, count in enumerate(BLOCKS, 1):
        config = "n=4" if block < len(BLOCKS) else "h=2 w=2"
        for conv in range(1, count + 1):
            found[f"features.{number}"] = f"conv{block}_{conv}", config
            number += 2
        found[f"features.{number}"] = f"pool{block}", config
        number += 1
    for k, config in enumerate(("c=4", "c=4", "c=2")):
        found[f"classifier.{3 * k}"] = f"FC{k + 1}", config
    return found


def text(split: Split, sizes: Mapping[str, int]) -> str:
    """Return a split as the paper writes it: ``h=2 w=2``; ``1`` where one device does it all."""
    degrees: dict[str, int] = {}
    for axis, dimension in split.axes:
        if dimension in NAMES:
            degrees[NAMES[dimension]] = degrees.get(NAMES[dimension], 1) * sizes[axis]
    return (
        " ".join(f"{name}={degree}" for name, degree in sorted(degrees.items(), key=lambda d: "nhwc".index(d[0])))
        or "1"
    )


def plan_figures() -> Iterator[Figure]:
    """Yield the plan of VGG-16 on 4 GPUs, layer by layer, by OptCNN's cost; as remarks, by our simulated step."""
    run = solved("vgg16", fitted("vgg16", NODE), MESH)
    table = run.search.table
    sizes = {axis.name: axis.size for axis in table.space.mesh.axes}
    own, ours = table.strategy(run.choice), table.strategy(run.planner.best()[1].choice)
    for layer in table.space.graph.layers:
        if layer.id in vgg_names():
            name, paper = vgg_names()[layer.id]
            yield Figure(name, paper, text(own[layer.id], sizes), remark=f"auto: {text(ours[layer.id], sizes)}")
    for what, names in (
        ("of all its plan", set(vgg_names())),
        ("of h=2 w=2 in the last convolutions", {n for n, (_, c) in vgg_names().items() if c == "h=2 w=2"}),
        ("of c=2 in FC3", {n for n, (name, _) in vgg_names().items() if name == "FC3"}),
    ):
        yield Figure(f"cost {what}, over the optimum", None, _ratio(run, names, sizes), digits=4)


def _ratio(run: Solved, names: set[str], sizes: Mapping[str, int]) -> float:
    """Return OptCNN's cost over its optimum when some layers are split as published."""
    allowed = {
        j: {i for i, s in enumerate(run.splits(j)) if text(s, sizes) == vgg_names()[layer.id][1]}
        for j, layer in enumerate(run.search.table.space.graph.layers)
        if layer.id in names
    }
    problem = run.found.problem
    return run.restricted(problem.node_s, problem.edge_s, allowed) / problem.cost_s(run.options)


# --- communication and speed on 16 GPUs


def cluster_figures() -> Iterator[tuple[str, tuple[Figure, ...]]]:
    """Yield the parts on 16 GPUs: bytes, the factors between them, images per second."""
    bytes_of: dict[str, dict[str, float]] = {}
    volume: list[Figure] = []
    speed: list[Figure] = []
    for network in MODELS:
        try:
            machine = fitted(network, CLUSTER)
            run = solved(network, machine)
            counted = {name: float(found.total) for name, found in volumes(network).items()}
            rates = server_rates(network, machine)
        except LayerwiseError as error:
            volume.append(Figure(f"{network}, all", None, None, remark=str(error)))
            continue
        counted["layer-wise"] = run.found.volume_bytes(run.options)
        rates["layer-wise"] = run.search.table.space.graph.batch / run.found.problem.cost_s(run.options)
        bytes_of[network] = counted
        for strategy, paper, images in zip(
            STRATEGIES, PUBLISHED_GIB[network], PUBLISHED_IMAGES_PER_S[network], strict=True
        ):
            name = f"{network}, {strategy}"
            volume.append(Figure(name, paper * GIB, counted[strategy], "B", digits=3))
            speed.append(Figure(name, float(images), rates[strategy], "images/s", digits=3))
        volume.append(Figure(f"{network}, least with all GPUs", None, _least_bytes(run), "B"))
    yield "bytes of a step on 16 GPUs", tuple(volume)
    yield "how much less the layer-wise plan sends", tuple(_factors(bytes_of))
    yield "images per second on 16 GPUs", tuple(speed)


def _least_bytes(run: Solved) -> float:
    """Return the bytes of the strategy that moves least, every layer on as many devices as it can be."""
    allowed: dict[int, set[int]] = {}
    for j in range(len(run.search.table.space.graph.layers)):
        idle = [sum(d is Dimension.REPLICATE for d in split.dimensions) for split in run.splits(j)]
        allowed[j] = {i for i, count in enumerate(idle) if count == min(idle)}
    return run.restricted(run.found.node_bytes, run.found.edge_bytes, allowed)


def _factors(bytes_of: Mapping[str, Mapping[str, float]]) -> Iterator[Figure]:
    """Yield by how much less the plan communicates, least and most over networks."""
    if not bytes_of:
        return
    against = {"one weird trick": ("conv-data-fc-model",), "data and model parallelism": ("data", "model")}
    for what, strategies in against.items():
        ratios = [found[s] / found["layer-wise"] for found in bytes_of.values() for s in strategies]
        bars = [
            PUBLISHED_GIB[network][STRATEGIES.index(s)] / PUBLISHED_GIB[network][-1]
            for network in bytes_of for s in strategies
        ]  # fmt: skip
        for word, pick, printed in (("least", min, BELOW[what][0]), ("most", max, BELOW[what][1])):
            remark = f"its bars: {pick(bars):.3g}"
            yield Figure(f"against {what}, {word}", printed, pick(ratios), digits=2, remark=remark)


def example_figures() -> Iterator[Figure]:
    """Yield its example of a linear layer."""
    for name, paper, found in zip(
        ("data", "split channels"), PUBLISHED_EXAMPLE_MB, first_linear_layer_bytes(), strict=True
    ):
        yield Figure(
            f"FC1 of VGG-16 on 2 GPUs, batch {EXAMPLE_BATCH}, {name}", paper * 1e6, float(found), "B", digits=2
        )


# --- search times


def search_figures() -> Iterator[Figure]:
    """Yield the seconds of a search on 4 GPUs, and what part of them is the elimination."""
    machine = machine_of(NODE)
    for name, network in SEARCHED.items():
        paper = PUBLISHED_SEARCH_S[name]
        try:
            run = solved(network, machine, MESH)
        except LayerwiseError as error:
            yield Figure(f"{name}, search", paper, None, "s", digits=1, remark=str(error))
            continue
        whole_s = run.tables_s + run.problem_s + run.solve_s
        remark = f"our cost table {run.tables_s:.2g} s, its costs from it {run.problem_s:.2g} s"
        yield Figure(f"{name}, search", paper, whole_s, "s", digits=1, remark=remark)
        remark = f"{run.num_layers} layers, {run.solve_s / whole_s:.1%} of the search"
        yield Figure(f"{name}, elimination alone", None, run.solve_s, "s", digits=1, remark=remark)


_REMARKS: Final = """
Plan: a roofline knows no reason to cut height and width where samples are left: the compute is the same and halos
move. The paper's t_C is measured; those tables are not published. So its h=2 w=2 and c=2 do not come out here. Their
costs over the optimum say how near they are: by so much of the step the measured layers must have been quicker.
Everything else of the plan is the same: samples in the convolutions, channels in FC1 and FC2.

Softmax (1 device in the paper) is no layer of ours: the loss is behind the model's output.

Bytes: data parallelism and one weird trick are counted as the paper counts (2 x GPUs x weights; what split linear
layers fetch). Model parallelism is another one: gathering the whole input of every layer moves many times the bytes
that the paper shows. Its AlexNet is another one too: its data-parallel bytes are those of 70 to 75 million parameters.

The layer-wise plan here minimises seconds on NVLink of 80 GB/s inside a node and 100 Gbit/s between, and takes many
bytes inside a node for few between; the paper's plans send less in total, so its factors are not reproduced. The row
"least with all GPUs" is the plan of least bytes in which every layer uses all GPUs, whatever its time: it still
sends more than the paper's plans, which therefore leave GPUs idle in some layers.

Published bytes and images per second are read off bars, to about 1 %. Images per second are those of OptCNN's cost:
nothing overlapped, parameter servers. AlexNet under one weird trick is not explained by bytes: its published step is
77 ms longer than the compute of one GPU, the bytes of this strategy take 12 ms here. VGG-16 under data parallelism:
134 of the published 308 ms are synchronisation, parameter servers with nothing overlapped take 269 here.

How far its own estimates are off measured steps is not reproduced: nothing is measured here.

Search times are of this machine, one run, on one core, tracing left out. The paper's do not include its measurements
of t_C. Its depth-first search (5.6 s for LeNet-5, hours for the others) is not repeated.
"""


def reproduce() -> Reproduction:
    """Compute the figures of the paper."""
    return Reproduction(
        "[OptCNN18] Exploring hidden dimensions in parallelizing convolutional neural networks",
        "layerwise reproduce optcnn",
        (
            ("plan of VGG-16 on 4 GPUs of one node, 32 images each", tuple(plan_figures())),
            *cluster_figures(),
            ("its example of a linear layer", tuple(example_figures())),
            ("seconds of a search on 4 GPUs", tuple(search_figures())),
        ),
        paragraphs(_REMARKS),
    )
