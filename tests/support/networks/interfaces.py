"""Networks with unusual inputs and outputs."""

from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from support.networks.network import CLASSES, Input, Network, block, classifier, image


class ImageAndAge(nn.Module):
    """A classifier that joins a number per sample, of shape (N,) or (N, 1), to the features of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(block(3, 8), nn.MaxPool2d(2), block(8, 16, stride=2))
        self.embed = nn.Linear(1, 4)
        self.head = nn.Linear(20, CLASSES)

    def forward(self, x: torch.Tensor, age: torch.Tensor) -> torch.Tensor:
        if age.dim() == 1:
            age = age[:, None]
        features = self.trunk(x).mean((2, 3))
        return self.head(torch.cat([features, torch.tanh(self.embed(age / 100))], dim=1))


class ScaledByNumber(nn.Module):
    """A number per sample that scales the features, as the time step of a diffusion network does."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 8, 3, padding=1), block(8, 8)
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        frequencies = torch.exp(torch.arange(4, device=x.device, dtype=x.dtype) * -0.5)
        phase = sigma.view(-1, 1) * frequencies[None]
        embedding = torch.cat([phase.sin(), phase.cos()], dim=-1)[:, :, None, None]
        return self.head(self.body(self.stem(x) + embedding)) / (1 + sigma.abs()).view(-1, 1, 1, 1)


class ClassConditional(nn.Module):
    """Feature-wise modulation by an embedded class number."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 16)
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8, affine=False)
        self.head = classifier(8)

    def forward(self, x: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        gamma, beta = self.embedding(label).chunk(2, dim=1)
        y = self.norm(self.conv(x)) * (1 + gamma[..., None, None]) + beta.unsqueeze(-1).unsqueeze(-1)
        return self.head(functional.relu(y))


class OptionalInputs(nn.Module):
    """Keyword inputs of which some are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.metadata = nn.Linear(6, 8)
        self.head = nn.Linear(8, CLASSES)

    def forward(
        self,
        x: torch.Tensor,
        metadata: torch.Tensor | None = None,
        *,
        mask: torch.Tensor | None = None,
        prior: torch.Tensor | None = None,
        temperature: float = 2.0,
    ) -> torch.Tensor:
        y = self.conv(x)
        if mask is not None:
            y = y * mask.unsqueeze(1)
        y = y.mean(dim=(-2, -1))
        if metadata is not None:
            y = y + self.metadata(metadata)
        logits = self.head(y) / temperature
        return logits if prior is None else logits + prior.log()


class DictOutput(nn.Module):
    """Segmentation with an auxiliary map: two outputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = block(3, 8, stride=2), block(8, 16, stride=2)
        self.main, self.auxiliary = nn.Conv2d(16, CLASSES, 1), nn.Conv2d(8, CLASSES, 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        size = x.shape[-2:]
        low = self.stem(x)
        result = OrderedDict()
        result["out"] = functional.interpolate(
            self.main(self.body(low)), size=size, mode="bilinear", align_corners=False
        )
        result["aux"] = functional.interpolate(self.auxiliary(low), size=size, mode="nearest")
        return result


class NestedOutput(nn.Module):
    """A detector's head: dictionaries in lists, tuples and the same tensor at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = block(3, 8, stride=2), block(8, 8, stride=2)
        self.boxes, self.scores = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: torch.Tensor) -> tuple[object, ...]:
        levels = [low := self.stem(x), self.down(low)]
        heads = [
            {"boxes": self.boxes(y).flatten(2).transpose(1, 2), "scores": self.scores(y).sigmoid()} for y in levels
        ]
        return heads, (levels[-1], (x, levels[-1]))


class Pyramid(nn.Module):
    """A feature pyramid: one head on three sizes, all maps in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([block(3, 8), block(8, 12, stride=2), block(12, 16, stride=2)])
        self.laterals = nn.ModuleList([nn.Conv2d(c, 8, 1) for c in (8, 12, 16)])
        self.smooth = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        merged = self.laterals[-1](features[-1])
        result = [self.smooth(merged)]
        for lateral, feature in zip(list(self.laterals)[-2::-1], features[-2::-1], strict=True):
            merged = lateral(feature) + functional.interpolate(merged, scale_factor=2, mode="nearest")
            result.insert(0, self.smooth(merged))
        return result


class Named(NamedTuple):
    """What ``AuxiliaryHead`` returns in training."""

    logits: torch.Tensor
    auxiliary: torch.Tensor | None


class AuxiliaryHead(nn.Module):
    """A second head that exists in training only, as in GoogLeNet and Inception."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = block(3, 8, stride=2), block(8, 16, stride=2)
        self.auxiliary, self.head = classifier(8), classifier(16)

    def forward(self, x: torch.Tensor) -> Named | torch.Tensor:
        low = self.stem(x)
        auxiliary = self.auxiliary(low) if self.training else None
        logits = self.head(functional.dropout(self.body(low), 0.2, self.training))
        return Named(logits, auxiliary) if self.training else logits


class Siamese(nn.Module):
    """One trunk for anchor, positive and negative."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(block(3, 8, stride=2), block(8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.project = nn.Linear(8, 6)

    def forward(
        self, anchor: torch.Tensor, positive: torch.Tensor, negative: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        a, p, n = (functional.normalize(self.project(self.trunk(x)), dim=1) for x in (anchor, positive, negative))
        return (a - p).pow(2).sum(1), functional.cosine_similarity(a, n, dim=1)


class TwoViews(nn.Module):
    """Two views that pass the trunk as one batch of twice the size and are split again."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head = block(3, 8, stride=2), classifier(8)

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        both = self.head(self.trunk(torch.cat([first, second])))
        a, b = both.split(first.shape[0])
        c, d = torch.chunk(both, 2)
        return torch.stack([a, b, c * d]).sum(0)


class ManyInputs(nn.Module):
    """Any number of inputs, as ``*views``."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head = block(3, 8, stride=2), classifier(8)

    def forward(self, *views: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.head(self.trunk(x)) for x in views], dim=1).amax(1)


class Video(nn.Module):
    """A clip (N, T, C, H, W) whose frames pass a 2D network as samples and are averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head = block(3, 8, stride=2), nn.Linear(8, CLASSES)

    def forward(self, clip: torch.Tensor) -> torch.Tensor:
        batch, frames, channels, height, width = clip.shape
        y = self.trunk(clip.view(batch * frames, channels, height, width)).mean((2, 3))
        return self.head(y.view(batch, frames, -1).mean(dim=1))


PHOTO = Input((3, 16, 16))
NETWORKS = {
    "image and number of shape (N,)": Network(ImageAndAge, (PHOTO, Input())),
    "image and number of shape (N, 1)": Network(ImageAndAge, (PHOTO, Input((1,)))),
    "scaled by a number": Network(ScaledByNumber, (PHOTO, Input())),
    "class conditional": Network(ClassConditional, (PHOTO, Input(num_classes=7))),
    "no optional input": image(OptionalInputs),
    "optional input by position": Network(OptionalInputs, (PHOTO, Input((6,)))),
    "optional inputs by name": Network(OptionalInputs, (PHOTO,), {"mask": Input((16, 16)), "metadata": Input((6,))}),
    "all inputs by name": Network(OptionalInputs, (), {"metadata": Input((6,)), "x": PHOTO}),
    "outputs in a dict": image(DictOutput),
    "outputs nested": image(NestedOutput),
    "feature pyramid": image(Pyramid),
    "auxiliary head in training": image(AuxiliaryHead),
    "siamese": Network(Siamese, (PHOTO, PHOTO, PHOTO)),
    "two views as one batch": Network(TwoViews, (PHOTO, PHOTO)),
    "any number of inputs": Network(ManyInputs, (PHOTO, PHOTO, PHOTO)),
    "video": Network(Video, (Input((3, 3, 16, 16)),)),
}
