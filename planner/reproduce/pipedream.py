"""PipeDream [PipeDream19]: its partitioner on its own profiles, by the printed formula and as released.

With it what other papers print of pipelines (``pipelines.py``): GPipe's bubble, the speed-ups and the memory of
training with stale weights.
"""

import functools
from collections.abc import Iterator
from typing import Final

from planner.devices.files import profiles_path
from planner.profile.pipedream import read_pipedream
from planner.reproduce import pipelines
from planner.reproduce.figures import Figure, Reproduction, paragraphs
from planner.search.published.pipedream import Level, Partition, SyncTerm, partition
from planner.search.published.pipedream_states import States, chain_of, states_of

ETHERNET: Final = 10e9 / 8
"""Bytes/s of 10 Gb/s, between the servers of cluster A."""
CLUSTERS: Final = {
    "4 x 4, 10 Gb/s": (Level(4, 12e9), Level(4, ETHERNET)),
    "2 x 8, 25 Gb/s": (Level(8, 25e9), Level(2, 25e9 / 8)),
}
"""The paper's clusters A and B, innermost level first; PCIe and NVLink inside are assumed."""
NETWORKS: Final = {"VGG-16": "vgg16", "AlexNet": "alexnet", "ResNet-50": "resnet50"}
PUBLISHED: Final = {
    ("VGG-16", "4 x 4, 10 Gb/s"): ("15-1", 5.28),
    ("VGG-16", "2 x 8, 25 Gb/s"): ("15-1", 2.98),
    ("AlexNet", "4 x 4, 10 Gb/s"): ("15-1", 4.92),
    ("AlexNet", "2 x 8, 25 Gb/s"): ("15-1", 2.04),
    ("ResNet-50", "4 x 4, 10 Gb/s"): ("16", 1.0),
    ("ResNet-50", "2 x 8, 25 Gb/s"): ("16", 1.0),
}
"""Configuration, and measured speed-up of an epoch over data parallelism."""
RELEASED: Final = {
    ("VGG-16", 4): ("3-1", 2.84),
    ("VGG-16", 16): ("13-2-1", 2.66),
    ("AlexNet", 4): ("3-1", 5.17),
    ("ResNet-50", 4): ("2-2", 1.13),
    ("ResNet-50", 16): ("8-5-3", 1.07),
}
"""What the released planner answers on these profiles for one level at 10 Gb/s: measured by running it."""
_OTHER_CUT: Final = (
    "not reproduced level by level, only on one level of 16: the profile is of another GPU than the paper's V100, and "
    "of 128 images for VGG-16, where the paper has 64"
)
_NOT_DATA: Final = (
    "not reproduced: by the formula the reduction of 102 MB of weights over 10 Gb/s takes 123 ms of a mini-batch on "
    "four servers and 153 ms on one level of 16, against 28 ms of compute on 16 devices"
)
_REMARKS: Final = """
The profiles are those of profiles/pipedream, in the order of their edges. Configurations are replicas of each stage.

The released planner differs from the formula: T = 1/m (compute + 4 (m - 1) w / (B m)), and transfers divided by the
replicas of the stage. With that, all of its answers come out, with the speed-up over data parallelism by its own
model.

ResNet-50: with everything that crosses a cut the formula gives 8-8 on one level of 16 at 10 Gb/s; if only the layer
in front of the cut counts, as on a chain, 13-2-1. Other partitions tie with both, because a transfer is slowest.
The paper's claim that it stays data parallel holds on cluster B, where the reduction is hidden, and not on cluster A.

The paper's speed-ups are measured, of epochs on V100. Those of the formula are several times larger where data
parallelism is slow: it charges a mini-batch of m devices with 2 (m - 1) / m of the weights, although a reduction serves
all m mini-batches at once; divided by m as in the released planner, AlexNet's 19 on cluster A becomes 3.
"""


def reproduce() -> Reproduction:
    """Return PipeDream's configurations and speed-ups beside ours, and what others print of pipelines."""
    return Reproduction(
        "[PipeDream19] Narayanan et al., PipeDream: generalized pipeline parallelism for DNN training, SOSP 2019",
        "layerwise reproduce pipedream",
        (
            ("The printed formula on one level of devices", tuple(_flat())),
            ("The printed formula, level by level, on the paper's clusters", tuple(_by_level())),
            ("The released planner, one level at 10 Gb/s", tuple(_released())),
            *pipelines.parts(),
        ),
        (*paragraphs(_REMARKS), *pipelines.remarks()),
    )


@functools.cache
def states(name: str, *, chain: bool = False) -> States:
    """Return where a network of ``NETWORKS`` may be cut; on a chain only the layer in front of a cut sends."""
    layers = read_pipedream(profiles_path() / "pipedream" / f"{NETWORKS[name]}.txt").layers
    return chain_of(layers) if chain else states_of(layers)


@functools.cache
def flat(name: str, devices: int, gigabits_per_s: float, sync: SyncTerm, *, chain: bool = False) -> Partition:
    """Return the partition on one level."""
    return partition(states(name, chain=chain), [Level(devices, gigabits_per_s * 1e9 / 8)], sync)


@functools.cache
def by_level(name: str, cluster: str) -> Partition:
    """Return the partition by the printed formula on one of ``CLUSTERS``."""
    return partition(states(name), CLUSTERS[cluster])


def _flat() -> Iterator[Figure]:
    printed = SyncTerm.PRINTED
    for name, devices, rate, published in (
        ("VGG-16", 4, 10, None),
        ("VGG-16", 16, 10, "15-1"),
        ("VGG-16", 16, 25, "15-1"),
        ("AlexNet", 4, 10, None),
        ("AlexNet", 16, 10, "15-1"),
        ("ResNet-50", 4, 10, None),
        ("ResNet-50", 16, 10, "16"),
    ):
        found = flat(name, devices, rate, printed)
        title = f"{name}, {devices} at {rate} Gb/s"
        remark = _NOT_DATA if published not in {None, found.text} else ""
        yield Figure(title, published, found.text, remark=remark)
        yield Figure(f"{title}, slowest stage", None, found.bottleneck_s, "s")
        yield Figure(f"{title}, mini-batches in flight", None, found.in_flight)
    chain = flat("ResNet-50", 16, 10, printed, chain=True)
    yield Figure("ResNet-50, 16 at 10 Gb/s, as a chain", "16", chain.text, remark=_NOT_DATA)
    yield Figure("ResNet-50, 16 at 10 Gb/s, as a chain, slowest stage", None, chain.bottleneck_s, "s")


def _by_level() -> Iterator[Figure]:
    for (name, cluster), (configuration, speed_up) in PUBLISHED.items():
        found = by_level(name, cluster)
        remark = "" if found.text == configuration else _NOT_DATA if configuration == "16" else _OTHER_CUT
        yield Figure(f"{name}, {cluster}", configuration, found.text, remark=remark)
        yield Figure(f"{name}, {cluster}, slowest stage", None, found.bottleneck_s, "s")
        yield Figure(
            f"{name}, {cluster}, over data parallelism", speed_up, found.speed_up,
            remark="measured, beside the formula's; see below",
        )  # fmt: skip


def _released() -> Iterator[Figure]:
    for (name, devices), (configuration, speed_up) in RELEASED.items():
        found = flat(name, devices, 10, SyncTerm.RELEASED)
        yield Figure(f"{name}, {devices}", configuration, found.text)
        yield Figure(f"{name}, {devices}, over data parallelism", speed_up, found.speed_up)
