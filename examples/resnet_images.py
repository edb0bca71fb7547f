"""Train a ResNet under a plan, on scikit-learn's digits or on a folder of images.

    layerwise plan resnet20 --cluster local-2 --batch 64 --all-devices -o plan.json
    torchrun --nproc-per-node 2 examples/resnet_images.py plan.json --data digits

A folder has a folder of images for each class, as torchvision's ImageFolder reads it (`pip install 'layerwise[zoo]'`).
Plan for its classes and size, `layerwise plan resnet18 --model-args num_classes=5 --input 3,224,224 ...`, then
`--data FOLDER`.
`runtime.loader` gives each rank what it passes under the plan: its samples, or all of them.
"""

import argparse

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch.nn import functional
from torch.utils.data import TensorDataset

import runtime
from planner.models import entry
from planner.plan import Plan
from runtime.launch import initialize, leave


def digits(size):
    """Return the 1,797 digits as colour images of this size."""
    found = load_digits()
    images = torch.tensor(found.images / 16, dtype=torch.float32).unsqueeze(1)
    images = functional.interpolate(images, size=size, mode="bilinear").expand(-1, 3, -1, -1)
    return TensorDataset(images, torch.tensor(found.target))


def folder(path, size):
    """Return the images of a folder, each in the middle of its scaled self."""
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    steps = [transforms.Resize(size), transforms.CenterCrop(size), transforms.ToTensor()]
    return ImageFolder(path, transforms.Compose(steps))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", help="made by layerwise plan")
    parser.add_argument("--data", default="digits", metavar="digits|FOLDER")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--steps", type=int, help="of each epoch, at most")
    arguments = parser.parse_args(arguments)

    process = initialize()
    torch.manual_seed(0)
    plan = Plan.load(arguments.plan)
    model = entry(plan.model.source).build(**plan.model.arguments)
    net = runtime.parallelize(model.to(process.device), plan)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)

    size = plan.model.inputs[0].shape[-1]
    dataset = digits(size) if arguments.data == "digits" else folder(arguments.data, size)
    batches = runtime.loader(dataset, plan, shuffle=True)
    means = []
    for epoch in range(arguments.epochs):
        batches.set_epoch(epoch)
        total = torch.zeros(2, device=process.device)
        for step, (images, labels) in enumerate(batches):
            if step == arguments.steps:
                break
            optimizer.zero_grad()
            loss = functional.cross_entropy(net(images.to(process.device)), labels.to(process.device))
            loss.backward()
            optimizer.step()
            total += torch.tensor([loss.item() * len(labels), len(labels)], device=process.device)
        dist.all_reduce(total)  # each rank's loss is that of its own samples
        means.append(float(total[0] / total[1]))
        if process.rank == 0:
            print(f"epoch {epoch + 1}: loss {means[-1]:.3f}", flush=True)
    leave()
    return means


if __name__ == "__main__":
    main()
