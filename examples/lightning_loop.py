"""Train under a plan with Lightning's Trainer (`pip install 'layerwise[lightning]'`).

    layerwise plan examples/train.py:build_model --input 1,8,8 --devices 2 --batch 64 --all-devices -o plan.json
    torchrun --nproc-per-node 2 examples/lightning_loop.py plan.json

The runtime does what Lightning's strategies do, so each rank's Trainer sees one device: it has no strategy and no
sampler of its own, and the process group is ours.
"""

import argparse
import runpy
from pathlib import Path

import lightning
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch.nn import functional

import runtime
from planner.plan import Plan
from runtime.launch import initialize, leave

DIGITS = runpy.run_path(str(Path(__file__).with_name("train.py")))  # network and data of the plain loop


class Digits(lightning.LightningModule):
    """The parallel module in a Lightning one; the optimizer gets this rank's pieces."""

    def __init__(self, net):
        super().__init__()
        self.net, self.losses = net, []

    def training_step(self, batch, _):
        images, labels = batch
        loss = functional.cross_entropy(self.net(images), labels)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.05, momentum=0.9)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, **_):  # noqa: ARG002
        if gradient_clip_val:
            self.net.clip_grad_norm_(gradient_clip_val)  # over the pieces of all ranks


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", help="made by layerwise plan")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--steps", type=int, default=-1, help="in all, at most")
    arguments = parser.parse_args(arguments)

    process = initialize()
    torch.manual_seed(0)
    plan = Plan.load(arguments.plan)
    module = Digits(runtime.parallelize(DIGITS["build_model"]().to(process.device), plan))
    train_data, _ = DIGITS["load_data"]()
    trainer = lightning.Trainer(
        accelerator=process.device.type,
        devices=1,
        plugins=[LightningEnvironment()],  # instead of torchrun's, of which Lightning would make a strategy
        use_distributed_sampler=False,
        max_epochs=arguments.epochs,
        max_steps=arguments.steps,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,  # runtime.checkpoint knows the pieces
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, runtime.loader(train_data, plan, shuffle=True))
    if process.rank == 0:
        print(f"loss {module.losses[0]:.3f} at first, {module.losses[-1]:.3f} after {len(module.losses)} steps")
    leave()
    return module.losses


if __name__ == "__main__":
    main()
