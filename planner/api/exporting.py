"""Plans and layer graphs for other tools: Graphviz, and torch's DTensor."""

from torch import nn

from planner.frontend.lower import trace_layers
from planner.frontend.source import load_model
from planner.frontend.trace import empty_inputs
from planner.ir.graph import LayerGraph
from planner.plan.placements import Placements, placements_of
from planner.plan.schema import Plan
from planner.plan.stages import microbatch_inputs
from planner.report.dot import dot


def layer_graph(plan: Plan, model: nn.Module | None = None) -> LayerGraph:
    """Return the layers of a plan's model, for the samples that a stage works on at once.

    Args:
        plan: of the model.
        model: its module; built from the source that the plan names, which runs its code, if left out.

    Raises:
        UsageError: the source cannot be loaded.
        TraceError: the model cannot be traced.
    """
    name = plan.model.name
    if model is None:
        loaded = load_model(plan.model.source, dict(plan.model.arguments))
        model, name = loaded.module, loaded.name
    inputs, keywords = empty_inputs(microbatch_inputs(plan))
    return trace_layers(model, inputs, name, keywords=keywords).layers


def export_placements(plan: Plan, model: nn.Module | None = None) -> Placements:
    """Return where a plan's parameters lie, as torch's ``DeviceMesh`` and placements of DTensor.

    Args:
        plan: of one stage, or a pipeline.
        model: as of ``layer_graph``.

    Raises:
        MismatchError: the model is not the plan's; others as ``layer_graph``.
    """
    return placements_of(plan, layer_graph(plan, model))


def export_dot(plan: Plan, model: nn.Module | None = None) -> str:
    """Return a plan's layers as a graph for Graphviz, coloured by their splits; arguments as ``export_placements``."""
    return dot(layer_graph(plan, model), plan)
