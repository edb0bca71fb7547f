"""Rules for modules of the user's own: one operator each, split as the user says."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import nn

from planner.errors import UsageError
from planner.ir.dimension import SPATIAL_DIMENSIONS, Dimension

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CustomRule:
    """How a module of the user's can be split beside samples.

    Attributes:
        dimensions: cut alike in every input and in the output.
        channel_params: of parameters and buffers that follow the channels, the dimension that does, by name.
        output_shape: from the shapes of the inputs to that of the output; None where ``forward`` runs on
            meta tensors.
        forward_flop: from the same shapes to the FLOP of the forward pass; backward counts twice.
    """

    dimensions: tuple[Dimension, ...]
    channel_params: Mapping[str, int]
    output_shape: Callable[..., Shape] | None
    forward_flop: Callable[..., int] | None


_RULES: dict[type[nn.Module], CustomRule] = {}


def register_module(
    module: type[nn.Module],
    *,
    dimensions: tuple[str, ...] = (),
    channel_params: Mapping[str, int] = MappingProxyType({}),
    output_shape: Callable[..., Shape] | None = None,
    forward_flop: Callable[..., int] | None = None,
) -> None:
    """Make a class of modules one operator, and say how it may be split.

    Its ``forward`` is not traced, so it may do anything that treats each sample alone: loops over
    values, own kernels. It takes tensors with the samples in their first dimension and returns one.

    Args:
        module: the class.
        dimensions: beside samples, what may be split: ``out_channel`` where every channel of the
            output depends on the same channel of the inputs only.
        channel_params: for a module split by channel: of each parameter and buffer that holds one
            slice per channel, by name, the dimension of the channels. A rank gets its slices; all others
            are whole on every rank.
        output_shape: from the shapes of the inputs, batch included, to the shape of the output. Needed
            where ``forward`` looks at values or has kernels of its own, so that it cannot run on meta tensors.
        forward_flop: from the same shapes to the FLOP of the forward pass, where meta tensors cannot
            tell them; backward counts twice as much.

    Raises:
        UsageError: unknown dimension.

    Example:
        >>> register_module(MyGate, dimensions=("out_channel",), channel_params={"scale": 0},
        ...                 output_shape=lambda x: x)
    """
    allowed = {str(Dimension.OUT_CHANNEL)}
    if unknown := [d for d in dimensions if d not in allowed]:
        space = ", ".join(sorted(SPATIAL_DIMENSIONS))
        raise UsageError(
            f"{module.__name__} cannot be split by {unknown}: a rule of your own may name {sorted(allowed)}; "
            f"samples always may, space ({space}) not yet"
        )
    _RULES[module] = CustomRule(
        tuple(Dimension(d) for d in dimensions), dict(channel_params), output_shape, forward_flop
    )


def is_custom(module: type[nn.Module]) -> bool:
    """Return whether a class of modules was registered."""
    return module in _RULES


def custom_rule(module: type[nn.Module]) -> CustomRule:
    """Return the rule of a registered class."""
    return _RULES[module]
