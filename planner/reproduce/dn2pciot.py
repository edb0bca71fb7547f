"""DN2PCIoT [Oliveira19]: LeNet-5 on microcontrollers, against METIS, greedy methods and whole layers."""

import functools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Final

import numpy as np

from planner.devices.library import cluster
from planner.inference.groups import neuron_groups
from planner.inference.problem import Devices, GroupGraph, Objective, Problem
from planner.inference.search import METIS, Found, Limits, partition
from planner.reproduce.figures import Figure, Reproduction, paragraphs
from planner.reproduce.traced import layer_graph

WORD_BYTES: Final = 8
SETUPS: Final = (
    "2xstm32f469-wlan2", "4xsamg55-wlan4", "11xstm32l433-wlan11", "56xstm32l151-wlan56", "63xstm32l151-wlan63",
)  # fmt: skip
"""The devices of the paper with their parts of the wireless LAN, equal ones."""
SHARED_WORDS: Final = (0, 156, 12, 1516, 32, 0, 0, 0)
FLOP: Final = {
    2: (0, 1224, 144, 3060, 96, 204, 960, 840),
    1: (0, 306, 36, 765, 96, 51, 240, 168),
}
"""Of one group of each layer, by the side of its squares, as their graphs have it."""
PUBLISHED: Final = {  # vertices, and words per vertex, of their graphs
    2: ((256, 196, 49, 25, 25, 30, 21, 2), (4, 24, 24, 64, 16, 1608, 488, 430)),
    1: ((1024, 784, 196, 100, 25, 120, 84, 10), (1, 6, 6, 16, 16, 402, 122, 86)),
}
EDGES: Final = {2: 3632, 1: 18_452}
METIS_RATES: Final = {"2xstm32f469-wlan2": 765.931, "4xsamg55-wlan4": 697.545, "11xstm32l433-wlan11": 115.799}
"""For LeNet 2:1, of the partitions ``initial-partitionings/metis-604v-*p-ir-free`` in the repository of their code, by
the paper's formula; none are there for 56 and 63 devices."""
GAIN: Final = 1.38
"""The abstract: up to 38 % more inferences per second than METIS."""
LIMITS: Final = Limits(kicks=20, time_limit_s=15.0)
"""Of the search for one set-up."""
_NAMES: Final = ("input", "C1", "S2", "C3", "S4", "C5", "F6", "output")
_REMARKS: Final = """
The paper's tables were not to be had: "paper" is what its abstract and the data of its code say (the repository
lmcad-unicamp/MDN2PCIoT, whose C++ this is not a copy of). The rates of "METIS, their partition" are those of the
partitions in it, by the formula of the paper. "METIS" of ours is the best valid partition of 90 settings: weights by
FLOP or by bytes, k-way for cut or volume or recursive, three imbalances, five seeds (pip install 'layerwise[metis]').

Where METIS has no valid partition, memory is why: it does not know the weights that a layer shares.

FLOP and shared weights of a group are their graphs'. They differ from a LeNet-5 of today: C3 reads some of the channels
and counts a quarter of its products, subsampling is trained, C5 counts one of 16 input maps, inputs count nothing.

Words have 8 bytes and a pair of devices its part of 150 Mbit/s: so the numbers of the set-ups fit the data sheets.

The search is random and ends after 20 kicks or 15 s for each set-up: on a slow or busy machine it finds less.
"""


def reproduce() -> Reproduction:
    """Return what DN2PCIoT publishes beside ours."""
    return Reproduction(
        "[Oliveira19] de Oliveira & Borin, Partitioning convolutional neural networks to maximize the inference rate "
        "on constrained IoT devices, Future Internet 11(10):209",
        "layerwise reproduce dn2pciot",
        (
            ("The graphs", tuple(_graphs())),
            ("Inferences per second, LeNet 2:1, inputs anywhere", tuple(_rates())),
            ("Communication per inference, LeNet 2:1, inputs anywhere", tuple(_communication())),
        ),
        paragraphs(_REMARKS),
    )


@functools.cache
def lenet(side: int) -> GroupGraph:
    """Return LeNet-5 in groups of ``side`` x ``side`` neurons as the paper has it.

    Structure and memory are those of the shipped LeNet-5; FLOP and shared weights are the paper's, which differ: its C3
    reads some of the channels only, its subsampling is trained, and its C5 counts one of 16 input maps. S4 is 1:1 in
    both graphs.
    """
    layers = layer_graph("lenet5", 1)
    last_pool = next(layer.id for layer in reversed(layers.layers) if layer.op.kind == "pool")
    ours = neuron_groups(layers, side, WORD_BYTES, {last_pool: 1})
    named = zip(ours.layers, _NAMES, SHARED_WORDS, strict=True)
    return replace(
        ours,
        name=f"LeNet {side}:1",
        layers=tuple(replace(layer, id=name, shared_bytes=WORD_BYTES * words) for layer, name, words in named),
        flop=np.array(FLOP[side], np.float64)[ours.layer_of],
    )


@functools.cache
def devices(setup: str) -> Devices:
    """Return the devices of a set-up."""
    return Devices.of(cluster(setup))


@functools.cache
def solved(setup: str, side: int, objective: Objective) -> Found:
    """Return the best partition found, with what simpler methods find."""
    return partition(Problem.of(lenet(side), devices(setup), objective), LIMITS)


def _graphs() -> Iterator[Figure]:
    for side, (sizes, words) in PUBLISHED.items():
        graph = lenet(side)
        first = np.searchsorted(graph.layer_of, np.arange(len(graph.layers)))
        ours = np.bincount(graph.layer_of)
        yield Figure(f"LeNet {side}:1, groups of each layer", _listed(sizes), _listed(ours))
        yield Figure(
            f"LeNet {side}:1, words of one group", _listed(words), _listed(graph.memory_bytes[first] // WORD_BYTES)
        )
        remark = "the header of their file says half of what its lines hold" if side == 1 else ""
        yield Figure(f"LeNet {side}:1, edges", EDGES[side], len(graph.edges), digits=5, remark=remark)


def _listed(values: Iterable[int]) -> str:
    return " ".join(map(str, values))


def _rates() -> Iterator[Figure]:
    unit = "inferences/s"
    for setup in SETUPS:
        found = solved(setup, 2, Objective.INFERENCE_RATE)
        yield Figure(f"{setup}, METIS, their partition", METIS_RATES.get(setup), None, unit, remark="not published")
        best = METIS_RATES.get(setup, 0.0)
        for each in found.baselines:
            rate = each.evaluation.rate_per_s if each.evaluation and each.evaluation.fits else None
            remark = "no valid partition" if rate is None else ""
            yield Figure(f"{setup}, {each.name}", None, rate, unit, remark=remark)
            best = max(best, rate or 0.0) if each.name == METIS else best
        rate = found.evaluation.rate_per_s
        yield Figure(f"{setup}, moves and swaps", None, rate, unit)
        if best:
            yield Figure(f"{setup}, over the better METIS", GAIN, rate / best, remark="the paper's is its best set-up")


def _communication() -> Iterator[Figure]:
    for setup in SETUPS:
        found = solved(setup, 2, Objective.COMMUNICATION)
        for each in found.baselines:
            if each.evaluation and each.evaluation.fits:
                yield Figure(f"{setup}, {each.name}", None, each.evaluation.communication_bytes, "B")
        yield Figure(f"{setup}, moves and swaps", None, found.evaluation.communication_bytes, "B")
