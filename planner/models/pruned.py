"""A pruned network: weights under masks of ``torch.nn.utils.prune``, which stay zero in training [Han15]."""

from typing import Final

from torch import nn
from torch.nn.utils import prune

from planner.models.hypar import lenet_c

KEPT: Final = (0.66, 0.12, 0.08, 0.19)
"""Of the weights of the two convolutions and the two linear layers [Han15, Table 4]: 36 thousand of 431 thousand."""


def pruned_lenet(width: float = 1.0, num_classes: int = 10) -> nn.Sequential:
    """Return Caffe's LeNet with the smallest weights of each layer masked, as [Han15] retrains it.

    Each layer has ``weight_orig`` (the parameter) and ``weight_mask`` (a buffer); their product is computed in front of
    every forward pass.

    Args:
        width: factor on all channels and hidden features.
        num_classes: of the images.
    """
    model = lenet_c(width, num_classes)
    products = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    for module, kept in zip(products, KEPT, strict=True):
        prune.l1_unstructured(module, "weight", amount=1 - kept)
    return model
