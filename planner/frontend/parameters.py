"""Which parameters and buffers a layer reads, and how they follow its splits."""

from dataclasses import replace

import torch
from torch import fx, nn

from planner.errors import TraceError
from planner.frontend.calls import METADATA, Call, name_of, shape_of
from planner.frontend.custom import custom_rule
from planner.frontend.drafts import Draft, Drafts
from planner.frontend.recognize import is_of_elements, operands
from planner.frontend.trace import attribute
from planner.ir import ops
from planner.ir.graph import Parameter
from planner.ir.tensor import DType, TensorSpec

_WITH_PIECES = ops.Conv | ops.ConvTranspose | ops.Linear | ops.BatchNorm
"""Operators whose parameters are cut where the channels are."""


def parameter_names(root: nn.Module) -> dict[int, str]:
    """Return one name for every parameter and buffer, by identity: the first, where modules share it."""
    return {id(t): name for name, t in [*root.named_parameters(), *root.named_buffers()]}


def add_parameters(found: Drafts, names: dict[int, str], draft: Draft, call: Call, op: ops.Op) -> None:
    """Give a layer the parameters and buffers that one of its calls reads.

    Args:
        found: all layers.
        names: of ``parameter_names``.
        draft: the layer.
        call: the call.
        op: its operator.
    """
    constants = [node for node in call.tensors if node in found.constant]
    draft.constants.extend(constants)
    by_role = operands(call) if isinstance(op, ops.Conv | ops.Linear | ops.BatchNorm) else {}
    computed = isinstance(op, ops.Conv | ops.Linear) and op.computed_weight
    roles = {node: role for role, node in by_role.items() if node is not None and not computed}
    for node in constants:
        for source in _attributes_behind(node):
            tensor = attribute(found.root, str(source.target))
            role = roles.get(node, "")
            _add(draft, names.get(id(tensor)), _described(tensor, role, op) if role else _whole(tensor))
    if call.module is None:
        return
    for role, tensor in [*call.module.named_parameters(), *call.module.named_buffers()]:
        parameter = _described(tensor, role, op, call.module)
        if not isinstance(op, _WITH_PIECES | ops.Custom):
            parameter = _whole(tensor, role)
        _add(draft, names.get(id(tensor)), parameter)


def has_weight_in_pieces(call: Call, found: Drafts, names: dict[int, str]) -> bool:
    """Return whether a rank can compute its piece of a product's weight from the same pieces of parameters.

    So it is where the weight is made element by element of parameters and buffers of its own shape: under a mask,
    binarised, scaled by a number.

    Args:
        call: a product whose weight or bias is computed.
        found: all layers.
        names: of ``parameter_names``.
    """
    operand = operands(call)
    weight, bias = operand["weight"], operand["bias"]
    if weight not in found.constant or (bias is not None and bias.op != "get_attr"):
        return False
    assert weight is not None
    shape, open_nodes = shape_of(weight), [weight]
    seen: set[fx.Node] = set()
    while open_nodes:
        node = open_nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        if shape_of(node) != shape:
            return False
        if node.op == "get_attr":
            if id(attribute(found.root, str(node.target))) not in names:
                return False  # no state, so that nobody would cut it
        elif not is_of_elements(Call.of(node, found.root)):
            return False
        open_nodes.extend(node.all_input_nodes)
    return True


def _add(draft: Draft, name: str | None, parameter: Parameter) -> None:
    if name is not None:  # a plain attribute is no state
        draft.params.setdefault(name, replace(parameter, name=name))


def _whole(tensor: torch.Tensor, role: str = "") -> Parameter:
    return Parameter("", _spec(tensor), None, None, _is_trainable(tensor), role, whole=True)


def _described(tensor: torch.Tensor, role: str, op: ops.Op, module: nn.Module | None = None) -> Parameter:
    """Return how a parameter follows the channels of its operator."""
    spec = _spec(tensor)
    out_dim = 0 if spec.shape else None
    in_dim = 1 if role == "weight" and isinstance(op, ops.Conv | ops.Linear) else None
    if isinstance(op, ops.ConvTranspose) and role == "weight":
        out_dim, in_dim = (1, 0) if op.groups == 1 else (0, None)
    if isinstance(op, ops.Custom) and module is not None:
        out_dim = custom_rule(type(module)).channel_params.get(role)
        if out_dim is None:
            return _whole(tensor, role)
    return Parameter("", spec, out_dim, in_dim, _is_trainable(tensor), role)


def _spec(tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(tuple(tensor.shape), DType(str(tensor.dtype).removeprefix("torch.")))


def _is_trainable(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) and tensor.requires_grad


def _attributes_behind(node: fx.Node) -> list[fx.Node]:
    """Return the parameters and buffers that a constant is computed from."""
    found: dict[fx.Node, None] = {}
    stack, seen = [node], {node}
    while stack:
        current = stack.pop()
        if current.op == "get_attr":
            found[current] = None
        elif name_of(current) not in METADATA:
            fresh = [n for n in reversed(current.all_input_nodes) if n not in seen]
            seen.update(fresh)
            stack.extend(fresh)
    return list(found)


def unify_uses(drafts: list[Draft]) -> None:
    """Let a parameter that one layer reads through other operators be whole in every layer (tied autoencoders).

    Raises:
        TraceError: another layer cannot use it whole.
    """
    whole = {name for draft in drafts for name, p in draft.params.items() if p.whole}
    pending = [draft for draft in drafts if _cuts(draft, whole)]
    while pending:
        for draft in pending:
            if not isinstance(draft.op, ops.Conv | ops.Linear):
                raise TraceError(
                    f"{draft.last.meta.get('origin')}: {draft.name!r} shares a parameter with operators that compute "
                    "with it. Make the module around them a leaf with planner.frontend.custom.register_module."
                )
            draft.ops[0] = replace(draft.op, computed_weight=True)
            draft.params = {
                name: replace(p, out_dim=None, in_dim=None, whole=True) for name, p in draft.params.items()
            }  # fmt: skip
            whole |= set(draft.params)
        pending = [draft for draft in drafts if _cuts(draft, whole)]


def _cuts(draft: Draft, whole: set[str]) -> bool:
    """Return whether a layer may cut one of these parameters."""
    return any(not p.whole for name, p in draft.params.items() if name in whole)
