"""Does a plan obey the constraints that it says it was made under?"""

from collections.abc import Iterator, Sequence

from planner.errors import MismatchError
from planner.ir.dimension import Dimension
from planner.ir.graph import LayerGraph
from planner.plan.schema import ConstraintPart, Plan
from planner.space.constraints import Constraints


def refuse_disobeyed_constraints(plan: Plan, graphs: Sequence[LayerGraph]) -> None:
    """Check every split against the plan's own constraints; ties within a stage, as the search ties them.

    Args:
        plan: that fits its model.
        graphs: the layers of every stage.

    Raises:
        MismatchError: with the first layer that is split otherwise, and what to do.
        UsageError: a constraint means nothing.
    """
    for part in plan.search.constraints:
        for problem in _problems(plan, graphs, part):
            raise MismatchError(
                f"{problem}, but the plan says that it was made under --{part.kind} {part.text}. Plan again with this "
                "constraint, or take it out of $.search.constraints."
            )


def _problems(plan: Plan, graphs: Sequence[LayerGraph], part: ConstraintPart) -> Iterator[str]:
    constraints = Constraints.of(**{part.kind: [part.text]})
    for stage, graph in zip(plan.stages, graphs, strict=True):
        strategy = stage.strategy()
        for layer in graph.layers:
            if layer.id in strategy and not constraints.limits(layer).allows(strategy[layer.id], frozenset(Dimension)):
                yield f"layer {layer.id!r} is split as {strategy[layer.id]}"
        for first, *others in constraints.tied(graph):
            for other in others:
                if strategy[other].axes != strategy[first].axes:
                    yield f"layers {first!r} and {other!r} are split as {strategy[first]} and {strategy[other]}"
