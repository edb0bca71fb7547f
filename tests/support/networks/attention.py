"""Networks with attention, positions, recurrence and indexing."""

import torch
from torch import nn
from torch.nn import functional

from support.networks.network import CLASSES, Network, block, classifier, image


class VisionTransformer(nn.Module):
    """Patches, a class token, position embeddings, attention of torch and a block of its encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.position = nn.Parameter(torch.randn(1, 17, 16) * 0.1)
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 4, dropout=0.1, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, 16))
        self.block = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.1, batch_first=True)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._assert(x.shape[2] == x.shape[3], f"a square image instead of {x.shape[2]} x {x.shape[3]}")
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.position
        y = self.norm1(x)
        y, _ = self.attention(y, y, y, need_weights=False)
        x = x + y
        x = self.block(x + self.mlp(self.norm2(x)))
        return self.head(x[:, 0])


class WindowAttention(nn.Module):
    """Attention in windows with a table of relative positions."""

    index: torch.Tensor

    def __init__(self, channels: int, window: int, heads: int) -> None:
        super().__init__()
        self.window, self.heads, self.scale = window, heads, (channels // heads) ** -0.5
        self.table = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads) * 0.1)
        grid = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        offsets = (grid[:, :, None] - grid[:, None, :] + window - 1).permute(1, 2, 0)
        self.register_buffer("index", offsets[..., 0] * (2 * window - 1) + offsets[..., 1])
        self.qkv, self.project = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        windows, pixels, channels = x.shape
        qkv = self.qkv(x).reshape(windows, pixels, 3, self.heads, channels // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        attention = (query * self.scale) @ key.transpose(-2, -1)
        bias = self.table[self.index.view(-1)].view(pixels, pixels, -1)
        attention = attention + bias.permute(2, 0, 1).contiguous().unsqueeze(0)
        if mask is not None:
            count = mask.shape[0]
            attention = attention.view(windows // count, count, self.heads, pixels, pixels)
            attention = (attention + mask.unsqueeze(1).unsqueeze(0)).view(-1, self.heads, pixels, pixels)
        x = (attention.softmax(dim=-1) @ value).transpose(1, 2).reshape(windows, pixels, channels)
        return self.project(x)


def windows_of(x: torch.Tensor, window: int) -> torch.Tensor:
    """Return the windows of a map with channels last, as samples."""
    batch, height, width, channels = x.shape
    x = x.view(batch, height // window, window, width // window, window, channels)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, window, window, channels)


def joined(windows: torch.Tensor, window: int, height: int, width: int) -> torch.Tensor:
    """Return the map of windows; the batch is computed from their number, as in the first Swin."""
    batch = int(windows.shape[0] / (height * width / window / window))
    x = windows.view(batch, height // window, width // window, window, window, -1)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(batch, height, width, -1)


class Swin(nn.Module):
    """Two blocks of window attention, the second with shifted windows and a mask made at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norms = nn.Conv2d(3, 8, 2, stride=2), nn.ModuleList([nn.LayerNorm(8), nn.LayerNorm(8)])
        self.attentions = nn.ModuleList([WindowAttention(8, 4, 2), WindowAttention(8, 4, 2)])
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).permute(0, 2, 3, 1)
        _, height, width, channels = x.shape
        for shift, norm, attention in zip((0, 2), self.norms, self.attentions, strict=True):
            y = norm(x)
            if shift > 0:
                y = torch.roll(y, shifts=(-shift, -shift), dims=(1, 2))
            mask = self.mask(y, shift) if shift > 0 else None
            y = joined(
                attention(windows_of(y, 4).view(-1, 16, channels), mask).view(-1, 4, 4, channels), 4, height, width
            )
            x = x + torch.roll(y, shifts=(shift, shift), dims=(1, 2)) if shift > 0 else x + y
        return self.head(x.mean((1, 2)))

    def mask(self, x: torch.Tensor, shift: int) -> torch.Tensor:
        """Forbid pixels of different regions to see each other."""
        size = x.shape[1]
        position = torch.arange(size, device=x.device)
        region = (position >= size - 4).to(torch.int64) + (position >= size - shift).to(torch.int64)
        regions = (region[:, None] * 3 + region[None, :]).view(1, size, size, 1)
        flat = windows_of(regions, 4).view(-1, 16)
        difference = flat.unsqueeze(1) - flat.unsqueeze(2)
        mask = x.new_zeros(difference.shape)
        return mask.masked_fill(difference != 0, -100.0).masked_fill(difference == 0, 0.0)


class BottleneckAttention(nn.Module):
    """Attention over pixels by einsum, with positions of rows and columns, as in BoTNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.qkv = block(3, 8, stride=2), nn.Conv2d(8, 24, 1, bias=False)
        self.rows, self.columns = nn.Parameter(torch.randn(1, 4, 8, 1)), nn.Parameter(torch.randn(1, 4, 1, 8))
        self.head = classifier(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        n, c, h, w = x.size()
        query, key, value = (t.reshape(n * 2, c // 2, h * w) for t in self.qkv(x).split(c, dim=1))
        content = torch.einsum("bdi,bdj->bij", query, key)
        position = torch.einsum("bdi,zdj->bij", query, (self.rows + self.columns).reshape(1, 4, h * w))
        weights = torch.softmax((content + position) * 4**-0.5, dim=-1)
        y = torch.einsum("bij,bdj->bdi", weights, value).reshape(n, c, h, w)
        return self.head(functional.relu(x + y))


class ScaledDotProduct(nn.Module):
    """Causal attention over columns with a mask of ones; the fused kernel of torch beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.qkv, self.head = nn.Conv2d(3, 8, (16, 1)), nn.Linear(8, 24), nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).squeeze(2).mT
        length = x.size(1)
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        allowed = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        scores = (query @ key.transpose(1, 2) / 8**0.5).masked_fill(~allowed, float("-inf"))
        y = torch.softmax(scores, -1) @ value
        distances = torch.triu(torch.full((length, length), 0.5), diagonal=1)
        z = functional.scaled_dot_product_attention(query, key, value, attn_mask=distances)
        return self.head((y + z)[:, -1])


class CoordConv(nn.Module):
    """Channels that tell the position, made at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.radial = nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(9, 8, 1)
        self.head = classifier(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, _, height, width = x.shape
        rows, columns = torch.meshgrid(
            torch.linspace(-1, 1, height, device=x.device), torch.linspace(-1, 1, width, device=x.device), indexing="ij"
        )
        coordinates = torch.stack([rows, columns]).unsqueeze(0).repeat(batch, 1, 1, 1).type_as(x)
        ones = torch.ones(batch, 1, height, width, dtype=x.dtype)
        x = functional.relu(self.conv(torch.cat([x, coordinates, ones], 1)))
        ramp = torch.arange(width).float().view(1, 1, 1, -1).expand(batch, 1, height, -1) / (width - 1)
        return self.head(self.radial(torch.cat([x, ramp], dim=1)))


class SinePositions(nn.Module):
    """Positions as sines of cumulative sums, as in DETR and EdgeNeXt, added to features that queries then read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.queries, self.project = block(3, 8, stride=2), nn.Embedding(4, 8), nn.Conv2d(8, 8, 1)
        self.attention, self.head = nn.MultiheadAttention(8, 2), nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        present = torch.ones((x.shape[0], x.shape[2], x.shape[3]), dtype=torch.bool, device=x.device)
        rows, columns = present.cumsum(1, dtype=torch.float32), present.cumsum(2, dtype=torch.float32)
        scale = 10 ** (torch.arange(2, dtype=torch.float32) / 2)
        rows, columns = rows[:, :, :, None] / scale, columns[:, :, :, None] / scale
        position = torch.cat([t for p in (rows, columns) for t in (p.sin(), p.cos())], dim=3).permute(0, 3, 1, 2)
        position = self.project(position.to(x.dtype)).reshape(x.shape[0], 8, -1).permute(2, 0, 1)
        memory = x.flatten(2).permute(2, 0, 1) + position
        queries = self.queries.weight.unsqueeze(1).repeat(1, x.shape[0], 1)
        y, _ = self.attention(queries, memory, memory)
        return self.head(y).transpose(0, 1)


class Recurrent(nn.Module):
    """Columns of an image as time steps of an LSTM, from a zero state and from one made for the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(block(1, 8), nn.MaxPool2d(2), nn.Conv2d(8, 6, (4, 1)))
        self.lstm = nn.LSTM(6, 5, num_layers=2, bidirectional=True)
        self.gru, self.head = nn.GRU(10, 4, batch_first=True), nn.Linear(4, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).squeeze(2).permute(2, 0, 1)
        x, (_, _) = self.lstm(x)
        state = torch.zeros(1, x.shape[1], 4, device=x.device)
        x, last = self.gru(x.transpose(0, 1), state)
        return functional.log_softmax(self.head(x) + self.head(last[-1]).unsqueeze(1), dim=2)


class SpatialTransformer(nn.Module):
    """An affine transform found by one network and applied by sampling a grid."""

    def __init__(self) -> None:
        super().__init__()
        self.localize = nn.Sequential(nn.Conv2d(3, 4, 5, stride=2), nn.ReLU(True), nn.Flatten(), nn.LazyLinear(6))
        self.localize(torch.zeros(1, 3, 16, 16))
        self.register_buffer("identity", torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 0.0]))
        self.trunk, self.head = block(3, 8), classifier(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        theta = (0.1 * self.localize(x) + self.identity).view(-1, 2, 3)
        grid = functional.affine_grid(theta, list(x.size()), align_corners=False)
        return self.head(self.trunk(functional.grid_sample(x, grid, padding_mode="border", align_corners=False)))


class Involution(nn.Module):
    """Kernels made from pixels, applied to unfolded neighbourhoods and folded back."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.kernel = block(3, 8), nn.Conv2d(8, 2 * 9, 1)
        self.head = classifier(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        n, c, h, w = x.shape
        weight = self.kernel(x).view(n, 2, 9, h, w).unsqueeze(2)
        patches = functional.unfold(x, 3, padding=1).view(n, 2, c // 2, 9, h, w)
        y = (weight * patches).sum(dim=3).view(n, c, h, w)
        folded = functional.fold(functional.unfold(y, 2, stride=2), (h, w), 2, stride=2)
        return self.head(folded + x.unfold(2, 1, 1).squeeze(-1))


class NetVlad(nn.Module):
    """Residuals to cluster centers, summed with soft assignments and normalised twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.assign = block(3, 8, stride=2), nn.Conv2d(8, 4, 1, bias=False)
        self.centers, self.head = nn.Parameter(torch.rand(4, 8)), nn.Linear(32, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.normalize(self.stem(x), p=2, dim=1)
        n, c = x.shape[:2]
        assigned = functional.softmax(self.assign(x).view(n, 4, -1), dim=1)
        flat = x.view(n, c, -1)
        residual = flat.expand(4, -1, -1, -1).permute(1, 0, 2, 3) - self.centers.expand(flat.size(-1), -1, -1).permute(
            1, 2, 0
        ).unsqueeze(0)
        vlad = (residual * assigned.unsqueeze(2)).sum(dim=-1)
        return self.head(functional.normalize(functional.normalize(vlad, dim=2).view(n, -1)))


class Keypoints(nn.Module):
    """Heat maps, their soft maxima, and the features at their hard maxima."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.heat = block(3, 8, stride=2), nn.Conv2d(8, 3, 1)
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = self.stem(x)
        n, c, h, w = x.shape
        heat = self.heat(x).flatten(2).softmax(-1)
        columns = torch.arange(w, dtype=torch.float32, device=x.device)
        expected = (heat.view(n, 3, h, w).sum(2) * columns).sum(-1)
        scores, places = heat.topk(2, dim=-1)
        picked = x.flatten(2).gather(2, places.flatten(1).unsqueeze(1).expand(-1, c, -1))
        best = heat[torch.arange(n), :, places[:, 0, 0]]
        return expected + best, self.head(picked.transpose(1, 2)) * scores.sum((1, 2))[:, None, None], places


class LinearAlgebra(nn.Module):
    """Every spelling of a product, transposes as attributes, masks by comparison."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 8, stride=2)
        self.weight, self.bias = nn.Parameter(torch.randn(6, 8) / 3), nn.Parameter(torch.zeros(6))
        self.bilinear, self.head = nn.Bilinear(6, 6, 6), nn.Linear(6, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        pooled = x.mean((2, 3))
        a = torch.addmm(self.bias, pooled, getattr(self.weight, "T"))  # noqa: B009  # as old code writes it
        b = pooled @ self.weight.T
        c = torch.einsum("nchw,kc->nk", x, self.weight) / x[0, 0].numel()
        gram = torch.baddbmm(torch.eye(8).expand(len(x), 8, 8), x.flatten(2), x.flatten(2).mT, alpha=0.01)
        d = (self.weight @ gram).diagonal(dim1=1, dim2=2)
        a = torch.where(a > 0, a, 0.1 * a)
        mask = (b.abs() > b.abs().mean()) & ~(c > 10)
        e = self.bilinear(a, b.masked_fill(mask, 0.0))
        e = e + functional.pad(d, (0, 6 - d.shape[1]))
        return self.head(torch.stack((a, b, c, e), dim=0).sum(dim=0).clamp_(-3, 3))


class TemporalShift(nn.Module):
    """Frames as samples, of which some channels move to the next and the last frame, as in TSM."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.head = block(3, 8), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        frames, c, h, w = x.size()
        clip = x.view(frames // 2, 2, c, h, w)
        ahead = functional.pad(clip[:, 1:, :2], (0, 0, 0, 0, 0, 0, 0, 1))
        behind = functional.pad(clip[:, :-1, 2:4], (0, 0, 0, 0, 0, 0, 1, 0))
        shifted = torch.cat([ahead, behind, clip[:, :, 4:]], dim=2).view(frames, c, h, w)
        y = self.head(self.conv(shifted).mean((2, 3)))
        return y.view(-1, 2, *y.size()[1:]).mean(1)


FRAMES = image(TemporalShift)
NETWORKS: dict[str, Network] = {
    "vision transformer": image(VisionTransformer),
    "shifted windows": image(Swin),
    "bottleneck attention": image(BottleneckAttention),
    "causal attention": image(ScaledDotProduct),
    "coordinates": image(CoordConv, 3, 8, 10),
    "sine positions": image(SinePositions, 3, 8, 12),
    "recurrent": image(Recurrent, 1, 8, 20),
    "spatial transformer": image(SpatialTransformer),
    "involution": image(Involution, 3, 8, 8),
    "netvlad": image(NetVlad),
    "keypoints": image(Keypoints, 3, 12, 10),
    "linear algebra": image(LinearAlgebra),
}
PAIRS_OF_FRAMES = Network(FRAMES.build, FRAMES.inputs, batches=(4, 6))
"""Frames of several videos in the batch: its number of frames is no number of samples."""
