"""Times single layers on the shapes of one device's piece, from their profile keys alone."""

import functools
import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional

from planner.measure.clock import synchronize, time_phases
from planner.profile.table import Measurement

_Shape = tuple[int, ...]
_Named = tuple[str, dict[str, Any]]
"""Kind and attributes of an operator."""
_Forward = Callable[[list[torch.Tensor], list[torch.Tensor]], torch.Tensor]


def measure_layers(keys: Iterable[str], device: torch.device) -> dict[str, Measurement]:
    """Return the times of the layers behind these ``LocalLayer.key``; those without an own kernel are left out."""
    found = {}
    for key in keys:
        measurement = measure_layer(key, device)
        if measurement is not None:
            found[key] = measurement
    return found


def median_over_ranks(times: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, Measurement]:
    """Join what several ranks timed at once: forward, backward and inter-quartile seconds, repeats."""
    found = {}
    for key in times[0]:
        rows = list(zip(*(rank[key] for rank in times), strict=True))
        forward_s, backward_s, iqr_s = (statistics.median(row) for row in rows[:3])
        found[key] = Measurement(forward_s, backward_s, iqr_s, int(rows[3][0]))
    return found


def measure_layer(key: str, device: torch.device) -> Measurement | None:
    """Return the time of one layer, or None for layers that compute nothing."""
    (kind, op), absorbed, shapes, output, dtype_name, input_gradient = _parsed(key)
    forward = _operator(kind, op, output)
    if forward is None:
        return None
    dtype = getattr(torch, dtype_name)
    generator = torch.Generator(device=device).manual_seed(0)

    def random(shape: _Shape, *, gradient: bool) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype).requires_grad_(gradient)

    inputs = [random(shape, gradient=input_gradient) for shape in shapes]
    params = [random(shape, gradient=True) for shape in _param_shapes(kind, op, shapes, output)]
    tail, tail_params = _absorbed(absorbed, output, random)
    result = random(output, gradient=False) if output else torch.ones((), dtype=dtype, device=device)

    def once() -> tuple[float, float]:
        for tensor in (*inputs, *params, *tail_params):
            tensor.grad = None
        synchronize(device)
        start = time.perf_counter()
        y = tail(forward(inputs, params))
        synchronize(device)
        middle = time.perf_counter()
        if y.requires_grad:
            y.backward(result)
            synchronize(device)
        return middle - start, time.perf_counter() - middle

    ahead, back = time_phases(once)
    return Measurement(ahead.median_s, back.median_s, ahead.iqr_s + back.iqr_s, ahead.num_samples)


def _parsed(key: str) -> tuple[_Named, list[_Named], list[_Shape], _Shape, str, bool]:
    kind, op, absorbed, shapes, output, dtype, input_gradient = json.loads(key)
    return (
        (kind, op), [(k, o) for k, o in absorbed], [tuple(s) for s in shapes], tuple(output), dtype, input_gradient,
    )  # fmt: skip


def _param_shapes(kind: str, op: dict[str, Any], shapes: list[_Shape], output: _Shape) -> list[_Shape]:
    match kind:
        case "conv":
            return [(output[1], shapes[0][1] // op["groups"], *op["kernel"]), (output[1],)]
        case "linear":
            return [(output[-1], shapes[0][-1]), (output[-1],)]
        case "batch_norm":
            return [(output[1],), (output[1],)]
        case _:
            return []


def _operator(kind: str, op: dict[str, Any], output: _Shape) -> _Forward | None:  # noqa: PLR0911  # a table of kinds
    spatial = len(output) - 2
    match kind:
        case "conv":
            convolve = [functional.conv1d, functional.conv2d, functional.conv3d][spatial - 1]
            return lambda x, p: convolve(x[0], p[0], p[1], op["stride"], op["padding"], op["dilation"], op["groups"])
        case "linear":
            return lambda x, p: functional.linear(x[0], p[0], p[1])
        case "batch_norm":
            return lambda x, p: _norm(p[0], p[1], x[0])
        case "pool":
            return _pool(op, spatial)
        case "adaptive_pool":
            return lambda x, _: _adaptive(op, spatial)(x[0])
        case "elementwise":
            return lambda x, p: x[0] + x[1] if len(x) > 1 else functional.relu(x[0])  # noqa: ARG005
        case "concat":
            return lambda x, p: torch.cat(x, op["dim"])  # noqa: ARG005
        case "softmax":
            return lambda x, p: functional.log_softmax(x[0], op["dim"])  # noqa: ARG005
        case _:
            return None


def _pool(op: dict[str, Any], spatial: int) -> _Forward:
    kernel, stride, padding, ceil_mode = op["kernel"], op["stride"], op["padding"], op["ceil_mode"]
    if op["function"] == "max":
        pool = [functional.max_pool1d, functional.max_pool2d, functional.max_pool3d][spatial - 1]
        return lambda x, p: pool(x[0], kernel, stride, padding, op["dilation"], ceil_mode)  # noqa: ARG005
    average = [functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d][spatial - 1]
    return lambda x, p: average(x[0], kernel, stride, padding, ceil_mode)  # noqa: ARG005


def _adaptive(op: dict[str, Any], spatial: int) -> Callable[[torch.Tensor], torch.Tensor]:
    if not op["output_size"]:
        return lambda x: x.mean(tuple(range(2, x.dim())))
    average = [
        functional.adaptive_avg_pool1d,
        functional.adaptive_avg_pool2d,
        functional.adaptive_avg_pool3d,
    ]
    largest = [
        functional.adaptive_max_pool1d,
        functional.adaptive_max_pool2d,
        functional.adaptive_max_pool3d,
    ]
    pool = (average if op["function"] == "avg" else largest)[spatial - 1]
    return lambda x: pool(x, op["output_size"])


def _norm(weight: torch.Tensor, bias: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return functional.batch_norm(y, None, None, weight, bias, True)


def _absorbed(
    operators: list[tuple[str, dict[str, Any]]], output: _Shape, random: Callable[..., torch.Tensor]
) -> tuple[Callable[[torch.Tensor], torch.Tensor], list[torch.Tensor]]:
    params: list[torch.Tensor] = []
    calls: list[Callable[[torch.Tensor], torch.Tensor]] = []
    for kind, op in operators:
        if kind == "batch_norm":
            weight, bias = random((output[1],), gradient=True), random((output[1],), gradient=True)
            params += [weight, bias]
            calls.append(functools.partial(_norm, weight, bias))
        elif kind == "dropout":
            calls.append(functools.partial(functional.dropout, p=op["probability"]))
        elif op.get("function") != "identity":
            calls.append(functional.relu)

    def tail(y: torch.Tensor) -> torch.Tensor:
        for call in calls:
            y = call(y)
        return y

    return tail, params
