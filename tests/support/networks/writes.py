"""Networks that write into tensors."""

import torch
from torch import nn
from torch.nn import functional

from support.networks.attention import PAIRS_OF_FRAMES
from support.networks.network import CLASSES, Network, block, classifier, image


class InPlace(nn.Module):
    """In-place operators in every spelling, of results that are read again later."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = (nn.Conv2d(c, 8, 3, padding=1) for c in (3, 8, 8))
        self.norm, self.relu, self.head = nn.BatchNorm2d(8), nn.ReLU(inplace=True), classifier(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv1(x)
        x.relu_()
        y = self.norm(self.conv2(x))
        y.mul_(0.5).add_(1)
        y += x
        z = self.conv3(self.relu(y))
        z -= y.mean()
        z *= 2
        z /= 3
        torch.clamp_(z, -2, 2)
        z = functional.dropout(z.add_(y, alpha=0.1), 0.1, self.training, inplace=True)
        functional.relu(z, inplace=True)
        return self.head(z)


class IntoTheInput(nn.Module):
    """An input that is normalised in place; the caller sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = block(3, 8), classifier(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.sub_(0.5).div_(2)
        return self.head(self.conv(x)) + x.mean((1, 2, 3)).unsqueeze(1)


class IntoViews(nn.Module):
    """Writes into one part of the channels, of which the whole is read afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(4), classifier(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x).sigmoid() + 0
        half = x[:, :4]
        half.mul_(2)
        x.narrow(1, 6, 2).zero_()
        rows = x.view(x.shape[0], -1)
        rows += 1
        rest = x[:, 4:].tanh_()
        return self.head(torch.cat([self.norm(half), rest], 1))


class IntoSlices(nn.Module):
    """Assignments to slices: shifted frames and a frame of zeros, as TSM and old padding code do."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.head = block(3, 8), nn.Conv2d(8, 8, 3), nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        shifted = torch.zeros_like(x)
        shifted[:, :2, :-1] = x[:, :2, 1:]
        shifted[:, 2:4, 1:] = x[:, 2:4, :-1]
        shifted[:, 4:] = x[:, 4:]
        padded = x.new_zeros(x.size(0), x.size(1), x.size(2) + 2, x.size(3) + 2)
        padded[..., 1:-1, 1:-1] = shifted
        return self.head(self.conv(padded).mean((2, 3)))


class IntoMasks(nn.Module):
    """Assignments by a mask and by an index, and scattered values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = block(3, 8), nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x).mean((2, 3)) * 1
        y[y < 0.1] = 0
        y[:, [0, 3]] = y[:, [3, 0]] * 2
        y[:, 1] += 1
        best = y.argmax(1, keepdim=True)
        y = y + torch.zeros_like(y).scatter_(1, best, 1.0)
        counts = torch.zeros(8).index_add_(0, best.flatten(), torch.ones(len(x)))
        return self.head(y) + functional.one_hot(best.squeeze(1) % CLASSES, CLASSES) * counts.sum()


NETWORKS: dict[str, Network] = {
    "in place": image(InPlace),
    "in place into the input": image(IntoTheInput),
    "in place into slices": image(IntoSlices),
}
REFUSABLE: dict[str, Network] = {
    "in place into views": image(IntoViews),
    "in place by masks": image(IntoMasks),
    "temporal shift": PAIRS_OF_FRAMES,
}
"""What tracing may refuse: writes into a part of a tensor that is read as a whole, halves of the batch."""
