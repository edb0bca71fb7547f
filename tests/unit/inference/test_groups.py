"""Networks in groups of neurons: the graphs of the paper, weights in their place, what cannot be cut."""

import numpy as np
import pytest
import torch
from torch import nn

from planner.errors import UsageError
from planner.frontend.lower import trace_layers
from planner.inference.groups import neuron_groups
from planner.inference.problem import GroupGraph
from planner.ir.count import total_flop
from planner.ir.graph import LayerGraph
from planner.reproduce.dn2pciot import EDGES, PUBLISHED, lenet
from planner.reproduce.traced import layer_graph


def layers_of(module: nn.Module, *shape: int) -> LayerGraph:
    return trace_layers(module, (torch.empty((1, *shape), device="meta"),), "net", training=False).layers


def readers(graph: GroupGraph, group: int) -> list[int]:
    return graph.readers[group].tolist()


@pytest.mark.parametrize("side", [1, 2])
def test_the_graphs_of_the_paper(side: int) -> None:
    graph, (sizes, words) = lenet(side), PUBLISHED[side]
    assert tuple(np.bincount(graph.layer_of)) == sizes
    assert [int(size) for size in graph.memory_bytes[np.cumsum(sizes) - 1] // 8] == list(words)
    assert len(graph.edges) == EDGES[side] * (2 if side == 1 else 1)
    assert readers(graph, 0) == ([256] if side == 2 else [1024])  # the corner is in one window
    if side == 2:  # as in their file: input vertex 34 and its nine readers
        assert readers(graph, 34) == [256, 257, 258, 270, 271, 272, 284, 285, 286]
        assert (graph.flop.sum(), graph.total_bytes) == (353_820, 69_968 * 8)


@pytest.mark.parametrize("side", [None, 1, 2, 3])
def test_groups_hold_all_of_the_network_once(side: int | None) -> None:
    layers = layer_graph("lenet5", 1)
    graph = neuron_groups(layers, side, 4)
    elements = sum(layer.output.numel for layer in layers.layers if layer.op.kind not in {"reshape", "output"})
    assert graph.output_bytes.sum() == 4 * elements
    assert graph.total_bytes == 4 * (elements + layers.num_params)
    assert graph.flop.sum() >= total_flop(layers)[0]
    assert graph.flop.sum() == pytest.approx(neuron_groups(layers, None, 4).flop.sum(), rel=1e-12)


def test_branches_read_their_own_positions_and_a_mean_reads_all() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.fc = nn.Linear(3, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x) + x
            found: torch.Tensor = self.fc(y.mean((2, 3)))
            return found

    graph = neuron_groups(layers_of(Block(), 3, 4, 4), 2)
    image, conv, add, mean, _ = (np.flatnonzero(graph.layer_of == i) for i in range(len(graph.layers)))
    assert np.bincount(graph.layer_of).tolist() == [4, 4, 4, 1, 1]
    for i in range(4):
        assert readers(graph, image[i]) == [*conv, add[i]]  # padding reaches into every quarter
        assert readers(graph, conv[i]) == [add[i]]
        assert readers(graph, add[i]) == [*mean]
    assert graph.layers[1].shared_bytes == 4 * (81 + 3)


def test_several_samples_and_too_many_groups_are_refused() -> None:
    with pytest.raises(UsageError, match="one sample"):
        neuron_groups(layer_graph("lenet5", 2), 1)
    with pytest.raises(UsageError, match="--group 1; take larger groups"):
        neuron_groups(layers_of(nn.Conv2d(1, 1, 1), 1, 150, 150), 1)
