"""The normalised non-linear unit of Habib & Qureshi (2022): the heat kernel at time a, as an activation.

    u_a(x)   = 1 / (2 sqrt(pi a)) exp(-x^2 / (4a))              (1)
    u_a'(x)  = -x / (2a) u_a(x)                                 (2)
    u_a''(x) = (x^2 - 2a) / (4 a^2) u_a(x)                      (3)

Eq. 3 is printed with the numerator -x^2 + 2a: its sign is wrong, or a minus in front of it was lost. Of what the text
says of u, much is not so: u is positive everywhere ("takes both negative and positive values"), even
("anti-symmetric"), goes to 0 for large inputs of either sign together with u' ("non-saturated"), has u'(0) = 0, and
its standard deviation is sqrt(2a), not a.
"""

import math

import torch
from torch import nn

from planner.errors import UsageError


class NNLU(nn.Module):
    """Applies u_a to each element, by operators that torch differentiates: gradients are exactly eq. 2.

    Args:
        alpha: a, positive; the paper uses 0.333.

    Raises:
        UsageError: ``alpha`` is not positive.
    """

    def __init__(self, alpha: float = 0.333):
        super().__init__()
        if alpha <= 0:
            raise UsageError(f"alpha is {alpha}; the heat kernel needs a positive time")
        self.alpha = alpha

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.exp(x.square() * (-0.25 / self.alpha)) * (0.5 / math.sqrt(math.pi * self.alpha))

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"


def slope(x: torch.Tensor, alpha: float) -> torch.Tensor:
    """Return u_a', eq. 2 as printed."""
    return -x / (4 * math.sqrt(math.pi) * alpha**1.5) * torch.exp(-(x**2) / (4 * alpha))


def curvature(x: torch.Tensor, alpha: float) -> torch.Tensor:
    """Return u_a'', eq. 3 with its sign corrected."""
    return (x**2 - 2 * alpha) / (8 * math.sqrt(math.pi) * alpha**2.5) * torch.exp(-(x**2) / (4 * alpha))
