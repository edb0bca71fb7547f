"""What the planner knows of a tensor: its shape and its element type."""

import math
from dataclasses import dataclass
from enum import StrEnum


class DType(StrEnum):
    """Element types, named as torch names them."""

    FLOAT64 = "float64"
    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    INT64 = "int64"
    INT32 = "int32"
    UINT8 = "uint8"
    BOOL = "bool"

    @property
    def item_bytes(self) -> int:
        """The bytes of one element."""
        return _ITEM_BYTES[self]

    @property
    def is_floating(self) -> bool:
        """Whether a tensor of this type can carry a gradient."""
        return self in {DType.FLOAT64, DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16}


_ITEM_BYTES = {
    DType.FLOAT64: 8, DType.FLOAT32: 4, DType.FLOAT16: 2, DType.BFLOAT16: 2,
    DType.INT64: 8, DType.INT32: 4, DType.UINT8: 1, DType.BOOL: 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and element type; a scalar has shape ``()``."""

    shape: tuple[int, ...]
    dtype: DType = DType.FLOAT32

    def __post_init__(self) -> None:
        if any(size < 1 for size in self.shape):
            raise ValueError(f"shape {self.shape} has an empty dimension")

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes of all elements."""
        return self.numel * self.dtype.item_bytes
