"""One frozen dataclass per operator kind. Attributes only; shapes are those of the layer's tensors."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from planner.ir.dimension import Dimension


@dataclass(frozen=True, slots=True)
class Input:
    """A model input with the samples in its first dimension; pinned by the plan's ``io``."""

    kind: ClassVar[str] = "input"


@dataclass(frozen=True, slots=True)
class Output:
    """A model output; pinned by the plan's ``io``."""

    kind: ClassVar[str] = "output"


@dataclass(frozen=True, slots=True)
class Receive:
    """A tensor that the previous pipeline stage sends."""

    kind: ClassVar[str] = "receive"
    has_gradient: bool
    """Its gradient goes back to where it came from."""
    is_shared: bool = False
    """Every rank gets all of it, and addends of its gradient go back."""


@dataclass(frozen=True, slots=True)
class Send:
    """A tensor that goes to the next pipeline stage, and whose gradient comes from there."""

    kind: ClassVar[str] = "send"


@dataclass(frozen=True, slots=True)
class Redistribute:
    """One layout of a tensor, shared by those of its consumers that ask for it."""

    kind: ClassVar[str] = "redistribute"


@dataclass(frozen=True, slots=True)
class Conv:
    """Convolution over one to three spatial dimensions; tuples have one entry each."""

    kind: ClassVar[str] = "conv"
    in_channels: int
    out_channels: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    """Before the first element of each dimension."""
    dilation: tuple[int, ...]
    groups: int = 1
    padding_mode: str = "zeros"
    padding_after: tuple[int, ...] | None = None
    """Behind the last element, where it is not that before the first (``padding="same"``)."""
    computed_weight: bool = False
    """The weight is the result of other operators (weight standardisation), which every rank runs whole."""

    @property
    def keeps_size(self) -> bool:
        """Whether there are as many outputs as inputs, each in the middle of those that it reads."""
        windows = zip(self.stride, self.padding, self.dilation, self.kernel, strict=True)
        return self.padding_after is None and all(s == 1 and 2 * p == d * (k - 1) for s, p, d, k in windows)


@dataclass(frozen=True, slots=True)
class ConvTranspose:
    """Transposed convolution over one to three spatial dimensions."""

    kind: ClassVar[str] = "conv_transpose"
    in_channels: int
    out_channels: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    output_padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1


@dataclass(frozen=True, slots=True)
class Linear:
    """Matrix product over the last dimension."""

    kind: ClassVar[str] = "linear"
    in_features: int
    out_features: int
    computed_weight: bool = False
    """As of ``Conv``."""


@dataclass(frozen=True, slots=True)
class BatchNorm:
    """Batch normalisation over everything but the channels."""

    kind: ClassVar[str] = "batch_norm"
    channels: int
    eps: float = 1e-5
    momentum: float | None = 0.1
    """Of the running statistics; None for their plain mean."""


@dataclass(frozen=True, slots=True)
class GroupNorm:
    """Normalisation over groups of channels and all of space of each sample; a group per channel: instance norm."""

    kind: ClassVar[str] = "group_norm"
    groups: int
    channels: int


@dataclass(frozen=True, slots=True)
class Pool:
    """Max, average or power-average pooling."""

    kind: ClassVar[str] = "pool"
    function: Literal["max", "avg", "lp"]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    ceil_mode: bool = False
    count_include_pad: bool = True
    """Of an average: positions in the padding count."""


@dataclass(frozen=True, slots=True)
class AdaptivePool:
    """Adaptive max or average pooling, or the mean over all of space."""

    kind: ClassVar[str] = "adaptive_pool"
    function: Literal["max", "avg"]
    output_size: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Interpolate:
    """Resizes space."""

    kind: ClassVar[str] = "interpolate"
    mode: Literal["nearest", "nearest-exact", "linear", "cubic", "area"]
    align_corners: bool = False
    scale: tuple[float, ...] | None = None
    """Output positions per input position as the user gave them; None where the sizes decide."""


@dataclass(frozen=True, slots=True)
class PixelShuffle:
    """Moves channels into blocks of ``factor`` x ``factor`` pixels, or back (``unshuffle``)."""

    kind: ClassVar[str] = "pixel_shuffle"
    factor: int
    unshuffle: bool = False


@dataclass(frozen=True, slots=True)
class Elementwise:
    """A function of each element alone, or of equal positions of several tensors (``add``, ``mul``), broadcast."""

    kind: ClassVar[str] = "elementwise"
    function: str


@dataclass(frozen=True, slots=True)
class Dropout:
    """Zeroes elements (or whole channels, or whole samples: stochastic depth) at random in training."""

    kind: ClassVar[str] = "dropout"
    probability: float
    unit: Literal["element", "channel", "sample", "batch"] = "element"
    rescale: bool = True
    """Divide what stays by the probability to stay."""


@dataclass(frozen=True, slots=True)
class Concat:
    """Joins tensors along one dimension."""

    kind: ClassVar[str] = "concat"
    dim: int


@dataclass(frozen=True, slots=True)
class Reshape:
    """Joins or divides neighbouring dimensions (``flatten``, ``view``).

    Attributes:
        groups: ranges of input dimensions and of output dimensions that hold the same elements:
            (first input, past the last input, first output, past the last output).
    """

    kind: ClassVar[str] = "reshape"
    groups: tuple[tuple[int, int, int, int], ...]


@dataclass(frozen=True, slots=True)
class Permute:
    """Reorders dimensions: output dimension i is input dimension ``order[i]``."""

    kind: ClassVar[str] = "permute"
    order: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Along:
    """Any function that works along some dimensions, for every index of the others alone.

    Slices, padding, layer norm, local response norm, cumulative sums, gated units.
    """

    kind: ClassVar[str] = "along"
    function: str
    dims: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Reduce:
    """Mean, sum, maximum or the like over some dimensions."""

    kind: ClassVar[str] = "reduce"
    function: str
    dims: tuple[int, ...]
    keepdim: bool


@dataclass(frozen=True, slots=True)
class PerSample:
    """Any function of several tensors or dimensions that treats each sample alone: attention, window partition, FFT.

    Attributes:
        function: its name.
        forward_flop, backward_flop: of the matrix products in it, for the whole batch.
    """

    kind: ClassVar[str] = "per_sample"
    function: str
    forward_flop: int = 0
    backward_flop: int = 0


@dataclass(frozen=True, slots=True)
class Custom:
    """A module of the user's with a rule of its own, see ``planner.frontend.custom``.

    Attributes:
        name: of its class.
        dimensions: that may be split, beside samples; input and output are cut alike.
        forward_flop, backward_flop: of the matrix products in it, for the whole batch.
    """

    kind: ClassVar[str] = "custom"
    name: str
    dimensions: tuple[Dimension, ...] = ()
    forward_flop: int = 0
    backward_flop: int = 0


@dataclass(frozen=True, slots=True)
class Softmax:
    """Softmax or its logarithm along one dimension."""

    kind: ClassVar[str] = "softmax"
    dim: int
    log: bool = False


@dataclass(frozen=True, slots=True)
class Loss:
    """A loss inside the model; a mean or a sum over all that its tensors hold, as a scalar."""

    kind: ClassVar[str] = "loss"
    function: str
    reduction: Literal["mean", "sum"]
    whole_samples: bool = False
    """It reads a constant that belongs to channels or positions (``pos_weight``), so that only samples can be split."""

    @property
    def of_classes(self) -> bool:
        """Whether dimension 1 of the first tensor holds classes, and targets that are ignored do not count."""
        return self.function in {"cross_entropy", "nll_loss"}


Op = (
    Input | Output | Receive | Send | Redistribute | Conv | ConvTranspose | Linear | BatchNorm | GroupNorm | Pool
    | AdaptivePool | Interpolate | PixelShuffle | Elementwise | Dropout | Concat | Reshape | Permute | Along | Reduce
    | PerSample | Custom | Softmax | Loss
)  # fmt: skip
"""Every operator kind. A new one needs a rule in ``planner.ir.rules`` and a lowering in ``runtime.lowering.lower``."""


def describe(op: Op) -> str:
    """Return what an operator is in one word: its function where the kind is general, else its kind."""
    match op:
        case Along(function=name) | Reduce(function=name) | PerSample(function=name) | Elementwise(function=name):
            return name
        case Custom(name=name):
            return name
        case _:
            return op.kind
