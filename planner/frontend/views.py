"""Operators that move or pick elements: reshapes, permutations, slices, concatenations, padding, resizing."""

from typing import Any, Final

import torch
from torch import fx

from planner.frontend.calls import Call
from planner.ir import ops

_RESHAPES: Final = frozenset({"reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "ravel"})
_SLICES: Final = frozenset({"chunk", "split", "unbind", "tensor_split", "narrow", "select", "glu"})
_ALONG_ONE: Final = frozenset({
    "cumsum", "cumprod", "flip", "roll", "sort", "argsort", "topk", "normalize", "logcumsumexp", "repeat_interleave",
    "softmin",
})  # fmt: skip


def view_operator(call: Call) -> ops.Op | None:  # noqa: PLR0911  # a table of kinds
    """Return the operator of a function that moves or picks elements; None where it is no such function."""
    name, rank = call.name, len(call.shape)
    if name in _RESHAPES:
        return reshape(call)
    if name == "cat":
        dim = call.node.kwargs.get("dim", call.node.kwargs.get("axis", (*call.node.args, 0)[1]))
        return ops.Concat(dim % rank) if isinstance(dim, int) else None
    if name in {"transpose", "permute", "t"}:
        return _permutation(call)
    if name == "getitem":
        return _index(call)
    if name in _SLICES or name in _ALONG_ONE:
        return _along(call)
    if name in {"pad", "constant_pad_nd"}:
        return padding(call)
    if name in {"pixel_shuffle", "pixel_unshuffle"} and rank == 4:
        wide, narrow = sorted((call.source[2], call.shape[2]), reverse=True)
        return ops.PixelShuffle(wide // narrow, unshuffle=name == "pixel_unshuffle")
    if name in {"interpolate", "upsample"}:
        size, scale, mode, align, recomputes, antialias = call.arguments(
            size=None, scale_factor=None, mode="nearest", align_corners=None, recompute_scale_factor=None,
            antialias=False,
        )  # fmt: skip
        return None if antialias else interpolation(call, mode, align, None if recomputes else scale, size)
    return None


def reshape(call: Call) -> ops.Op:
    """Return how a call joins and divides dimensions."""
    if call.source == call.shape:
        return ops.Elementwise("identity")
    return ops.Reshape(reshape_groups(call.source, call.shape))


def reshape_groups(before: tuple[int, ...], after: tuple[int, ...]) -> tuple[tuple[int, int, int, int], ...]:
    """Return the smallest ranges of dimensions of both shapes that hold the same elements; sizes of 1 apart."""
    groups = []
    i = j = 0
    while i < len(before) and j < len(after):
        if before[i] == 1 and after[j] != 1:
            i += 1
            continue
        if after[j] == 1 and before[i] != 1:
            j += 1
            continue
        a, b, first, out = before[i], after[j], i, j
        i, j = i + 1, j + 1
        while a != b:
            if a < b:
                a *= before[i]
                i += 1
            else:
                b *= after[j]
                j += 1
        groups.append((first, i, out, j))
    return tuple(groups)


def _permutation(call: Call) -> ops.Op | None:
    """Return the order of dimensions, found by moving numbers in place of sizes."""
    rank = len(call.source)
    marks = torch.empty(tuple(range(2, rank + 2)), device="meta")
    arguments = [marks if a is call.tensors[0] else a for a in call.node.args]
    target: Any = getattr(marks, str(call.node.target)) if call.node.op == "call_method" else call.node.target
    try:
        moved = target(*(arguments[1:] if call.node.op == "call_method" else arguments), **call.node.kwargs)
    except (TypeError, RuntimeError):
        return None
    return ops.Permute(tuple(size - 2 for size in moved.shape)) if moved.dim() == rank else None


def _index(call: Call) -> ops.Op | None:
    """Return the dimensions that an index touches; None where it is more than slices."""
    value = call.node.args[0]
    if isinstance(value, fx.Node) and not isinstance(value.meta["val"], torch.Tensor):
        return ops.Elementwise("identity")  # one of several results
    index = call.node.args[1]
    items = index if isinstance(index, tuple) else (index,)
    rank = len(call.source)
    if any(not isinstance(i, slice | int | type(None) | type(...)) for i in items) or len(call.shape) != rank:
        return None
    if any(i is None or isinstance(i, int) for i in items):
        return None
    if ... in items:
        at = items.index(...)
        items = (*items[:at], *[slice(None)] * (rank - len(items) + 1), *items[at + 1 :])
    touched = [d for d, i in enumerate(items) if i != slice(None)]
    return ops.Along("slice", tuple(touched)) if touched else ops.Elementwise("identity")


def _along(call: Call) -> ops.Op | None:
    places = {
        "chunk": 1, "split": 1, "unbind": 0, "tensor_split": 1, "narrow": 0, "select": 0, "glu": 0, "roll": 1,
        "topk": 1, "repeat_interleave": 1, "normalize": 1,
    }  # fmt: skip
    defaults = {"chunk": 0, "split": 0, "unbind": 0, "tensor_split": 0, "normalize": 1, "glu": -1, "sort": -1}
    place = places.get(call.name, 0) + 1
    given = call.node.args[place] if len(call.node.args) > place else defaults.get(call.name)
    dims = call.node.kwargs.get("dim", call.node.kwargs.get("dims", given))
    if call.name == "flip" and isinstance(dims, int):
        dims = call.node.args[1:]  # as many as the user likes
    listed = dims if isinstance(dims, tuple | list) else (dims,)
    rank = len(call.source)
    over = tuple(sorted(d % rank for d in listed if isinstance(d, int)))
    if len(over) != len(listed) or call.name in {"unbind", "select"} or len(call.shape) != rank:
        return None
    return ops.Along("slice" if call.name in _SLICES - {"glu"} else call.name, over)


def padding(call: Call) -> ops.Op | None:
    """Return which dimensions a call pads."""
    (given,) = call.arguments(pad=None)
    widths = getattr(call.module, "padding", given)
    rank = len(call.source)
    if isinstance(widths, tuple | list) and len(widths) <= 2 * rank:
        touched = sorted(rank - 1 - k // 2 for k in range(0, len(widths), 2) if tuple(widths[k : k + 2]) != (0, 0))
    else:
        touched = [d for d, (a, b) in enumerate(zip(call.source, call.shape, strict=True)) if a != b]
    return ops.Along("pad", tuple(touched)) if touched else ops.Elementwise("identity")


def interpolation(call: Call, mode: str, align: Any, scale: Any, size: Any) -> ops.Op | None:
    """Return how a call resizes space, from the arguments of ``torch.nn.functional.interpolate``."""
    kind = {"bilinear": "linear", "trilinear": "linear", "bicubic": "cubic"}.get(mode, mode)
    spatial = len(call.shape) - 2
    scales = None if scale is None or size is not None else tuple(map(float, each(scale, spatial)))
    return ops.Interpolate(kind, bool(align), scales)  # type: ignore[arg-type]  # torch knows no other modes


def each(value: Any, count: int) -> tuple[int, ...]:
    """Return an argument for every dimension of space, where one number may stand for all."""
    if isinstance(value, tuple | list):
        return tuple(value) if len(value) == count else tuple(value) * count
    return (value,) * count
