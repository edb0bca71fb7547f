"""Where the samples are in every tensor of a traced graph, and what its other dimensions hold.

The model was traced on a prime number of samples, so sizes tell which dimension grows with the
batch. What sizes cannot tell is whether an operator mixed the samples or put them in another order
(a roll, a softmax over the batch, a concatenation along it): those are listed here.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import fx, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from planner.errors import TraceError
from planner.frontend.batch import PROBE, is_count
from planner.frontend.calls import RANDOM, Call, shape_of
from planner.frontend.recognize import values_of
from planner.ir import ops
from planner.ir.dimension import SPACE, Dimension, Roles, image_roles
from planner.ir.tensor import DType, TensorSpec

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Samples:
    """How a tensor holds the samples.

    Attributes:
        dim: the dimension; None where sizes depend on the batch in another way.
        rows: of that dimension for each sample.
    """

    dim: int | None
    rows: int = 1


MIXED: Final = Samples(None, 0)
_BY_POSITION = (
    ops.Conv | ops.ConvTranspose | ops.Pool | ops.AdaptivePool | ops.Interpolate | ops.PixelShuffle | ops.GroupNorm
    | ops.BatchNorm
)  # fmt: skip
"""Operators that take the first dimension for the samples, whatever it holds."""
_RECURRENT_OR_ATTENTION = (
    nn.RNNBase | nn.MultiheadAttention | nn.TransformerEncoderLayer | nn.TransformerDecoderLayer | nn.TransformerEncoder
    | nn.TransformerDecoder | nn.Transformer
)  # fmt: skip
_LAST_TWO = (-2, -1)
_EVERY = None
_DIMS: Final[Mapping[str, tuple[int, ...] | None]] = {
    **dict.fromkeys(("softmax", "log_softmax", "softmin", "gumbel_softmax", "roll", "flip", "fftn", "ifftn", "rfftn",
                     "irfftn", "cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "gather", "index_select",
                     "index_add", "index_copy", "index_fill", "scatter", "scatter_add", "scatter_reduce", "take",
                     "put", "renorm", "rot90", "select_scatter", "slice_scatter", "masked_select", "masked_scatter",
                     "histc", "unique", "bincount", "diff", "cross", "cov", "corrcoef"), _EVERY),
    **dict.fromkeys(("sort", "argsort", "topk", "kthvalue", "mode", "glu", "fft", "ifft", "rfft", "irfft", "hfft",
                     "ihfft"), (-1,)),
    **dict.fromkeys(("fft2", "ifft2", "rfft2", "irfft2", "tril", "triu", "diagonal", "qr", "pinv", "svd", "svdvals",
                     "inv", "eig", "eigh", "cholesky", "solve", "lstsq", "det", "slogdet", "matrix_exp", "matrix_power",
                     "scaled_dot_product_attention"), _LAST_TWO),
    "normalize": (1,), "flipud": (0,), "fliplr": (1,), "unfold": (), "diag_embed": (),
}  # fmt: skip
"""Functions that work along dimensions, whose result looks the same when they mix samples: where no argument names
the dimension, those that they work along; None: all of them."""
_FROM_ONE: Final = frozenset({"expand", "expand_as", "repeat", "tile", "broadcast_to", "broadcast_tensors"})
"""Functions that give every sample the same."""
_NO_DIM: Final = frozenset({"scaled_dot_product_attention", "normalize", "topk", "kthvalue", "rot90", "renorm"})
"""Of these functions, those whose first number is no dimension."""

_NUMBERED: Final = frozenset({
    "arange", "linspace", "logspace", "eye", "randperm", "tril", "triu", "tril_indices", "triu_indices", "cumsum",
    "cumprod", "hann_window", "hamming_window", "nonzero", "argsort", "diag", "range",
})  # fmt: skip
"""Functions that give every position another value."""


def samples_of(call: Call, op: ops.Op, inputs: list[tuple[fx.Node, Samples | None]]) -> Samples | None:
    """Return how a call's result holds the samples, None where no size depends on the batch.

    Args:
        call: the call.
        op: its operator.
        inputs: the tensors that it reads, in order, and how they hold the samples.
    """
    grown = [d for d, size in enumerate(call.shape) if size % PROBE == 0 and size]
    if not grown:
        return None
    if len(grown) > 1 or call.shape[grown[0]] % PROBE**2 == 0 or any(s == MIXED for _, s in inputs):
        return MIXED
    dim = grown[0]
    if all(s is None for _, s in inputs) and call.name not in _FROM_ONE:
        return MIXED  # parts that were taken from the batch, put together again
    for node, samples in inputs:
        if samples is not None and samples.dim is not None and _mixes(call, op, shape_of(node), samples.dim, dim):
            return MIXED
    return Samples(dim, call.shape[dim] // PROBE)


def samples_of_constant(call: Call, op: ops.Op, inputs: list[tuple[fx.Node, Samples | None]]) -> Samples | None:
    """Return how the result of a function of constants holds the samples, as ``samples_of``.

    ``MIXED`` where it is not the same for each sample; drawn at random, it is held as if it were.

    Args:
        call: the call.
        op: its operator.
        inputs: the constants that it reads, in order, and how they hold the samples.
    """
    grown = [d for d, size in enumerate(call.shape) if size % PROBE == 0 and size]
    if not grown:
        return None
    rows = call.shape[grown[0]] // PROBE
    if len(grown) > 1 or rows % PROBE == 0:
        return MIXED
    if call.name in RANDOM:
        return Samples(grown[0], rows)
    if any(samples is not None for _, samples in inputs):
        return samples_of(call, op, inputs)
    return MIXED if call.name in _NUMBERED or (inputs and call.name not in _FROM_ONE) else Samples(grown[0], rows)


def is_of_batch(call: Call, samples: Samples | None, inputs: list[tuple[fx.Node, Samples | None]]) -> bool:
    """Return whether a function of constants has to be one layer: a piece of the batch alone would give other values.

    Args:
        call: the call.
        samples: of ``samples_of_constant``.
        inputs: the constants that it reads, and how they hold the samples.
    """
    if samples is None:  # it sums or picks samples
        sizes = set(call.node.all_input_nodes) - set(values_of(call.node))
        return any(held is not None for _, held in inputs) or any(map(is_count, sizes))
    return samples == MIXED or call.name in RANDOM


def _mixes(call: Call, op: ops.Op, source: Shape, before: int, dim: int) -> bool:  # noqa: PLR0911  # a table of kinds
    """Return whether an operator mixes samples, though a dimension of its result has their number.

    Args:
        call: the call.
        op: its operator.
        source: shape of an input.
        before: the dimension of the input that holds the samples.
        dim: the one of the result that has their number.
    """
    if isinstance(call.module, _RECURRENT_OR_ATTENTION):
        first = next((m.batch_first for m in call.module.modules() if hasattr(m, "batch_first")), False)
        return before != (0 if first else 1)
    if isinstance(call.module, _InstanceNorm) and call.module.track_running_stats:
        return True  # its statistics are means over the batch
    match op:
        case _ if isinstance(op, _BY_POSITION):
            return before != 0
        case ops.Concat(dim=along) | ops.Softmax(dim=along):
            return along == dim
        case ops.Along(dims=along):
            return dim in along
        case ops.Reshape():
            return math.prod(source[:before]) != math.prod(call.shape[:dim])
        case ops.Linear():
            return before == len(source) - 1
        case _:
            return _mixes_by_name(call, source, before, dim)


def _mixes_by_name(call: Call, source: Shape, before: int, dim: int) -> bool:
    if call.name in {"repeat", "tile"}:
        return call.shape[dim] != source[before]
    if call.name in _DIMS:
        return before in _dims_of(call, len(source))
    if call.name == "getitem" and isinstance(call.node.args[0], fx.Node) and len(call.node.args) > 1:
        return isinstance(call.node.args[0].meta["val"], torch.Tensor) and _index_touches(
            call.node.args[1], len(source), before
        )
    if call.name == "write_items":
        return _index_touches(call.node.args[1], len(source), before)
    return call.name == "batch_norm"


def _dims_of(call: Call, rank: int) -> set[int]:
    """Return the dimensions that a function works along."""
    given = call.node.kwargs
    named = next((given[key] for key in ("dim", "dims", "axis") if key in given), None)
    if named is None and call.name not in _NO_DIM:
        rest = [a for a in call.node.args[1:] if isinstance(a, int | tuple | list) and not isinstance(a, bool)]
        place = 1 if call.name in {"roll", "fft", "ifft", "rfft", "irfft", "fft2", "ifft2", "rfft2", "irfft2"} else 0
        named = rest[place:] if call.name == "flip" else (rest[place] if len(rest) > place else None)
    if named is None and call.name in {"softmax", "log_softmax", "softmin"}:
        named = 0 if rank in {0, 1, 3} else 1  # torch's implicit choice
    if named is None:
        named = _DIMS[call.name] if not isinstance(call.module, nn.Module) else getattr(call.module, "dim", None)
    if named is None:
        return set(range(rank))
    listed = [a for d in (named if isinstance(named, tuple | list) else (named,))
              for a in (d if isinstance(d, tuple | list) else (d,))]  # fmt: skip
    return {d % rank for d in listed if isinstance(d, int) and rank}


def _index_touches(index: Any, rank: int, before: int) -> bool:
    """Return whether an index picks or reorders samples."""
    items = list(index) if isinstance(index, tuple) else [index]
    if ... in [i for i in items if not isinstance(i, fx.Node)]:
        at = next(k for k, i in enumerate(items) if i is ...)
        taken = sum(i is not None for i in items) - 1
        items[at : at + 1] = [slice(None)] * (rank - taken)
    position = 0
    for item in items:
        if item is None:
            continue
        if position == before:
            return not (isinstance(item, slice) and item == slice(None))
        position += 1
    return False


def spec_of(node: fx.Node, samples: Samples | None, roles: Roles, batch: int) -> TensorSpec:
    """Return the tensor of a node for the user's batch.

    Raises:
        TraceError: an element type or size that cannot be planned.
    """
    value = node.meta["val"]
    while not isinstance(value, torch.Tensor):
        value = value[0]
    name = str(value.dtype).removeprefix("torch.")
    shape = tuple(scaled(size, batch) for size in value.shape)
    try:
        return TensorSpec(shape, DType(name), roles, 1 if samples is None else samples.rows)
    except ValueError as error:
        raise TraceError(f"{node.meta.get('origin', node.name)}: {node.name!r} is a {name} tensor of shape "
                         f"{shape}: {error}") from error  # fmt: skip


def scaled(size: int, batch: int) -> int:
    """Return what a size or number of bytes is for the user's batch."""
    while size and size % PROBE == 0:
        size = size // PROBE * batch
        if batch % PROBE == 0:
            break
    return size


def roles_of(op: ops.Op, inputs: list[TensorSpec], shape: tuple[int, ...], samples: Samples | None) -> Roles:
    """Return what the dimensions of an operator's result hold.

    Args:
        op: the operator.
        inputs: the tensors that it reads, constants left out.
        shape: of the result.
        samples: how it holds the samples.
    """
    if samples is None:
        return (None,) * len(shape)
    roles = list(_plain_roles(op, inputs, shape))
    for dim, role in enumerate(roles):
        if role is Dimension.SAMPLE:
            roles[dim] = None
    if samples.dim is not None:
        roles[samples.dim] = Dimension.SAMPLE
        _fill(roles)
    return tuple(roles)


def _plain_roles(op: ops.Op, inputs: list[TensorSpec], shape: Shape) -> Roles:  # noqa: PLR0911  # a table of kinds
    rank = len(shape)
    source = inputs[0] if inputs else None
    match op:
        case _ if isinstance(op, _BY_POSITION | ops.Custom) or source is None:
            return image_roles(rank)
        case ops.Permute(order=order):
            return tuple(source.roles[d] for d in order)
        case ops.Reshape(groups=groups):
            return _reshaped(groups, source, shape)
        case ops.Reduce(dims=dims, keepdim=keepdim):
            return tuple(r for d, r in enumerate(source.roles) if keepdim or d not in dims)
        case ops.Linear():
            return (*(None if r is Dimension.OUT_CHANNEL else r for r in source.roles[:-1]), Dimension.OUT_CHANNEL)
        case ops.PerSample() | ops.Loss():
            return (None,) * rank
        case _:
            same = [s.roles for s in inputs if len(s.roles) == rank]
            return max(same, key=lambda roles: sum(r is not None for r in roles), default=(None,) * rank)


def _reshaped(groups: tuple[tuple[int, int, int, int], ...], source: TensorSpec, shape: tuple[int, ...]) -> Roles:
    """Return the roles behind a reshape: a dimension keeps its own; channels keep theirs when they join space."""
    roles: list[Dimension | None] = [None] * len(shape)
    for first, past, out, past_out in groups:
        alone = past - first == 1 and past_out - out == 1
        if alone or (source.roles[first] is Dimension.OUT_CHANNEL and past_out - out == 1):
            roles[out] = source.roles[first]
    return tuple(roles)


def _fill(roles: list[Dimension | None]) -> None:
    """Name what has no name yet where only one reading is left: samples first, space last."""
    rank = len(roles)
    space = SPACE.get(rank - 2, ())
    if roles[0] is Dimension.SAMPLE and rank > 1 and roles[1] is None and tuple(roles[2:]) == space:
        roles[1] = Dimension.OUT_CHANNEL
    seen: set[Dimension] = set()
    for dim, role in enumerate(roles):
        if role is not None and role in seen:
            roles[dim] = None
        elif role is not None:
            seen.add(role)
