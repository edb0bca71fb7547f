"""Train on images that are too large for one device: a U-Net, the rows of each image spread over ranks.

    layerwise plan unet --input 1,256,256 --devices 2 --batch 1 --solver spatial --io local -o plan.json
    torchrun --nproc-per-node 2 examples/large_images.py plan.json

`--solver spatial` asks for rows; without it the planner takes them where they are fastest. With `--io local` a rank
gets its rows of the class maps, and reads no others of the masks; of the images it reads what the plan gives it.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

import runtime
from planner.models import entry
from planner.plan import Plan
from runtime.launch import initialize, leave


def write_images(path, count, shape):
    """Write images with a bright square each, and where it is."""
    generator = np.random.default_rng(0)
    images = generator.random((count, *shape), dtype=np.float32)
    masks = np.zeros((count, *shape[1:]), dtype=np.int64)
    for image, mask in zip(images, masks, strict=True):
        top, left = generator.integers(0, shape[1] // 2, 2)
        mask[top : top + shape[1] // 4, left : left + shape[2] // 4] = 1
        np.add(image, mask, out=image)
    np.save(path / "images.npy", images)
    np.save(path / "masks.npy", masks)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", help="made by layerwise plan --solver spatial --io local")
    parser.add_argument("--steps", type=int, default=8)
    arguments = parser.parse_args(arguments)

    process = initialize()
    torch.manual_seed(0)
    plan = Plan.load(arguments.plan)
    net = runtime.parallelize(entry(plan.model.source).build(**plan.model.arguments).to(process.device), plan)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)

    with tempfile.TemporaryDirectory() as name:  # a real one is on a file system that all ranks see
        write_images(Path(name), arguments.steps * plan.batch, plan.model.inputs[0].shape[1:])
        images, masks = (np.load(Path(name) / f"{what}.npy", mmap_mode="r") for what in ("images", "masks"))
        batches = runtime.loader(runtime.ArrayDataset(images, masks), plan, targets=[("height", "width")])
        losses = []
        for inputs, wanted in batches:
            optimizer.zero_grad()
            loss = functional.cross_entropy(net(inputs.to(process.device)), wanted.to(process.device))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    print(f"rank {process.rank}: rows {tuple(wanted.shape)}, loss {losses[-1]:.3f}")
    leave()
    return losses, list(wanted.shape)


if __name__ == "__main__":
    main()
