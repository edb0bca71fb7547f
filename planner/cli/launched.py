"""Who starts the ranks: another launcher, which has started this process as one of them, or this command."""

import os
from dataclasses import dataclass
from typing import Annotated, Literal

import typer

from planner.errors import UsageError


@dataclass(frozen=True, slots=True)
class Launcher:
    """The launcher as it was typed."""

    launcher: Annotated[
        Literal["auto", "ray"],
        typer.Option(
            help="auto: torchrun or srun where one has started this, else processes of this host; ray: a Ray cluster."
        ),
    ] = "auto"
    ray_address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Of the Ray cluster; RAY_ADDRESS if left out. Without both, one is started here for the run.",
        ),
    ] = None

    def refuse_unfit(self) -> None:
        """Refuse options that cannot be.

        Raises:
            UsageError: options that contradict each other, or another launcher.
        """
        if self.launcher != "ray" and self.ray_address is not None:
            raise UsageError("--ray-address is for --launcher ray")
        if self.launcher == "ray" and is_rank():
            raise UsageError(
                "--launcher ray starts the ranks, and torchrun or srun has started this process as one: "
                "run the command once, without them"
            )

    def is_on_this_host(self) -> bool:
        """Return whether ranks that this command starts are processes of this host."""
        return self.launcher != "ray" or not (self.ray_address or os.environ.get("RAY_ADDRESS"))


def is_rank() -> bool:
    """Return whether torchrun or srun has started this process as a rank; srun's variables get torchrun's names."""
    from runtime.slurm import adopt_step

    adopt_step()
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ
