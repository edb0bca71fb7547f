"""Which element types tensors have that this rank does not compute, under autocast too.

A rank must know what it receives from another stage before it is there, and what it is to hold nothing of where other
ranks run a branch. Where all is float32, the plan says it. Autocast decides operator by operator, and a model of
another type may compute some of it in float32 all the same (attention does); so the traced model is run once on fake
tensors, which have shapes and types and no values, by the same rules of torch. Where torch cannot (an operator of the
user's own that needs values), what the plan knows as float32 is sent in autocast's type, or the model's, and rounded to
it.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from planner.frontend.lower import TracedModel
from planner.frontend.trace import on_meta
from planner.ir.split import LayerId
from planner.ir.tensor import TensorSpec

_log = logging.getLogger(__name__)

Known = Mapping[LayerId, torch.dtype]


@dataclass(frozen=True)
class ElementTypes:
    """Element types for one way of running a model.

    Attributes:
        default: of what has the model's own type: that which it has now, or autocast's.
        own: the model's type when it was traced; what is float32 there counts as of this type too.
        known: of layers, as torch's rules gave them; empty where the plan says all.
    """

    default: torch.dtype
    own: torch.dtype = torch.float32
    known: Known = field(default_factory=dict, hash=False, compare=False)

    def of(self, layer: LayerId, spec: TensorSpec) -> torch.dtype:
        """Return that of a layer's tensor."""
        traced: torch.dtype = getattr(torch, spec.dtype.value)
        return self.known.get(layer, self.default if traced in {torch.float32, self.own} else traced)


class Casting:
    """What autocast does to a model's tensors, found when it is first asked for.

    Args:
        model: the whole one; nothing of it is kept but shapes.
        traced: the same.
        inputs: on the meta device, by the names of its inputs.

    Attributes:
        own: the model's element type.
    """

    def __init__(self, model: nn.Module, traced: TracedModel, inputs: Mapping[str, torch.Tensor]) -> None:
        self._model, self._traced, self._inputs = on_meta(model), traced, dict(inputs)
        self._known: dict[tuple[str, torch.dtype, torch.dtype], Known] = {}
        tensors = (*model.parameters(), *model.buffers())
        self.own = next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)

    def types(self, device: str, dtype: torch.dtype) -> ElementTypes:
        """Return the element types at this moment.

        Args:
            device: type of the device that the model is on.
            dtype: of its parameters.
        """
        is_cast = torch.is_autocast_enabled(device)
        if not is_cast and dtype == self.own == torch.float32:
            return ElementTypes(dtype, self.own)
        cast = torch.get_autocast_dtype(device) if is_cast else dtype
        key = device, dtype, cast
        if key not in self._known:
            self._known[key] = self._found(device, dtype)
        return ElementTypes(cast, self.own, self._known[key])

    def _found(self, device: str, dtype: torch.dtype) -> Known:
        by_node: dict[str, torch.dtype] = {}

        class Recording(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                result = super().run_node(n)
                if isinstance(result, torch.Tensor):
                    by_node[n.name] = result.dtype
                return result

        def fake(tensor: torch.Tensor) -> torch.Tensor:
            kept = dtype if tensor.dtype.is_floating_point else tensor.dtype
            return torch.empty(tensor.shape, dtype=kept, device=device)

        model = on_meta(self._model)
        layer_of = {names[-1]: layer for layer, names in self._traced.nodes.items()}
        try:
            with FakeTensorMode(), torch.no_grad():
                module = fx.GraphModule(model._apply(fake), self._traced.graph)
                named = (layer_of.get(node.name) for node in module.graph.find_nodes(op="placeholder"))
                Recording(module).run(*(None if name is None else fake(self._inputs[name]) for name in named))
        except RuntimeError as error:
            _log.warning(
                "tensors of other ranks are taken to have %s where the plan says float32: %s",
                torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype,
                error,
            )
        return {layer_of[name]: found for name, found in by_node.items() if name in layer_of}
