r"""Features of two networks at the same time on two processes, and a support vector machine on them.

    layerwise plan examples/feature_extractors/networks.py:build_model --cluster local-2 --batch 1 --all-devices \
        --io global -o plan.json
    python -m examples.feature_extractors.extract plan.json

starts the processes of the plan, one core each. The images are scikit-learn's digits, enlarged. The weights are random,
but for the statistics of the batch norms, which are those of some of the images: no weights ship with a package. Beside
some batches under the plan, rank 0 computes them by itself while the others wait, and all ranks compute the whole by
themselves at the same time: twice the first over that is what two processes can gain here at all. Medians are printed.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from torch import nn
from torch.nn import functional

import runtime
from examples.feature_extractors.networks import SideBySide, build_model
from planner.errors import LayerwiseError
from planner.plan import Plan
from runtime.launch import Process, run_local

CALIBRATION = 8
"""Images whose statistics the batch norms take."""


def load_images(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return so many images, float32[count, 3, height, width], and their classes."""
    digits = load_digits()
    small = torch.tensor(digits.images[:count] / 16, dtype=torch.float32).unsqueeze(1)
    images = functional.interpolate(small, SideBySide.input_shape[1:], mode="bilinear").expand(-1, 3, -1, -1)
    return images, torch.tensor(digits.target[:count])


@torch.no_grad()
def calibrated(model: nn.Module, images: torch.Tensor) -> nn.Module:
    """Return the model with the batch norms' statistics of these images, ready for evaluation."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0  # no memory of the statistics before
    model.train()(images)
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


def timed(call: Callable[[], object]) -> float:
    """Return the seconds of a call that all ranks begin together, until the last one is done."""
    dist.barrier()
    start = time.perf_counter()
    call()
    dist.barrier()
    return time.perf_counter() - start


@torch.no_grad()
def extract(argument: dict[str, Any], process: Process) -> dict[str, Any]:
    """Return the features of all images and the seconds of some batches: alone, everyone alone, under the plan."""
    plan, (images, _) = Plan.from_json(argument["plan"]), load_images(argument["images"])
    alone = calibrated(build_model(), images[:CALIBRATION])
    net = runtime.parallelize(calibrated(build_model(), images[:CALIBRATION]), plan).eval()
    batches = [batch for batch in images.split(plan.batch) if len(batch) == plan.batch]
    torch.testing.assert_close(net(batches[0]), alone(batches[0]), rtol=1e-3, atol=1e-3)
    seconds: list[tuple[float, ...]] = []
    for batch in batches[: argument["rounds"]]:
        one = timed(lambda batch=batch: alone(batch) if process.rank == 0 else None)
        everyone = timed(lambda batch=batch: alone(batch))
        seconds.append((one, everyone, timed(lambda batch=batch: net(batch))))
    return {"seconds": seconds, "features": torch.cat([net(batch) for batch in batches]).tolist()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", help="with the whole batch on every rank (a batch of 1, or --io global)")
    parser.add_argument("--images", type=int, default=200, help="whose features the classifier gets")
    parser.add_argument("--rounds", type=int, default=20, help="batches that are timed")
    arguments = parser.parse_args()
    try:
        plan = Plan.load(arguments.plan)
    except LayerwiseError as error:
        parser.error(str(error))
    if plan.io != "global":
        parser.error("the plan takes each rank's own samples: plan again with --io global")
    argument = {"plan": Path(arguments.plan).read_text(), "images": arguments.images, "rounds": arguments.rounds}
    found: Any = run_local(
        "examples.feature_extractors.extract:extract", argument, num_ranks=plan.num_ranks, timeout_s=3600.0
    )[0]
    one, everyone, planned = (statistics.median(column) for column in zip(*found["seconds"], strict=True))
    faster = statistics.median(a / c for a, _, c in found["seconds"])
    most = plan.num_ranks * statistics.median(a / b for a, b, _ in found["seconds"])
    print(f"a batch of {plan.batch}: one process {one * 1e3:.0f} ms, {plan.num_ranks} processes {planned * 1e3:.0f} ms "
          f"({plan.totals.step_s * 1e3:.0f} ms predicted), {faster:.2f} times as fast")  # fmt: skip
    print(f"all processes by themselves at the same time: {everyone * 1e3:.0f} ms, {most:.2f} times as many images")
    features, (_, classes) = np.array(found["features"]), load_images(len(found["features"]))
    is_test = np.arange(len(features)) % 5 == 0
    machine = make_pipeline(StandardScaler(), SVC()).fit(features[~is_test], classes[~is_test])
    score = machine.score(features[is_test], classes[is_test])
    print(f"{features.shape[1]} features of {len(features)} images, support vector machine: {score:.1%} of the test "
          "images right")  # fmt: skip


if __name__ == "__main__":
    main()
