"""Networks of one to three spatial dimensions, with odd sizes, odd padding and changes of resolution."""

import math

import torch
from torch import nn
from torch.nn import functional

from support.networks.network import CLASSES, Network, block, classifier, image


class Ecg(nn.Module):
    """A residual network over signals of 12 leads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(12, 8, 7, stride=2, padding=3, bias=False)
        self.stem_norm = nn.BatchNorm1d(8)
        self.conv1, self.norm1 = nn.Conv1d(8, 8, 5, padding=2), nn.BatchNorm1d(8)
        self.conv2, self.norm2 = nn.Conv1d(8, 8, 5, padding=4, dilation=2), nn.BatchNorm1d(8)
        self.pool = nn.MaxPool1d(3, stride=2, padding=1)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(functional.relu(self.stem_norm(self.stem(x))))
        y = functional.dropout(functional.leaky_relu(self.norm1(self.conv1(x)), 0.1), 0.2, self.training)
        x = functional.relu(x + self.norm2(self.conv2(y)))
        return self.head(torch.cat([x.mean(-1), x.amax(-1)], 1))


class UNet(nn.Module):
    """A U-Net of two or three dimensions that takes any size: what comes up is resized to its skip."""

    def __init__(self, dims: int, mode: str) -> None:
        super().__init__()
        conv, pool = (nn.Conv2d, nn.MaxPool2d) if dims == 2 else (nn.Conv3d, nn.MaxPool3d)
        norm = nn.BatchNorm2d if dims == 2 else nn.InstanceNorm3d
        self.mode = mode

        def double(first: int, last: int) -> nn.Sequential:
            return nn.Sequential(conv(first, last, 3, padding=1), norm(last), nn.ReLU(inplace=True))

        self.encoder = nn.ModuleList([double(1, 4), double(4, 6)])
        self.pool, self.bottom = pool(2), double(6, 8)
        self.decoder = nn.ModuleList([double(8 + 6, 6), double(6 + 4, 4)])
        self.head = conv(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = []
        for stage in self.encoder:
            x = stage(x)
            skips.append(x)
            x = self.pool(x)
        x = self.bottom(x)
        for stage, skip in zip(self.decoder, reversed(skips), strict=True):
            x = functional.interpolate(x, size=skip.shape[2:], mode=self.mode)
            x = stage(torch.cat((skip, x), dim=1))
        return self.head(x)


class UNetWithTransposes(nn.Module):
    """Transposed convolutions; skips are cropped, and results padded, to the sizes that meet."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 8, 3, stride=2)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.up2 = nn.ConvTranspose2d(8, 4, 3, stride=2, padding=1, output_padding=1)
        self.head = nn.Conv2d(4, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skip = self.down1(x).relu()
        y = self.up(self.down2(skip).relu())
        top, left = ((skip.size(i) - y.size(i)) // 2 for i in (2, 3))
        y = self.up2(torch.cat([skip[:, :, top : top + y.size(2), left : left + y.size(3)], y], 1))
        missing = [s - t for s, t in zip(x.shape[2:], y.shape[2:], strict=True)]
        padding = [missing[1] // 2, missing[1] - missing[1] // 2, missing[0] // 2, missing[0] - missing[0] // 2]
        return self.head(functional.pad(y, padding))


class SegNet(nn.Module):
    """Pooling whose indices undo it later."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = block(3, 8), block(8, 8)
        self.pool, self.unpool = nn.MaxPool2d(2, 2, return_indices=True), nn.MaxUnpool2d(2, 2)
        self.head = nn.Conv2d(8, CLASSES, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.encode(x)
        size = x.size()
        x, indices = self.pool(x)
        return self.head(self.unpool(self.decode(x), indices, output_size=size))


class MultiScale(nn.Module):
    """Three scales of one image and skips over many layers, joined at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3, 6, 3, padding=1), *(nn.Conv2d(6, 6, 3, padding=1) for _ in range(6))])
        self.coarse = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.GroupNorm(2, 18)
        self.head = nn.Conv2d(18, CLASSES, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        half = functional.avg_pool2d(x, 2)
        quarter = functional.interpolate(x, scale_factor=0.25, mode="bilinear", align_corners=False, antialias=True)
        kept = []
        y = x
        for i, layer in enumerate(self.layers):
            y = functional.silu(layer(y))
            if i % 3 == 0:
                kept.append(y)
        coarse = [functional.interpolate(self.coarse(z), x.shape[-2:]) for z in (half, quarter)]
        return self.head(self.norm(torch.cat([kept[0] + kept[-1], kept[1] * coarse[0], coarse[1]], 1)))


class HighResolution(nn.Module):
    """Two resolutions side by side that exchange features twice, as in HRNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.transition = block(3, 8), block(8, 12, stride=2)
        self.high = nn.ModuleList([block(8, 8) for _ in range(2)])
        self.low = nn.ModuleList([block(12, 12) for _ in range(2)])
        self.down = nn.ModuleList([nn.Conv2d(8, 12, 3, stride=2, padding=1) for _ in range(2)])
        self.up = nn.ModuleList([nn.Conv2d(12, 8, 1) for _ in range(2)])
        self.head = nn.Conv2d(20, CLASSES, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        high = self.stem(x)
        low = self.transition(high)
        for a, b, down, up in zip(self.high, self.low, self.down, self.up, strict=True):
            high, low = a(high), b(low)
            raised = functional.interpolate(up(low), size=high.shape[-2:], mode="nearest")
            high, low = (high + raised).relu(), (low + down(high)).relu()
        return self.head(torch.cat([high, functional.interpolate(low, size=high.shape[-2:])], 1))


class OneModuleTwoSizes(nn.Module):
    """One block that is called on two different resolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shared = nn.Conv2d(3, 8, 3, padding=1), block(8, 8)
        self.pool, self.head = nn.AvgPool2d(2), classifier(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        large = self.shared(self.stem(x))
        small = self.shared(self.pool(large))
        return self.head(large) + self.head(small)


class SamePadding(nn.Module):
    """Padding by name, even kernels and dilation included, and modes of padding other than zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.even = nn.Conv2d(3, 8, 4, padding="same")
        self.dilated = nn.Conv2d(8, 8, 3, padding="same", dilation=3, groups=2)
        self.valid = nn.Conv2d(8, 8, (1, 3), padding="valid")
        self.reflect = nn.Conv2d(8, 8, 3, padding=2, padding_mode="reflect")
        self.circular = nn.Conv2d(8, 8, (3, 5), padding="same", padding_mode="circular")
        self.head = classifier(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.valid(self.dilated(self.even(x).relu()).relu()).relu()
        return self.head(self.circular(self.reflect(x)).relu())


class TensorFlowConv(nn.Conv2d):
    """The padding of TensorFlow, from the size of the input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        padding: list[int] = []
        for size, kernel, stride in zip(x.size()[-2:], self.kernel_size, self.stride, strict=True):
            missing = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
            padding = [missing // 2, missing - missing // 2, *padding]
        if any(padding):
            x = functional.pad(x, padding)
        return functional.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class TensorFlowPadding(nn.Module):
    """Convolutions and pooling that pad as TensorFlow does."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = TensorFlowConv(3, 8, 3, stride=2), TensorFlowConv(8, 8, 5, stride=2, groups=8)
        self.point, self.head = nn.Conv2d(8, 12, 1), classifier(12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.depthwise(self.stem(x).relu())
        x = functional.max_pool2d(functional.pad(x, (0, 1, 0, 1), value=float("-inf")), 2, 1)
        return self.head(self.point(x).relu())


class SuperResolution(nn.Module):
    """Pixels into channels and back."""

    def __init__(self) -> None:
        super().__init__()
        self.unshuffle, self.shuffle = nn.PixelUnshuffle(2), nn.PixelShuffle(2)
        self.first, self.last = nn.Conv2d(12, 12, 3, padding=1), nn.Conv2d(12, 48, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.last(functional.prelu(self.first(self.unshuffle(x)), torch.tensor(0.25)))
        base = functional.interpolate(x, scale_factor=2, mode="bicubic", align_corners=False)
        return functional.pixel_shuffle(self.shuffle(y), 2) + base


class SpaceToDepth(nn.Module):
    """A stem that takes every second pixel (YOLOv5's focus) and merges patches (Swin's)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(12, 8, 3, padding=1), nn.LayerNorm(32)
        self.reduce, self.head = nn.Linear(32, 16, bias=False), nn.Linear(16, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1)
        y = self.conv(x).permute(0, 2, 3, 1)
        batch, height, width, channels = y.shape
        y = y.reshape(batch, height // 2, 2, width // 2, 2, channels)
        y = y.permute(0, 1, 3, 2, 4, 5).flatten(3)
        return self.head(self.reduce(self.norm(y)).flatten(1, 2).mean(1))


class AtrousPyramid(nn.Module):
    """Dilated branches beside a branch of global features, as in DeepLab."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 8, stride=2)
        self.branches = nn.ModuleList([nn.Conv2d(8, 4, 3, padding=d, dilation=d) for d in (1, 2, 4)])
        self.pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 4, 1), nn.ReLU())
        self.project = nn.Sequential(nn.Conv2d(16, 8, 1), nn.Dropout(0.5), nn.Conv2d(8, CLASSES, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.stem(x)
        pooled = functional.interpolate(self.pooled(y), size=y.shape[-2:], mode="bilinear", align_corners=False)
        return self.project(torch.cat([*(branch(y) for branch in self.branches), pooled], dim=1))


class SpatialPyramidPool(nn.Module):
    """Adaptive pools of three sizes, flattened and joined, so that images of any size have equally many features."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = block(3, 4), nn.Linear(4 * 14, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        pools = [functional.adaptive_max_pool2d(x, size).view(x.size(0), -1) for size in (1, 3)]
        return self.head(torch.cat([*pools, functional.lp_pool2d(x, 2, 8).reshape(len(x), -1)], 1))


class Deep(nn.Module):
    """A residual network of any depth: two convolutions a block."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__()
        self.stem, self.head = block(3, 4, stride=2), classifier(4)
        self.blocks = nn.ModuleList(
            [nn.Sequential(block(4, 4), nn.Conv2d(4, 4, 3, padding=1)) for _ in range(num_blocks)]
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for residual in self.blocks:
            x = x + residual(x)
        return self.head(x)


NETWORKS: dict[str, Network] = {
    "one convolution": image(lambda: nn.Conv2d(3, 8, 3, stride=2, padding=1)),
    "one sequence": image(lambda: nn.Sequential(block(3, 8), nn.MaxPool2d(2), classifier(8))),
    "ecg": image(Ecg, 12, 50),
    "3d u-net": image(lambda: UNet(3, "trilinear"), 1, 8, 9, 10),
    "u-net of odd sizes": image(lambda: UNet(2, "nearest"), 1, 17, 13),
    "u-net with transposes": image(UNetWithTransposes, 1, 15, 14),
    "segnet": image(SegNet, 3, 9, 10),
    "multi-scale": image(MultiScale),
    "high resolution": image(HighResolution),
    "one module, two sizes": image(OneModuleTwoSizes),
    "same padding": image(SamePadding, 3, 11, 14),
    "padding of tensorflow": image(TensorFlowPadding, 3, 15, 18),
    "super resolution": image(SuperResolution, 3, 8, 8),
    "space to depth": image(SpaceToDepth),
    "atrous pyramid": image(AtrousPyramid, 3, 17, 17),
    "spatial pyramid pool": image(SpatialPyramidPool),
    "twelve residuals": image(lambda: Deep(12)),
}
