"""The fixed strategies that people use without a planner.

Each is a rule that names, for every layer and every mesh axis, dimensions in order of preference. A layer takes the
first that are legal for it, outermost axis first, and replicates where none is.

================== =================================================================================================
data               samples, every layer [OptCNN18, FlexFlow19: "data parallelism"]
model, model-in    output channels; input channels, the partial sums all-reduced [HyPar19, SoyBean18]
conv-data-fc-model samples before the first linear layer, output units from there on [OWT14]
spatial            the dimensions of space, the largest of the network's input on the outermost axis, the others on the
                   next ones, in turn; another dimension of space where that one is illegal [Dryden19a]
sample-spatial     samples on the outer axes, space on the innermost one: the GPUs of a node share a sample, nodes have
                   samples of their own [Dryden19a, Oyama20]; a machine of one level is cut in two for it
channel-filter     channels of all activations [Dryden19b]: convolutions and linear layers on a way through the network
                   alternate between ``out_channel`` (stationary-Y: gather x, use own filters) and
                   ``in_channel_scatter`` (stationary-X: use own channels of x, reduce-scatter y); the other of the two
                   where one is illegal. x of a stationary-X layer lies as it is needed, so each pair of layers gathers
                   once and scatters once. All other layers treat every channel alone (``out_channel``)
fsdp               samples, with parameters, gradients and optimizer state in pieces [Rajbhandari20, Zhao23]
================== =================================================================================================

[Dryden19b] has a third form, stationary-W, with weights cut both ways over a grid of ranks; on two axes ``auto`` finds
it, this fixed strategy does not have it.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from planner.cost.sharding import ParameterSharding
from planner.cost.table import CostTable
from planner.errors import InfeasibleError, UnknownNameError
from planner.ir.dimension import SPATIAL_DIMENSIONS, Dimension
from planner.ir.graph import Layer, LayerGraph, tied_layers
from planner.ir.mesh import Mesh
from planner.ir.ops import Conv, ConvTranspose, Linear
from planner.ir.rules import has_statistics, partition
from planner.ir.split import LayerId, Split
from planner.search.elimination import solve_dp
from planner.search.formulate import Formulation
from planner.search.problem import Choice
from planner.space.constraints import is_chosen

Wishes = tuple[tuple[Dimension, ...], ...]
"""For every mesh axis, outermost first, dimensions in order of preference."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a layer is.

    Attributes:
        behind: it comes behind the first linear layer, in the order of the graph.
        depth: convolutions and linear layers on the longest way to it, itself included.
        space: the dimensions of space that the network has, those of its first image, largest first.
        num_axes: of the mesh.
    """

    behind: bool
    depth: int
    space: tuple[Dimension, ...]
    num_axes: int


@dataclass(frozen=True, slots=True)
class FixedRule:
    """A fixed strategy.

    Attributes:
        wishes: of a layer.
        dimensions: that it may use.
        sharding: of parameters that it stands for; None for whatever is asked.
        needs_two_axes: a machine of one level has to be cut in two for it.
    """

    wishes: Callable[[Layer, Place], Wishes]
    dimensions: frozenset[Dimension]
    sharding: ParameterSharding | None = None
    needs_two_axes: bool = False


def _everywhere(dimension: Dimension, sharding: ParameterSharding | None = None) -> FixedRule:
    return FixedRule(lambda _, place: ((dimension,),) * place.num_axes, frozenset({dimension}), sharding)


def _conv_data_fc_model(layer: Layer, place: Place) -> Wishes:
    is_linear = place.behind or isinstance(layer.op, Linear)
    return ((Dimension.OUT_CHANNEL if is_linear else Dimension.SAMPLE,),) * place.num_axes


def _spatial(_: Layer, place: Place) -> Wishes:
    return tuple(_turned(place.space, axis) for axis in range(place.num_axes))


def _sample_spatial(_: Layer, place: Place) -> Wishes:
    return (*((Dimension.SAMPLE,),) * (place.num_axes - 1), place.space)[: place.num_axes]


def _channel_filter(layer: Layer, place: Place) -> Wishes:
    forms = Dimension.OUT_CHANNEL, Dimension.IN_CHANNEL_SCATTER
    is_scatter = _has_channels(layer) and place.depth % 2 == 0
    return (forms[::-1] if is_scatter else forms,) * place.num_axes


def _turned(space: tuple[Dimension, ...], axis: int) -> tuple[Dimension, ...]:
    first = axis % len(space) if space else 0
    return space[first:] + space[:first]


def _has_channels(layer: Layer) -> bool:
    return isinstance(layer.op, Conv | ConvTranspose | Linear)


FIXED: Final[Mapping[str, FixedRule]] = {
    "data": _everywhere(Dimension.SAMPLE),
    "model": _everywhere(Dimension.OUT_CHANNEL),
    "model-in": _everywhere(Dimension.IN_CHANNEL),
    "conv-data-fc-model": FixedRule(_conv_data_fc_model, frozenset({Dimension.SAMPLE, Dimension.OUT_CHANNEL})),
    "spatial": FixedRule(_spatial, SPATIAL_DIMENSIONS),
    "sample-spatial": FixedRule(_sample_spatial, SPATIAL_DIMENSIONS | {Dimension.SAMPLE}, needs_two_axes=True),
    "channel-filter": FixedRule(
        _channel_filter, frozenset({Dimension.OUT_CHANNEL, Dimension.IN_CHANNEL_SCATTER})
    ),
    "fsdp": _everywhere(Dimension.SAMPLE, ParameterSharding.FULL),
}  # fmt: skip
"""Strategies by name."""
ALIASES: Final[Mapping[str, str]] = {"model-out": "model"}
"""Other names of strategies."""


@dataclass(frozen=True, slots=True)
class FixedStrategy:
    """A fixed strategy on a search space.

    Attributes:
        choice: the position of every layer's split.
        num_replaced: layers that replicate on some axis because all that the rule wants is illegal there.
    """

    choice: Choice
    num_replaced: int


def fixed_strategy(name: str, table: CostTable, formulation: Formulation) -> FixedStrategy:
    """Return a fixed strategy on a priced space; redistribute layers follow their neighbours at the least cost.

    Layers to which the space leaves nothing that the rule wants, not even ``replicate``, because the user pinned them,
    take what costs least.

    Raises:
        UnknownNameError: there is no such strategy.
        InfeasibleError: no layer at all can follow the rule, because the search space leaves its dimension out; or the
            costs are those of another sharding of parameters.
    """
    rule, space = _rule(name), table.space
    if rule.sharding not in {None, table.model.settings.parameter_sharding}:
        raise InfeasibleError(f"strategy {name!r} has its parameters sharded: {rule.sharding}")
    pins: dict[int, list[int]] = {}
    tied: dict[int, Split | None] = {}  # layers that take one split follow the first of them
    replaced = 0
    cache: dict[object, Split | None] = {}  # layers that look alike share their splits
    for i, wishes in _wishes(rule, space.graph, space.mesh).items():
        splits = space.splits[space.graph.layers[i].id]
        variable = formulation.variable_of[i]
        if variable not in tied:
            key = wishes, id(splits), formulation.options[i]
            if key not in cache:
                cache[key] = _closest(wishes, [splits[o] for o in formulation.options[i]])
            tied[variable] = cache[key]
        found = tied[variable]
        replaced += found is None or not _follows(found, wishes)
        pins[i] = list(formulation.options[i]) if found is None else [splits.index(found)]
    _refuse_no_follower(name, replaced, len(pins), space.graph, space.mesh)
    smaller, problem = formulation.pinned(pins)
    problem = type(problem)(problem.node_s, problem.edge_s)  # its memory is judged by the caller
    solution = solve_dp(problem)
    assert solution.choice is not None
    return FixedStrategy(smaller.layer_choice(solution.choice), replaced)


def fixed_splits(name: str, graph: LayerGraph, mesh: Mesh, *, own_statistics: bool = False) -> dict[LayerId, Split]:
    """Return the split of every layer whose split is chosen for itself, out of all legal ones.

    ``own_statistics`` as of ``planner.space.enumerate.enumerate_splits``.

    Raises:
        UnknownNameError: there is no such strategy.
        InfeasibleError: no layer at all can follow the rule.
    """
    rule = _rule(name)
    leader = tied_layers(graph)
    members: dict[int, list[Layer]] = {}
    for i, first in enumerate(leader):
        if is_chosen(graph.layers[i]):
            members.setdefault(first, []).append(graph.layers[i])
    cache: dict[object, Split] = {}
    found: dict[int, Split] = {}
    splits: dict[LayerId, Split] = {}
    replaced = 0
    wanted = _wishes(rule, graph, mesh)
    for i, wishes in wanted.items():
        if leader[i] not in found:
            own = members[leader[i]]
            parts = [partition(layer, graph.inputs_of(layer), mesh) for layer in own]
            behind = tuple(each.op for layer in own for each in layer.absorbed) if own_statistics else ()
            key = wishes, tuple(id(part) for part in parts), behind  # layers that look alike share their partition
            if key not in cache:
                legal = (s for s in _candidates(wishes, mesh) if all(part.is_legal(s) for part in parts))
                cache[key] = next(  # to replicate is always legal
                    split
                    for split in legal
                    if not own_statistics
                    or all(
                        has_statistics(layer, part.layouts(split).output)
                        for layer, part in zip(own, parts, strict=True)
                    )
                )
            found[leader[i]] = cache[key]
        splits[graph.layers[i].id] = found[leader[i]]
        replaced += not _follows(found[leader[i]], wishes)
    _refuse_no_follower(name, replaced, len(wanted), graph, mesh)
    return splits


def _rule(name: str) -> FixedRule:
    if name not in FIXED:
        raise UnknownNameError("strategy", name, FIXED)
    return FIXED[name]


def _wishes(rule: FixedRule, graph: LayerGraph, mesh: Mesh) -> dict[int, Wishes]:
    """Return what every layer wants whose split is chosen for itself, by position."""
    space, behind = _space(graph), False
    depth: dict[LayerId, int] = {}
    found = {}
    for i, layer in enumerate(graph.layers):
        depth[layer.id] = max((depth[p] for p in layer.inputs), default=0) + _has_channels(layer)
        if is_chosen(layer):
            found[i] = rule.wishes(layer, Place(behind, depth[layer.id], space, len(mesh.axes)))
            behind = behind or isinstance(layer.op, Linear)
    return found


def _space(graph: LayerGraph) -> tuple[Dimension, ...]:
    for layer in graph.layers:
        output = layer.output
        sizes = {d: n for d, n in zip(output.roles, output.shape, strict=True) if d is not None}
        if found := [d for d in sizes if d in SPATIAL_DIMENSIONS]:
            return tuple(sorted(found, key=lambda d: -sizes[d]))
    return ()


def _candidates(wishes: Wishes, mesh: Mesh) -> Iterator[Split]:
    """Yield the splits that a rule may take, best first; the last one replicates."""
    for dimensions in itertools.product(*((*wanted, Dimension.REPLICATE) for wanted in wishes)):
        yield Split.of(mesh, dimensions)


def _closest(wishes: Wishes, splits: Sequence[Split]) -> Split | None:
    """Return the best of these splits by a rule, outermost axis first; None where it wants none of them."""
    ranks = {split: rank for split in splits if math.inf not in (rank := _rank(split, wishes))}
    return min(ranks, key=ranks.__getitem__, default=None)


def _rank(split: Split, wishes: Wishes) -> tuple[float, ...]:
    """Return how far down the wishes of each axis its dimension is; infinite where it is none of them."""
    orders = [(*wanted, Dimension.REPLICATE) for wanted in wishes]
    return tuple(o.index(d) if d in o else math.inf for d, o in zip(split.dimensions, orders, strict=True))


def _follows(split: Split, wishes: Wishes) -> bool:
    return all(d in wanted for d, wanted in zip(split.dimensions, wishes, strict=True))


def _refuse_no_follower(name: str, replaced: int, count: int, graph: LayerGraph, mesh: Mesh) -> None:
    if replaced == count and mesh.axes:
        raise InfeasibleError(
            f"no layer can follow strategy {name!r} on {mesh.size} ranks: its dimension is forbidden by "
            f"--dims, or too small (the batch is {graph.batch})"
        )
