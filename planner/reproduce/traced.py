"""Shipped networks as layer graphs."""

import functools

from planner.ir.graph import LayerGraph


@functools.cache
def layer_graph(name: str, batch: int) -> LayerGraph:
    """Return the layers of a network of ``planner.models`` for a global batch."""
    from planner.api import example_inputs
    from planner.frontend.lower import trace_layers
    from planner.frontend.source import load_model

    model = load_model(name, {})
    return trace_layers(model.module, example_inputs(model.input_shapes, batch), name).layers
