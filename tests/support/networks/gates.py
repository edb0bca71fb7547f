"""Networks with gates, shuffles, splits and random paths."""

import math

import torch
from torch import nn
from torch.nn import functional

from support.networks.network import CLASSES, Network, block, classifier, image


class SqueezeExcite(nn.Module):
    """A gate per channel, from global averages."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = block(3, 8)
        self.reduce, self.expand = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)
        self.head = classifier(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        gate = functional.adaptive_avg_pool2d(x, 1)
        gate = self.expand(functional.silu(self.reduce(gate), inplace=True))
        return self.head(x * functional.hardsigmoid(gate))


class Cbam(nn.Module):
    """A gate per channel and one per pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = block(3, 8)
        self.shared = nn.Sequential(nn.Linear(8, 2), nn.ReLU(), nn.Linear(2, 8))
        self.spatial = nn.Conv2d(2, 1, 7, padding=3, bias=False)
        self.head = classifier(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        batch, channels, _, _ = x.size()
        average = self.shared(x.mean([2, 3]))
        highest = self.shared(functional.adaptive_max_pool2d(x, 1).view(batch, channels))
        x = x * torch.sigmoid(average + highest).view(batch, channels, 1, 1).expand_as(x)
        pooled = torch.cat([x.mean(1, keepdim=True), torch.max(x, dim=1, keepdim=True)[0]], dim=1)
        return self.head(x * torch.sigmoid(self.spatial(pooled)))


class Eca(nn.Module):
    """A gate per channel by a convolution over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gate = block(3, 8), nn.Conv1d(1, 1, 3, padding=1, bias=False)
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), classifier(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        y = self.pool(x)
        y = self.gate(y.squeeze(-1).transpose(-1, -2)).transpose(-1, -2).unsqueeze(-1)
        return self.head(x * y.sigmoid().expand_as(x))


class CoordinateGate(nn.Module):
    """Gates along rows and columns that share a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.squeeze = block(3, 8), nn.Sequential(nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4), nn.Hardswish())
        self.rows, self.columns = nn.Conv2d(4, 8, 1), nn.Conv2d(4, 8, 1)
        self.head = classifier(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        _, _, height, width = x.shape
        rows = functional.adaptive_avg_pool2d(x, (None, 1))
        columns = functional.adaptive_avg_pool2d(x, (1, None)).permute(0, 1, 3, 2)
        rows, columns = torch.split(self.squeeze(torch.cat([rows, columns], dim=2)), [height, width], dim=2)
        return self.head(x * self.rows(rows).sigmoid() * self.columns(columns.permute(0, 1, 3, 2)).sigmoid())


class SelectiveKernel(nn.Module):
    """Branches of different kernels, summed with weights that a softmax over branches gives."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList([nn.Conv2d(3, 8, k, padding=k // 2) for k in (1, 3, 5)])
        self.reduce, self.expand = nn.Linear(8, 4), nn.Linear(4, 24)
        self.head = classifier(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = torch.stack([branch(x) for branch in self.branches], dim=1)
        squeezed = self.reduce(features.sum(1).mean((-1, -2))).relu()
        weights = self.expand(squeezed).view(x.shape[0], 3, 8, 1, 1)
        return self.head((features * torch.softmax(weights, dim=1)).sum(dim=1))


class NonLocal(nn.Module):
    """Attention between all pixels, with matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = block(3, 8)
        self.theta, self.phi, self.value = (nn.Conv2d(8, 4, 1) for _ in range(3))
        self.out, self.gamma = nn.Conv2d(4, 8, 1), nn.Parameter(torch.full((1,), 0.5))
        self.head = classifier(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        batch, _, *sizes = x.shape
        query = self.theta(x).view(batch, 4, -1).permute(0, 2, 1)
        key = functional.max_pool2d(self.phi(x), 2).flatten(2)
        value = functional.max_pool2d(self.value(x), 2).flatten(2).transpose(1, 2)
        attention = functional.softmax(torch.bmm(query, key), dim=-1)
        y = torch.matmul(attention, value).transpose(1, 2).contiguous().view(batch, 4, *sizes)
        return self.head(x + self.gamma * self.out(y))


class ShuffleNet(nn.Module):
    """Grouped convolutions with a channel shuffle; a unit that passes half of the channels on."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grouped = block(3, 8), nn.Conv2d(8, 8, 1, groups=4)
        self.branch = nn.Sequential(
            nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.ReLU(inplace=True)
        )
        self.shuffle, self.head = nn.ChannelShuffle(4), classifier(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.shuffle(self.grouped(self.stem(x)))
        first, second = x.chunk(2, 1)
        x = torch.cat((first, self.branch(second)), dim=1)
        batch, channels, height, width = x.size()
        x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2).contiguous()
        return self.head(x.view(batch, -1, height, width))


class Split(nn.Module):
    """Channels in unequal parts, each with its own way (Res2Net, CSP), and gated linear units."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.parts = nn.ModuleList([nn.Conv2d(c, 4, 3, padding=1) for c in (6, 4)])
        self.gated, self.head = nn.Conv2d(10, 16, 1), classifier(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b, kept = torch.split(self.stem(x), [6, 4, 2], dim=1)
        y = self.parts[0](a)
        z = self.parts[1](b + y)
        x = functional.glu(self.gated(torch.cat([y, z, kept], 1)), dim=1)
        first, *_, last = x.unbind(1)
        return self.head(x) + (first * last).mean((1, 2))[:, None]


class Maxout(nn.Module):
    """Concatenated ReLU and its negative, maximum over groups of channels, and a maximum with itself shifted."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.point, self.head = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(12, 16, 1), classifier(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        x = self.point(torch.cat((x, -x), 1).clamp(min=0))
        x, _ = x.view(x.shape[0], 8, 2, *x.shape[2:]).max(dim=2)
        return self.head(torch.maximum(x, torch.roll(x, shifts=(1, -1), dims=(2, 3))) - x.min(1, keepdim=True).values)


def drop_path(x: torch.Tensor, probability: float, training: bool) -> torch.Tensor:
    """Drop whole samples, as timm does."""
    if probability == 0.0 or not training:
        return x
    keep = 1 - probability
    mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
    if keep > 0.0:
        mask.div_(keep)
    return x * mask


def stochastic_depth(x: torch.Tensor, probability: float, training: bool) -> torch.Tensor:
    """Drop whole samples, as torchvision does."""
    if not training:
        return x
    survival = 1.0 - probability
    size = [x.shape[0]] + [1] * (x.ndim - 1)
    noise = torch.empty(size, dtype=x.dtype, device=x.device)
    return x * noise.bernoulli_(survival).div_(survival)


def bernoulli_gate(x: torch.Tensor, probability: float, training: bool) -> torch.Tensor:
    """Drop whole samples, as the first EfficientNets in torch did."""
    if not training:
        return x
    random = 1 - probability + torch.rand([x.shape[0], 1, 1, 1], dtype=x.dtype, device=x.device)
    return x / (1 - probability) * torch.floor(random)


class StochasticDepth(nn.Module):
    """Residual blocks that are left out at random for single samples."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = block(3, 8), nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1) for _ in range(3)])
        self.head = classifier(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for layer, drop in zip(self.blocks, (drop_path, stochastic_depth, bernoulli_gate), strict=True):
            x = x + drop(layer(x).relu(), 0.4, self.training)
        return self.head(x)


class DropBlock(nn.Module):
    """Noise in every form: dropped squares, dropped channels and elements, Gaussian noise."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.channels = nn.Conv2d(3, 8, 3, padding=1), nn.Dropout2d(0.2)
        self.alpha, self.head = nn.AlphaDropout(0.1), classifier(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.alpha(self.channels(self.conv(x)))
        if self.training:
            seeds = (torch.rand(len(x), *x.shape[1:], device=x.device) < 0.05).float()
            kept = 1 - functional.max_pool2d(seeds, kernel_size=3, stride=1, padding=1)
            x = x * kept * (kept.numel() / kept.sum())
            x = x + 0.1 * torch.randn_like(x)
            x = x * torch.bernoulli(torch.full_like(x[:, :1], 0.9))
        return self.head(functional.dropout(x, p=0.3, training=self.training, inplace=True))


class GeneralizedMean(nn.Module):
    """A pool with a trained exponent."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.exponent = block(3, 8), nn.Parameter(torch.ones(1) * 3)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        kernel = (x.size(-2), x.size(-1))
        x = functional.avg_pool2d(x.clamp(min=1e-6).pow(self.exponent), kernel).pow(1.0 / self.exponent)
        return self.head(x.flatten(start_dim=1) / math.sqrt(x.shape[1]))


NETWORKS: dict[str, Network] = {
    "squeeze and excite": image(SqueezeExcite),
    "cbam": image(Cbam),
    "eca": image(Eca),
    "coordinate gate": image(CoordinateGate, 3, 12, 10),
    "selective kernel": image(SelectiveKernel),
    "non-local": image(NonLocal, 3, 8, 8),
    "shufflenet": image(ShuffleNet),
    "split": image(Split),
    "maxout": image(Maxout),
    "stochastic depth": image(StochasticDepth),
    "drop block": image(DropBlock),
    "generalized mean": image(GeneralizedMean),
}
