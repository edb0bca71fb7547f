"""Small random networks of groups, and every partition of them."""

import itertools

import numpy as np

from planner.inference.evaluate import Evaluation, evaluate
from planner.inference.problem import FREE, Devices, GroupGraph, Layer, Objective, Problem


def random_problem(
    generator: np.random.Generator, num_groups: int, num_devices: int, objective: Objective, room: float
) -> Problem:
    """Return a random problem whose devices together have ``room`` times the memory of the network."""
    num_layers = int(generator.integers(1, min(num_groups, 4) + 1))
    layer_of = np.sort(
        np.concatenate([np.arange(num_layers), generator.integers(num_layers, size=num_groups - num_layers)])
    )
    pairs = [(a, b) for a in range(num_groups) for b in range(a + 1, num_groups) if generator.uniform() < 0.4]
    shared = generator.integers(0, 40, num_layers)
    graph = GroupGraph(
        "random",
        tuple(
            Layer(f"layer{i}", "conv", (("out_channel", int(num)),), int(size))
            for i, (num, size) in enumerate(zip(np.bincount(layer_of), shared, strict=True))
        ),
        layer_of,
        generator.integers(0, 100, num_groups).astype(float),
        generator.integers(1, 30, num_groups),
        generator.integers(1, 20, num_groups),
        np.array(pairs, np.int64).reshape(-1, 2),
        np.array([0]),
    )
    links = generator.integers(1, 30, (num_devices, num_devices)).astype(float)
    links = links + links.T
    np.fill_diagonal(links, np.inf)
    share = generator.dirichlet(np.full(num_devices, 5.0))
    memory = np.ceil(share * graph.total_bytes * room).astype(np.int64)
    speeds = generator.integers(10, 100, num_devices).astype(float)
    devices = Devices(tuple(f"d{p}" for p in range(num_devices)), speeds, memory, links)
    fixed = np.full(num_groups, FREE)
    if generator.uniform() < 0.3:
        fixed[0] = generator.integers(num_devices)
    return Problem(graph, devices, objective, fixed)


def best_of_all(problem: Problem) -> Evaluation | None:
    """Return the best valid partition by trying all; None if none is valid."""
    every = itertools.product(range(len(problem.devices)), repeat=len(problem.graph))
    rated = (evaluate(problem, np.array(parts)) for parts in every)
    return min((e for e in rated if e.fits), key=lambda e: e.value(problem.objective), default=None)


def by_definition(problem: Problem, parts: list[int]) -> tuple[float, float, list[int]]:
    """Return seconds per inference, bytes between devices and bytes on each, in loops over single groups."""
    graph, devices = problem.graph, problem.devices
    num = len(devices)
    times = [sum(graph.flop[v] for v in range(len(graph)) if parts[v] == p) / devices.flop_per_s[p] for p in range(num)]
    sent = {(int(v), parts[w]) for v, w in graph.edges if parts[v] != parts[w]}
    for p, q in itertools.combinations(range(num), 2):
        between = sum(graph.output_bytes[v] for v, there in sent if {parts[v], there} == {p, q})
        times.append(between / devices.link_bytes_per_s[p, q])
    used = [
        sum(int(graph.memory_bytes[v]) for v in range(len(graph)) if parts[v] == p)
        + sum(
            graph.layers[i].shared_bytes for i in {int(graph.layer_of[v]) for v in range(len(graph)) if parts[v] == p}
        )
        for p in range(num)
    ]
    return max(times), float(sum(graph.output_bytes[v] for v, _ in sent)), used
