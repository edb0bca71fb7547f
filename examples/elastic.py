"""Training that goes on with however many ranks there are: each start plans for them and loads the last checkpoint.

    torchrun --standalone --nproc-per-node 2 examples/elastic.py run --epochs 2
    torchrun --standalone --nproc-per-node 1 examples/elastic.py run --epochs 4
    torchrun --standalone --nproc-per-node 3 examples/elastic.py run --epochs 6

is one run of six epochs, on two ranks, on one that is left, and on three; ranks that torchrun starts again
(--max-restarts) go on likewise. The losses follow those of a run on one number of ranks: a global batch has the same
samples under every plan, and only rounding differs, which training makes more of; with --dtype float64 the losses
agree.
"""

import argparse
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

import runtime
from planner.api import plan_model
from planner.plan import Plan
from runtime import checkpoint
from runtime.data import Batches
from runtime.launch import initialize

BATCH = 60
KEPT = 2  # checkpoints; an older one is there where the last is damaged


def build_model():
    """Return the network; every rank calls it."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def plan_for(num_ranks, dtype, is_first):
    """Return a plan for so many ranks: one of them plans, all get the same."""
    found = [None]
    if is_first:
        images = torch.empty(BATCH, 1, 8, 8, device="meta", dtype=dtype)
        found = [plan_model(build_model().to(dtype), (images,), devices=num_ranks, all_devices=True).to_json()]
    dist.broadcast_object_list(found)
    return Plan.from_json(found[0])


def train_epoch(net, optimizer, images, labels, batches):
    """Return the mean loss over the samples of all ranks."""
    total = torch.zeros(2, dtype=images.dtype, device=images.device)
    for samples in batches:
        optimizer.zero_grad()
        loss = functional.cross_entropy(net(images[samples]), labels[samples])
        loss.backward()
        runtime.require_finite(net, loss)
        optimizer.step()
        total += torch.stack([loss.detach() * len(samples), torch.ones_like(loss) * len(samples)])
    dist.all_reduce(total)
    return float(total[0] / total[1])


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the checkpoints")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    arguments = parser.parse_args(words)

    process = initialize()
    torch.manual_seed(0)
    dtype = getattr(torch, arguments.dtype)
    plan = plan_for(process.world_size, dtype, process.rank == 0)
    net = runtime.parallelize(build_model().to(process.device, dtype), plan)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    digits = load_digits()
    images = torch.tensor(digits.images / 16, dtype=dtype, device=process.device).unsqueeze(1)
    labels = torch.tensor(digits.target, device=process.device)
    batches = Batches(len(labels), plan, shuffle=True)

    resumed = checkpoint.load_newest(net, optimizer, arguments.run)
    for epoch in range(resumed.step if resumed else 0, arguments.epochs):
        batches.set_epoch(epoch)
        loss = train_epoch(net, optimizer, images, labels, batches)
        if process.rank == 0:
            print(f"epoch {epoch + 1} on {process.world_size} ranks: loss {loss:.6f}", flush=True)
            shutil.rmtree(arguments.run / f"epoch-{epoch + 1 - KEPT}", ignore_errors=True)
        checkpoint.save(net, optimizer, arguments.run / f"epoch-{epoch + 1}", step=epoch + 1)
    dist.barrier()  # lets gloo finish the last collective; an exit right behind one may abort
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
