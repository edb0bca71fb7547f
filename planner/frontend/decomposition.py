"""CNN-DNN by domain decomposition: a local CNN on each part of the image, a dense network on their class probabilities.

[Klawonn24] A. Klawonn, M. Lanser, J. Weber: A Domain Decomposition-Based CNN-DNN Architecture for Model Parallel
Training Applied to Image Recognition Problems. SIAM J. Sci. Comput. 46(5), 2024, arXiv:2302.06564. Follow-up, with the
coherent network: arXiv:2408.14442. The overlap is ours to define (``planner.ir.subdomains``): the papers' widths were
not available.

This changes the model. The local networks never see each other's activations, so nothing is exchanged between them;
the price is another network with another accuracy.
"""

import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from planner.errors import UsageError
from planner.frontend.source import load_callable
from planner.ir.region import Region
from planner.ir.subdomains import parse_grid, subdomains

Shape = tuple[int, ...]

Factory = Callable[[Shape], nn.Module]
"""From the shape of one sample, channels first, to a network that gives (N, K) class scores."""


@dataclass(frozen=True)
class Decomposition:
    """How images or volumes are cut.

    Attributes:
        input_shape: of one sample, channels first, with one to three dimensions of space.
        grid: number of parts in each dimension of space.
        overlap: pixels by which a part reaches over each inner boundary.

    Raises:
        UsageError: grid, overlap and shape do not fit each other.
    """

    input_shape: Shape
    grid: tuple[int, ...]
    overlap: int = 0

    def __post_init__(self) -> None:
        _ = self.regions  # refuses what does not fit

    @cached_property
    def regions(self) -> tuple[Region, ...]:
        """The part of every local network, row-major in the grid; coordinates of space, without channels."""
        return subdomains(self.input_shape[1:], self.grid, self.overlap)

    @property
    def local_shapes(self) -> tuple[Shape, ...]:
        """The shape of one sample of every local network, channels first."""
        return tuple((self.input_shape[0], *region.shape) for region in self.regions)

    def part(self, images: torch.Tensor, index: int) -> torch.Tensor:
        """Return what a local network sees of (N, C, *space) images: a view."""
        region = self.regions[index]
        return images[(slice(None), slice(None), *map(slice, region.start, region.stop))]

    def __str__(self) -> str:
        grid = "x".join(map(str, self.grid))
        return f"{grid} parts, " + (f"overlap {self.overlap}" if self.overlap else "disjoint")


class CnnDnn(nn.Module):
    """Local networks on the parts of the input, and a dense network on their joined class probabilities.

    Trained end to end it is the papers' coherent network; with local networks that were trained apart and then a dense
    network on their outputs, it is the CNN-DNN.

    Attributes:
        decomposition: of the input.
        nets: the local networks, row-major in the grid.
        coarse: from (N, parts * K) probabilities to (N, K) scores.
        num_classes: K.
        input_shape: of one sample, for ``layerwise plan``.
        changes_model: what a plan says of it.
    """

    def __init__(
        self, decomposition: Decomposition, nets: Sequence[nn.Module], coarse: nn.Module, num_classes: int
    ) -> None:
        super().__init__()
        self.decomposition, self.num_classes = decomposition, num_classes
        self.nets, self.coarse = nn.ModuleList(nets), coarse
        self.input_shape = decomposition.input_shape
        self.changes_model = (
            f"domain decomposition (CNN-DNN, {decomposition}): local networks that see a part of the input each, and a "
            "dense network on their class probabilities; not the network that sees the whole input"
        )

    def probabilities(self, images: torch.Tensor) -> torch.Tensor:
        """Return the (N, parts * K) class probabilities of all local networks for (N, C, *space) images."""
        scores = [net(self.decomposition.part(images, index)) for index, net in enumerate(self.nets)]
        return torch.cat([torch.softmax(score, 1) for score in scores], 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the (N, K) class scores of (N, C, *space) images."""
        found: torch.Tensor = self.coarse(self.probabilities(images))
        return found


def dense_network(num_features: int, num_classes: int, hidden: Sequence[int] = (64,)) -> nn.Sequential:
    """Return the coarse network: linear layers with ReLU between them.

    Args:
        num_features: parts * K.
        num_classes: K.
        hidden: sizes of the hidden layers.
    """
    sizes = [num_features, *hidden]
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], num_classes))


def local_network(factory: Factory, decomposition: Decomposition, index: int) -> nn.Module:
    """Return the untrained local network of a part, drawn from torch's current generator.

    Raises:
        UsageError: the factory raises for this shape, or does not give a module.
    """
    shape = decomposition.local_shapes[index]
    try:
        found = factory(shape)
    except Exception as error:
        raise UsageError(
            f"part {index} of {decomposition}: the factory of local networks raised {type(error).__name__} for an "
            f"input of shape {shape}: {error}"
        ) from error
    if not isinstance(found, nn.Module):
        raise UsageError(f"the factory of local networks returned a {type(found).__name__}, not a torch.nn.Module")
    return found


def num_classes_of(net: nn.Module, shape: Shape) -> int:
    """Return the number of classes that a network for samples of this shape scores; its state stays as it is.

    Raises:
        UsageError: it does not run on such a sample, or gives no (N, K) scores.
    """
    device = next((t.device for t in net.parameters()), torch.device("cpu"))
    try:
        with torch.no_grad():
            scores: Any = copy.deepcopy(net).eval()(torch.zeros((2, *shape), device=device))
    except Exception as error:
        raise UsageError(
            f"a local network does not run on samples of shape {shape}: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(scores, torch.Tensor) or scores.dim() != 2 or len(scores) != 2:
        found = tuple(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__
        raise UsageError(f"a local network must give class scores of shape (N, K); for N = 2 it gave {found}")
    return scores.shape[1]


def decomposed(
    cnn: str | Factory, shape: str | Shape, grid: str | tuple[int, ...] = "2x2", overlap: int = 0, hidden: str = "64"
) -> CnnDnn:
    """Return the coherent CNN-DNN with fresh weights; all arguments may be texts, so that it is a MODEL.

    Args:
        cnn: a factory, or ``package.module:callable`` or ``path/to/file.py:callable`` of one.
        shape: of one sample, such as ``1x32x32``.
        grid: of the parts, such as ``2x2``.
        overlap: pixels over each inner boundary.
        hidden: sizes of the coarse network's hidden layers, such as ``64`` or ``128x64``.

    Raises:
        UsageError: the parts do not fit each other, or the factory does not give local networks.

    Example:
        >>> # layerwise plan planner.frontend.decomposition:decomposed
        >>> #     --model-args cnn=examples/domain_decomposition/networks.py:small_cnn,shape=1x32x32,grid=2x2 ...
    """
    factory = load_callable(cnn, "factory of local networks") if isinstance(cnn, str) else cnn
    sizes = parse_grid(shape, "shape", "3x32x32") if isinstance(shape, str) else tuple(shape)
    found = Decomposition(sizes, parse_grid(str(grid)) if isinstance(grid, str | int) else tuple(grid), overlap)
    return assemble(found, [local_network(factory, found, i) for i in range(len(found.regions))], hidden)


def assemble(decomposition: Decomposition, nets: Sequence[nn.Module], hidden: str | Sequence[int] = (64,)) -> CnnDnn:
    """Return local networks with a fresh coarse network behind them.

    Raises:
        UsageError: they do not run on their parts, or score different numbers of classes.
    """
    classes = [num_classes_of(net, shape) for net, shape in zip(nets, decomposition.local_shapes, strict=True)]
    if len(set(classes)) > 1:
        raise UsageError(f"the local networks score different numbers of classes: {classes}")
    sizes = parse_grid(str(hidden), "hidden", "64 or 64x32") if isinstance(hidden, str | int) else tuple(hidden)
    return CnnDnn(decomposition, nets, dense_network(sum(classes), classes[0], sizes), classes[0])


def transfer(net: CnnDnn, local: Sequence[Mapping[str, torch.Tensor]], coarse: Mapping[str, torch.Tensor]) -> None:
    """Load trained weights, as the start values of end-to-end training or to use the CNN-DNN as it is.

    Args:
        net: gets copies of them.
        local: ``state_dict()`` of every local network.
        coarse: ``state_dict()`` of the coarse network.
    """
    for each, state in zip(net.nets, local, strict=True):
        each.load_state_dict(state)
    net.coarse.load_state_dict(coarse)


def averaged(probabilities: torch.Tensor, num_parts: int) -> torch.Tensor:
    """Return the (N, K) mean of the local networks' (N, parts * K) probabilities: the first baseline."""
    return _by_part(probabilities, num_parts).mean(1)


def majority(probabilities: torch.Tensor, num_parts: int) -> torch.Tensor:
    """Return the (N,) class that most local networks choose: the second baseline.

    Among classes with equally many votes it is the one with the largest mean probability.
    """
    shares = _by_part(probabilities, num_parts)
    votes = nn.functional.one_hot(shares.argmax(2), shares.shape[2]).sum(1)
    best = votes == votes.amax(1, keepdim=True)
    return shares.mean(1).masked_fill(~best, -math.inf).argmax(1)


def _by_part(probabilities: torch.Tensor, num_parts: int) -> torch.Tensor:
    """Return (N, parts, K) probabilities."""
    return probabilities.reshape(len(probabilities), num_parts, -1)
