"""`layerwise decompose`: what training by domain decomposition would cost, and that it changes the model."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Final

import typer

from planner.cli.terminal import Terminal, rendered
from planner.ir.subdomains import parse_grid
from planner.report.tables import Table, change_sentences
from planner.units import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from planner.api import PricedDecomposition
    from planner.api.decomposing import PricedNetwork

_FACTORY_HELP: Final = "A module:callable or file.py:callable, from the shape of one sample to a CNN with class scores."


@dataclass(frozen=True, slots=True)
class AskedParts:
    """The decomposition as it was typed."""

    shape: Annotated[
        str, typer.Option("--input", metavar="SIZES", help="One sample, such as 3,32,32; 1,64,64,64 is a volume.")
    ]
    grid: Annotated[str, typer.Option(metavar="PARTS", help="In each dimension of space, such as 2x2.")] = "2x2"
    overlap: Annotated[int, typer.Option(min=0, help="Pixels by which a part reaches over each inner boundary.")] = 0


def decompose(
    factory: Annotated[str, typer.Argument(metavar="FACTORY", help=_FACTORY_HELP)],
    asked: AskedParts,
    terminal: Terminal,
    batch: Annotated[int, typer.Option(min=1, help="Samples a step.")] = 64,
    devices: Annotated[int | None, typer.Option(min=1, metavar="N", help="That many equal accelerators.")] = None,
    cluster: Annotated[str | None, typer.Option(metavar="FILE|NAME", help="A machine; local-N is this host.")] = None,
) -> None:
    """Price a CNN-DNN by domain decomposition: local CNNs on parts of the input, a dense network on their classes.

    This changes the model: it is no strategy for the network that sees the whole input. The factory's code is run.
    """
    sizes = parse_grid(asked.shape.replace(",", "x"), "--input", "3x32x32")
    parts = parse_grid(asked.grid, "--grid")
    with terminal.working(f"pricing {factory}"):
        from planner.api import machine_of, price_decomposition
        from planner.frontend.decomposition import Decomposition
        from planner.frontend.source import load_callable

        found = Decomposition(sizes, parts, asked.overlap)
        build = load_callable(factory, "factory of local networks")
        machine = machine_of(cluster, devices)
        priced = price_decomposition(build, found, machine, batch)
    terminal.out.print(rendered(_table(priced, batch)))
    terminal.out.print()
    for sentence in _sentences(priced, len(machine.graph.devices)):
        terminal.out.print(sentence)


def _table(priced: "PricedDecomposition", batch: int) -> Table:
    rows = tuple(_row(net) for net in (priced.whole, *priced.local, priced.coarse))
    columns = ("network", "input", "parameters", "step", "memory")
    return Table(f"One device each, batch {batch}, predicted", columns, rows, num_text=2)


def _row(net: "PricedNetwork") -> tuple[str, ...]:
    shape = "x".join(map(str, net.input_shape))
    return net.name, shape, format_count(net.num_params), format_seconds(net.step_s, 5), format_bytes(net.memory_bytes)


def _sentences(priced: "PricedDecomposition", num_devices: int) -> tuple[str, ...]:
    ranks = min(num_devices, len(priced.local))
    step_s, coarse_s = priced.local_step_s(ranks), priced.coarse.step_s
    of = f"{ranks} of {num_devices} devices" if ranks < num_devices else f"{ranks} device{'s' if ranks > 1 else ''}"
    faster = f"{priced.whole.step_s / step_s:.3g} times as fast as the whole input on one"
    sent = f"{format_bytes(priced.sent_bytes)} of each local network for each training sample"
    local = (
        f"Local networks on {of}: {format_seconds(step_s, 5)} a step, {faster}; nothing is sent. "
        f"Then the coarse network: {format_seconds(coarse_s, 5)} a step, after {sent}, once."
    )
    return (local, *change_sentences([priced.changes]))
