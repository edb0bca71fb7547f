"""``models``, ``clusters`` and ``schema``: what is known by name."""

import fnmatch
from typing import TYPE_CHECKING, Annotated

import typer

from planner.cli.terminal import Terminal, rendered
from planner.devices.graph import PRECISIONS
from planner.errors import UnknownNameError
from planner.report.tables import Table
from planner.units import GB, TERA, format_seconds

if TYPE_CHECKING:
    from planner.devices import BusKind, DeviceKind, NetworkKind


def models(
    terminal: Terminal,
    pattern: Annotated[
        str, typer.Argument(metavar="PATTERN", help="Such as 'res*' or 'timm:res*'.", show_default=False)
    ] = "*",
) -> None:
    """List the models that are known by name."""
    library, colon, wanted = pattern.rpartition(":")
    table = _library_table(library, wanted) if colon else _shipped_table(wanted)
    if not table.rows:
        whole = _library_table(library, "*") if colon else _shipped_table("*")
        raise UnknownNameError("model", pattern, [row[0] for row in whole.rows])
    terminal.out.print(rendered(table))
    if not colon:
        terminal.out.print(
            "\ntorchvision:NAME and timm:NAME are models of these libraries, without weights; "
            "`layerwise models 'timm:res*'` lists them.\n"
            "A model of your own is package.module:callable or path/to/file.py:callable. All take "
            "what --model-args says; yours returns a torch.nn.Module."
        )


def _shipped_table(pattern: str) -> Table:
    from planner.models import ENTRIES

    found = [entry for entry in ENTRIES.values() if fnmatch.fnmatch(entry.name, pattern)]
    rows = tuple((known.name, _sample(known.input_shapes), known.source) for known in found)
    return Table("Models", ("name", "one sample", "from"), rows, num_text=3)


def _sample(inputs: tuple[tuple[int, ...], ...]) -> str:
    return ", ".join(" x ".join(map(str, shape)) for shape in inputs)


def _library_table(library: str, pattern: str) -> Table:
    from planner.frontend import zoo

    if library not in zoo.LIBRARIES:
        raise UnknownNameError("library of models", library, zoo.LIBRARIES)
    found = sorted(zoo.families(library).items())
    rows = tuple((f"{library}:{name}", family) for name, family in found if fnmatch.fnmatch(name, pattern))
    return Table(f"Models of {library}", ("name", "defined in"), rows, num_text=2)


def clusters(terminal: Terminal) -> None:
    """List shipped machines, how names are made, and the kinds of devices and links."""
    from planner.devices import bus_kinds, device_kinds, network_kinds
    from planner.devices.library import GRAMMAR, clusters, equal_devices

    found = tuple(clusters().items())
    networks = tuple(_network_row(kind) for kind in network_kinds().values())
    speeds = ("per direction", "latency")
    for table in (
        Table("Machines, for example", ("name", "what it is"), found, num_text=2),
        Table(
            "Devices",
            ("name", "links", "memory", "memory rate", *PRECISIONS),
            tuple(_device_row(kind) for kind in device_kinds().values()),
            num_text=2,
        ),
        Table(
            "Links inside a node",
            ("name", *speeds),
            tuple(_link_row(kind) for kind in bus_kinds().values()),
        ),
        Table("Networks between nodes", ("name", *speeds, "card per"), networks),
    ):
        terminal.out.print(rendered(table))
        terminal.out.print()
    terminal.out.print(GRAMMAR)
    terminal.out.print("local-N is this host with N processes, measured on first use.")
    terminal.out.print(
        f"--devices N is Nxaccelerator-nvlink whatever the host, such as {equal_devices(4).name}: "
        f"{device_kinds()['accelerator'].source}."
    )


def schema(
    partition: Annotated[
        bool, typer.Option("--partition", help="Of the file that plan --objective writes, for inference.")
    ] = False,
) -> None:
    """Print the JSON Schema of the plan file."""
    from planner.inference import schema as partitions
    from planner.plan import schema as plans

    typer.echo(partitions.json_schema() if partition else plans.json_schema())


def _device_row(kind: "DeviceKind") -> tuple[str, ...]:
    peaks = {str(precision): peak for precision, peak in kind.peak_flop_per_s.items()}
    rates = (f"{peaks[p] / TERA:.3g} TFLOP/s" if p in peaks else "" for p in PRECISIONS)
    memory = f"{kind.memory_bytes / GB:.3g} GB"
    rate = f"{kind.memory_bandwidth_bytes_per_s / GB:.4g} GB/s"
    return kind.name, " ".join(kind.links), memory, rate, *rates


def _link_row(kind: "BusKind | NetworkKind") -> tuple[str, str, str]:
    rate = f"{kind.bandwidth_bytes_per_s / GB:.3g} GB/s"
    return kind.name, rate, format_seconds(kind.latency_s)


def _network_row(kind: "NetworkKind") -> tuple[str, ...]:
    return *_link_row(kind), kind.card_per
