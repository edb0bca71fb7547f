"""From the nodes of a traced graph to layers: what each computes, and what it takes in."""

from dataclasses import replace

import torch
from torch import fx

from planner.errors import TraceError
from planner.frontend.batch import PROBE
from planner.frontend.calls import METADATA, Call, holds_tensor, is_in_place
from planner.frontend.counting import flop_of, is_transform
from planner.frontend.drafts import Draft, Drafts, name_in_model, outputs, readers
from planner.frontend.parameters import add_parameters, has_weight_in_pieces, parameter_names
from planner.frontend.recognize import recognize
from planner.frontend.samples import MIXED, Samples, is_of_batch, roles_of, samples_of, samples_of_constant
from planner.ir import ops
from planner.ir.dimension import Dimension
from planner.ir.tensor import TensorSpec


class Collector:
    """Collects layers while the nodes pass in order.

    Args:
        found: what is collected.
    """

    def __init__(self, found: Drafts) -> None:
        self._found = found
        self._names = parameter_names(found.root)

    def add(self, node: fx.Node) -> None:
        """Take in the next node.

        Raises:
            TraceError: it cannot be planned.
        """
        match node.op:
            case "placeholder":
                self._input(node)
            case "output":
                self._outputs(node)
            case "get_attr":
                self._found.constant.add(node)
            case _ if not holds_tensor(node.meta.get("val")) and not is_in_place(node, None):
                pass  # sizes, devices, the class of a structured result
            case _:
                self._call(Call.of(node, self._found.root))

    def _input(self, node: fx.Node) -> None:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            samples = Samples(0) if value.dim() and value.shape[0] == PROBE else None
            self._found.place(node, samples, (None,) * value.dim() if samples is None else ())
            self._found.start(node, ops.Input(), str(node.target))

    def _outputs(self, node: fx.Node) -> None:
        listed = list(outputs(node.args[0]))
        if not listed:
            raise TraceError("the model returns no tensor, so there is no output to plan for")
        for path, value in listed:
            if value not in self._found.of:
                raise TraceError(f"output{path} of the model does not depend on its inputs; return it apart")
            self._found.drafts.append(Draft("output" + path, [value], [ops.Output()]))

    def _call(self, call: Call) -> None:
        found, node = self._found, call.node
        data = found.data(call)
        if not data:
            found.samples[node], is_layer = self._made(call)
            if not is_layer:
                found.constant.add(node)
                return
        op = self._operator(call, data)
        samples = samples_of(call, op, [(n, found.samples[n]) for n in data]) if data else found.samples[node]
        if samples is MIXED or (samples is None and not isinstance(op, ops.Loss)):
            op = op if isinstance(op, ops.PerSample) else self._per_sample(call)  # run whole
        found.place(node, samples, roles_of(op, [found.specs[n] for n in data], call.shape, samples))
        draft = self._absorber(call, op, data)
        if draft is not None:
            draft.nodes.append(node)
            draft.ops.append(op)
            found.of[node] = draft
        else:
            draft = found.start(node, op, name_in_model(node))
            if data and not isinstance(data[0].meta["val"], torch.Tensor):
                draft.follows, draft.ops = found.of[data[0]], [ops.PerSample("result")]
        add_parameters(found, self._names, draft, call, op)

    def _made(self, call: Call) -> tuple[Samples | None, bool]:
        """Return how a function of constants holds the samples, and whether it is a layer."""
        read = [] if call.name in METADATA else [(n, self._found.samples.get(n)) for n in call.tensors]
        made = samples_of_constant(call, recognize(call, sum(samples is not None for _, samples in read)), read)
        return made, is_of_batch(call, made, read) or not self._is_light(call)

    @staticmethod
    def _is_light(call: Call) -> bool:
        """Return whether a function of constants is best computed by every reader: no products, no layers."""
        return call.module is None and (is_transform(call) or flop_of(call) == (0, 0))

    def _operator(self, call: Call, data: list[fx.Node]) -> ops.Op:
        op = recognize(call, len(data))
        match op:
            case ops.Concat(dim=dim) if len(data) == 1:
                return ops.Along("cat", (dim,))  # with constants
            case ops.Custom():
                return ops.Custom(op.name, op.dimensions, *flop_of(call, self._found.batch))
            case ops.Conv() | ops.Linear() if op.computed_weight and len(data) == 1:
                return replace(op, computed_weight=not has_weight_in_pieces(call, self._found, self._names))
            case ops.Elementwise() | ops.Concat() | ops.Loss():
                return op
            case _ if len(data) == 1 and not isinstance(op, ops.PerSample):
                return op
            case _:
                return self._per_sample(call)

    def _per_sample(self, call: Call) -> ops.PerSample:
        return ops.PerSample(call.name, *flop_of(call, self._found.batch))

    def _absorber(self, call: Call, op: ops.Op, data: list[fx.Node]) -> Draft | None:
        """Return the layer that takes in an operator: its only input's, read by nobody else."""
        found = self._found
        if not data or any(n not in found.of for n in data):
            return None
        draft = found.of[data[0]]
        if not isinstance(data[0].meta["val"], torch.Tensor):  # one of several results
            return draft if draft.last is data[0] else None
        if len(data) != 1 or len(readers(data[0])) != 1 or isinstance(draft.op, ops.Input | ops.Loss):
            return None
        before, after = found.specs[data[0]], found.specs[call.node]
        if (before.shape, before.sample_rows) != (after.shape, after.sample_rows):
            return None
        return draft if _joins(draft, call, op, before) else None


def _joins(draft: Draft, call: Call, op: ops.Op, before: TensorSpec) -> bool:
    """Return whether a layer takes in an operator, so that it works under each of the layer's splits."""
    by_channel = isinstance(op, ops.BatchNorm) or (isinstance(op, ops.Dropout) and op.unit == "channel")
    if by_channel and before.dim_of(Dimension.OUT_CHANNEL) != 1:
        return False  # a linear layer on (N, L, F) has its channels last
    if isinstance(op, ops.BatchNorm):
        return isinstance(draft.op, ops.Conv | ops.ConvTranspose | ops.Linear) and len(draft.ops) == 1
    if isinstance(op, ops.Elementwise) and isinstance(draft.op, ops.AdaptivePool | ops.Reduce):
        return len(call.tensors) == 1
    return isinstance(op, ops.Elementwise | ops.Dropout)
