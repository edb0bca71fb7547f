"""The file of ``layerwise run --measured``: what the layers of a plan took, phase by phase.

All seconds are of one rank, the one that computes most: the others wait for it. The rows of layers,
``gathering_s``, ``exposed_sync_s``, ``optimizer_s`` and ``other_s`` add up to ``instrumented_step_s``.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import FailFast, Field

from planner.errors import FormatError, MismatchError
from planner.ir.canonical import Count, PositiveSeconds, Seconds, StrictModel, decode_file, write_atomically
from planner.plan.schema import MAX_RANKS, Name, Plan, Sha256

WHAT: Final = "measured run"
"""What messages call such a file."""


class MeasuredLayer(StrictModel):
    """Medians of a layer's seconds over the steps, and their inter-quartile ranges.

    Attributes:
        id: as in the plan.
        forward_s, backward_s: compute.
        transfer_forward_s, transfer_backward_s: communication that compute waits for: moves of the layer's
            inputs between layouts with their packing, partial sums, batch norm statistics.
    """

    id: Name
    forward_s: Seconds
    forward_iqr_s: Seconds
    backward_s: Seconds
    backward_iqr_s: Seconds
    transfer_forward_s: Seconds
    transfer_forward_iqr_s: Seconds
    transfer_backward_s: Seconds
    transfer_backward_iqr_s: Seconds

    @property
    def compute_s(self) -> float:
        """Forward and backward compute."""
        return self.forward_s + self.backward_s

    @property
    def transfer_s(self) -> float:
        """Communication that compute waits for."""
        return self.transfer_forward_s + self.transfer_backward_s


class Measured(StrictModel):
    """A measured run file.

    Attributes:
        schema_version: of this form.
        plan_sha256: ``Plan.digest`` of the plan that was run.
        model, batch, num_ranks: of that plan, for people.
        environment: versions and settings behind the seconds.
        rank: that the seconds of the parts are of.
        steps_s: every plain step, on the slowest rank.
        step_s, step_iqr_s: their median and inter-quartile range.
        compute_only_s: a step in which nothing is sent.
        instrumented_steps_s: every step with marks on its parts, on ``rank``.
        instrumented_step_s: their median.
        gathering_s: gradients into the buckets of the reductions, and starting these.
        exposed_sync_s: waiting for gradient reductions when backward has ended.
        optimizer_s: the optimizer's step.
        other_s: what is left of the instrumented step: the loss, the interpreter, waiting for the sizes of the ranks'
            batches; and that medians of parts do not add up to the median of the whole, so it may be below zero.
        layers: in the order of the plan.
    """

    schema_version: Literal[1] = 1
    plan_sha256: Sha256
    model: Name
    batch: Count
    num_ranks: Annotated[int, Field(ge=1, le=MAX_RANKS)]
    environment: dict[str, str]
    rank: Annotated[int, Field(ge=0, lt=MAX_RANKS)]
    steps_s: Annotated[list[PositiveSeconds], FailFast(), Field(min_length=1)]
    step_s: PositiveSeconds
    step_iqr_s: Seconds
    compute_only_s: PositiveSeconds
    instrumented_steps_s: Annotated[list[PositiveSeconds], FailFast(), Field(min_length=1)]
    instrumented_step_s: PositiveSeconds
    gathering_s: Seconds
    exposed_sync_s: Seconds
    optimizer_s: Seconds
    other_s: Annotated[float, Field(ge=-1e15, le=1e15)]
    layers: Annotated[list[MeasuredLayer], FailFast(), Field(min_length=1, max_length=200_000)]

    @property
    def slow_down(self) -> float:
        """How much longer than a plain step a step with marks is, relative to the plain one."""
        return self.instrumented_step_s / self.step_s - 1

    def save(self, path: Path) -> None:
        """Write the file whole or not at all.

        Raises:
            UsageError: the folder is missing or not writable.
        """
        write_atomically(path, self.model_dump_json(indent=2) + "\n")


def read_measured(path: Path, plan: Plan) -> Measured:
    """Read the measurements of a run of this plan.

    Raises:
        UsageError: the file cannot be read.
        FormatError: every problem with its JSON path.
        MismatchError: another plan was run.
    """
    try:
        found = decode_file(Measured, path, WHAT)
    except FormatError:
        if _is_of_a_pipeline(path):
            raise MismatchError(
                f"{WHAT} {str(path)!r} is of a pipelined plan, with the seconds of stages and not of layers. Run the "
                f"given plan: layerwise run PLAN --measured {path}"
            ) from None
        raise
    ids = [layer.id for layer in found.layers]
    if found.plan_sha256 != plan.digest or ids != [layer.id for layer in plan.stages[0].layers]:
        raise MismatchError(
            f"{WHAT} {str(path)!r} is of another plan (of {found.model!r}, digest {found.plan_sha256[:12]}…) than the "
            f"one given (of {plan.model.name!r}, digest {plan.digest[:12]}…). Run this plan: layerwise run PLAN "
            f"--measured {path}"
        )
    return found


def _is_of_a_pipeline(path: Path) -> bool:
    from planner.plan.measured_stages import MeasuredPipeline

    try:
        decode_file(MeasuredPipeline, path, WHAT)
    except FormatError:
        return False
    return True


LAYER_PHASES: Final = ("forward", "backward", "transfer_forward", "transfer_backward")


def layers_of(plan: Plan, found: Mapping[str, Mapping[str, tuple[float, float]]]) -> list[MeasuredLayer]:
    """Return the rows of a plan's layers.

    Args:
        plan: that was run.
        found: median and inter-quartile range of a layer's phases (``LAYER_PHASES``); zero where there is none.
    """
    return [
        MeasuredLayer.model_validate({"id": layer.id} | _figures(found.get(layer.id, {})))
        for layer in plan.stages[0].layers
    ]


def _figures(phases: Mapping[str, Sequence[float]]) -> dict[str, float]:
    pairs = {name: phases.get(name, (0.0, 0.0)) for name in LAYER_PHASES}
    medians = {f"{name}_s": pair[0] for name, pair in pairs.items()}
    return medians | {f"{name}_iqr_s": pair[1] for name, pair in pairs.items()}


def median_and_iqr(samples: Sequence[float]) -> tuple[float, float]:
    """Return the median and the inter-quartile range, which is 0 of a single sample."""
    if len(samples) < 2:
        return samples[0], 0.0
    quartiles = statistics.quantiles(samples, n=4)
    return statistics.median(samples), quartiles[2] - quartiles[0]
