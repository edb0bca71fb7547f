"""Element types of tensors between stages, against those that torch gives them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

from planner.frontend.lower import trace_layers
from planner.models.resnet import cifar_resnet
from planner.models.unet import unet
from runtime.types import Casting
from support.pipeline_ranks import Skips

NETS: list[tuple[Callable[[], nn.Module], tuple[int, ...]]] = [
    (Skips, (3, 6, 6)),
    (lambda: cifar_resnet(8, width=0.5), (3, 8, 8)),
    (lambda: unet(width=0.0625, num_classes=4), (1, 16, 16)),
]


@pytest.mark.parametrize(("build", "shape"), NETS)
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, None])
def test_types_are_those_of_a_real_pass(
    build: Callable[[], nn.Module], shape: tuple[int, ...], cast: torch.dtype | None
) -> None:
    model, x = build(), torch.randn(4, *shape)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    traced = trace_layers(model, (x,), "net")
    (name,) = [layer.id for layer in traced.layers.layers if layer.op.kind == "input"]
    casting = Casting(model, traced, {name: x.to("meta")})
    seen: dict[str, torch.dtype] = {}

    class Recording(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if isinstance(result, torch.Tensor):
                seen[n.name] = result.dtype
            return result

    with torch.autocast("cpu", cast or torch.bfloat16, enabled=cast is not None):
        found = casting.types("cpu", torch.float32)
        assert {n: bool((t == before[n]).all()) for n, t in model.state_dict().items()} == dict.fromkeys(before, True)
        Recording(fx.GraphModule(model, traced.graph)).run(x)
    layers = [layer for layer in traced.layers.layers if traced.nodes.get(layer.id)]
    assert len(layers) > 4
    assert {x.id: found.of(x.id, x.output) for x in layers} == {x.id: seen[traced.nodes[x.id][-1]] for x in layers}
