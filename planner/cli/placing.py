"""``plan --objective``: which small device computes which part of a network, for inference."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

import typer

from planner.cli.options import Asked
from planner.cli.terminal import Terminal, rendered
from planner.errors import UsageError
from planner.report import partitions

_SHARED: Final = frozenset({"model", "shapes", "model_args", "devices", "cluster", "time_limit"})
"""Options of training plans that mean the same here."""


@dataclass(frozen=True, slots=True)
class Placed:
    """A partition for inference as it was typed."""

    objective: Annotated[
        Literal["inference-rate", "communication"] | None,
        typer.Option(
            help="Plan inference on small devices instead of training: most inferences per second, or fewest bytes "
            "between devices, within the devices' memory."
        ),
    ] = None
    group: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N",
            help="For inference: squares of N x N positions may be on a device of their own; whole layers if left out.",
        ),
    ] = None  # fmt: skip
    element_bytes: Annotated[
        int, typer.Option(min=1, max=16, metavar="N", help="For inference: of each number, such as 1 for int8.")
    ] = 4
    input_device: Annotated[
        str | None, typer.Option(metavar="ID", help="For inference: the device that has the inputs, such as cpu0.")
    ] = None

    def refuse_for_training(self) -> None:
        """Raise where something is asked for that a training step does not have.

        Raises:
            UsageError: an option is of no use without ``--objective``.
        """
        for field in dataclasses.fields(self):
            if getattr(self, field.name) != field.default:
                raise UsageError(
                    f"{_option(field.name)} is for inference: add --objective inference-rate or communication"
                )


def place(asked: Asked, placed: Placed, terminal: Terminal, output: Path | None, command: str) -> None:
    """Find a partition; write it, or print it on stdout."""
    for field in dataclasses.fields(asked):
        if field.name not in _SHARED and getattr(asked, field.name) != field.default:
            raise UsageError(
                f"{_option(field.name)} is for training, and --objective {placed.objective} plans inference"
            )
    arguments = asked.arguments()
    asked.input_shapes()  # refuses what cannot be understood, before torch is loaded
    from planner.api import InferenceOptions, Origin, example_inputs, machine_of, plan_inference
    from planner.frontend.source import load_model
    from planner.inference.problem import Objective
    from planner.inference.search import Limits

    assert placed.objective is not None
    options = InferenceOptions(
        Objective(placed.objective), placed.group, placed.element_bytes, placed.input_device,
        Limits(time_limit_s=asked.time_limit_s()),
    )  # fmt: skip
    machine = machine_of(asked.cluster, asked.devices).graph
    model = load_model(asked.model, arguments)
    shapes, named = asked.inputs_of(model.input_shapes)
    keywords = dict(zip(named, example_inputs(tuple(named.values()), 1), strict=True))
    origin = Origin(model.name, model.source, arguments, command)
    with terminal.working(f"placing {model.name}"):
        found = plan_inference(model.module, example_inputs(shapes, 1), machine, options, origin, keywords)
    if output is None:
        typer.echo(found.to_json(), nl=False)
        return
    found.save(output)
    terminal.err.print(rendered(partitions.methods(found)))
    terminal.err.print(partitions.bound_sentence(found))
    terminal.err.print(f"wrote {output}")


def _option(name: str) -> str:
    """Return how a field is typed."""
    return {"shapes": "--input", "local_batch_norm": "--no-sync-batch-norm"}.get(name, f"--{name.replace('_', '-')}")
