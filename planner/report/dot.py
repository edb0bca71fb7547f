"""Layer graphs in the language of Graphviz: ``dot -Tsvg graph.dot -o graph.svg``."""

from collections.abc import Iterator, Mapping
from typing import Final

from planner.ir.dimension import SPATIAL_DIMENSIONS, Dimension
from planner.ir.graph import Layer, LayerGraph, is_boundary
from planner.ir.ops import Redistribute, describe
from planner.ir.split import LayerId, Split
from planner.plan.check import refuse_other_model
from planner.plan.schema import Plan
from planner.plan.stages import graphs_of

COLOURS: Final = {
    Dimension.SAMPLE: "#56b4e9", Dimension.OUT_CHANNEL: "#e69f00", Dimension.IN_CHANNEL: "#f0e442",
    Dimension.IN_CHANNEL_SCATTER: "#cc79a7", Dimension.REPLICATE: "#dddddd",
    **dict.fromkeys(SPATIAL_DIMENSIONS, "#009e73"),
}  # fmt: skip
"""Okabe and Ito's, which people with colour-blindness tell apart; labels say the same in words."""


def dot(graph: LayerGraph, plan: Plan | None = None) -> str:
    """Return a layer graph for Graphviz.

    Args:
        graph: of a model.
        plan: of it; then layers say how they are split and have a stripe for every axis, and stages are boxes.

    Raises:
        MismatchError: the plan is for another model.
    """
    splits, stages = _of_plan(graph, plan)
    lines = [
        f"digraph {_quoted(graph.name)} {{",
        f"  label={_quoted(_title(graph, plan))}; labelloc=t; rankdir=TB;",
        '  node [shape=box, style="filled", fillcolor="white", fontname="sans-serif"]; edge [fontname="sans-serif"];',
        *(f"  {line}" for line in _nodes(graph, splits, stages)),
    ]
    for layer in graph.layers:
        for producer in layer.inputs:
            shape = "x".join(map(str, graph[producer].output.shape)) or "scalar"
            lines.append(f"  {_quoted(producer)} -> {_quoted(layer.id)} [label={_quoted(shape)}];")
    return "\n".join([*lines, "}"]) + "\n"


def _of_plan(graph: LayerGraph, plan: Plan | None) -> tuple[Mapping[LayerId, Split], Mapping[LayerId, int]]:
    """Return the splits and the stages of layers; no stages where the plan has one."""
    if plan is None:
        return {}, {}
    if not plan.is_pipelined:
        refuse_other_model(plan, graph)
        return plan.strategy, {}
    graphs_of(plan, graph)
    splits: dict[LayerId, Split] = {}
    stages: dict[LayerId, int] = {}
    for s, stage in enumerate(plan.stages):
        for layer, split in stage.strategy().items():
            if layer in graph.index:
                splits.setdefault(layer, split)
                stages.setdefault(layer, s)
    return splits, stages


def _nodes(graph: LayerGraph, splits: Mapping[LayerId, Split], stages: Mapping[LayerId, int]) -> Iterator[str]:
    if not stages:
        yield from (_node(layer, splits.get(layer.id)) for layer in graph.layers)
        return
    for s in sorted(set(stages.values())):
        yield f"subgraph cluster_{s} {{ label={_quoted(f'stage {s}')};"
        yield from (f"  {_node(x, splits[x.id])}" for x in graph.layers if stages.get(x.id) == s)
        yield "}"
    yield from (_node(layer, None) for layer in graph.layers if layer.id not in stages)


def _node(layer: Layer, split: Split | None) -> str:
    operators = " + ".join(describe(op) for op in (layer.op, *(each.op for each in layer.absorbed)))
    texts = [str(layer.id), operators]
    attributes = []
    if split is not None:
        texts.append(str(split))
        colours = [COLOURS.get(dimension, "white") for dimension in split.dimensions] or ["white"]
        attributes.append(f"fillcolor={_quoted(':'.join(colours))}")
        if len(set(colours)) > 1:
            attributes.append('style="striped"')
    if is_boundary(layer.op) or isinstance(layer.op, Redistribute):
        attributes = [each for each in attributes if not each.startswith("style")]
        attributes.append("shape=ellipse")
    label = "\\n".join(_escaped(text) for text in texts)
    return f"{_quoted(layer.id)} [{', '.join([f'label={chr(34)}{label}{chr(34)}', *attributes])}];"


def _title(graph: LayerGraph, plan: Plan | None) -> str:
    if plan is None:
        return f"{graph.name}, batch {graph.batch}"
    return f"{graph.name}, batch {plan.batch}, planned for {plan.cluster.name}"


def _quoted(text: str) -> str:
    return f'"{_escaped(text)}"'


def _escaped(text: str) -> str:
    r"""Return a text for the inside of quotes; Graphviz knows ``\"``, and in labels ``\\``."""
    return text.replace("\\", "\\\\").replace('"', '\\"')
