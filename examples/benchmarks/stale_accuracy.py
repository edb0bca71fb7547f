"""Accuracy of training in cycles with stale weights: cuts early and deep, several of them, and the hybrid.

    python -m examples.benchmarks.stale_accuracy -o examples/benchmarks/stale_accuracy.csv

Trains LeNet-5 and a narrow ResNet-20 on scikit-learn's digits, enlarged to the size that the network takes, with the
same start values, order of batches and learning rates for every way of training: on one device, pipelined
[Zhang & Abdelrahman 2021] with cuts behind chosen layers, the hybrid (the first half of the steps pipelined), and with
the deepest cuts and stashed weights. At most four pairs of registers, as in the paper. All stages run in this process,
in cycles: the numbers of a pipeline, not its speed. Prints and writes the mean test accuracy over seeds and the drop
against one device, with the standard deviation of the drop over the seeds; rows of other networks that the file has
stay. An hour on one core.

`--data FOLDER` takes images of your own instead, such as CIFAR-10 or MNIST as files: FOLDER/train/CLASS/* and
FOLDER/test/CLASS/* (needs pillow). `--width 1` is the whole ResNet-20.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD

from examples.benchmarks.rows import read_rows, write_rows
from planner.errors import LayerwiseError, UsageError
from planner.models.lenet import lenet5
from planner.models.resnet import BasicBlock, cifar_resnet
from runtime.demo import load_digits
from runtime.pipeline.stale import Mode, StalePipeline

BATCH = 32
MOMENTUM, DECAY = 0.9, 5e-4
SLOWER_AFTER, SLOWER_BY = 0.7, 0.1
"""The share of the steps behind which the learning rate falls, and to what part."""


@dataclasses.dataclass(frozen=True)
class Network:
    """A network and how it is trained.

    ``cuts``: the layers with weights behind which registers are, counted from 1 along the main path.
    """

    size: int
    channels: int
    rate: float
    epochs: int
    cuts: tuple[tuple[int, ...], ...]


NETWORKS = {
    "lenet5": Network(32, 1, 0.004, 24, ((1,), (4,), (1, 2), (1, 2, 3), (1, 2, 3, 4))),
    "resnet20": Network(16, 3, 0.05, 8, ((7,), (19,), (7, 13), (7, 13, 19), (3, 7, 13, 19))),
}


@dataclasses.dataclass(frozen=True)
class Images:
    """Images as (N, channels, size, size), uint8, and their classes, for training and testing."""

    train: Tensor
    train_classes: Tensor
    test: Tensor
    test_classes: Tensor

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return int(self.train_classes.max()) + 1


@dataclasses.dataclass(frozen=True)
class Row:
    """One way of training one network; accuracies of the test images, in percent."""

    network: str
    way: str
    cuts: str
    registers: int
    stale_weights: float
    accuracy: float
    drop: float
    drop_sd: float
    seeds: int
    steps: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, help="instead of the network's own number")
    parser.add_argument("--rate", type=float, help="learning rate instead of the network's own")
    parser.add_argument("--width", type=float, default=0.25, help="of ResNet-20 (default: 0.25)")
    parser.add_argument("--data", type=Path, help="folder of images instead of digits")
    parser.add_argument("-o", "--output", type=Path, help="CSV file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = read_rows(arguments.output, Row) if arguments.output else []
    try:
        for name in arguments.networks:
            start = time.perf_counter()
            network = NETWORKS[name]
            network = dataclasses.replace(
                network, epochs=arguments.epochs or network.epochs, rate=arguments.rate or network.rate
            )
            rows = [row for row in rows if row.network != name]
            for row in study(name, network, images_of(arguments.data, network), arguments.width, arguments.seeds):
                rows.append(row)
                if arguments.output:
                    write_rows(arguments.output, rows, Row)
            print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    except LayerwiseError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for line in lines(rows):
        print(line)
    return 0


# ---- images


def images_of(folder: Path | None, network: Network) -> Images:
    """Return the images in the size of the network."""
    if folder is not None:
        train, test = (_folder(folder / part, network) for part in ("train", "test"))
        return Images(*train, *test)
    both = load_digits()
    enlarged = [functional.interpolate(d.images, network.size, mode="bilinear").clamp(0, 1) for d in both]
    pixels = [(x * 255).to(torch.uint8).repeat(1, network.channels, 1, 1) for x in enlarged]
    return Images(pixels[0], both[0].labels, pixels[1], both[1].labels)


def _folder(folder: Path, network: Network) -> tuple[Tensor, Tensor]:
    try:
        from PIL import Image
    except ImportError:
        raise UsageError("reading images needs pillow: pip install pillow") from None
    classes = sorted(path for path in folder.glob("*") if path.is_dir())
    if not classes:
        raise UsageError(f"{folder} has no folders of images; one for each class is needed")
    pixels, labels = [], []
    for label, place in enumerate(classes):
        for file in sorted(place.iterdir()):
            with Image.open(file) as opened:
                image = opened.convert("L" if network.channels == 1 else "RGB").resize((network.size, network.size))
            pixels.append(torch.from_numpy(np.array(image)).view(network.size, network.size, -1).permute(2, 0, 1))
            labels.append(label)
    return torch.stack(pixels), torch.tensor(labels)


def floats(pixels: Tensor) -> Tensor:
    return pixels.float() / 127.5 - 1


# ---- networks


def build(name: str, num_classes: int, width: float, seed: int) -> list[nn.Module]:
    """Return the network as a list of what stays together."""
    torch.manual_seed(seed)
    if name == "lenet5":
        net = lenet5(num_classes=num_classes)
        return [*net.features, net.flatten, *net.classifier]
    net = cifar_resnet(20, width, num_classes)
    blocks = [block for i in (1, 2, 3) for block in net.get_submodule(f"layer{i}").children()]
    return [net.conv1, net.bn1, net.relu, *blocks, net.avgpool, net.flatten, net.fc]


def layers_in(unit: nn.Module) -> int:
    """Return how many layers with weights lie on the main path; shortcuts do not count."""
    return 2 if isinstance(unit, BasicBlock) else int(isinstance(unit, nn.Conv2d | nn.Linear))


def stages_of(units: Sequence[nn.Module], cuts: Sequence[int]) -> list[nn.Sequential]:
    """Cut a network behind layers; what follows a layer without weights stays with it."""
    found, count = [nn.Sequential()], 0
    for unit in units:
        if layers_in(unit) and count in cuts:
            found.append(nn.Sequential())
        found[-1].append(unit)
        count += layers_in(unit)
    if len(found) != len(cuts) + 1:
        raise UsageError(f"the network cannot be cut behind all of the layers {list(cuts)}")
    return found


# ---- training


def study(name: str, network: Network, images: Images, width: float, seeds: int) -> Iterator[Row]:
    """Yield a row for every way of training."""
    steps = len(images.train) // BATCH * network.epochs
    deepest = network.cuts[-1]
    ways: list[tuple[str, tuple[int, ...], Mode, int | None]] = [("one device", (), "stale", None)]
    ways += [("pipelined", cuts, "stale", None) for cuts in network.cuts]
    ways += [("hybrid", cuts, "stale", steps // 2) for cuts in network.cuts]
    ways.append(("stashed", deepest, "pipedream", None))
    alone: list[float] = []
    for way, cuts, mode, pipelined in ways:
        found = []
        for seed in range(seeds):
            stages = stages_of(build(name, images.num_classes, width, seed), cuts)
            found.append(100 * trained(stages, network, images, seed, mode, pipelined))
        alone = alone or found
        drops = [a - b for a, b in zip(alone, found, strict=True)]
        sizes = [sum(p.numel() for p in stage.parameters()) for stage in stages]
        yield Row(
            name, way, "-".join(map(str, cuts)), len(cuts), 100 * sum(sizes[:-1]) / sum(sizes), statistics.mean(found),
            statistics.mean(drops), statistics.stdev(drops) if seeds > 1 else 0.0, seeds, steps,
        )  # fmt: skip
        print(f"{name} {way} {cuts}: {statistics.mean(found):.2f} %", file=sys.stderr)


def trained(
    stages: Sequence[nn.Sequential], network: Network, images: Images, seed: int, mode: Mode, pipelined: int | None
) -> float:
    """Return the share of test images that are classified rightly, behind the last step."""
    optimizers = [SGD(stage.parameters(), network.rate, MOMENTUM, weight_decay=DECAY) for stage in stages]
    pipeline = StalePipeline.in_process(stages, optimizers, functional.cross_entropy, mode, pipelined)
    generator = torch.Generator().manual_seed(seed)
    count = len(images.train)
    total = count // BATCH * network.epochs
    step = 0
    for _ in range(network.epochs):
        for chosen in torch.randperm(count, generator=generator)[: count // BATCH * BATCH].split(BATCH):
            if step == int(total * SLOWER_AFTER):
                for optimizer in optimizers:
                    optimizer.param_groups[0]["lr"] = network.rate * SLOWER_BY
            pipeline.step(floats(images.train[chosen]), images.train_classes[chosen])
            step += 1
    pipeline.drain()
    whole = nn.Sequential(*stages).eval()
    with torch.no_grad():
        parts = zip(images.test.split(256), images.test_classes.split(256), strict=True)
        right = sum(int((whole(floats(x)).argmax(1) == y).sum()) for x, y in parts)
    return right / len(images.test)


# ---- results


def lines(rows: Sequence[Row]) -> Iterator[str]:
    yield f"{'network':10}{'way':12}{'cut behind layers':28}{'stale weights':>14}{'accuracy':>10}{'drop':>8}{'sd':>7}"
    for row in rows:
        yield (
            f"{row.network:10}{row.way:12}{row.cuts or '-':28}{row.stale_weights:12.0f} %{row.accuracy:8.2f} %"
            f"{row.drop:8.2f}{row.drop_sd:7.2f}"
        )


if __name__ == "__main__":
    raise SystemExit(main())
