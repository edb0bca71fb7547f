"""HyPar [HyPar19]: plans, communication, performance and energy of its ten networks."""

import functools
import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from planner.ir.graph import Layer
from planner.reproduce.figures import Figure, Reproduction, paragraphs
from planner.reproduce.hypar_platform import (
    ENERGY_BYTES_PER_MAC,
    TIME_BYTES_PER_MAC,
    WORD_BYTES,
    bytes_per_mac_of,
    gain,
)
from planner.reproduce.hypar_published import (
    BATCH,
    GMEAN_ENERGY,
    GMEAN_GB,
    GMEAN_PERFORMANCE,
    GMEAN_TORUS,
    NETWORKS,
    TRICK,
    Published,
)
from planner.reproduce.hypar_simulated import simulated
from planner.reproduce.traced import layer_graph
from planner.search.published.hypar import DP, MP, HyParPlan, Model, evaluate, hypar, uniform
from planner.search.published.networks import Network, chain, network_of, weights_of
from planner.units import GB

_CALIBRATED = "VGG-A"
_NOT_MODEL_PARALLEL = "no rule was found that gives these bars"
_BAR = "with the printed bar of Fig. 8 as its communication"

_REMARKS = """
Plans and totals follow from layer shapes and one rule (planner/search/published/hypar.py): no constant is fitted. Layer
shapes of the four small networks and of AlexNet are those that reproduce the totals; the paper's own table of them was
not to be had.

Model-parallel bars of Fig. 8 are not reproduced; ours are the rule's. For Figs. 6 and 7 the printed bars are taken as
what model parallelism exchanges.

Figs. 6 and 7, known constants: 84 GOPS, 1600 Mbit/s at the leaves, 4.6 pJ per multiply-add, 1280 pJ per word exchanged,
nothing overlaps (planner/reproduce/hypar_platform.py). The simulator of the paper is not public; utilisation, SRAM and
DRAM accesses of its units are unknown and left out.

Figs. 6 and 7, taken from {calibrated}: the same formulas with one number from the paper itself, its bar of HyPar for
{calibrated}: {time} bytes per thousand multiply-adds where the known constants give {known_time}, and {energy} instead
of {known_energy} for energy. The paper's machine computes {times} times as much per byte as the known constants say.

How many times the compute of its shapes each network's HyPar bar of Fig. 6 needs, against {calibrated}: {needed}. All
but Lenet-c and AlexNet follow the formula: these two would need more work than the layers that reproduce their
weights have.

Fig. 12: our simulator overlaps gradient reductions with backward, which favours data parallelism; at 84 GOPS that hides
nearly all of them in a VGG, so the second part takes accelerators that are {times} times as fast, as above. The paper's
bars of the torus were not read one by one; SCONV and Cifar-c fall below 1 there, of which ours has Cifar-c.

Fig. 13: the paper names layers, not networks; ours are VGG's conv5 (512 to 512 channels, 3 x 3, 14 x 14, no pool behind
it) and fc3 (4096 to 1000).
"""


@dataclass(frozen=True, slots=True)
class Computed:
    """One network, computed here; bytes are exchanged per step by all devices in both directions."""

    published: Published
    network: Network
    macs: float
    plan: HyParPlan

    def bytes_of(self, plan: HyParPlan) -> float:
        """Return the bytes that a plan exchanges."""
        return WORD_BYTES * plan.elements

    @property
    def data_bytes(self) -> float:
        """Of data parallelism."""
        return self.bytes_of(uniform(self.network, DP))

    @property
    def hypar_bytes(self) -> float:
        """Of HyPar's plan."""
        return self.bytes_of(self.plan)


@functools.cache
def computed() -> tuple[Computed, ...]:
    """Return the ten networks with our plans."""
    return tuple(_computed(published) for published in NETWORKS)


def _computed(published: Published) -> Computed:
    graph = layer_graph(published.model, BATCH)
    network, _ = network_of(graph)
    return Computed(published, network, sum(map(macs_of, graph.layers)), hypar(network))


def macs_of(layer: Layer) -> float:
    """Return the multiply-adds of a convolution or linear layer, forward: outputs times weights per output channel."""
    weights = weights_of(layer)
    channels = next((p.spec.shape[0] for p in layer.params if len(p.spec.shape) > 1), 1)
    return layer.output.numel * weights / channels


def plan_text(plan: HyParPlan) -> str:
    """Return decisions as the paper prints them, one group of digits a level."""
    return " ".join("".join(map(str, level)) for level in plan.levels)


def gmean(values: Sequence[float]) -> float:
    """Return the geometric mean."""
    return statistics.geometric_mean(values)


def rank_correlation(ours: Sequence[float], paper: Sequence[float]) -> float:
    """Return Spearman's coefficient; 1 where both order the networks alike."""
    ranks = [[sorted(values).index(v) for v in values] for values in (ours, paper)]
    return statistics.correlation(*ranks)


def reproduce() -> Reproduction:
    """Return the figures of HyPar beside ours; takes about half a minute."""
    fits = {name: _calibration(name) for name in ("performance", "energy")}
    return Reproduction(
        "[HyPar19] Song et al., HyPar: towards hybrid parallelism for deep learning accelerator array, HPCA 2019",
        "layerwise reproduce hypar",
        (
            ("Fig. 5: plans, levels H1 to H4, 0 data and 1 model parallelism", tuple(_plans())),
            ("Fig. 8: communication per step", tuple(_totals())),
            ("Fig. 8 with Table 2 as printed", tuple(_totals_of_table2())),
            ("Fig. 6: performance over data parallelism, known constants", _gains("performance", TIME_BYTES_PER_MAC)),
            (f"Fig. 6: compute to bandwidth taken from {_CALIBRATED}", _gains("performance", fits["performance"])),
            (
                "Fig. 7: energy efficiency over data parallelism, known constants",
                _gains("energy", ENERGY_BYTES_PER_MAC),
            ),
            (f"Fig. 7: compute to communication taken from {_CALIBRATED}", _gains("energy", fits["energy"])),
            ("Fig. 12: performance over data parallelism, simulator of this project", tuple(_simulated(1.0))),
            (f"Fig. 12: the same, accelerators {_faster(fits):.1f} times as fast", tuple(_simulated(_faster(fits)))),
            ("Fig. 13: over one weird trick, levels h, constants of VGG-A", tuple(_trick(fits))),
            ("Best plans of partly enumerated spaces", tuple(_explored(fits["performance"]))),
        ),
        _remarks(fits),
    )


def _plans() -> Iterator[Figure]:
    for found in computed():
        yield Figure(found.published.title, found.published.plan, plan_text(found.plan))


def _totals() -> Iterator[Figure]:
    columns: dict[str, list[float]] = {"data parallel": [], "HyPar": [], "model parallel": []}
    for found in computed():
        printed = found.published
        both = uniform(found.network, MP)
        for name, paper_gb, ours in (
            ("data parallel", printed.data_gb, found.data_bytes),
            ("HyPar", printed.hypar_gb, found.hypar_bytes),
            ("model parallel", printed.model_gb, found.bytes_of(both)),
        ):
            columns[name].append(ours)
            yield Figure(f"{printed.title}, {name}", paper_gb * GB, ours, "B", remark=_remark(printed.title, name))
    model, data, plan = (value * GB for value in GMEAN_GB)
    for name, value in (("data parallel", data), ("HyPar", plan), ("model parallel", model)):
        yield Figure(f"gmean, {name}", value, gmean(columns[name]), "B", remark=_remark("gmean", name))


def _remark(title: str, name: str) -> str:
    if name == "model parallel":
        return _NOT_MODEL_PARALLEL
    return {
        ("AlexNet", "data parallel"): "ours is 1.99496 GB, 344 weights short of what rounds to 2.00",
        ("VGG-B", "HyPar"): "a slip of the paper: its gmean of 0.318 needs 1.49 GB here, and not 1.47",
    }.get((title, name), "")


def _totals_of_table2() -> Iterator[Figure]:
    for found in computed():
        plan = hypar(found.network, model=Model.TABLE2)
        remark = "" if plan.levels == found.plan.levels else "the plan differs from Fig. 5 too"
        yield Figure(found.published.title, found.published.hypar_gb * GB, found.bytes_of(plan), "B", remark=remark)


def _calibration(kind: str) -> float:
    found = next(each for each in computed() if each.published.title == _CALIBRATED)
    _, gained = getattr(found.published, kind)
    return bytes_per_mac_of(gained, found.macs, found.data_bytes, found.hypar_bytes)


def _gains(kind: str, bytes_per_mac: float) -> tuple[Figure, ...]:
    figures, ours, paper = [], [], []
    for found in computed():
        bar, printed = getattr(found.published, kind)
        gained = gain(found.macs, found.data_bytes, found.hypar_bytes, bytes_per_mac)
        model = gain(found.macs, found.data_bytes, found.published.model_gb * GB, bytes_per_mac)
        ours.append((model, gained))
        paper.append(printed)
        figures.append(Figure(f"{found.published.title}, HyPar", printed, gained))
        figures.append(Figure(f"{found.published.title}, model parallel", bar, model))
    models, gains = zip(*ours, strict=True)
    means = GMEAN_PERFORMANCE if kind == "performance" else GMEAN_ENERGY
    figures.append(Figure("gmean, HyPar", means[1], gmean(gains)))
    figures.append(Figure("gmean, model parallel", means[0], gmean(models), remark=_BAR))
    figures.append(Figure("rank correlation with the paper, HyPar", None, rank_correlation(gains, paper)))
    return tuple(figures)


def _simulated(speed: float) -> Iterator[Figure]:
    for cluster, mean in (("16xhmc-htree", GMEAN_PERFORMANCE[1]), ("16xhmc-torus", GMEAN_TORUS)):
        gains = []
        for found in computed():
            gains.append(simulated(found.published.model, BATCH, cluster, speed).gain)
            is_tree = cluster.endswith("htree")
            paper = found.published.performance[1] if is_tree else None
            yield Figure(f"{found.published.title}, {cluster}", paper, gains[-1])
        digits = 3 if cluster.endswith("htree") else 2
        yield Figure(f"gmean, {cluster}", mean, gmean(gains), digits=digits)


def _trick(fits: dict[str, float]) -> Iterator[Figure]:
    conv_weights, fc_weights = 512 * 512 * 9, 4096 * 1000
    layers = {  # macs, (weights, outputs), what one weird trick does with it
        "conv5-b32": (32 * 14 * 14 * conv_weights, (conv_weights, 32 * 512 * 14 * 14), DP),
        "fc3-b4096": (4096 * fc_weights, (fc_weights, 4096 * 1000), MP),
    }
    ratios: dict[str, list[tuple[float, float]]] = {"performance": [], "energy": []}
    for name, (macs, layer, fixed) in layers.items():
        network = chain([layer])
        for i, kind in enumerate(("performance", "energy")):
            for count, paper in zip((2, 3, 4), TRICK[name][i], strict=True):
                sizes = (2,) * count
                base, plan = uniform(network, fixed, sizes), hypar(network, sizes)
                ours = gain(macs, WORD_BYTES * base.elements, WORD_BYTES * plan.elements, fits[kind])
                ratios[kind].append((paper, ours))
                yield Figure(f"{name}, h{count}, {kind}", paper, ours)
    for kind, printed in (("performance", 1.62), ("energy", 1.22)):
        yield Figure(f"gmean, {kind}", printed, gmean([ours for _, ours in ratios[kind]]))


def _explored(bytes_per_mac: float) -> Iterator[Figure]:
    """Yield the fastest of the plans that the paper enumerates around its own."""
    lenet, vgg = (next(c for c in computed() if c.published.title == t) for t in ("Lenet-c", "VGG-A"))

    def best(found: Computed, plans: Sequence[HyParPlan], text: Callable[[HyParPlan], str]) -> tuple[str, float]:
        speed = {
            text(p): gain(found.macs, found.data_bytes, found.bytes_of(p), bytes_per_mac)
            for p in plans
        }  # fmt: skip
        name = max(speed, key=lambda key: speed[key])
        return name, speed[name]

    _, second, third, _ = lenet.plan.levels
    decisions = list(itertools.product((DP, MP), repeat=4))
    plans = [evaluate(lenet.network, [first, second, third, last]) for first in decisions for last in decisions]
    name, speed = best(lenet, plans, lambda p: " ".join("".join(map(str, p.levels[h])) for h in (0, 3)))
    yield Figure("Lenet-c, fastest (H1, H4)", "0011 0011", name)
    yield Figure("Lenet-c, its performance", 3.05, speed)

    conv, fc = len(vgg.network.nodes) - 4, len(vgg.network.nodes) - 3

    def varied(convs: tuple[int, ...], fcs: tuple[int, ...]) -> HyParPlan:
        return evaluate(
            vgg.network,
            [
                tuple(c if n == conv else f if n == fc else d for n, d in enumerate(level))
                for level, c, f in zip(vgg.plan.levels, convs, fcs, strict=True)
            ],
        )

    def text(plan: HyParPlan) -> str:
        return " ".join("".join(str(level[n]) for level in plan.levels) for n in (conv, fc))

    name, speed = best(vgg, [varied(c, f) for c in decisions for f in decisions], text)
    yield Figure("VGG-A, fastest (conv5_2, fc1)", "1000 1111", name, remark="the paper's own plan is 0001 1111")
    yield Figure("VGG-A, its performance", 5.05, speed)


def _remarks(fits: dict[str, float]) -> tuple[str, ...]:
    needed = {c.published.title: _needed(c) for c in computed() if c.published.performance[1] != 1}
    values = {
        "calibrated": _CALIBRATED,
        "time": f"{1e3 * fits['performance']:.3g}",
        "known_time": f"{1e3 * TIME_BYTES_PER_MAC:.3g}",
        "energy": f"{1e3 * fits['energy']:.3g}",
        "known_energy": f"{1e3 * ENERGY_BYTES_PER_MAC:.3g}",
        "times": f"{_faster(fits):.1f}",
        "needed": ", ".join(f"{name} {value / fits['performance']:.2f}" for name, value in needed.items()),
    }
    return paragraphs(_REMARKS.format(**values))


def _faster(fits: dict[str, float]) -> float:
    return TIME_BYTES_PER_MAC / fits["performance"]


def _needed(found: Computed) -> float:
    return bytes_per_mac_of(found.published.performance[1], found.macs, found.data_bytes, found.hypar_bytes)
