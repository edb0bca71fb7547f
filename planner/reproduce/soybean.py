"""SoyBean [SoyBean18] and its successor Tofu: conversions, recursive cuts, communication against data parallelism."""

import functools
from collections.abc import Iterator
from typing import Final

from planner.cost.accounting import received_elements
from planner.ir.layout import BALANCED, Layout, Placement, Whole
from planner.ir.mesh import Mesh
from planner.reproduce.figures import Figure, Reproduction, paragraphs
from planner.reproduce.traced import layer_graph
from planner.search.published.hypar import hypar
from planner.search.published.networks import Network, network_of
from planner.search.published.soybean import (
    ALL_FORMS,
    MATCHED,
    Form,
    Forms,
    SoyBeanPlan,
    Tiling,
    conversion,
    factors,
    soybean,
)

BATCH: Final = 256
DEVICES: Final = 8
NETWORKS: Final = {"AlexNet": "alexnet", "VGG-16": "vgg16"}
_WORD_BYTES: Final = 4
_DATA: Final = ((Form.SAMPLE, Form.SAMPLE),)
_HYPAR: Final = (*_DATA, (Form.IN, Form.IN))
_LETTERS: Final = {Form.SAMPLE: "S", Form.OUT: "O", Form.IN: "I", Form.WHOLE: "R"}
_PUBLISHED: Final = {  # from, to, elements moved between two halves, as a multiple of the tensor
    (Tiling.CUT0, Tiling.CUT0): 0.0,
    (Tiling.CUT0, Tiling.CUT1): 0.5,
    (Tiling.CUT0, Tiling.REPLICATED): 1.0,
    (Tiling.REPLICATED, Tiling.CUT0): 0.0,
    (Tiling.REPLICATED, Tiling.REPLICATED): 0.0,
    (Tiling.REDUCED, Tiling.CUT0): 1.0,
    (Tiling.REDUCED, Tiling.REPLICATED): 2.0,
}
_NAMES: Final = {
    Tiling.CUT0: "cut", Tiling.CUT1: "cut elsewhere", Tiling.REPLICATED: "replicated", Tiling.REDUCED: "reduced",
}  # fmt: skip
_REMARKS: Final = """
The conversion table is that of the author's code; ours in it is counted from the layouts of this project's plans, copy
by copy, and the solver's formula agrees with both.

Plans: one letter per layer with weights, S samples, O output channels, I input channels.

The paper's 1.5 to 4 is how much faster its steps are than data-parallel ones, over AlexNet and VGG on up to 8 GPUs; its
figures one by one, its batches and its AlexNet were not to be had. Communication falls by more than a step can speed
up, as compute does not fall with it.

A result counts behind its pools; the loss and the model's input move nothing. planner/search/published/soybean.py lists
every reading of ours.
"""


def reproduce() -> Reproduction:
    """Return what SoyBean publishes beside ours."""
    return Reproduction(
        "[SoyBean18] Wang et al., Unifying data, model and hybrid parallelism via tensor tiling, arXiv:1805.04170",
        "layerwise reproduce soybean",
        (
            ("Conversions between two halves, as a multiple of the tensor", tuple(_conversions())),
            (f"Recursive cuts, {DEVICES} devices, batch {BATCH}, fp32: one group of each cut", tuple(_cuts())),
            ("Data parallelism over recursive cuts: communication (the paper: 1.5 to 4 times the speed)",
             tuple(_gains())),
        ),
        paragraphs(_REMARKS),
    )  # fmt: skip


def counted(source: Tiling, target: Tiling) -> float:
    """Return what two ranks receive to convert a tensor, by the layouts of this project, as a multiple of it."""
    mesh, shape = Mesh.of(half=2), (8, 6)
    have, need = (Layout(shape, mesh, (_placement(t),), (BALANCED,) * 2) for t in (source, target))
    return received_elements(have, need) / 48


def _placement(tiling: Tiling) -> Placement:
    if tiling is Tiling.REPLICATED:
        return Whole.EQUAL
    return Whole.PARTIAL if tiling is Tiling.REDUCED else int(tiling)


def _conversions() -> Iterator[Figure]:
    for (source, target), published in _PUBLISHED.items():
        remark = "" if conversion(source, target) == counted(source, target) else "the solver's formula differs"
        yield Figure(f"{_NAMES[source]} to {_NAMES[target]}", published, counted(source, target), remark=remark)


@functools.cache
def _network(name: str) -> Network:
    network, _ = network_of(layer_graph(NETWORKS[name], BATCH))
    return network


@functools.cache
def _plan(name: str, forms: tuple[Forms, ...], divide: bool = True) -> SoyBeanPlan:
    return soybean(_network(name), factors(DEVICES), forms, divide=divide)


def _cuts() -> Iterator[Figure]:
    for name in NETWORKS:
        plan = _plan(name, MATCHED)
        for i, (cut, elements) in enumerate(zip(plan.cuts, plan.by_cut, strict=True), start=1):
            letters = "".join(_LETTERS[forward] for forward, _ in cut)
            yield Figure(f"{name}, cut {i}: {letters}", None, _WORD_BYTES * elements, "B")
        yield Figure(f"{name}, all devices, c1 + 2 (c2 + 2 c3)", None, _WORD_BYTES * plan.elements, "B")


def _gains() -> Iterator[Figure]:
    for name in NETWORKS:
        data = _plan(name, _DATA)
        yield Figure(f"{name}, data parallel", None, _WORD_BYTES * data.elements, "B")
        for title, plan in (
            ("data parallel over SoyBean", _plan(name, MATCHED)),
            ("data parallel over SoyBean, backward in another form than forward allowed", _plan(name, ALL_FORMS)),
            ("data parallel over cuts by samples and input channels alone", _plan(name, _HYPAR, divide=False)),
        ):
            yield Figure(f"{name}, {title}", None, data.elements / plan.elements)
        elements = hypar(_network(name), factors(DEVICES)).elements
        yield Figure(f"{name}, data parallel over HyPar", None, data.elements / elements)
