"""The traced stages of a model, one behind the other, are the model bit for bit: outputs, gradients, buffers."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import fx, nn

from planner.frontend.lower import TracedModel, trace_layers
from planner.frontend.stages import stage_models
from planner.ir.ops import Input, Receive, Send
from planner.ir.stages import legal_cuts, stage_graphs
from support.networks import NETWORKS

MAX_STAGES = 4


def tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | tuple | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from tensors(each)


def trace(name: str, module: nn.Module) -> TracedModel:
    inputs, keywords = NETWORKS[name].example(NETWORKS[name].batches[0])
    return trace_layers(module, inputs, name, keywords=keywords)


def in_stages(stages: tuple[TracedModel, ...], module: nn.Module, passed: dict[str, torch.Tensor]) -> Any:
    """Run the stages one behind the other."""
    held: dict[str, torch.Tensor] = dict(passed)
    for stage in stages:
        layers = stage.layers.layers
        bound = fx.GraphModule(module, stage.graph)
        output = bound(*[held[x.id] for x in layers if isinstance(x.op, Input | Receive)])
        sent = [x.inputs[0] for x in layers if isinstance(x.op, Send)]
        if sent:
            held = dict(zip(sent, output, strict=True))
    return output


def observed(module: nn.Module, output: Any) -> list[torch.Tensor]:
    """Return outputs, buffers and the gradients of a sum over all outputs."""
    found = list(tensors(output))
    carrying = [x for x in found if x.requires_grad]
    if carrying:
        torch.autograd.backward(carrying, [torch.ones_like(x) for x in carrying])
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    return [*(x.detach() for x in found), *gradients, *module.buffers()]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("name", NETWORKS)
def test_stages_one_behind_the_other_are_the_model(name: str) -> None:
    network = NETWORKS[name]
    traced = trace(name, network.module())
    cuts = legal_cuts(traced.layers)
    count = min(MAX_STAGES, len(cuts) + 1)
    picked = sorted(np.random.default_rng(len(name)).choice(len(cuts), count - 1, replace=False))
    stages = stage_models(traced, stage_graphs(traced.layers, [cuts[i] for i in picked]))
    names = [str(node.target) for node in traced.graph.find_nodes(op="placeholder")]

    eager, cut = network.module(), network.module()
    inputs, keywords = network.example(network.batches[0])
    torch.manual_seed(3)
    wanted = observed(eager, fx.GraphModule(eager, traced.graph)(*inputs, **keywords))
    inputs, keywords = network.example(network.batches[0])  # anew: some networks write into them
    torch.manual_seed(3)
    found = observed(cut, in_stages(stages, cut, dict(zip(names, inputs, strict=False)) | keywords))
    assert len(found) == len(wanted)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
