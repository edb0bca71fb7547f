"""AlexNet, Inception-v3 and ResNet-101 in PaSE's granularity [PaSE21], node for node as its published code has them.

Batch norms, pools, concatenations, additions and the loss are nodes; activations belong to the convolution or addition
in front of them, and do not count behind a batch norm. Images have 227 x 227 pixels, of Inception-v3 299 x 299;
AlexNet is the two-tower net without its towers and has 1024 classes.
"""

from collections.abc import Sequence
from math import prod

from planner.search.published.pase_operators import Graph, Kind, Node, Operator, Shape

Pair = tuple[int, int]


class _Builder:
    """Collects nodes; a tensor is the position of the node that makes it, -1 the network's input."""

    def __init__(self, batch: int, pixels: int) -> None:
        self.nodes: list[Node] = []
        self.block = ""
        self._input: Shape = (batch, 3, pixels, pixels)

    def shape(self, tensor: int) -> Shape:
        return self._input if tensor < 0 else self.nodes[tensor].operator.output

    def conv(
        self, x: int, filters: int, kernel: Pair, stride: int = 1, padding: Pair = (0, 0), pointwise: int = 0
    ) -> int:
        b, c, *image = self.shape(x)
        h, w = ((size - k + 2 * pad) // stride + 1 for size, k, pad in zip(image, kernel, padding, strict=True))
        sizes = (b, c, h, w, *kernel, filters)
        return self._add(Operator(Kind.PRODUCT, sizes, (b, filters, h, w), self.shape(x), pointwise), x)

    def linear(self, x: int, features: int, pointwise: int = 0) -> int:
        return self.conv(x, features, (1, 1), pointwise=pointwise)

    def pool(self, x: int, size: int, stride: int, padding: int = 0) -> int:
        b, c, *image = self.shape(x)
        h, w = ((pixels - size + 2 * padding) // stride + 1 for pixels in image)
        return self._plain(Kind.POOL, x, (b, c, h, w), window=(size, size))

    def norm(self, x: int) -> int:
        return self._plain(Kind.NORM, x, self.shape(x))

    def add(self, x: int, other: int) -> int:
        return self._plain(Kind.ELEMENTWISE, x, self.shape(x), other, pointwise=1)

    def concat(self, tensors: Sequence[int]) -> int:
        b, _, h, w = self.shape(tensors[0])
        return self._plain(Kind.CONCAT, tensors[0], (b, sum(self.shape(x)[1] for x in tensors), h, w), *tensors[1:])

    def flatten(self, x: int) -> int:
        b, *rest = self.shape(x)
        flat: Shape = (b * prod(rest), 1, 1, 1)
        x = self._add(Operator(Kind.FLATTEN, (*self.shape(x), 1, 1, 1), flat, self.shape(x)), x)
        return self._plain(Kind.UNFLATTEN, x, (b, prod(rest), 1, 1))

    def head(self, x: int, classes: int) -> Graph:
        """Mean, linear layer and loss."""
        self.block = ""
        b, c, h, w = self.shape(x)
        x = self._add(Operator(Kind.MEAN, (b, c, h, w, 1, 1, 1), (b, c, 1, 1), self.shape(x)), x)
        return self.loss(self.linear(x, classes))

    def loss(self, x: int) -> Graph:
        self._plain(Kind.LOSS, x, self.shape(x))
        return tuple(self.nodes)

    def _plain(self, kind: Kind, x: int, output: Shape, *others: int, pointwise: int = 0, window: Pair = (1, 1)) -> int:
        operator = Operator(kind, (*output, 1, 1, 1), output, self.shape(x), pointwise, window)
        return self._add(operator, x, *others)

    def _add(self, operator: Operator, *inputs: int) -> int:
        name = f"{self.block}{operator.kind}{len(self.nodes)}"
        self.nodes.append(Node(name, operator, tuple(x for x in inputs if x >= 0)))
        return len(self.nodes) - 1


def alexnet(batch: int) -> Graph:
    """Return AlexNet: 14 nodes, 13 edges."""
    g = _Builder(batch, 227)
    x = g.pool(g.conv(-1, 96, (11, 11), 4, pointwise=1), 3, 2)
    x = g.pool(g.conv(x, 256, (5, 5), 1, (2, 2), pointwise=1), 3, 2)
    for filters in (384, 384, 256):
        x = g.conv(x, filters, (3, 3), 1, (1, 1), pointwise=1)
    x = g.flatten(g.pool(x, 3, 2))
    x = g.linear(g.linear(x, 4096, pointwise=1), 4096, pointwise=1)
    return g.loss(g.linear(x, 1024))


def resnet101(batch: int) -> Graph:
    """Return ResNet-101: 245 nodes, 277 edges."""
    g = _Builder(batch, 227)
    x = g.pool(g.norm(g.conv(-1, 64, (7, 7), 2, (3, 3))), 3, 2, 1)
    for stage, blocks in enumerate((3, 4, 23, 3)):
        planes = 64 * 2**stage
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            y = g.norm(g.conv(x, planes, (1, 1)))
            y = g.norm(g.conv(y, planes, (3, 3), stride, (1, 1)))
            y = g.norm(g.conv(y, 4 * planes, (1, 1)))
            x = g.add(y, x if block else g.norm(g.conv(x, 4 * planes, (1, 1), stride)))
    return g.head(x, 1000)


class _Inception(_Builder):
    """The five kinds of blocks, by which their nodes are named; a convolution has a batch norm behind it."""

    def unit(self, x: int, filters: int, height: int = 1, width: int = 1, stride: int = 1) -> int:
        """Padded so that the size stays, but for strides."""
        padding = (0, 0) if stride > 1 else (height // 2, width // 2)
        return self.norm(self.conv(x, filters, (height, width), stride, padding))

    def units(self, x: int, *steps: tuple[int, ...]) -> int:
        for step in steps:
            x = self.unit(x, *step)
        return x

    def a(self, x: int, pooled: int) -> int:
        self.block = "A:"
        branches = [((64,),), ((48,), (64, 5, 5)), ((64,), (96, 3, 3), (96, 3, 3))]
        return self._joined(x, branches, pooled)

    def b(self, x: int) -> int:
        self.block = "B:"
        return self._reduced(x, [((384, 3, 3, 2),), ((64,), (96, 3, 3), (96, 3, 3, 2))])

    def c(self, x: int, inner: int) -> int:
        self.block = "C:"
        twice = ((inner,), (inner, 7, 1), (inner, 1, 7), (inner, 7, 1), (192, 1, 7))
        return self._joined(x, [((192,),), ((inner,), (inner, 1, 7), (192, 7, 1)), twice], 192)

    def d(self, x: int) -> int:
        self.block = "D:"
        return self._reduced(x, [((192,), (320, 3, 3, 2)), ((192,), (192, 1, 7), (192, 7, 1), (192, 3, 3, 2))])

    def e(self, x: int) -> int:
        self.block = "E:"
        one = self.unit(x, 320)
        three = self._fork(self.unit(x, 384))
        double = self._fork(self.units(x, (448,), (384, 3, 3)))
        return self.concat([one, three, double, self.unit(self.pool(x, 3, 1, 1), 192)])

    def _fork(self, x: int) -> int:
        return self.concat([self.unit(x, 384, 1, 3), self.unit(x, 384, 3, 1)])

    def _joined(self, x: int, branches: Sequence[Sequence[tuple[int, ...]]], pooled: int) -> int:
        made = [self.units(x, *branch) for branch in branches]
        return self.concat([*made, self.unit(self.pool(x, 3, 1, 1), pooled)])

    def _reduced(self, x: int, branches: Sequence[Sequence[tuple[int, ...]]]) -> int:
        made = [self.units(x, *branch) for branch in branches]
        return self.concat([*made, self.pool(x, 3, 2)])


def inception_v3(batch: int) -> Graph:
    """Return Inception-v3 without the auxiliary classifier: 219 nodes, 253 edges."""
    g = _Inception(batch, 299)
    x = g.norm(g.conv(g.norm(g.conv(-1, 32, (3, 3), 2)), 32, (3, 3)))
    x = g.unit(g.pool(g.unit(x, 64, 3, 3), 3, 2), 80)
    x = g.pool(g.norm(g.conv(x, 192, (3, 3))), 3, 2)
    for pooled in (32, 64, 64):
        x = g.a(x, pooled)
    x = g.b(x)
    for inner in (128, 160, 160, 192):
        x = g.c(x, inner)
    return g.head(g.e(g.e(g.d(x))), 1000)
