"""``calibrate``: what the layers of a run took becomes entries of a device profile."""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from planner.cli.planning import refuse_unwritable
from planner.cli.reading import PlanPath, read_plan
from planner.cli.terminal import Terminal
from planner.errors import MismatchError, UsageError
from planner.plan.measured import Measured, MeasuredLayer, read_measured
from planner.profile.demand import Phase, demands
from planner.profile.file import (
    ProfileFile,
    processor_of,
    profile_of,
    read_profile,
    with_measurements,
    write_profile,
)
from planner.profile.table import Measurement
from planner.report.tables import counted
from planner.units import format_seconds

if TYPE_CHECKING:
    from planner.profile.key import LocalLayer, PieceKey


def calibrate(
    path: PlanPath,
    measured: Annotated[Path, typer.Option(metavar="FILE", help="Of layerwise run PLAN --measured FILE.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the profile goes.")],
    terminal: Terminal,
    profile: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A profile to start from: the run's layers replace its own.")
    ] = None,
) -> None:
    """Feed a measured run back into a device profile, so that plans made with it predict what was measured.

    The model is built from its source, which runs its code.
    """
    plan = read_plan(path)
    if plan.is_pipelined:
        raise UsageError(
            f"{path} is a pipelined plan, whose runs are timed stage by stage: no profile can be made of them. Run and "
            "calibrate with a plan of one stage (layerwise plan --stages 1), or time layers with layerwise profile."
        )
    found = read_measured(measured, plan)
    before = None if profile is None else read_profile(profile)
    refuse_unwritable(output)
    with terminal.working(f"tracing {plan.model.name}"):
        from planner.api import local_layers

        pieces = local_layers(plan)
    entries = measurements_of(pieces, found, before)
    if not entries:
        raise UsageError("none of the plan's layers computes anything that a profile could hold")
    write_profile(output, merged(before, found, entries))
    replaced = 0 if before is None else len(entries.keys() & before.measurements().keys())
    terminal.err.print(
        f"wrote {output}: {counted(len(entries), 'layer')} of this run"
        + (f", {replaced} of them measured anew; {len(before.layers)} were there before" if before else "")
    )
    if before is not None and before.fit is not None:
        terminal.err.print("left out: the profile's fit, which is not of these layers; layerwise profile fit makes one")
    left_s = sum(row.compute_s for row, piece in zip(found.layers, pieces, strict=True) if not piece.has_kernel)
    terminal.err.print(f"left out: {format_seconds(left_s)} in layers that a profile has no entry for, such as views")


def measurements_of(
    pieces: Sequence["LocalLayer"], measured: Measured, before: ProfileFile | None
) -> dict[str, Measurement]:
    """Return what a run says of every piece of a layer, by its key; the median over layers with equal pieces.

    Args:
        pieces: of the layers of the plan, in its order.
        measured: the run.
        before: tells how backward is divided into the gradients of inputs and of parameters, which a run cannot.
    """
    rows: dict[str, list[MeasuredLayer]] = defaultdict(list)
    known: dict[str, LocalLayer] = {}
    for piece, row in zip(pieces, measured.layers, strict=True):
        if piece.has_kernel:
            rows[piece.key].append(row)
            known[piece.key] = piece
    entries = {} if before is None else before.measurements()
    count = len(measured.instrumented_steps_s)
    found = {}
    for key, equal in rows.items():
        to_inputs = share_of_inputs(known[key].piece, entries.get(key), before)
        backward_s = _median(row.backward_s for row in equal)
        iqr_s = _median(row.forward_iqr_s + row.backward_iqr_s for row in equal)
        found[key] = Measurement(
            _median(row.forward_s for row in equal), to_inputs * backward_s, (1 - to_inputs) * backward_s, iqr_s, count
        )
    return found


def share_of_inputs(piece: "PieceKey", entry: Measurement | None, before: ProfileFile | None) -> float:
    """Return which share of a piece's backward pass goes into the gradients of its inputs.

    That of its entry in a profile, else of the profile's fit; else by FLOP, or by bytes where there are none.
    """
    if not piece.input_gradient or not piece.weight_gradient:
        return 1.0 if piece.input_gradient else 0.0
    if entry is not None and entry.backward_s > 0:
        return entry.backward_data_s / entry.backward_s
    fitted = before.fit.seconds(piece) if before is not None and before.fit is not None else None
    return _share(fitted or _work(piece))


def _work(piece: "PieceKey") -> dict[Phase, float]:
    found = demands(piece)
    flop = {phase: demand.flop for phase, demand in found.items()}
    return flop if any(flop.values()) else {phase: demand.num_bytes for phase, demand in found.items()}


def _share(found: Mapping[Phase, float]) -> float:
    to_inputs, to_weights = (found.get(p, 0.0) for p in (Phase.BACKWARD_DATA, Phase.BACKWARD_WEIGHT))
    return to_inputs / (to_inputs + to_weights) if to_inputs + to_weights > 0 else 1.0


def merged(before: ProfileFile | None, measured: Measured, layers: Mapping[str, Measurement]) -> ProfileFile:
    """Return a profile with the entries of a run in place of those for the same pieces, and without a fit.

    Raises:
        MismatchError: the run was made with another processor, torch or number of threads than the profile.
    """
    facts = measured.environment
    if before is None:
        return profile_of(processor_of(facts) or "cpu", facts, layers)
    _refuse_other_environment(before, facts)
    run = f"run of plan {measured.plan_sha256[:12]} ({measured.model}, batch {measured.batch})"
    environment = {**before.environment, "calibrated": run}
    return with_measurements(before.device, environment, before.layers, layers)


def _refuse_other_environment(before: ProfileFile, facts: Mapping[str, str]) -> None:
    known = before.environment
    both = {
        "processor": (processor_of(known), processor_of(facts)),
        **{name: (known.get(name), facts.get(name)) for name in ("torch", "threads")},
    }
    for name, (theirs, mine) in both.items():
        if None not in (theirs, mine) and theirs != mine:
            raise MismatchError(
                f"the profile was measured with {name} {theirs!r}, the run with {mine!r}: times of both cannot be in "
                "one file. Leave out --profile, or give one that was measured like the run."
            )


def _median(values: Iterable[float]) -> float:
    return statistics.median(values)
