"""METIS's partitions of the same network [Karypis98]: what a general partitioner makes of it."""

import contextlib
import importlib
import importlib.util
import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np

from planner.errors import UsageError
from planner.inference.problem import FREE, Assignment, Floats, GroupGraph, Integers, Problem

_SEEDS: Final = 5
_MOST: Final = 2.0**29
IMBALANCES: Final = (30, 100, 500)
"""Thousandths by which a part may be heavier than its share (``ufactor``): METIS's default for k-way, 10 %, 50 %."""


def is_installed() -> bool:
    """Return whether ``pymetis`` can be imported."""
    return importlib.util.find_spec("pymetis") is not None


def metis_partitions(problem: Problem) -> Iterator[Assignment]:
    """Yield what METIS finds with every sensible setting, whether memory allows it or not.

    Groups weigh their FLOP or their bytes, parts in proportion to what the devices have of it, edges the bytes that
    they stand for; k-way for the least cut or the least volume, or recursive bisection. METIS knows neither the weights
    that a layer shares nor that an output is sent once to each device. Where groups are fixed, they are put there
    afterwards.

    Raises:
        UsageError: pymetis is not installed.
    """
    if not is_installed():
        raise UsageError("METIS needs pymetis: pip install 'layerwise[metis]'")
    pymetis = importlib.import_module("pymetis")
    starts, neighbours, weights = _symmetric(problem.graph)
    devices, num = problem.devices, len(problem.devices)
    loads = (
        (_whole(problem.graph.flop), devices.flop_per_s / devices.flop_per_s.sum()),
        (_whole(problem.graph.memory_bytes), devices.memory_bytes / devices.memory_bytes.sum()),
    )
    methods = ((False, pymetis.ObjType.CUT), (False, pymetis.ObjType.VOL), (True, pymetis.ObjType.CUT))
    for (load, shares), (is_recursive, objective), imbalance, seed in itertools.product(
        loads, methods, IMBALANCES, range(_SEEDS)
    ):
        options = pymetis.Options()
        options.seed, options.ufactor, options.objtype = seed, imbalance, objective
        with _silence():
            _, parts = pymetis.part_graph(
                num, pymetis.CSRAdjacency(starts, neighbours), vweights=load, eweights=weights, tpwgts=shares.tolist(),
                recursive=is_recursive, options=options,
            )  # fmt: skip
        yield np.where(problem.fixed != FREE, problem.fixed, np.asarray(parts, np.int64))


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep what METIS prints where parts are many off stdout, on which a partition may be written."""
    sys.stdout.flush()
    kept = os.dup(1)
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _symmetric(graph: GroupGraph) -> tuple[Integers, Integers, Integers]:
    """Return the network as METIS takes it: CSR of both directions, and the bytes of every edge."""
    both = np.concatenate([graph.edges, graph.edges[:, ::-1]])
    weights = np.tile(graph.output_bytes[graph.edges[:, 0]], 2)
    order = np.lexsort((both[:, 1], both[:, 0]))
    starts = np.searchsorted(both[order, 0], np.arange(len(graph) + 1))
    return starts.astype(np.int64), both[order, 1], np.maximum(_whole(weights[order]), 1)


def _whole(weights: Floats | Integers) -> Integers:
    """Return weights as METIS takes them: whole numbers whose sum fits 32 bits."""
    scale = min(_MOST / max(float(weights.sum()), 1.0), 1.0)
    return np.asarray(np.ceil(weights * scale), np.int64)
