"""What all ranks must have in common, compared before they begin and on demand.

Ranks with different plans or models make different process groups and other calls: they would wait for each other until
a timeout, or add up what does not belong together. So they compare digests first, and what one rank refuses all refuse.
"""

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from planner import errors
from planner.errors import MismatchError, RunError, UsageError
from planner.plan.schema import Plan, require_single_rank_count
from runtime.comm.failures import peer_failed
from runtime.ended import raised_on, told
from runtime.module import ParallelModule
from runtime.parameters.local import ANOTHER_MODEL, Held, model_digest
from runtime.pipeline.holding import HeldStages

T = TypeVar("T")

Facts = Mapping[str, str]
"""What a rank has, by what it is."""

_CALL: Final = "call"
_ADVICE: Final = {
    _CALL: "All ranks make the same calls in the same order.",
    "plan": "Give all ranks the same plan file.",
    "model": ANOTHER_MODEL,
    "code": "Install the same version of Layerwise on all machines.",
    "torch": "Install the same version of torch on all machines.",
    "step": "They have drifted apart: go on from a checkpoint.",
    "random numbers": "They have drifted apart: go on from a checkpoint.",
}


def start_together(call: str, model: nn.Module, plan: Plan, check: Callable[[], T]) -> T:
    """Return what a check finds, where it passes on all ranks and they have the same plan, model and code.

    Every rank must call it, in front of everything else that ranks do together.

    Args:
        call: what begins.
        model: whole.
        plan: as this rank has it.
        check: what may fail on this rank, such as tracing the model.

    Raises:
        UsageError: torch.distributed is not initialised, or the plan is for another number of ranks.
        MismatchError: on every rank, with what differs.
        LayerwiseError: of the check; on the other ranks the same class, with the rank's number.
        RunError: a rank did not come.
    """
    if not dist.is_initialized():
        raise UsageError(
            "torch.distributed is not initialised: call runtime.launch.initialize() (or "
            "torch.distributed.init_process_group()) first, and start the script with torchrun"
        )
    found, error = None, None
    try:
        require_single_rank_count(plan, dist.get_world_size())
        found = check()
    except Exception as caught:  # told to the others, then raised
        error = caught
    facts = {_CALL: call, "plan": plan.digest, "model": model_digest(model), "code": code_digest(),
             "torch": str(torch.__version__).partition("+")[0]}  # fmt: skip
    failed = None if error is None else told(error) or told(RunError(f"{type(error).__name__}: {error}"))
    everyone = _everyones((facts, failed), f"starting {call}")
    refuse_differing([facts for facts, _ in everyone])
    if error is not None:
        raise error
    for rank, (_, failed) in enumerate(everyone):
        if failed is not None:
            raise raised_on(rank, failed)
    return found  # type: ignore[return-value]  # of the check, as nothing failed


def require_agreement(net: nn.Module, *, step: int | None = None, weights: bool = True) -> None:
    """Check that all ranks are at the same place of the same training; every rank must call it.

    Compared are the plan, the code, the step, the numbers of forward passes and seeds of what is random, and the bits
    of the parameters that several ranks hold. It reads all weights once: call it every few hundred steps, or behind
    what may have gone differently on the ranks.

    Args:
        net: of ``parallelize``, ``pipelined`` or ``variable_batch``.
        step: of the script, if it counts.
        weights: compare parameters too.

    Raises:
        MismatchError: on every rank, with what differs and on which ranks.
        RunError: a rank did not come.
    """
    stages = net.held_stages if isinstance(net, HeldStages) else (net,)
    if not dist.is_initialized():
        return
    facts = {"plan": net.plan.digest, "code": code_digest(), "step": str(step)}  # type: ignore[union-attr]  # it has one
    facts["random numbers"] = str([(each._state.seed, each._state.step) for each in stages])  # type: ignore[union-attr]
    held = [_bits(each) for each in stages if isinstance(each, ParallelModule)] if weights else []
    everyone = _everyones((facts, {k: v for each in held for k, v in each.items()}), "comparing the ranks")
    refuse_differing([facts for facts, _ in everyone])
    first: dict[str, tuple[int, str]] = {}
    for rank, (_, bits) in enumerate(everyone):
        for piece, digest in bits.items():
            holder, expected = first.setdefault(piece, (rank, digest))
            if digest != expected:
                raise MismatchError(
                    f"rank {rank} has other weights than rank {holder} in {piece}, which both hold. {_ADVICE['step']}"
                )


def refuse_differing(everyone: Sequence[Facts]) -> None:
    """Check that all ranks have the same facts as the first.

    Raises:
        MismatchError: with every fact that differs, and the ranks.
    """
    problems = []
    for what, expected in everyone[0].items():
        others = [rank for rank, facts in enumerate(everyone) if facts.get(what) != expected]
        if others:
            shown = f" ({everyone[others[0]].get(what)}, not {expected})" if len(expected) < _SHOWN else ""
            listed = f"ranks {others} have" if len(others) > 1 else f"rank {others[0]} has"
            problems.append(f"{listed} another {what} than rank 0{shown}: {_ADVICE.get(what, '')}".rstrip(" :"))
    if problems:
        raise MismatchError("; ".join(problems))


_SHOWN: Final = 40
"""Characters of a fact that a message repeats; digests are longer."""


@functools.cache
def code_digest() -> str:
    """Return a hash of the code that ranks run of Layerwise."""
    found = hashlib.sha256()
    for top in (Path(errors.__file__).parent, Path(__file__).parent):
        for path in sorted(top.rglob("*.py")):
            found.update(path.relative_to(top).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def _bits(net: ParallelModule) -> dict[str, str]:
    """Return a hash of every piece of a parameter that this rank holds together with others, by name and region."""
    found = {}
    for name, parameter in net.named_parameters():
        place: Held | None = net.held.get(name)
        if place is not None and len(place.holders) > 1 and parameter.numel():
            region = ", ".join(f"{a}:{b}" for a, b in zip(place.region.start, place.region.stop, strict=True))
            values = parameter.detach().contiguous().cpu().view(-1).view(torch.uint8)
            found[f"{name}[{region}]"] = hashlib.sha256(values.numpy().data).hexdigest()
    return found


def _everyones(mine: Any, what: str) -> list[Any]:
    """Return what every rank of the job has to say."""
    found: list[Any] = [None] * dist.get_world_size()
    try:
        dist.all_gather_object(found, mine)
    except RuntimeError as error:
        raise peer_failed(dist.get_rank(), f"all_gather in {what}", error) from error
    return found
