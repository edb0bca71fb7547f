"""The file of ``layerwise run --measured`` of a pipelined plan: what its stages took."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from planner.ir.canonical import StrictModel, write_atomically
from planner.plan.schema import MAX_RANKS, Count, Name, Seconds, Sha256, StepSeconds


class MeasuredStage(StrictModel):
    """Medians over the steps, of the rank of the stage that computes most.

    Of schedules in cycles (``stale``, ``pipedream``), a step is a cycle, and its one micro-batch is a whole batch.

    Attributes:
        rank: of the job.
        forward_s, backward_s: of one micro-batch, transfers inside the stage included.
        tail_s: of a step: gradients into the buckets of the reductions, waiting for these, and the update, with copies
            of weights that it is about to overwrite (``pipedream``). The share of one stage, where its ranks hold
            several.
        bubble_share: of the step, in which the rank did none of these: it waited for other stages, or the interpreter
            worked.
    """

    rank: Annotated[int, Field(ge=0, lt=MAX_RANKS)]
    forward_s: Seconds
    backward_s: Seconds
    tail_s: Seconds
    bubble_share: Annotated[float, Field(ge=0, le=1)]


class MeasuredPipeline(StrictModel):
    """A measured run of a pipelined plan.

    Of schedules in cycles, a step is a cycle of the full pipeline; cycles follow each other without a barrier.

    Attributes:
        schema_version: of this form.
        plan_sha256: ``Plan.digest`` of the plan that was run.
        model, batch, num_ranks: of that plan, for people.
        environment: versions and settings behind the seconds.
        steps_s: every plain step, on the slowest rank.
        step_s, step_iqr_s: their median and inter-quartile range.
        instrumented_step_s: the median of steps with marks on their parts, on the slowest rank.
        stages: in the order of the plan.
    """

    schema_version: Literal[1] = 1
    plan_sha256: Sha256
    model: Name
    batch: Count
    num_ranks: Annotated[int, Field(ge=1, le=MAX_RANKS)]
    environment: dict[str, str]
    steps_s: Annotated[list[StepSeconds], Field(min_length=1)]
    step_s: StepSeconds
    step_iqr_s: Seconds
    instrumented_step_s: StepSeconds
    stages: Annotated[list[MeasuredStage], Field(min_length=1)]

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
