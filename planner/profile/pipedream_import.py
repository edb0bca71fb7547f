"""A PipeDream profile as a device profile: operators and shapes from what its lines say of modules and bytes.

The file has no shapes. The last linear layer gives the batch, the bytes of the input its height and width, which are
taken as equal, and the modules the rest; the bytes of every result must agree. Elements have four bytes.

Backward is one time in the file, of inputs and weights together. The profile has two phases, so that time is halved
where both are computed; the sum is what was measured. The layers that read the input have no gradient of it.
Equal layers become one entry, the median of their times.
"""

import ast
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from planner.errors import FormatError, shortened
from planner.ir.canonical import decode
from planner.ir.ops import BatchNorm, Conv, Elementwise, Linear, Op, Pool
from planner.profile.file import MAX_SIZE, Entry, LayerKey
from planner.profile.foreign import Foreign
from planner.profile.key import PieceKey
from planner.profile.pipedream import WHAT, MeasuredLayer, PipeDreamProfile, read_pipedream

_ITEM_BYTES: Final = 4
MAX_CHARACTERS: Final = 2000
"""Of a module as torch prints it."""
_NOTES: Final = (
    "A profile of PipeDream's profiler (msr-fiddle/pipedream). Backward is one time in the file; where inputs and "
    "weights both have a gradient it is halved between them. Shapes are inferred from the bytes of the results. Layers "
    "were timed one by one, each with a synchronisation."
)
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Module:
    """A module as torch prints it: ``Conv2d(3, 64, kernel_size=(3, 3), ...)``."""

    kind: str
    arguments: tuple[object, ...]
    options: Mapping[str, object]

    @classmethod
    def of(cls, description: str) -> "_Module":
        try:
            if len(description) > MAX_CHARACTERS:
                raise ValueError
            call = ast.parse(description, mode="eval").body
            if isinstance(call, ast.Name):
                return cls(call.id, (), {})
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
                raise ValueError
            arguments = tuple(ast.literal_eval(a) for a in call.args if not isinstance(a, ast.Name))
            options = {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg is not None}
        except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):  # the last two: brackets in brackets
            raise ValueError(f"{shortened(repr(description))} is no module as torch prints it") from None
        return cls(call.func.id, arguments, options)

    def size(self, name: str, at: int | None = None, default: int | None = None) -> int:
        found = self.options.get(name, self.arguments[at] if at is not None and at < len(self.arguments) else default)
        if not isinstance(found, int) or isinstance(found, bool) or not 1 <= found <= MAX_SIZE:
            raise ValueError(f"{self.kind}: {name} is missing or no whole number from 1")
        return found

    def pair(self, name: str, default: object = None) -> tuple[int, int]:
        found = self.options.get(name, default)
        found = (found, found) if isinstance(found, int) else found
        least = int(name != "padding")
        if not (
            isinstance(found, tuple) and len(found) == 2
            and all(isinstance(x, int) and least <= x <= MAX_SIZE for x in found)
        ):  # fmt: skip
            raise ValueError(f"{self.kind}: {name} is missing or no pair of whole numbers from {least}")
        return found


@dataclass(frozen=True, slots=True)
class _Piece:
    """The operator of a layer; None for one that only hands on what it reads, or has no kind here."""

    op: Op | None
    output: Shape
    bias: bool | None = None
    trains: bool = False


def import_pipedream(path: Path, device: str | None = None) -> Foreign:
    """Return the layers of a profile that took time and whose operator has a kind here.

    Args:
        path: the profile.
        device: that was measured; the file does not say.

    Raises:
        UsageError: the file cannot be read.
        FormatError: it is no such profile, or its modules do not fit its bytes.
    """
    return Foreign(device or "", entries_of(read_pipedream(path), f"{WHAT} {path}"), _NOTES)


def entries_of(profile: PipeDreamProfile, what: str = WHAT) -> tuple[Entry, ...]:
    """Return the entries of a profile, each key once; ``what`` names the profile in messages.

    Raises:
        FormatError: as ``import_pipedream``.
    """
    problems: list[tuple[str, str]] = []
    shapes: list[Shape] = []
    times: dict[PieceKey, list[tuple[float, float]]] = {}
    try:
        modules = _modules(profile.layers)
        start = _input_shape(profile, modules)
    except ValueError as error:
        raise FormatError(what, [("the file", str(error))]) from None
    for layer, module in zip(profile.layers, modules, strict=True):
        inputs = [shapes[i] for i in layer.reads] or [start]
        try:
            piece = _piece(module, inputs)
            _refuse_bytes(layer, piece)
        except ValueError as error:
            problems.append((f"{layer.place}, {layer.name}", str(error)))
            break  # the shapes behind it are unknown
        shapes.append(piece.output)
        if piece.op is not None and layer.forward_s > 0:
            key = PieceKey(
                piece.op, (), tuple(inputs), piece.output,
                input_gradient=bool(layer.reads), weight_gradient=piece.trains, bias=piece.bias,
                synchronised=False if isinstance(piece.op, BatchNorm) else None,
            )  # fmt: skip
            times.setdefault(key, []).append((layer.forward_s, layer.backward_s))
    if problems:
        raise FormatError(what, problems)
    return tuple(_entry(key, found, what) for key, found in times.items())


def _entry(key: PieceKey, times: Sequence[tuple[float, float]], what: str) -> Entry:
    forward_s, backward_s = (statistics.median(of) for of in zip(*times, strict=True))
    low, high = np.percentile(times, [25, 75], axis=0)
    both = key.input_gradient and key.weight_gradient
    return Entry(
        layer=decode(LayerKey, key.text, f"{what}, a layer of it"),
        forward_s=forward_s,
        backward_data_s=backward_s / 2 if both else backward_s if key.input_gradient else 0.0,
        backward_weight_s=backward_s / 2 if both else backward_s if key.weight_gradient else 0.0,
        iqr_s=float((high - low).sum()),
        num_repeats=len(times),
    )


def _modules(layers: Sequence[MeasuredLayer]) -> list[_Module]:
    found = []
    for layer in layers:
        try:
            found.append(_Module.of(layer.description))
        except ValueError as error:
            raise ValueError(f"{layer.place}, {layer.name}: {error}") from None
    return found


def _input_shape(profile: PipeDreamProfile, modules: Sequence[_Module]) -> Shape:
    """Return the shape of the mini-batch: (N, C, H, H)."""
    linear = next((i for i in reversed(range(len(modules))) if modules[i].kind == "Linear"), None)
    if linear is None:
        raise ValueError("without a Linear layer nothing tells the batch")
    batch = profile.layers[linear].output_bytes / _ITEM_BYTES / modules[linear].size("out_features", 1)
    first = next((m for m, x in zip(modules, profile.layers, strict=True) if m.kind == "Conv2d" and not x.reads), None)
    if first is None or not profile.input_bytes:
        raise ValueError("no Input is read by a Conv2d: nothing tells the size of the images")
    channels = first.size("in_channels", 0)
    height = math.sqrt(profile.input_bytes / _ITEM_BYTES / batch / channels)
    if not (batch.is_integer() and height.is_integer()):
        raise ValueError(
            f"an input of {profile.input_bytes:.0f} bytes is no batch of {batch:g} square images of {channels} channels"
        )
    return int(batch), channels, int(height), int(height)


def _refuse_bytes(layer: MeasuredLayer, piece: _Piece) -> None:
    expected = math.prod(piece.output) * _ITEM_BYTES
    if layer.output_bytes != expected:
        raise ValueError(
            f"{layer.description.split('(')[0]} gives {piece.output}, which is {expected} bytes; the file says "
            f"{layer.output_bytes:.0f}"
        )


def _piece(module: _Module, inputs: Sequence[Shape]) -> _Piece:
    if module.kind not in _KINDS:
        raise ValueError(f"{module.kind} is none of {', '.join(_KINDS)}")
    return _KINDS[module.kind](module, inputs)


def _conv(module: _Module, inputs: Sequence[Shape]) -> _Piece:
    kernel, stride = module.pair("kernel_size"), module.pair("stride", 1)
    padding, dilation = module.pair("padding", 0), module.pair("dilation", 1)
    channels, results, groups = (
        module.size("in_channels", 0),
        module.size("out_channels", 1),
        module.size("groups", None, 1),
    )
    (batch, found, *space) = _image(module, inputs)
    if found != channels:
        raise ValueError(f"Conv2d of {channels} channels reads {found}")
    op = Conv(channels, results, kernel, stride, padding, dilation, groups)
    output = (batch, results, *_windows(space, kernel, stride, padding, dilation))
    return _Piece(op, output, bias=module.options.get("bias", True) is True, trains=True)


def _linear(module: _Module, inputs: Sequence[Shape]) -> _Piece:
    features, results = module.size("in_features", 0), module.size("out_features", 1)
    if inputs[0][-1] != features:
        raise ValueError(f"Linear of {features} features reads {inputs[0][-1]}")
    output = (*inputs[0][:-1], results)
    return _Piece(Linear(features, results), output, bias=module.options.get("bias", True) is True, trains=True)


def _pool(module: _Module, inputs: Sequence[Shape]) -> _Piece:
    kernel = module.pair("kernel_size")
    stride, padding, dilation = module.pair("stride", kernel), module.pair("padding", 0), module.pair("dilation", 1)
    if module.options.get("ceil_mode"):
        raise ValueError(f"{module.kind} with ceil_mode is not known here")
    batch, channels, *space = _image(module, inputs)
    output = (batch, channels, *_windows(space, kernel, stride, padding, dilation))
    return _Piece(Pool("max" if module.kind == "MaxPool2d" else "avg", kernel, stride, padding, dilation), output)


def _batch_norm(module: _Module, inputs: Sequence[Shape]) -> _Piece:
    return _Piece(BatchNorm(_image(module, inputs)[1]), inputs[0], trains=module.options.get("affine", True) is True)


def _relu(_: _Module, inputs: Sequence[Shape]) -> _Piece:
    return _Piece(Elementwise("relu"), inputs[0])


def _add(_: _Module, inputs: Sequence[Shape]) -> _Piece:
    return _Piece(Elementwise("add"), inputs[0])


def _dropout(_: _Module, inputs: Sequence[Shape]) -> _Piece:
    return _Piece(None, inputs[0])


def _view(_: _Module, inputs: Sequence[Shape]) -> _Piece:
    whole = max(inputs, key=math.prod)  # the other input is a size
    return _Piece(None, (whole[0], math.prod(whole[1:])))


def _size(_module: _Module, _inputs: Sequence[Shape]) -> _Piece:
    return _Piece(None, (1,))


_KINDS: Final[Mapping[str, Callable[[_Module, Sequence[Shape]], _Piece]]] = {
    "Conv2d": _conv,
    "Linear": _linear,
    "MaxPool2d": _pool,
    "AvgPool2d": _pool,
    "BatchNorm2d": _batch_norm,
    "ReLU": _relu,
    "Add": _add,
    "Dropout": _dropout,
    "View": _view,
    "Size": _size,
}


def _image(module: _Module, inputs: Sequence[Shape]) -> Shape:
    if len(inputs[0]) != 4:
        raise ValueError(f"{module.kind} reads {inputs[0]}, which is no batch of images")
    return inputs[0]


def _windows(space: Sequence[int], *window: Sequence[int]) -> tuple[int, ...]:
    """Return the output's height and width; the window is kernel, stride, padding and dilation."""
    found = tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip(space, *window, strict=True))
    if min(found) < 1:
        raise ValueError("the kernel is larger than the padded input")
    return found
