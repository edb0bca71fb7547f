"""Bring your own CNN: with a module that cannot be traced, in a plain loop.

    layerwise plan examples/own_cnn.py:build_model --input 3,32,32 --devices 2 --batch 32 --all-devices -o plan.json
    torchrun --nproc-per-node 2 examples/own_cnn.py plan.json

Nothing but `register_module` tells that the network will be planned. Images are random: what is shown is the loop.
"""

import argparse

import torch
from torch import nn
from torch.nn import functional

import runtime
from planner.frontend.custom import register_module
from planner.plan import Plan
from runtime.launch import initialize, leave


class Normalize(nn.Module):
    """Scales each image by its own brightest pixel: it looks at values, so no tracer can follow it."""

    def forward(self, images):
        return torch.stack([image / image.max() if image.max() > 1 else image for image in images])


register_module(Normalize, output_shape=lambda shape: shape)  # one layer, that may be split by samples


def build_model(width=32):
    """Return the network; `layerwise plan` and every rank call it."""
    return nn.Sequential(
        Normalize(),
        nn.Conv2d(3, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(8),
        nn.Flatten(),
        nn.Linear(2 * width * 64, 1024),
        nn.ReLU(),
        nn.Linear(1024, 10),
    )


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", help="made by layerwise plan")
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args(arguments)

    process = initialize()
    torch.manual_seed(0)
    plan = Plan.load(arguments.plan)
    net = runtime.parallelize(build_model(**plan.model.arguments).to(process.device), plan)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)

    samples = plan.batch // process.world_size  # each rank its own
    generator = torch.Generator().manual_seed(process.rank)
    images = torch.rand(samples, 3, 32, 32, generator=generator).to(process.device)
    labels = (images.mean((1, 2, 3)) * 1000).long() % 10
    losses = []
    for _ in range(arguments.steps):
        optimizer.zero_grad()
        loss = functional.cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if process.rank == 0:
        print(f"loss {losses[0]:.3f} at first, {losses[-1]:.3f} after {len(losses)} steps")
    leave()
    return losses


if __name__ == "__main__":
    main()
