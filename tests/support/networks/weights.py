"""Networks whose weights and buffers are used in unusual ways."""

import math

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from support.networks.network import CLASSES, Input, Network, block, classifier, image


class Functional(nn.Module):
    """No layer at all: parameters, buffers and functions."""

    running_mean: torch.Tensor
    running_var: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(8, 3, 3, 3) / 5)
        self.gamma, self.beta = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))
        self.kernels = nn.ParameterList([torch.randn(8, 8, 1, 1) / 3, torch.randn(8, 1, 3, 3) / 3])
        self.head = nn.ParameterDict({"weight": torch.randn(CLASSES, 8) / 3, "bias": torch.zeros(CLASSES)})
        self.register_buffer("running_mean", torch.zeros(8))
        self.register_buffer("running_var", torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.conv2d(x, self.kernel, stride=2, padding=1)
        x = functional.batch_norm(
            x, self.running_mean, self.running_var, self.gamma, self.beta, self.training, momentum=0.2
        )
        x = functional.conv2d(functional.relu(x), self.kernels[0])
        x = functional.conv2d(x, self.kernels[1], padding="same", groups=8)
        x = functional.adaptive_avg_pool2d(functional.layer_norm(x, x.shape[1:]), 1).squeeze(-1).squeeze(-1)
        return functional.linear(x, self.head["weight"], bias=self.head["bias"])


class StandardizedConv(nn.Conv2d):
    """A convolution whose weights are standardised by the kernel of batch norm, as in timm."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = functional.batch_norm(
            self.weight.reshape(1, self.out_channels, -1), None, None, training=True, momentum=0.0, eps=1e-6
        ).reshape_as(self.weight)
        return functional.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class ScaledConv(nn.Conv2d):
    """Weights that are standardised by hand and multiplied by a trained gain."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        self.gain = nn.Parameter(torch.ones(out_channels, 1, 1, 1))
        self.scale = 1.7139588594436646 / math.sqrt(self.weight[0].numel())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        variance, mean = torch.var_mean(self.weight, dim=[1, 2, 3], keepdim=True, unbiased=False)
        weight = self.scale * self.gain * (self.weight - mean) * torch.rsqrt(variance + 1e-5)
        return functional.conv2d(x, weight, self.bias, padding=self.padding)


class WeightStandardization(nn.Module):
    """Group norm over convolutions with computed weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = StandardizedConv(3, 8, 3, stride=2, padding=1), nn.GroupNorm(4, 8)
        self.body, self.head = ScaledConv(8, 8, 3), classifier(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.norm(self.stem(x)))
        return self.head(x + self.body(functional.gelu(x)) * 0.2)


class EqualizedConv(nn.Module):
    """A convolution whose weights are scaled at run time, as in StyleGAN."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 3, 3))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.scale = 1 / math.sqrt(in_channels * 9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.conv2d(x, self.weight * self.scale, bias=self.bias, padding=1)


class ModulatedConv(nn.Module):
    """Weights of each sample from its style; all samples in one grouped convolution."""

    def __init__(self, in_channels: int, out_channels: int, style: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, out_channels, in_channels, 3, 3) / math.sqrt(in_channels * 9))
        self.modulation = nn.Linear(style, in_channels)

    def forward(self, x: torch.Tensor, style: torch.Tensor) -> torch.Tensor:
        batch, channels, height, width = x.shape
        weight = self.weight * self.modulation(style).view(batch, 1, channels, 1, 1)
        weight = weight * torch.rsqrt(weight.pow(2).sum([2, 3, 4]) + 1e-8).view(batch, -1, 1, 1, 1)
        weight = weight.view(-1, channels, 3, 3)
        y = functional.conv2d(x.reshape(1, batch * channels, height, width), weight, padding=1, groups=batch)
        return y.view(batch, -1, height, width)


class StyleNetwork(nn.Module):
    """A generator: style, a learned constant for all samples, noise."""

    def __init__(self) -> None:
        super().__init__()
        self.constant = nn.Parameter(torch.randn(1, 8, 4, 4))
        self.mapping, self.first = nn.Linear(6, 6), EqualizedConv(8, 8)
        self.modulated, self.noise = ModulatedConv(8, 8, 6), nn.Parameter(torch.full((1,), 0.1))
        self.to_image = nn.Conv2d(8, 3, 1)

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        latent = latent * torch.rsqrt(torch.mean(latent**2, dim=1, keepdim=True) + 1e-8)
        style = functional.leaky_relu(self.mapping(latent), 0.2)
        x = self.first(self.constant.repeat(latent.shape[0], 1, 1, 1))
        x = functional.interpolate(self.modulated(x, style), scale_factor=2, mode="bilinear", align_corners=False)
        x = x + self.noise * x.new_empty(x.shape[0], 1, *x.shape[2:]).normal_()
        return torch.tanh(self.to_image(x))


class Parametrized(nn.Module):
    """Weight norm and spectral norm as parametrizations of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = parametrizations.weight_norm(nn.Conv2d(3, 8, 3, padding=1))
        self.body = parametrizations.spectral_norm(nn.Conv2d(8, 8, 3, padding=1))
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), parametrizations.weight_norm(nn.Linear(8, CLASSES), dim=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.pool(functional.leaky_relu(self.body(self.stem(x).relu()), 0.1)).flatten(1))


class OldParametrized(nn.Module):
    """The spectral norm of torch that works with hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.utils.spectral_norm(nn.Conv2d(3, 8, 3, padding=1)), classifier(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(x))


class NormWithActivation(nn.BatchNorm2d):
    """Batch norm with its own forward and the activation behind it, as in timm."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        factor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        use_batch = self.training or (self.running_mean is None and self.running_var is None)
        x = functional.batch_norm(
            x,
            self.running_mean if not self.training or self.track_running_stats else None,
            self.running_var if not self.training or self.track_running_stats else None,
            self.weight, self.bias, use_batch, factor, self.eps,
        )  # fmt: skip
        return functional.silu(x, inplace=True)


class FrozenNorm(nn.Module):
    """Batch norm with fixed statistics in buffers, as in detection."""

    weight: torch.Tensor
    bias: torch.Tensor
    running_mean: torch.Tensor
    running_var: torch.Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name, value in (("weight", 1.5), ("bias", 0.1), ("running_mean", 0.2), ("running_var", 0.8)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.weight.reshape(1, -1, 1, 1) * (self.running_var.reshape(1, -1, 1, 1) + 1e-5).rsqrt()
        return x * scale + (self.bias.reshape(1, -1, 1, 1) - self.running_mean.reshape(1, -1, 1, 1) * scale)


class OwnNorms(nn.Module):
    """Norms with their own forward, without statistics, over channels that come last, of single samples."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, padding=1), NormWithActivation(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, groups=8), FrozenNorm(8)
        self.norm3 = nn.BatchNorm2d(8, momentum=None, track_running_stats=False)
        self.norm4, self.local = nn.LayerNorm(8), nn.LocalResponseNorm(3)
        self.gamma, self.grn = nn.Parameter(torch.full((8,), 0.5)), nn.Parameter(torch.ones(1, 1, 1, 8))
        self.head = classifier(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm1(self.conv1(x))
        y = self.norm4(self.local(self.norm3(self.norm2(self.conv2(x)))).permute(0, 2, 3, 1))
        power = torch.norm(y, p=2, dim=(1, 2), keepdim=True)
        y = y + self.grn * (y * (power / (power.mean(dim=-1, keepdim=True) + 1e-6)))
        return self.head(x + (self.gamma * y).permute(0, 3, 1, 2))


class CumulativeNorm(nn.Module):
    """Batch norms that average all batches and that count what they saw in a buffer of their own."""

    seen: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, momentum=None)
        self.head = classifier(8)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen += x.shape[0]
        return self.head(self.norm(self.conv(x)).relu())


class MovingCenter(nn.Module):
    """A buffer that follows the mean of the features, updated without gradients."""

    center: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = block(3, 8), nn.Linear(8, CLASSES)
        self.register_buffer("center", torch.zeros(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x).mean((2, 3))
        if self.training:
            with torch.no_grad():
                self.center.mul_(0.9).add_(y.mean(0), alpha=0.1)
        return self.head(y.detach() - self.center) + self.head(y)


class NonPersistent(nn.Module):
    """Constants in buffers that the state dict does not have: pixel statistics, a blur kernel, an index."""

    mean: torch.Tensor
    blur: torch.Tensor
    order: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        kernel = torch.tensor([1.0, 2.0, 1.0])
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("blur", (kernel[:, None] * kernel / 16).repeat(8, 1, 1, 1), persistent=False)
        self.register_buffer("order", torch.tensor([7, 1, 5, 3, 0, 2, 6, 4]), persistent=False)
        self.stem, self.head = block(3, 8), classifier(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem((x - self.mean) / 0.25)
        x = functional.conv2d(functional.pad(x, (1, 1, 1, 1), "reflect"), self.blur, stride=2, groups=x.shape[1])
        return self.head(x[:, self.order] + x.index_select(1, self.order.flip(0)))


class TiedAutoencoder(nn.Module):
    """A decoder with the transposed weights of the encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.narrow = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Linear(8, 4, bias=False)
        self.bias = nn.Parameter(torch.zeros(3))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.encoder(x).relu()
        code = self.narrow(y.permute(0, 2, 3, 1))
        y = functional.linear(code, self.narrow.weight.t()).permute(0, 3, 1, 2)
        y = functional.conv_transpose2d(y, self.encoder.weight, self.bias, 2, 1, output_padding=1)
        return y, code.mean((1, 2))


class ConditionalConv(nn.Module):
    """Kernels mixed from experts, separately for every sample."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.routing, self.head = block(3, 4), nn.Linear(4, 3), classifier(6)
        self.experts = nn.Parameter(torch.randn(3, 6 * 4 * 9) / 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        batch, channels, height, width = x.shape
        routing = torch.sigmoid(self.routing(functional.adaptive_avg_pool2d(x, 1).flatten(1)))
        weight = torch.matmul(routing, self.experts).view(batch * 6, channels, 3, 3)
        y = functional.conv2d(x.reshape(1, batch * channels, height, width), weight, padding=1, groups=batch)
        return self.head(y.permute([1, 0, 2, 3]).view(batch, 6, y.shape[-2], y.shape[-1]))


class SincNetwork(nn.Module):
    """Band-pass filters over raw audio, computed from their cut-off frequencies; a spectrogram beside them."""

    times: torch.Tensor
    window: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Parameter(torch.linspace(0.02, 0.3, 6)[:, None])
        self.band = nn.Parameter(torch.full((6, 1), 0.05))
        self.register_buffer("times", torch.arange(1, 9, dtype=torch.float32)[None])
        self.register_buffer("window", torch.hann_window(16))
        self.conv, self.head = nn.Conv1d(6, 8, 5, stride=2), nn.Linear(17, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = self.low.abs()
        high = torch.clamp(low + self.band.abs(), max=0.5)
        right = (torch.sin(2 * math.pi * high * self.times) - torch.sin(2 * math.pi * low * self.times)) / self.times
        filters = torch.cat([right.flip(-1), 2 * (high - low), right], dim=1)[:, None]
        y = functional.relu(self.conv(functional.conv1d(x, filters, padding=8).abs())).mean(-1)
        spectrum = torch.stft(x.squeeze(1), 16, 8, window=self.window, return_complex=True).abs().mean(-1)
        return self.head(torch.cat([y, torch.log1p(spectrum)], 1))


class Fourier(nn.Module):
    """A filter in the frequency domain with complex weights, as in GFNet and FNO."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), classifier(6)
        self.filter = nn.Parameter(torch.randn(6, 8, 5, 2) * 0.5)
        self.modes = nn.Parameter(torch.randn(6, 6, 3, 3, dtype=torch.cfloat) * 0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        size = x.shape[-2:]
        spectrum = torch.fft.rfft2(x, norm="ortho") * torch.view_as_complex(self.filter)
        y = self.norm(torch.fft.irfft2(spectrum, s=size, norm="ortho"))
        spectrum = torch.fft.rfft2(y)
        mixed = torch.einsum("bixy,ioxy->boxy", spectrum[..., :3, :3], self.modes)
        mixed = functional.pad(mixed, (0, spectrum.size(-1) - 3, 0, spectrum.size(-2) - 3))
        return self.head(x + torch.fft.irfft2(mixed, s=size))


NETWORKS: dict[str, Network] = {
    "functions and parameters only": image(Functional),
    "weight standardization": image(WeightStandardization),
    "style": Network(StyleNetwork, (Input((6,)),)),
    "parametrized weights": image(Parametrized),
    "spectral norm by hooks": image(OldParametrized),
    "norms of the user": image(OwnNorms),
    "cumulative norm": image(CumulativeNorm),
    "moving center": image(MovingCenter),
    "non-persistent buffers": image(NonPersistent),
    "tied autoencoder": image(TiedAutoencoder),
    "kernels per sample": image(ConditionalConv),
    "filters from frequencies": image(SincNetwork, 1, 64),
    "complex weights": image(Fourier, 3, 8, 8),
}
