"""One layer on one device: what is timed, looked up or estimated."""

from dataclasses import asdict, dataclass, replace

from planner.ir.canonical import canonical_bytes
from planner.ir.count import Shape, Work, work
from planner.ir.graph import Layer
from planner.ir.ops import Conv, ConvTranspose, GroupNorm, Op
from planner.ir.tensor import DType


@dataclass(frozen=True, slots=True)
class LocalLayer:
    """A layer with the shapes of one device's piece.

    Attributes:
        layer: the layer whose operator and absorbed operators are meant; its own shapes are not.
        inputs, output, params: local shapes.
        dtype: element type of activations.
        input_gradient: whether backward computes the gradient of the inputs.
    """

    layer: Layer
    inputs: tuple[Shape, ...]
    output: Shape
    params: tuple[Shape, ...]
    dtype: DType
    input_gradient: bool

    @property
    def op(self) -> Op:
        """The operator, with its groups as this device sees them."""
        op = self.layer.op
        match op:
            case Conv():
                groups = max(op.groups * self.output[1] // op.out_channels, 1) if op.groups > 1 else 1
                return replace(op, in_channels=self.inputs[0][1], out_channels=self.output[1], groups=groups)
            case ConvTranspose():
                groups = max(op.groups * self.output[1] // op.out_channels, 1) if op.groups > 1 else 1
                return replace(op, in_channels=self.inputs[0][1], out_channels=self.output[1], groups=groups)
            case GroupNorm():
                return replace(op, groups=op.groups * self.output[1] // op.channels, channels=self.output[1])
            case _:
                return op

    @property
    def key(self) -> str:
        """What decides the time: operator, absorbed operators, local shapes, element type."""
        return canonical_bytes([
            self.op.kind, asdict(self.op),
            [[a.op.kind, asdict(a.op)] for a in self.layer.absorbed],
            [list(s) for s in self.inputs], list(self.output), self.dtype, self.input_gradient,
        ]).decode()  # fmt: skip

    def work(self) -> Work:
        """Return the FLOP and elements of this piece."""
        return work(self.layer, self.inputs, self.output, self.params, input_gradient=self.input_gradient)
