"""Fork-join regions against their definition, and what branches can gain by FLOP against known networks."""

import itertools

import networkx as nx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from planner.frontend.lower import trace_layers
from planner.ir.branches import branch_bound, fork_join_regions, outermost
from planner.ir.count import layer_flop
from planner.ir.graph import Layer, LayerGraph, Parameter
from planner.ir.ops import Elementwise, Input, Linear
from planner.ir.split import LayerId
from planner.ir.tensor import TensorSpec
from planner.models.alexnet import alexnet
from planner.models.resnet import Bottleneck, imagenet_resnet
from planner.models.vgg import vgg

WIDE = TensorSpec((4, 8))


@st.composite
def graphs(draw: st.DrawFn) -> LayerGraph:
    """Up to two inputs and nine layers, each reading up to three earlier ones; some share a parameter."""
    num_inputs, count = draw(st.integers(1, 2)), draw(st.integers(1, 9))
    layers = [Layer(LayerId(f"in{i}"), Input(), (), WIDE) for i in range(num_inputs)]
    for i in range(count):
        read = draw(st.lists(st.sampled_from(layers), min_size=1, max_size=3, unique_by=lambda layer: layer.id))
        own = draw(st.sampled_from([f"w{i}", f"w{i}", f"w{i}", "shared"]))
        weight = Parameter(own, TensorSpec((8, 8)), 0, 1, role="weight")
        layers.append(Layer(LayerId(f"l{i}"), Elementwise("add"), tuple(x.id for x in read), WIDE, (weight,)))
    return LayerGraph("random", tuple(layers), 4)


def paths(graph: LayerGraph) -> list[tuple[int, ...]]:
    """Return every way from an input to a layer that nobody reads."""
    flow = nx.DiGraph([(i, j) for i, j, _ in graph.edges()])
    flow.add_nodes_from(range(len(graph.layers)))
    starts = [i for i, layer in enumerate(graph.layers) if not layer.inputs]
    ends = [i for i in flow if not flow.out_degree(i)]
    found = [(a,) for a in starts if a in ends]
    return found + [tuple(p) for a, b in itertools.product(starts, ends) for p in nx.all_simple_paths(flow, a, b)]


@given(graphs())
def test_regions_are_what_their_definition_says(graph: LayerGraph) -> None:
    """Every way through a branch passes fork and join, and stays in one branch between them."""
    every = paths(graph)
    for region in fork_join_regions(graph):
        of = {layer: number for number, branch in enumerate(region.branches) for layer in branch}
        assert len(region.branches) > 1
        for path in every:
            inside = [k for k, layer in enumerate(path) if layer in of]
            if not inside:
                continue
            first, last = inside[0], inside[-1]
            assert inside == list(range(first, last + 1))
            assert len({of[path[k]] for k in inside}) == 1
            before = path[first - 1] if first else None
            assert before == region.fork or (region.fork is None and graph.layers[path[0]].op.kind == "input")
            assert region.join == (path[last + 1] if last + 1 < len(path) else None)
        names = [{p.name for i in branch for p in graph.layers[i].params} for branch in region.branches]
        assert all(a.isdisjoint(b) for a, b in itertools.combinations(names, 2))
        others = {p.name for i, x in enumerate(graph.layers) if i not in of for p in x.params}
        assert all(own.isdisjoint(others) for own in names)


@given(graphs())
def test_every_fork_with_a_region_of_its_own_is_found(graph: LayerGraph) -> None:
    """Where two ways from a layer to the next one that all ways pass have nothing in common, there is a region."""
    every = paths(graph)
    found = {(region.fork, region.join) for region in fork_join_regions(graph)}
    flow = nx.DiGraph([(i, j) for i, j, _ in graph.edges()])
    for fork in flow:
        behind = [path[path.index(fork) + 1 :] for path in every if fork in path]
        common = [i for i in behind[0] if all(i in rest for rest in behind)] if behind else []
        if not common:
            continue
        join = common[0]
        ways = [set(rest[: rest.index(join)]) for rest in behind]
        inside = set().union(*ways)
        parts = list(nx.connected_components(flow.subgraph(inside).to_undirected()))
        reached_past = any(path.index(i) < path.index(fork) if fork in path else True
                           for path in every for i in inside.intersection(path))  # fmt: skip
        shared = any(p.name == "shared" for i in inside for p in graph.layers[i].params)
        if len(parts) > 1 and not reached_past and not shared:
            assert (fork, join) in found


def linear(name: str, read: str, width: int) -> Layer:
    weight = Parameter(f"{name}.weight", TensorSpec((width, 8)), 0, 1, role="weight")
    return Layer(LayerId(name), Linear(8, width), (LayerId(read),), TensorSpec((4, width)), (weight,))


def test_the_bound_of_a_nested_region_is_its_arithmetic() -> None:
    """A stem of 8, one branch of 16, and one of 24 in which 16 and 8 may run at the same time.

    In units of a layer of width 8, but for the stem, whose input needs no gradient: with enough parts
    1 + max(2, 2) of 1 + 2 + 3; with two parts the outer region still takes its half of 2 + 2 at least.
    """
    layers = [
        Layer(LayerId("x"), Input(), (), WIDE), linear("stem", "x", 8),
        linear("a", "stem", 16),
        Layer(LayerId("fork"), Elementwise("relu"), (LayerId("stem"),), WIDE), linear("b1", "fork", 16),
        linear("b2", "fork", 8),
        Layer(LayerId("inner"), Elementwise("add"), (LayerId("b1"), LayerId("b2")), TensorSpec((4, 16))),
        Layer(LayerId("outer"), Elementwise("add"), (LayerId("a"), LayerId("inner")), TensorSpec((4, 16))),
    ]  # fmt: skip
    graph = LayerGraph("nested", tuple(layers), 4)
    regions = fork_join_regions(graph)
    assert [r.branches for r in regions] == [((2,), (3, 4, 5, 6)), ((4,), (5,))]
    assert outermost(regions) == regions[:1]
    stem, wide, narrow = (layer_flop(graph)[i] for i in (1, 2, 5))
    assert wide == 2 * narrow
    assert branch_bound(graph, 8) == pytest.approx((stem + 2 * wide + narrow) / (stem + wide))
    assert branch_bound(graph, 1) == 1


class Beside(nn.Module):
    """Two networks on one image, or on an image each, with joined results."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        return torch.cat([self.first(x), self.second(x if y is None else y)], 1)


LARGE = {"alexnet": alexnet, "vgg16": lambda: vgg("d"), "resnet152": lambda: imagenet_resnet(Bottleneck, (3, 8, 36, 3))}


@pytest.mark.parametrize(("names", "expected"), [(("alexnet", "vgg16"), 1.05), (("vgg16", "resnet152"), 1.74)])
@pytest.mark.parametrize("num_inputs", [1, 2])
def test_bounds_of_networks_side_by_side_are_those_that_were_published(
    names: tuple[str, str], expected: float, num_inputs: int
) -> None:
    with torch.device("meta"):
        model = Beside(*(LARGE[name]() for name in names)).requires_grad_(False)
    graph = trace_layers(model, (torch.empty(2, 3, 224, 224, device="meta"),) * num_inputs).layers
    largest = outermost(fork_join_regions(graph))
    assert max(len(region.layers) for region in largest) >= 0.9 * len(graph.layers)
    assert branch_bound(graph, 2) == pytest.approx(expected, abs=0.006)


def test_towers_that_share_weights_are_one_branch() -> None:
    tower = nn.Linear(4, 4)
    model = Beside(tower, tower)
    graph = trace_layers(model, (torch.empty(2, 4), torch.empty(2, 4))).layers
    assert fork_join_regions(graph) == ()
