"""``layerwise``: all commands, and what their errors look like."""

import errno
import gc
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, Final, NoReturn

import typer

from planner.cli import (
    calibrating,
    comparing,
    decomposing,
    demo,
    doctor,
    explaining,
    exporting,
    fitting,
    inspecting,
    linking,
    listing,
    planning,
    profiling,
    reading,
    reporting,
    reproducing,
    run,
    tracing,
)
from planner.cli.signature import with_fields
from planner.cli.terminal import is_debugging, printable
from planner.errors import EXIT_INTERRUPTED, LayerwiseError, UsageError

EXIT_BUG: Final = 1
_STDOUT: Final = 1
_NOT_WRITTEN: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EPIPE)
"""Errors of a pipe or of the disk that stdout goes to."""

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with: layerwise demo",
)  # fmt: skip


def register(name: str, function: Callable[..., None]) -> None:
    """Add a command; parameters that are dataclasses give it their fields as options."""
    app.command(name)(with_fields(function))


register("plan", planning.plan)
register("show", reading.show)
register("check", reading.check)
register("explain", explaining.explain)
register("diff", explaining.diff)
register("compare", comparing.compare)
register("run", run.run)
register("trace", tracing.trace)
register("report", reporting.report)
register("export", exporting.export)
register("calibrate", calibrating.calibrate)
register("demo", demo.demo)
register("doctor", doctor.doctor)
register("inspect", inspecting.inspect)
register("decompose", decomposing.decompose)
register("reproduce", reproducing.reproduce)
register("models", listing.models)
register("clusters", listing.clusters)
register("schema", listing.schema)
profiling.register("links", linking.links)
profiling.register("fit", fitting.fit)
profiling.register("import", fitting.import_measurements)
app.add_typer(profiling.profile_app, name="profile")


def _print_version(wanted: bool) -> None:
    if not wanted:
        return
    try:
        typer.echo(f"layerwise {metadata.version('layerwise')}")
    except metadata.PackageNotFoundError:
        typer.echo("layerwise, not installed")
    raise typer.Exit


@app.callback()
def _options(
    version: Annotated[  # its callback prints and exits
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Find the fastest way to train a CNN on given devices, layer by layer, and run it."""


OBJECTS_BETWEEN_COLLECTIONS: Final = 100_000
"""Importing torch makes a million objects that stay; Python's default of 700 looks through them again and again."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run ``layerwise`` and end with its exit code, see ``planner.errors``.

    Args:
        arguments: of the command line; those of this process if left out.
    """
    gc.set_threshold(OBJECTS_BETWEEN_COLLECTIONS)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed, and a file that a command opens would take its place
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115  # for as long as this process lives
    sys.exit(_run(sys.argv[1:] if arguments is None else arguments))


def plan() -> NoReturn:
    """Run ``plan``, which is ``layerwise plan``."""
    main(["plan", *sys.argv[1:]])


def _run(arguments: Sequence[str]) -> int:
    typed = printable(shlex.join(["layerwise", *arguments]))  # names of files need not be text
    try:
        try:
            app(args=list(arguments), prog_name="layerwise", obj=typed)
        finally:
            sys.stdout.flush()  # what does not fit is said here, not dropped while the interpreter ends
    except LayerwiseError as error:
        if is_debugging():
            traceback.print_exception(error)
        print(printable(f"error: {error}"), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except SystemExit as ended:  # typer makes one of an interrupt, and says nothing
        if ended.code == EXIT_INTERRUPTED:
            print("error: interrupted", file=sys.stderr)
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _NOT_WRITTEN:
            os.dup2(os.open(os.devnull, os.O_WRONLY), _STDOUT)  # what is left in the buffer has no place
            print(f"error: cannot write the result: {error.strerror}", file=sys.stderr)
            return UsageError.exit_code
        traceback.print_exception(error)
        print(
            f"error: {type(error).__name__} in layerwise itself. Please report it with the lines "
            f"above and the command: {typed}",
            file=sys.stderr,
        )
        return EXIT_BUG
    return 0
