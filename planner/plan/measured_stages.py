"""The file of ``layerwise run --measured`` of a pipelined plan: what its stages took."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import FailFast, Field

from planner.errors import MismatchError
from planner.ir.canonical import Count, PositiveSeconds, Seconds, StrictModel, decode_file, write_atomically
from planner.plan.schema import MAX_RANKS, Name, Plan, Sha256


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
    steps_s: Annotated[list[PositiveSeconds], FailFast(), Field(min_length=1)]
    step_s: PositiveSeconds
    step_iqr_s: Seconds
    instrumented_step_s: PositiveSeconds
    stages: Annotated[list[MeasuredStage], Field(min_length=1, max_length=1000)]

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


def read_measured_pipeline(path: Path, plan: Plan) -> MeasuredPipeline:
    """Read the measurements of a run of this pipelined plan.

    Raises:
        UsageError: the file cannot be read.
        FormatError: every problem with its JSON path.
        MismatchError: another plan was run.
    """
    found = decode_file(MeasuredPipeline, path, "measured run")
    if found.plan_sha256 != plan.digest or len(found.stages) != len(plan.stages):
        raise MismatchError(
            f"measured run {str(path)!r} is of another plan (of {found.model!r}, digest {found.plan_sha256[:12]}…) "
            f"than the one given (of {plan.model.name!r}, digest {plan.digest[:12]}…). Run this plan: "
            f"layerwise run PLAN --measured {path}"
        )
    return found
