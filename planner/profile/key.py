"""One layer on one device: what is timed, looked up or estimated, and the key under which it is found.

A key names what decides the time of a piece, and nothing else: pieces with equal keys take equally long. So the
operator is the one that the device sees (its own channels and groups), what changes values only (``eps``, a dropout's
probability) has one value for all, and operators that do nothing are left out.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any, Final, get_args

from planner.ir.canonical import canonical_bytes
from planner.ir.count import Shape, Work, work
from planner.ir.graph import Layer, is_boundary
from planner.ir.ops import (
    Along,
    BatchNorm,
    Concat,
    Conv,
    ConvTranspose,
    Custom,
    Elementwise,
    Linear,
    Loss,
    Op,
    Permute,
    PerSample,
    Reduce,
    Reshape,
    Softmax,
)
from planner.ir.tensor import DType
from planner.profile.local import does_nothing, has_bias, local_operator, trains_norms, trains_operator

MEMORY_FORMATS: Final = ("contiguous", "channels_last")
_OPS: Final[Mapping[str, type[Op]]] = {op.kind: op for op in get_args(Op)}
_ENDS_GRADIENT: Final = Elementwise("detach")


@dataclass(frozen=True)
class AbsorbedKey:
    """An absorbed operator, and whether backward computes the gradient of its parameters."""

    op: Op
    weight_gradient: bool = False


@dataclass(frozen=True)
class PieceKey:
    """What decides the time of a piece of a layer.

    Attributes:
        op: as the device sees it.
        absorbed: operators that work on the result, in order; none that does nothing.
        inputs, output: local shapes; ``output`` is what the operator itself computes.
        dtype: element type of activations.
        precision: how products are computed: ``fp32``, ``tf32`` or ``bf16`` (autocast).
        memory_format: ``contiguous`` or ``channels_last``, of tensors with space and of convolutions' weights.
        input_gradient: backward computes the gradient of the inputs.
        weight_gradient: backward computes the gradient of the operator's own parameters.
        bias: a convolution or linear layer adds one; None for other operators.
        synchronised: batch norms work on statistics of several ranks; None where there is no batch norm.
        resolved: where ``output`` is a partial sum: the local shape behind the reduction, on which bias and absorbed
            operators work.
    """

    op: Op
    absorbed: tuple[AbsorbedKey, ...]
    inputs: tuple[Shape, ...]
    output: Shape
    dtype: DType = DType.FLOAT32
    precision: str = "fp32"
    memory_format: str = "contiguous"
    input_gradient: bool = True
    weight_gradient: bool = True
    bias: bool | None = None
    synchronised: bool | None = None
    resolved: Shape | None = None

    def as_object(self) -> dict[str, Any]:
        """Return the key as the plain values of a profile file; what says nothing of this operator is left out."""
        found: dict[str, Any] = {
            **_named(self.op),
            "absorbed": [_absorbed(a) for a in self.absorbed],
            "inputs": [list(shape) for shape in self.inputs],
            "output": list(self.output),
            "dtype": self.dtype.value,
            "precision": self.precision,
            "memory_format": self.memory_format,
            "input_gradient": self.input_gradient,
            "weight_gradient": self.weight_gradient,
        }
        optional = {"bias": self.bias, "synchronised": self.synchronised, "resolved": self.resolved}
        found |= {name: value for name, value in optional.items() if value is not None}
        return found

    @cached_property
    def text(self) -> str:
        """The canonical JSON of the key, as in ``ProfileTable.layers``."""
        return canonical_bytes(self.as_object()).decode()

    @staticmethod
    def of_text(text: str) -> "PieceKey":
        """Return the key that a text means; the inverse of ``text``.

        Raises:
            ValueError: it is no key.
        """
        try:
            return _of_object(json.loads(text))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{text[:200]} is no key of a layer: {type(error).__name__} {error}") from error

    @property
    def samples(self) -> int | None:
        """The first size of the output, where the operator treats every index of it alone; None where it does not.

        Inputs then have as many, or are broadcast. Pieces that differ in this number only are one family, whose time
        grows with it (``with_samples``).
        """
        if not self.output or not _treats_samples_alone(self.op):
            return None
        count = self.output[0]
        rows = [shape for shape in self.inputs if self._has_samples(shape)]
        fits = all(shape[0] == count for shape in rows) and (self.resolved is None or self.resolved[0] == count)
        return count if rows and fits else None

    def _has_samples(self, shape: Shape) -> bool:
        """Return whether an input has the output's first size, or is broadcast along it."""
        return len(shape) >= min(len(self.output), 2) and (shape[0] != 1 or self.output[0] == 1)

    def with_samples(self, samples: int) -> "PieceKey":
        """Return the piece of the same family with so many samples.

        Raises:
            ValueError: the piece has no family, because ``samples`` is None.
        """
        if self.samples is None:
            raise ValueError(f"{self.op.kind} on {self.inputs} does not treat samples alone")
        inputs = tuple((samples, *s[1:]) if self._has_samples(s) else s for s in self.inputs)
        resolved = None if self.resolved is None else (samples, *self.resolved[1:])
        return replace(self, inputs=inputs, output=(samples, *self.output[1:]), resolved=resolved)

    @property
    def family(self) -> tuple[str, int] | None:
        """The key text without the number of samples, and that number; None where ``samples`` is None."""
        samples = self.samples
        return None if samples is None else (self.with_samples(0).text, samples)


def family_of(key: str) -> tuple[str, int] | None:
    """Return the family of a ``LocalLayer.key`` and its samples, see ``PieceKey.family``.

    Raises:
        ValueError: the text is no key.
    """
    return PieceKey.of_text(key).family


@dataclass(frozen=True, slots=True)
class LocalLayer:
    """A layer with the shapes of one device's piece.

    Attributes:
        layer: the layer whose operator and absorbed operators are meant; its own shapes are not.
        inputs, output, params: local shapes; the output as the operator computes it.
        dtype: element type of activations.
        input_gradient: whether backward computes the gradient of the inputs.
        precision, memory_format: as of ``PieceKey``.
        synchronised: batch norms work on statistics of several ranks.
        resolved: local shape behind the reduction of partial sums; None where the output is no partial sum.
    """

    layer: Layer
    inputs: tuple[Shape, ...]
    output: Shape
    params: tuple[Shape, ...]
    dtype: DType
    input_gradient: bool
    precision: str = "fp32"
    memory_format: str = "contiguous"
    synchronised: bool = False
    resolved: Shape | None = None

    @property
    def op(self) -> Op:
        """The operator as this device sees it: with its own channels and groups."""
        return local_operator(self.layer.op, self.inputs, self.output)

    @property
    def piece(self) -> PieceKey:
        """What decides the time."""
        op, layer = self.op, self.layer
        behind = self.resolved or self.output
        absorbed = tuple(
            AbsorbedKey(local_operator(op, (behind,), behind), isinstance(op, BatchNorm) and trains_norms(layer))
            for op in (a.op for a in layer.absorbed) if not does_nothing(op)
        )  # fmt: skip
        trains = layer.output.dtype.is_floating and all(a.op != _ENDS_GRADIENT for a in layer.absorbed)
        is_product = isinstance(op, Conv | ConvTranspose | Linear)
        has_norm = any(isinstance(each, BatchNorm) for each in (op, *(a.op for a in absorbed)))
        adds_bias = is_product and has_bias(layer)
        return PieceKey(
            op, absorbed, self.inputs, self.output, self.dtype, self.precision,
            self.memory_format if any(len(s) in {4, 5} for s in (*self.inputs, self.output)) else MEMORY_FORMATS[0],
            self.input_gradient and trains,
            trains and trains_operator(layer),
            adds_bias if is_product else None,
            self.synchronised if has_norm else None,
            self.resolved if is_product and (adds_bias or absorbed) else None,
        )  # fmt: skip

    @property
    def has_kernel(self) -> bool:
        """Whether there is anything to time: not for views, borders of the model and changes of layout."""
        op = self.layer.op
        own = not (is_boundary(op) or op.kind == "redistribute" or isinstance(op, Reshape) or does_nothing(op))
        return own or bool(self.piece.absorbed)

    @property
    def key(self) -> str:
        """What decides the time, as canonical JSON."""
        return self.piece.text

    def work(self) -> Work:
        """Return the FLOP and elements of this piece."""
        return work(self.layer, self.inputs, self.output, self.params, input_gradient=self.input_gradient)


def _treats_samples_alone(op: Op) -> bool:
    match op:
        case Concat(dim=dim) | Softmax(dim=dim):
            return dim != 0
        case Reduce(dims=dims) | Along(dims=dims):
            return 0 not in dims
        case Permute(order=order):
            return order[0] == 0
        case Reshape(groups=groups):
            return groups[:1] == ((0, 1, 0, 1),)
        case Loss() | PerSample() | Custom():
            return False
        case _:
            return not is_boundary(op)


# ---- plain values


def _named(op: Op) -> dict[str, Any]:
    return {"op": op.kind, "attributes": {name: _plain(value) for name, value in asdict(op).items()}}


def _absorbed(absorbed: AbsorbedKey) -> dict[str, Any]:
    trained = {"weight_gradient": absorbed.weight_gradient} if isinstance(absorbed.op, BatchNorm) else {}
    return {**_named(absorbed.op), **trained}


def _plain(value: object) -> object:
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def _of_object(value: Mapping[str, Any]) -> PieceKey:
    given = {field.name: value[field.name] for field in fields(PieceKey) if field.name in value}
    absorbed = tuple(AbsorbedKey(_op(a), a.get("weight_gradient", False)) for a in value["absorbed"])
    resolved = value.get("resolved")
    given |= {
        "op": _op(value), "absorbed": absorbed, "inputs": tuple(tuple(s) for s in value["inputs"]),
        "output": tuple(value["output"]), "dtype": DType(value["dtype"]),
        "resolved": None if resolved is None else tuple(resolved),
    }  # fmt: skip
    key = PieceKey(**given)
    if any(math.prod(shape) < 0 for shape in (*key.inputs, key.output)):
        raise ValueError("a size is negative")
    return key


def _op(value: Mapping[str, Any]) -> Op:
    kind = value["op"]
    if kind not in _OPS:
        raise ValueError(f"{kind!r} is no kind of operator")
    attributes: dict[str, Any] = {name: _tuples(item) for name, item in value["attributes"].items()}
    found: Op = _OPS[kind](**attributes)
    return found


def _tuples(value: object) -> object:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
