"""What is printed of pipelines elsewhere: GPipe's bubble [GPipe19], training with stale weights [ZhangAbdelrahman21].

Of the second: Table 5, times on two GPUs with one pair of registers (K = 1), and Table 9, the memory that pipelining
adds. The paper's model of memory is not printed where we could read it; ours is below.

The increase over a step that is not pipelined, of a batch with activations and their gradients A and weights W, of
which the first stage has A1 and W1: stage i of K + 1 holds 2 (K + 1 - i) + 1 batches, so K = 1 adds two batches'
activations, without their gradients: 2 A1 / 2. PipeDream's stash adds as many versions of the weights, 2 W1. A and W
are the table's; the base is A + W.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from planner.cost.cycles import hybrid_limit, hybrid_speedup
from planner.cost.pipeline import StageLink, StageTimes, simulate_pipeline
from planner.ir.graph import LayerGraph
from planner.ir.ops import Conv, Linear, Pool
from planner.ir.schedule import ScheduleKind, in_flight, staleness, weight_versions
from planner.reproduce.figures import Figure, paragraphs
from planner.reproduce.traced import layer_graph
from planner.units import MIB

GPIPE: Final = {
    1: (1.0, 1.13, 1.38),
    4: (1.07, 1.26, 1.72),
    32: (1.21, 1.84, 3.48),
}
"""Micro-batches; measured throughput of AmoebaNet-D on 2, 4 and 8 TPUs, over that on 2 with one micro-batch."""
PARTITIONS: Final = (2, 4, 8)


@dataclass(frozen=True, slots=True)
class Run:
    """A row of Table 5: seconds of 2 GPUs, and the printed speed-ups."""

    plain_s: float
    pipelined_s: float
    hybrid_s: float
    speed_up: float
    hybrid: float

    @property
    def share(self) -> float:
        """The share of iterations that the hybrid's time implies were pipelined."""
        return (self.plain_s - self.hybrid_s) / (self.plain_s - self.pipelined_s)

    @property
    def halved_s(self) -> float:
        """The time of a hybrid that pipelines half of the iterations, by the two measured times."""
        return self.plain_s / hybrid_speedup(1000, 500, self.plain_s / self.pipelined_s)


TABLE_5: Final = {
    "ResNet-56": Run(6745, 4090, 5429, 1.65, 1.24),
    "ResNet-110": Run(13150, 7570, 10452, 1.73, 1.26),
    "ResNet-224": Run(27231, 14998, 21245, 1.81, 1.28),
    "ResNet-362": Run(44814, 24640, 34814, 1.82, 1.29),
}


@dataclass(frozen=True, slots=True)
class Memory:
    """A row of Table 9.

    Attributes:
        activations, weights: MiB, the first for a sample.
        batch: samples.
        pipedream, stale: printed increase, %.
        network: of ``planner.models`` that it is; None where it is not known.
        last: name of the last layer with weights in front of the registers.
    """

    activations: float
    weights: float
    batch: int
    pipedream: int
    stale: int
    network: str | None = None
    last: str = ""

    @property
    def total(self) -> float:
        """Activations of a batch, and weights."""
        return self.activations * self.batch + self.weights


TABLE_9: Final = {
    "LeNet-5, MNIST": Memory(0.06, 0.24, 128, 109, 97, "lenet5", "features.3"),
    "AlexNet, CIFAR-10": Memory(0.88, 88.87, 128, 214, 37),
    "VGG-16, CIFAR-10": Memory(3.30, 58.16, 128, 124, 75),
    "ResNet-20, CIFAR-10": Memory(3.84, 1.03, 128, 61, 60, "resnet20", "layer1.2.conv2"),
    "VGG-16, ImageNet": Memory(218.59, 527.79, 32, 105, 77, "vgg16", "features.2"),
}
SIXTH: Final = "features.12"
"""The sixth convolution of VGG-16."""
PRINTED_COPIES: Final = 4
"""Further copies of all weights that explain every difference between the columns of Table 9."""
_FULL: Final = 8
"""Batches after which a pipeline of two stages is full."""
_TRUNCATED: Final = "printed without its last digits, not rounded"
_UNKNOWN: Final = "its network for CIFAR-10, by the weights neither ours nor one that we know, was not to be had"
_OTHER_CUT: Final = (
    "which modules the paper counts in front of its registers is not known; for VGG-16 the printed 77 % is that of a "
    "cut behind the sixth convolution"
)
_OTHER_STASH: Final = "the paper counts four more copies of all weights; a stash needs two more of the first stage's"
_ROUNDED: Final = "both columns are rounded to a percent"
_LIMIT: Final = "measured, and the limit of the bubble"
_REMARKS: Final = """
GPipe's throughput is measured, with recompute, transfers and stages that are not equal; ours is the limit that the
bubble alone leaves, M K / (M + K - 1), over that of two devices with one micro-batch. It bounds the growth with K.

Zhang & Abdelrahman, Table 5: two GPUs at K = 1, where the paper counts 2 K + 1 = 3 accelerators; its hybrids pipeline
about half of the iterations, and their limit is 1.5. The speed-up of a pipeline of two positions is 2 at most.

Table 9: the columns differ by four copies of all weights, one for each of the four stages; weights that are stashed
where they are used need two more versions of the first stage's only. Its activations are the results of all modules
and as many gradients, in MiB: ours are equal. The direction (PipeDream's stash costs more, most where weights are
large) comes out; the increase of the scheme itself comes out within a tenth for LeNet-5 and ResNet-20.
"""


def parts() -> tuple[tuple[str, tuple[Figure, ...]], ...]:
    """Return the headings and figures."""
    return (
        ("GPipe: bubble (K - 1) / (M + K - 1), simulated", tuple(_bubbles())),
        ("GPipe: throughput over two partitions with one micro-batch", tuple(_throughputs())),
        ("Stale weights: updates between forward and backward", tuple(_staleness())),
        ("Stale weights, Table 5: two GPUs", tuple(_times())),
        ("Stale weights, Table 9: memory added, as a share of activations and weights", tuple(_memory())),
    )


def remarks() -> tuple[str, ...]:
    """Return what is to say of all of them."""
    return paragraphs(_REMARKS)


# --- GPipe


def bubble(partitions: int, microbatches: int) -> float:
    """Return the share of idle time of the simulated schedule, for equal stages and free messages."""
    stages = [StageTimes(1 / microbatches, 1 / microbatches, 1 / microbatches)] * partitions
    links = [StageLink()] * (partitions - 1)
    return simulate_pipeline(ScheduleKind.GPIPE, stages, links, microbatches).bubble


def _bubbles() -> Iterator[Figure]:
    for k in PARTITIONS:
        for m in sorted({*GPIPE, 4 * k}):
            remark = "M = 4 K, from where on the paper calls it negligible" if m == 4 * k else ""
            yield Figure(f"K = {k}, M = {m}", (k - 1) / (m + k - 1), bubble(k, m), digits=6, remark=remark)


def throughput_limit(partitions: int, microbatches: int) -> float:
    """Return the throughput that the bubble alone leaves, over that of two partitions with one micro-batch."""
    return partitions * (1 - bubble(partitions, microbatches)) / (2 * (1 - bubble(2, 1)))


def _throughputs() -> Iterator[Figure]:
    for m, printed in GPIPE.items():
        for k, published in zip(PARTITIONS, printed, strict=True):
            yield Figure(f"K = {k}, M = {m}", published, throughput_limit(k, m), remark=_LIMIT)


# --- Table 5


def _staleness() -> Iterator[Figure]:
    for registers in (1, 2, 3, 4):
        found = staleness(ScheduleKind.STALE, registers + 1)
        for i, updates in enumerate(found, 1):
            yield Figure(f"K = {registers}, stage {i}: 2 (K + 1 - i)", 2 * (registers + 1 - i), updates)


def _times() -> Iterator[Figure]:
    for name, run in TABLE_5.items():
        for title, printed, ours in (
            ("pipelined", run.speed_up, run.plain_s / run.pipelined_s),
            ("hybrid", run.hybrid, run.plain_s / run.hybrid_s),
        ):
            cut = int(ours * 100) / 100 == printed != round(ours, 2)
            remark = _TRUNCATED if cut else ""
            yield Figure(f"{name}, {title}, from its seconds", printed, ours, remark=remark)
        yield Figure(f"{name}, share of iterations pipelined that they imply", None, run.share)
        yield Figure(f"{name}, hybrid, half of the iterations", run.hybrid_s, run.halved_s, "s", digits=5)
    yield Figure("limit of a hybrid, half pipelined, K = 1", None, hybrid_limit(1000, 500, 1))
    yield Figure("the same with two accelerators", None, hybrid_speedup(1000, 500, 2))


# --- Table 9


@dataclass(frozen=True, slots=True)
class Shares:
    """What is in front of the registers.

    Attributes:
        activations: share of the results of modules.
        weights: share of the parameters.
        module_mib: twice the results of all modules, for a sample: they and their gradients.
    """

    activations: float
    weights: float
    module_mib: float


def shares(network: str, last: str, *, element_wise: bool) -> Shares:
    """Return them of one of our networks; ``element_wise`` counts the results of ReLU, batch norm and dropout too."""
    graph = layer_graph(network, 1)
    results = _results(graph, element_wise=element_wise)
    weights = [sum(p.spec.numel for p in layer.params if p.trainable) for layer in graph.layers]
    end = next(i for i, layer in enumerate(graph.layers) if layer.id == last) + 1
    return Shares(sum(results[:end]) / sum(results), sum(weights[:end]) / sum(weights), 2 * 4 * sum(results) / MIB)


def shares_of(row: Memory) -> Shares:
    """Return them of a row whose network is known; the paper counts no ReLU of LeNet-5."""
    assert row.network is not None
    return shares(row.network, row.last, element_wise=row.network != "lenet5")


def _results(graph: LayerGraph, *, element_wise: bool) -> list[int]:
    """Return the elements of every module's result; VGG had no adaptive pool when they were counted."""
    return [
        layer.output.numel * (1 + len(layer.absorbed) * element_wise)
        if isinstance(layer.op, Conv | Linear | Pool)
        else 0
        for layer in graph.layers
    ]


def added(row: Memory, found: Shares) -> tuple[float, float]:
    """Return the increase of our model in %: with PipeDream's stash, and without."""
    batches = in_flight(ScheduleKind.STALE, 2, 2, _FULL)[0] - 1
    versions = weight_versions(ScheduleKind.PIPEDREAM, 2)[0] - 1
    activations = batches * found.activations * row.activations * row.batch / 2  # results without gradients
    weights = versions * found.weights * row.weights
    return 100 * (activations + weights) / row.total, 100 * activations / row.total


def _memory() -> Iterator[Figure]:
    for name, row in TABLE_9.items():
        copies = (row.pipedream - row.stale) / 100 * row.total / row.weights
        yield Figure(f"{name}: copies of the weights that the columns imply", None, copies)
        difference = 100 * PRINTED_COPIES * row.weights / row.total
        yield Figure(
            f"{name}: PipeDream over this, {PRINTED_COPIES} copies", row.pipedream - row.stale, difference, "%",
            digits=len(str(row.pipedream - row.stale)), remark=_ROUNDED,
        )  # fmt: skip
        if row.network is None:
            yield Figure(f"{name}: PipeDream", row.pipedream, None, "%", remark=_UNKNOWN)
            yield Figure(f"{name}: this", row.stale, None, "%", remark=_UNKNOWN)
            continue
        found = shares_of(row)
        pipedream, stale = added(row, found)
        yield Figure(f"{name}: PipeDream", row.pipedream, pipedream, "%", remark=_OTHER_STASH)
        yield Figure(f"{name}: this", row.stale, stale, "%", digits=2, remark=_OTHER_CUT)
        title = f"{name}: MiB of activations of a sample, with gradients"
        yield Figure(title, row.activations, found.module_mib, digits=len(f"{100 * row.activations:.0f}"))
    row = TABLE_9["VGG-16, ImageNet"]
    _, stale = added(row, shares("vgg16", SIXTH, element_wise=True))
    yield Figure("VGG-16, ImageNet: this, if cut behind the sixth convolution", row.stale, stale, "%", digits=2)
