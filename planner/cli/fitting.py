"""``profile fit`` and ``profile import``: from measured layers to a calibrated roofline."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from planner.cli.planning import refuse_unwritable
from planner.cli.terminal import Terminal, rendered
from planner.errors import UsageError
from planner.report.tables import Table, counted

if TYPE_CHECKING:
    from planner.profile.calibrated import CalibratedRoofline
    from planner.profile.fit import HeldOut

ProfilePath = Annotated[Path, typer.Argument(metavar="FILE", help="A device profile.", show_default=False)]


def fit(
    path: ProfilePath,
    terminal: Terminal,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the profile with its fit here, not back to FILE.")
    ] = None,
    holdout: Annotated[
        bool,
        typer.Option(
            "--holdout", help="Fit without one half of the convolution shapes, predict that half, and write nothing."
        ),
    ] = False,
) -> None:
    """Fit the roofline to a device profile, and say how far it is off.

    Errors are shares of the measured time: median and 90th percentile, of the entries fitted and of entries left out.
    """
    from planner.profile.file import read_profile, write_profile
    from planner.profile.fit import fit_profile, hold_out

    if holdout and output is not None:
        raise UsageError("--holdout only measures the fit: there is nothing to write to --output")
    target = output or path
    if not holdout:
        refuse_unwritable(target)
    profile = read_profile(path)
    if holdout:
        found = hold_out(profile.layers)
        terminal.out.print(rendered(_halves(profile.device, found)))
        return
    fitted = fit_profile(profile.layers)
    terminal.out.print(rendered(_residuals(profile.device, fitted)))
    terminal.out.print(f"left out: {fitted.left_out}")
    write_profile(target, profile.model_copy(update={"fit": fitted}))
    terminal.err.print(f"wrote {target}")


def import_measurements(
    path: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="CSV, JSON where it ends so, or as --format says.", show_default=False),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The device profile.")],
    terminal: Terminal,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of the profile; whose rows, where the file has several.")
    ] = None,
    form: Annotated[
        Literal["table", "pipedream"],
        typer.Option("--format", help="A table with the columns below, or a profile of PipeDream's profiler."),
    ] = "table",
) -> None:
    """Make a device profile of foreign measurements of single layers.

    Columns: op (conv, linear, max_pool, avg_pool, batch_norm, relu, add), batch, in_channels, out_channels, height,
    width, kernel, stride, padding, dilation, groups, bias, precision, memory_format, device, repeats, and times
    such as forward_ms, backward_data_us, backward_weight_s. profiles/README.md explains them.
    """
    from planner.profile.file import from_entries, write_profile
    from planner.profile.foreign import read_foreign
    from planner.profile.pipedream_import import import_pipedream

    refuse_unwritable(output)
    found = (read_foreign if form == "table" else import_pipedream)(path, device)
    name = device or found.device
    if not name:
        raise UsageError(f"{path} does not say which device was measured: name it with --device")
    environment = {"imported": path.name} | ({"notes": found.notes} if found.notes else {})
    write_profile(output, from_entries(name, environment, found.entries))
    terminal.err.print(f"wrote {output}: {counted(len(found.entries), 'layer')} of {name}")


def _residuals(device: str, fitted: "CalibratedRoofline") -> Table:
    columns = ("precision", "memory format", "kind", "phase", "entries", "median", "90 %", "left out: median", "90 %")
    rows = tuple(
        (
            condition.precision, condition.memory_format, r.kind, r.phase.value, str(r.num_entries),
            _share(r.median), _share(r.ninetieth), _share(r.left_out_median), _share(r.left_out_ninetieth),
        )
        for condition in fitted.conditions for r in condition.residuals
    )  # fmt: skip
    return Table(f"Errors of the fit of {device}", columns, rows, num_text=4)


def _halves(device: str, found: "Sequence[HeldOut]") -> Table:
    rows = tuple(
        (*h.condition, h.kind, h.phase, str(h.num_entries), _share(h.median), _share(h.ninetieth)) for h in found
    )
    columns = ("precision", "memory format", "kind", "phase", "predicted", "median", "90 %")
    return Table(f"Errors on the half of {device}'s convolution shapes that was not fitted", columns, rows, num_text=4)


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
