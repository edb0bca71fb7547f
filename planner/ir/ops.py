"""One frozen dataclass per operator kind. Attributes only; shapes are those of the layer's tensors."""

from dataclasses import dataclass
from typing import ClassVar, Literal


@dataclass(frozen=True, slots=True)
class Input:
    """A model input with the samples in its first dimension; pinned by the plan's ``io``."""

    kind: ClassVar[str] = "input"


@dataclass(frozen=True, slots=True)
class Output:
    """A model output; pinned by the plan's ``io``."""

    kind: ClassVar[str] = "output"


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
    dilation: tuple[int, ...]
    groups: int = 1


@dataclass(frozen=True, slots=True)
class Linear:
    """Matrix product over the last dimension."""

    kind: ClassVar[str] = "linear"
    in_features: int
    out_features: int


@dataclass(frozen=True, slots=True)
class BatchNorm:
    """Batch normalisation over everything but the channels."""

    kind: ClassVar[str] = "batch_norm"
    channels: int


@dataclass(frozen=True, slots=True)
class Pool:
    """Max or average pooling."""

    kind: ClassVar[str] = "pool"
    function: Literal["max", "avg"]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    ceil_mode: bool = False


@dataclass(frozen=True, slots=True)
class AdaptivePool:
    """Adaptive max or average pooling, or the mean over all of space."""

    kind: ClassVar[str] = "adaptive_pool"
    function: Literal["max", "avg"]
    output_size: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Elementwise:
    """A function of each element alone, or of equal positions of several tensors (``add``, ``mul``)."""

    kind: ClassVar[str] = "elementwise"
    function: str


@dataclass(frozen=True, slots=True)
class Dropout:
    """Zeroes elements (or whole channels) at random in training."""

    kind: ClassVar[str] = "dropout"
    probability: float
    whole_channels: bool = False


@dataclass(frozen=True, slots=True)
class Concat:
    """Joins tensors along one dimension."""

    kind: ClassVar[str] = "concat"
    dim: int


@dataclass(frozen=True, slots=True)
class Flatten:
    """Joins the channels and all of space into one dimension."""

    kind: ClassVar[str] = "flatten"


@dataclass(frozen=True, slots=True)
class Softmax:
    """Softmax or its logarithm along one dimension."""

    kind: ClassVar[str] = "softmax"
    dim: int
    log: bool = False


@dataclass(frozen=True, slots=True)
class Loss:
    """A loss inside the model; a mean or a sum over the samples, as a scalar."""

    kind: ClassVar[str] = "loss"
    function: str
    reduction: Literal["mean", "sum"]


Op = (
    Input | Output | Redistribute | Conv | Linear | BatchNorm | Pool | AdaptivePool | Elementwise
    | Dropout | Concat | Flatten | Softmax | Loss
)  # fmt: skip
"""Every operator kind. A new one needs a rule in ``planner.ir.rules`` and a lowering in ``runtime.lower``."""
