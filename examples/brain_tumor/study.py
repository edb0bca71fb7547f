"""Habib & Qureshi's comparisons on this machine: activations, heads and optimizers; ways to train in parallel.

    python -m examples.brain_tumor.study variants -o examples/brain_tumor/variants.csv
    python -m examples.brain_tumor.study alphas -o examples/brain_tumor/alphas.csv
    python -m examples.brain_tumor.study ways --alpha 0.05 -o examples/brain_tumor/ways.csv

`variants` trains the network with ReLU and NNLU, with and without GAP, by SGD, Adam and AMSGrad, on one device;
`alphas` with NNLU at other times a, with GAP, by Adam.
`ways` trains it on two local processes, each with one core: data, model, conv-data-fc-model (the paper's hybrid), that
with linear layers updated in each of two turns, and the planned strategy, a step of each in turn, beside one device.

The network is the paper's at a width and for an image size (`--width`, `--size`); without `--data FOLDER` it sees
scikit-learn's digits 3, 5 and 8. See README.md for the formats.
"""

import argparse
import dataclasses
import itertools
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn import functional

import runtime
from examples.benchmarks.rows import write_rows
from examples.brain_tumor.data import load, split
from examples.brain_tumor.network import tumor_net
from planner.api import Options, Origin, machine_of, prepare
from planner.errors import LayerwiseError
from planner.plan import Plan
from runtime.data import own_samples
from runtime.launch import run_local

RANKS = 2
ALPHAS = (0.02, 0.05, 0.1, 0.2, 0.333, 1.0)
ACTIVATIONS, GAPS, OPTIMIZERS = ("relu", "nnlu"), (False, True), ("sgd", "adam", "amsgrad")
STRATEGIES = {"data": "data", "model": "model", "hybrid": "conv-data-fc-model", "planned": None}
WARM_UP = 3


@dataclasses.dataclass(frozen=True)
class Row:
    """One training.

    ``loss``: the mean of the last epoch.
    ``reach``: in the first step, the norm of the gradient of Conv1's weights over that of Fc2's; 0 where not measured.
    ``step_s``: the median step of the slowest rank; 0 where nobody measures.
    """

    activation: str
    alpha: float
    gap: int
    optimizer: str
    way: str
    batch: str
    seed: int
    epochs: int
    loss: float
    train_percent: float
    test_percent: float
    reach: float
    step_s: float


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("variants", "alphas", "ways"))
    parser.add_argument("--data", metavar="FOLDER", help="brain slices as .mat files, or images in folders of classes")
    parser.add_argument("--width", type=float, default=1 / 32, help="factor on the paper's channels")
    parser.add_argument("--size", type=int, default=32, help="pixels")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=2, help="of variants; ways are trained once")
    parser.add_argument("--alpha", type=float, default=0.333, help="of NNLU")
    parser.add_argument("-o", "--output", type=Path, help="CSV file")
    arguments = parser.parse_args()
    settings = {k: v for k, v in vars(arguments).items() if k not in {"part", "output"}}
    rows = []
    try:
        for row in {"variants": variants, "alphas": alphas, "ways": ways}[arguments.part](settings):
            rows.append(row)
            if arguments.output:
                write_rows(arguments.output, rows, Row)
    except LayerwiseError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for line in table(rows):
        print(line)
    return 0


def build(settings, activation, gap, seed=0):
    torch.manual_seed(seed)
    return tumor_net(
        width=settings["width"], image=settings["size"], channels=1, activation=activation, gap=gap,
        alpha=settings["alpha"],
    )  # fmt: skip


def of_nnlu(settings, activation):
    """Return a of NNLU; 0 for ReLU, which has none."""
    return settings["alpha"] if activation == "nnlu" else 0.0


def make_optimizer(name, parameters):
    """Return an optimizer with settings that train the network with ReLU; the paper gives no rate for Table 1."""
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
    return torch.optim.Adam(parameters, lr=1e-3, amsgrad=name == "amsgrad")


def epochs_of(indices, batch, epochs, seed):
    """Yield the images of every step, in whole batches."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = indices[torch.randperm(len(indices), generator=generator)]
        yield from order.split(batch)[: len(order) // batch]


def percent(scores, labels):
    return 100 * float((scores.argmax(1) == labels).float().mean())


# --- variants


def variants(settings):
    data = load(settings["data"], settings["size"])
    for seed in range(settings["seeds"]):
        for activation, gap, name in itertools.product(ACTIVATIONS, GAPS, OPTIMIZERS):
            yield variant(settings, data, activation, gap, name, seed)


def alphas(settings):
    data = load(settings["data"], settings["size"])
    for alpha, seed in itertools.product(ALPHAS, range(settings["seeds"])):
        yield variant({**settings, "alpha": alpha}, data, "nnlu", True, "adam", seed)


def variant(settings, data, activation, gap, optimizer_name, seed):
    net = build(settings, activation, gap, seed)
    train, test = split(data, seed=seed)
    optimizer = make_optimizer(optimizer_name, net.parameters())
    losses, reach = [], 0.0
    for batch in epochs_of(train, settings["batch"], settings["epochs"], seed):
        optimizer.zero_grad()
        loss = functional.cross_entropy(net(data.images[batch]), data.labels[batch])
        loss.backward()
        reach = reach or float(net.features.conv1.weight.grad.norm() / net.fc2.weight.grad.norm())
        optimizer.step()
        losses.append(float(loss.detach()))
    net.eval()
    with torch.no_grad():
        found = [percent(net(data.images[part]), data.labels[part]) for part in (train, test)]
    last = losses[-(len(train) // settings["batch"]) :]
    return Row(
        activation, of_nnlu(settings, activation), int(gap), optimizer_name, "one device", str(settings["batch"]), seed,
        settings["epochs"], statistics.mean(last), *found, reach, 0.0,
    )  # fmt: skip


# --- ways


def ways(settings):
    machine = machine_of(f"local-{RANKS}")
    for activation, gap in itertools.product(ACTIVATIONS, GAPS):
        net, images = build(settings, activation, gap), torch.zeros(settings["batch"], 1, *[settings["size"]] * 2)
        planner = prepare(net, (images,), machine, Options(all_devices=True), Origin("tumor-net", "tumor-net"))
        search = planner.search(planner.meshes()[0])
        plans = {
            way: (planner.plan() if name is None else planner.plan_of(search, search.fixed(name))).to_json()
            for way, name in STRATEGIES.items()
        }
        argument = {"plans": plans, "settings": settings, "activation": activation, "gap": gap}
        found, *_ = run_local("examples.brain_tumor.study:train", argument, num_ranks=RANKS, timeout_s=3600)
        yield from (Row(**row) for row in found)


class Way:
    """One way to train, on this rank."""

    def __init__(self, net, optimizer, step, evaluate, part):
        self.net, self.optimizer, self.step, self.evaluate, self.part = net, optimizer, step, evaluate, part
        self.losses, self.seconds = [], []


def plain(net, part):
    optimizer = make_optimizer("adam", net.parameters())

    def step(images, labels):
        optimizer.zero_grad()
        loss = functional.cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return Way(net, optimizer, step, net, part)


def in_turns(model, plan, part):
    net = runtime.variable_batch(model, plan, functional.cross_entropy, scheme="c", num_turns=2)
    optimizer = make_optimizer("adam", net.parameters())
    return Way(
        net, optimizer, lambda x, labels: net.step(x, target=labels, optimizer=optimizer), net.evaluate, part
    )  # fmt: skip


def train(argument, process):
    """Train in every way, a step of each in turn; every rank calls it."""
    torch.set_num_threads(1)
    settings, activation, gap = argument["settings"], argument["activation"], argument["gap"]
    data = load(settings["data"], settings["size"])
    indices, test = split(data)

    def new():
        return build(settings, activation, gap)

    plans = {way: Plan.from_json(text) for way, text in argument["plans"].items()}
    of = {way: lambda n, plan=plan: own_samples(plan, process.rank, n) for way, plan in plans.items()}
    running = {way: plain(runtime.parallelize(new(), plan), of[way]) for way, plan in plans.items()}
    running["hybrid (m, n)"] = in_turns(new(), plans["hybrid"], of["data"])
    alone = plain(new(), slice)
    for batch in epochs_of(indices, settings["batch"], settings["epochs"], 0):
        for way in running.values():
            dist.barrier()
            timed(way, data, batch)
        dist.barrier()
        if process.rank == 0:  # the other waits
            timed(alone, data, batch)
    steps = len(indices) // settings["batch"]
    rows = []
    for name, way in {"one device": alone, **running}.items():
        is_alone, m = name == "one device", settings["batch"]
        shares = [tested(way, data, part, process, is_alone) for part in (indices, test)]
        loss = over_ranks(way.losses[-steps:], dist.ReduceOp.SUM)
        slowest = over_ranks(way.seconds[WARM_UP:], dist.ReduceOp.MAX)
        size = f"({m}, {m // 2})" if "(m, n)" in name else str(m)
        rows.append(dataclasses.asdict(Row(
            activation, of_nnlu(settings, activation), int(gap), "adam", name, size, 0, settings["epochs"],
            loss if is_alone else loss / process.world_size, *shares, 0.0, slowest,
        )))  # fmt: skip
    return rows


def over_ranks(values, operation):
    """Return the mean of a rank's losses, or the median of its seconds, put together over the ranks."""
    typical = statistics.mean if operation is dist.ReduceOp.SUM else statistics.median
    found = torch.tensor(typical(values) if values else 0.0)
    dist.all_reduce(found, operation)
    return float(found)


def timed(way, data, batch):
    own = batch[way.part(len(batch))]
    images, labels = data.images[own], data.labels[own]
    start = time.perf_counter()
    loss = way.step(images, labels)
    way.seconds.append(time.perf_counter() - start)
    way.losses.append(float(loss))


def tested(way, data, indices, process, is_alone):
    """Return the accuracy over all images, of all ranks' shares."""
    if is_alone and process.rank:
        return 0.0
    own = indices[way.part(len(indices))]
    way.net.eval()
    with torch.no_grad():
        right = (way.evaluate(data.images[own]).argmax(1) == data.labels[own]).sum().float()
    way.net.train()
    if not is_alone:
        dist.all_reduce(right)
    return 100 * float(right) / len(indices)


# --- tables


def table(rows):
    """Yield means over seeds, with standard deviations."""
    head = f"{'network':16}{'optimizer':11}{'way':16}{'batch':>10}{'loss':>8}"
    yield f"{head}{'test accuracy, %':>19}{'reach':>9}{'step':>10}"
    for key in dict.fromkeys((r.activation, r.alpha, r.gap, r.optimizer, r.way, r.batch) for r in rows):
        group = [r for r in rows if (r.activation, r.alpha, r.gap, r.optimizer, r.way, r.batch) == key]
        found, losses = [r.test_percent for r in group], [r.loss for r in group]
        spread = f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else ""
        step = f"{1e3 * statistics.median(r.step_s for r in group):.1f} ms" if group[0].step_s else ""
        reach = f"{statistics.median(r.reach for r in group):.0e}" if group[0].reach else ""
        activation, alpha, gap, optimizer, way, batch = key
        network = f"{activation}{f' {alpha:g}' if alpha else ''}{' gap' if gap else ''}"
        accuracy = f"{statistics.mean(found):.1f}{spread}"
        loss = f"{statistics.mean(losses):.3f}"
        yield f"{network:16}{optimizer:11}{way:16}{batch:>10}{loss:>8}{accuracy:>19}{reach:>9}{step:>10}"


if __name__ == "__main__":
    sys.exit(main())
