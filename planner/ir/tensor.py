"""What the planner knows of a tensor: its shape, its element type, what its dimensions hold."""

import math
from dataclasses import dataclass
from enum import StrEnum

from planner.ir.dimension import Dimension, Roles, image_roles


class DType(StrEnum):
    """Element types, named as torch names them."""

    FLOAT64 = "float64"
    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    COMPLEX64 = "complex64"
    COMPLEX128 = "complex128"
    INT64 = "int64"
    INT32 = "int32"
    INT16 = "int16"
    INT8 = "int8"
    UINT8 = "uint8"
    BOOL = "bool"

    @property
    def item_bytes(self) -> int:
        """The bytes of one element."""
        return _ITEM_BYTES[self]

    @property
    def is_floating(self) -> bool:
        """Whether a tensor of this type can carry a gradient."""
        return self in _DIFFERENTIABLE


_ITEM_BYTES = {
    DType.FLOAT64: 8, DType.FLOAT32: 4, DType.FLOAT16: 2, DType.BFLOAT16: 2,
    DType.COMPLEX64: 8, DType.COMPLEX128: 16,
    DType.INT64: 8, DType.INT32: 4, DType.INT16: 2, DType.INT8: 1, DType.UINT8: 1, DType.BOOL: 1,
}  # fmt: skip

_DIFFERENTIABLE = frozenset({
    DType.FLOAT64, DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16, DType.COMPLEX64, DType.COMPLEX128,
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape, element type, and what the dimensions hold; a scalar has shape ``()``.

    Attributes:
        shape: the sizes.
        dtype: of the elements.
        roles: of every dimension; samples, channels, space if left out.
        sample_rows: how many rows of the sample dimension belong to one sample: 1, or the frames of a
            video or the windows of an image that were folded into the batch. 0 where sizes depend on
            the batch, but no dimension holds whole samples one after the other.
    """

    shape: tuple[int, ...]
    dtype: DType = DType.FLOAT32
    roles: Roles = ()
    sample_rows: int = 1

    def __post_init__(self) -> None:
        if any(size < 0 for size in self.shape):
            raise ValueError(f"shape {self.shape} has a negative size")
        if not self.roles:
            object.__setattr__(self, "roles", image_roles(len(self.shape)))
        if len(self.roles) != len(self.shape):
            raise ValueError(f"{self.roles} do not fit shape {self.shape}")

    def dim_of(self, role: Dimension) -> int | None:
        """Return the dimension that holds samples, channels or a part of space, if there is one."""
        return self.roles.index(role) if role in self.roles else None

    @property
    def sample_dim(self) -> int | None:
        """The dimension that holds the samples, if the tensor has any."""
        return self.dim_of(Dimension.SAMPLE)

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes of all elements."""
        return self.numel * self.dtype.item_bytes
