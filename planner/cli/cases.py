"""What ``compare`` looks at: other solvers, machines, links and batches, and the cases that they make."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from planner.cli.options import SAMPLES_PER_DEVICE, Asked, counts
from planner.errors import UnknownNameError, UsageError
from planner.units import parse_bit_rates

if TYPE_CHECKING:
    from planner.api import Machine
    from planner.api.what_if import Case


@dataclass(frozen=True, slots=True)
class WhatIf:
    """What is compared, as it was typed; every combination of machines, links and batches is a case.

    Raises:
        UsageError: from every method, where a text cannot be understood.
    """

    solvers: Annotated[
        str | None,
        typer.Option(metavar="all|LIST", help="Show what other solvers find too: all, or such as dp,hypar,pase."),
    ] = None
    clusters: Annotated[
        str | None,
        typer.Option(metavar="A,B,…", help="Which machine to rent: clusters to plan for, instead of --cluster."),
    ] = None
    scale: Annotated[
        str | None,
        typer.Option(metavar="N,N,…", help="Plan for so many devices of the machine, such as 1,2,4,8."),
    ] = None
    links: Annotated[
        str | None,
        typer.Option(metavar="RATES", help="Plan for these rates of its outermost links, such as 1,10,100Gbit."),
    ] = None
    price: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CLUSTER=PRICE", help="What an hour of a machine costs; a part of it costs in proportion. Repeat."
        ),
    ] = None
    samples_per_epoch: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Say how long an epoch takes, and what it costs.")
    ] = None

    def machines(self, asked: Asked) -> "tuple[Machine, ...]":
        """Return the machines to choose from."""
        from planner.api import machine_of

        if self.clusters is None:
            return (machine_of(asked.cluster, asked.devices, asked.precision, asked.profile),)
        return tuple(machine_of(name, None, asked.precision, asked.profile) for name in self.names())

    def refuse_unfit(self, asked: Asked) -> None:
        """Refuse options that contradict each other, before anything is built."""
        if self.clusters is not None and (asked.cluster is not None or asked.devices is not None):
            raise UsageError("--clusters says which machines to compare: leave --cluster and --devices out")
        if self.scale is not None and asked.mesh is not None:
            raise UsageError("--mesh is of one number of devices, and --scale asks for several")
        if self.price and self.samples_per_epoch is None:
            raise UsageError("--price gives what an epoch costs: say with --samples-per-epoch how long one is")
        for parse in (self.names, self._counts, self._rates, self._prices, asked.batches, asked.input_shapes):
            parse()  # refuses its own text

    def cases(self, asked: Asked, machines: "Sequence[Machine]") -> "tuple[Case, ...]":
        """Return every combination."""
        from planner.api import cases

        return cases(
            machines, samples_per_device=SAMPLES_PER_DEVICE, devices=self._counts(), link_rates=self._rates(),
            batches=asked.batches(),
        )  # fmt: skip

    def prices_per_h(self, asked: Asked, machines: "Sequence[Machine]") -> dict[str, float]:
        """Return the price of an hour by the names of machines; they may be written as they were asked for."""
        asked_for = self.names() if self.clusters is not None else [asked.cluster or machines[0].graph.name]
        names = dict(zip(asked_for, (machine.graph.name for machine in machines), strict=True))
        names |= {name: name for name in names.values()}
        found = self._prices()
        for name in found:
            if name not in names:
                raise UnknownNameError("cluster", name, names, "(--price)")
        return {names[name]: price for name, price in found.items()}

    def other_solvers(self) -> tuple[str, ...]:
        """Return ``--solvers``."""
        from planner.api.comparing import refuse_unknown_solvers
        from planner.search.auto import SEARCHING

        if self.solvers is None:
            return ()
        names = SEARCHING if self.solvers == "all" else tuple(name.strip() for name in self.solvers.split(","))
        refuse_unknown_solvers(names)
        return names

    def names(self) -> list[str]:
        """Return ``--clusters``."""
        if self.clusters is None:
            return []
        names = [name.strip() for name in self.clusters.split(",")]
        if not all(names):
            raise UsageError(f"--clusters {self.clusters!r}: give names or files of clusters with commas between them")
        return list(dict.fromkeys(names))

    def _counts(self) -> tuple[int, ...]:
        return () if self.scale is None else counts("--scale", self.scale)

    def _rates(self) -> tuple[float, ...]:
        return () if self.links is None else parse_bit_rates(self.links)

    def _prices(self) -> dict[str, float]:
        found = {}
        for text in self.price or ():
            name, equals, value = text.rpartition("=")
            try:
                found[name.strip()] = float(value)
            except ValueError:
                equals = ""
            if not equals or not 0 <= found[name.strip()] < float("inf"):
                raise UsageError(f"--price {text!r} is not a cluster and the price of its hour, as 4xa100-nvlink=12.5")
        return found
