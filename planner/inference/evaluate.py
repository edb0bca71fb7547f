"""What a partition achieves, computed from nothing: the definition that the search's increments are held against."""

from dataclasses import dataclass

import numpy as np

from planner.inference.problem import Assignment, Floats, GroupGraph, Integers, Objective, Problem


@dataclass(frozen=True)
class Evaluation:
    """The figures of a partition.

    Attributes:
        rate_per_s: inferences per second; infinite where nothing is computed or sent.
        communication_bytes: between devices, of one inference.
        load_flop: float64[P], of one inference.
        traffic_bytes: float64[P, P], symmetric: both directions together.
        used_bytes: int64[P].
        fits: every device has the memory, and fixed groups are where they must be.
    """

    rate_per_s: float
    communication_bytes: float
    load_flop: Floats
    traffic_bytes: Floats
    used_bytes: Integers
    fits: bool

    def value(self, objective: Objective) -> float:
        """Return what is minimised: seconds per inference, or bytes."""
        return 1 / self.rate_per_s if objective is Objective.INFERENCE_RATE else self.communication_bytes


def evaluate(problem: Problem, assignment: Assignment) -> Evaluation:
    """Return the figures of a partition, valid or not.

    The formulas of [Oliveira19], as their code has them::

        rate          = min(min_p speed[p] / sum of flop in p, min_pq bandwidth[p, q] / traffic[p, q])
        communication = sum over groups v and other devices q with a reader of v: bytes(v)
        memory[p]     = sum of memory in p + sum over layers with a group in p: shared bytes

    A group's output is sent once to each device, however many readers it has there.
    """
    graph, devices = problem.graph, problem.devices
    load = np.bincount(assignment, graph.flop, len(devices)).astype(np.float64)
    traffic = traffic_of(graph, assignment, len(devices))
    used = used_of(graph, assignment, len(devices))
    period = max((load / devices.flop_per_s).max(), (traffic / devices.link_bytes_per_s).max())
    is_where_fixed = (problem.fixed < 0) | (problem.fixed == assignment)
    return Evaluation(
        rate_per_s=float(1 / period) if period > 0 else float("inf"),
        communication_bytes=float(traffic.sum() / 2),
        load_flop=load,
        traffic_bytes=traffic,
        used_bytes=used,
        fits=bool((used <= devices.memory_bytes).all() and is_where_fixed.all()),
    )


def traffic_of(graph: GroupGraph, assignment: Assignment, num_devices: int) -> Floats:
    """Return float64[P, P]: the bytes between each pair, both directions together."""
    producers, readers = graph.edges.T
    sent = np.unique(np.stack([producers, assignment[readers]]), axis=1)
    sent = sent[:, assignment[sent[0]] != sent[1]]
    one_way = np.zeros((num_devices, num_devices))
    np.add.at(one_way, (assignment[sent[0]], sent[1]), graph.output_bytes[sent[0]])
    return one_way + one_way.T


def used_of(graph: GroupGraph, assignment: Assignment, num_devices: int) -> Integers:
    """Return int64[P]: the bytes on each device, weights that a layer shares once."""
    present = np.zeros((num_devices, len(graph.layers)), bool)
    present[assignment, graph.layer_of] = True
    used = np.zeros(num_devices, np.int64)
    np.add.at(used, assignment, graph.memory_bytes)
    return np.asarray(used + present @ graph.shared_bytes, np.int64)
