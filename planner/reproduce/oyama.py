"""CosmoFlow on volumes of 512^3 [Oyama20]: its size, and a step on 128 V100.

The machine is 32 nodes of 4 V100, NVLink inside, InfiniBand between, by data sheets. A sample's activations need at
least four of them, so a batch has one sample for each node.
"""

from typing import Final

from planner.api import Options, Origin, Planner, example_inputs, machine_of, prepare
from planner.frontend.source import load_model
from planner.ir.count import total_flop
from planner.ir.graph import LayerGraph
from planner.plan import Plan
from planner.reproduce.figures import Figure, Reproduction, paragraphs

MODEL, CLUSTER, BATCH = "cosmoflow-512", "32x4-v100-ib100", 32
PUBLISHED_PARAMETERS: Final = 9.44e6
PUBLISHED_ACTIVATION_BYTES: Final = 52.7 * 2**30
PUBLISHED_FLOP_PER_S: Final = 171e12


def planner_of(batch: int = BATCH) -> Planner:
    """Return the network on the machine; every rank reads its region of the batch, and Adam updates."""
    loaded = load_model(MODEL)
    options = Options(io="local", optimizer="adam")
    inputs = example_inputs(loaded.input_shapes, batch)
    return prepare(loaded.module, inputs, machine_of(CLUSTER), options, Origin(MODEL, MODEL))


def activation_bytes(graph: LayerGraph) -> int:
    """Return the bytes of a sample's input and of what convolutions, activations and pools make, with gradients."""
    counted = [layer for layer in graph.layers if layer.op.kind in {"input", "conv", "pool"}]
    return sum(2 * layer.output.nbytes * (1 + len(layer.absorbed)) for layer in counted) // graph.batch


def step_flop_per_s(graph: LayerGraph, plan: Plan) -> float:
    """Return the FLOP of a step over its predicted seconds."""
    return sum(total_flop(graph)) / plan.totals.step_s


def split_of(plan: Plan, layer: str) -> str:
    """Return what the mesh axes split of a layer, outermost first."""
    found = next(each for each in plan.stages[0].layers if each.id == layer)
    return ", ".join(str(dimension) for dimension in found.split.values())


def reproduce() -> Reproduction:
    """Compute size and step again; the search takes some seconds."""
    planner = planner_of()
    graph, plan = planner.traced.layers, planner.plan()
    size = (
        Figure("parameters", PUBLISHED_PARAMETERS, float(plan.model.num_params)),
        Figure("activations and their gradients of a sample", PUBLISHED_ACTIVATION_BYTES,
               float(activation_bytes(graph)), "B", 3, COUNTED),
    )  # fmt: skip
    step = (
        Figure("FLOP rate of 128 V100", PUBLISHED_FLOP_PER_S, step_flop_per_s(graph, plan), "FLOP/s", 3, ROOFLINE),
        Figure("a step", None, plan.totals.step_s, "s"),
        Figure("the largest GPU's memory", None, float(plan.totals.memory_bytes), "B"),
        Figure("splits of the first convolution", "sample, depth", split_of(plan, "0"), remark=SAME),
    )
    return Reproduction(
        "[Oyama20] The case for strong scaling in deep learning: training large 3D CNNs with hybrid parallelism",
        "layerwise reproduce oyama",
        (("CosmoFlow for 4 x 512 x 512 x 512", size), (f"A step of {BATCH} samples", step)),
        paragraphs(REMARKS),
    )


COUNTED = "theirs is ours, 48.7 GiB, with the input and its gradient once more: 52.7 GiB"
SAME = "a cube's three directions cost the same here"
ROOFLINE = (
    "ours is a data-sheet roofline, 70 % of 15.7 TFLOP/s; theirs, 1.34 TFLOP/s a GPU, was measured on 3D convolutions "
    "of 4 to 256 channels, with input from files"
)
REMARKS = """
The batch of the published rate is not known to us; here every node has a sample, the least that fits 16 GB.

Their speed-ups up to 2,048 GPUs and the tables of their performance model are not known to us, so nothing is held
against them.
"""
