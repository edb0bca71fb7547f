"""The fixed strategies that people use without a planner."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from planner.cost.table import CostTable
from planner.errors import InfeasibleError, UnknownNameError
from planner.ir.dimension import Dimension
from planner.ir.graph import Layer, is_boundary
from planner.ir.ops import Linear, Redistribute
from planner.ir.split import Split
from planner.search.elimination import solve_dp
from planner.search.formulate import Formulation
from planner.search.problem import Choice

_Rule = Callable[[Layer, bool], Dimension]
"""From a layer, and whether it comes behind the first linear layer, to the wanted dimension."""


def _conv_data_fc_model(layer: Layer, behind: bool) -> Dimension:
    """One weird trick [OWT14]: samples in the convolutional part, output units in the linear layers."""
    return Dimension.OUT_CHANNEL if behind or isinstance(layer.op, Linear) else Dimension.SAMPLE


FIXED: Final[Mapping[str, _Rule]] = {
    "data": lambda layer, behind: Dimension.SAMPLE,  # noqa: ARG005  # every rule takes both
    "model": lambda layer, behind: Dimension.OUT_CHANNEL,  # noqa: ARG005
    "model-in": lambda layer, behind: Dimension.IN_CHANNEL,  # noqa: ARG005
    "conv-data-fc-model": _conv_data_fc_model,
}
"""Strategies by name."""
ALIASES: Final[Mapping[str, str]] = {"model-out": "model"}
"""Other names of strategies."""


@dataclass(frozen=True, slots=True)
class FixedStrategy:
    """A fixed strategy on a search space.

    Attributes:
        choice: the position of every layer's split.
        num_replaced: layers that replicate on some axis because the rule's dimension is illegal there.
    """

    choice: Choice
    num_replaced: int


def fixed_strategy(name: str, table: CostTable, formulation: Formulation) -> FixedStrategy:
    """Return a fixed strategy; redistribute layers follow their neighbours at the least cost.

    Raises:
        UnknownNameError: there is no such strategy.
        InfeasibleError: no layer at all can follow the rule, because the search space leaves its dimension out.
    """
    if name not in FIXED:
        raise UnknownNameError("strategy", name, FIXED)
    pins: dict[int, list[int]] = {}
    tied: dict[int, Split] = {}  # layers that share a parameter follow the first of them
    replaced = 0
    behind = False
    for i, layer in enumerate(table.space.graph.layers):
        splits = table.space.splits[layer.id]
        if isinstance(layer.op, Redistribute) or is_boundary(layer.op):
            continue
        wanted = FIXED[name](layer, behind)
        behind = behind or isinstance(layer.op, Linear)
        variable = formulation.variable_of[i]
        common = tuple(splits[o] for o in formulation.options[i])
        found = tied.setdefault(variable, _closest(wanted, common))
        replaced += any(d is not wanted for d in found.dimensions)
        pins[i] = [splits.index(found)]
    if replaced == len(pins) and table.space.mesh.axes:
        raise InfeasibleError(
            f"no layer can follow strategy {name!r} on {table.space.mesh.size} ranks: its dimension is forbidden by "
            f"--dims, or too small (the batch is {table.space.graph.batch})"
        )
    smaller, problem = formulation.pinned(pins)
    problem = type(problem)(problem.node_s, problem.edge_s)  # its memory is judged by the caller
    solution = solve_dp(problem)
    assert solution.choice is not None
    return FixedStrategy(smaller.layer_choice(solution.choice), replaced)


def _closest(wanted: Dimension, splits: tuple[Split, ...]) -> Split:
    """Return the split with the wanted dimension on as many axes as are legal, outermost first."""
    allowed = [s for s in splits if set(s.dimensions) <= {wanted, Dimension.REPLICATE}]
    return max(allowed, key=lambda s: [d is wanted for d in s.dimensions])
