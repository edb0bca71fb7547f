"""Train a small CNN on scikit-learn's digits under a plan.

    layerwise plan examples/train.py:build_model --input 1,8,8 --cluster local-2 --batch 64 --all-devices -o plan.json
    torchrun --nproc-per-node 2 examples/train.py plan.json

With --checkpoint FOLDER the run saves itself behind each epoch; started again, under this plan or another one and on
any number of ranks, it goes on from there.

Against a script for torch's DistributedDataParallel, three lines are new. They are marked.
"""

import argparse

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import runtime  # line 1
from planner.plan import Plan
from runtime import checkpoint
from runtime.launch import initialize


def build_model():
    """Return the network; `layerwise plan` and every rank call it."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 512),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(512, 10),
    )


def load_data():
    """Return training and test images: every fifth of the 1,797 digits is for testing."""
    digits = load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(digits.target)
    is_test = torch.arange(len(labels)) % 5 == 0
    return TensorDataset(images[~is_test], labels[~is_test]), TensorDataset(images[is_test], labels[is_test])


def loader(dataset, plan, *, shuffle):
    """Return this rank's share of the data. All ranks get equally many batches, the last one may be smaller."""
    sampler = DistributedSampler(dataset, shuffle=shuffle)
    return DataLoader(dataset, plan.batch // dist.get_world_size(), sampler=sampler)


def train_epoch(net, optimizer, batches, device):
    """Return the mean loss over the samples of all ranks."""
    net.train()
    total = torch.zeros(2, device=device)
    for images, labels in batches:
        optimizer.zero_grad()
        loss = functional.cross_entropy(net(images.to(device)), labels.to(device))
        loss.backward()
        optimizer.step()
        total += torch.stack([loss.detach() * len(labels), torch.tensor(float(len(labels)), device=device)])
    dist.all_reduce(total)
    return float(total[0] / total[1])


def accuracy(net, batches, device):
    """Return the share of test images of all ranks that are classified rightly."""
    net.eval()
    total = torch.zeros(2, device=device)
    with torch.no_grad():
        for images, labels in batches:
            right = net(images.to(device)).argmax(1) == labels.to(device)
            total += torch.tensor([right.sum(), len(labels)], device=device)
    dist.all_reduce(total)
    return float(total[0] / total[1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", help="made by layerwise plan")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--checkpoint", metavar="FOLDER", help="save there after every epoch; go on from what is there")
    parser.add_argument("--export", metavar="FILE", help="write the trained weights for torch.load")
    arguments = parser.parse_args()

    process = initialize()  # torch.distributed.init_process_group() works too
    torch.manual_seed(0)
    model = build_model().to(process.device)

    plan = Plan.load(arguments.plan)  # line 2
    net = runtime.parallelize(model, plan)  # line 3

    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    train_data, test_data = load_data()
    train_batches, test_batches = loader(train_data, plan, shuffle=True), loader(test_data, plan, shuffle=False)
    first, saving = 0, None
    if arguments.checkpoint and checkpoint.exists(arguments.checkpoint):
        first = checkpoint.load(net, optimizer, arguments.checkpoint).step
    for epoch in range(first, arguments.epochs):
        train_batches.sampler.set_epoch(epoch)
        loss = train_epoch(net, optimizer, train_batches, process.device)
        share = accuracy(net, test_batches, process.device)
        if process.rank == 0:
            print(f"epoch {epoch + 1}: loss {loss:.4f}, test accuracy {share:.1%}", flush=True)
        if arguments.checkpoint:  # it is written while the next epoch runs
            saving = checkpoint.start_saving(net, optimizer, arguments.checkpoint, step=epoch + 1)
    if saving:
        saving.wait()
    if arguments.export:
        checkpoint.export(net, arguments.export)
    dist.barrier()  # lets gloo finish the last collective; an exit right behind one may abort
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
