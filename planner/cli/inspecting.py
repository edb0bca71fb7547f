"""``inspect``: what a model consists of, without a machine and without a plan."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from planner.cli.options import AskedModel
from planner.cli.planning import refuse_unwritable
from planner.cli.terminal import Rendered, Terminal, as_text, rendered
from planner.ir.canonical import write_atomically
from planner.report import inspection
from planner.report.dot import dot

if TYPE_CHECKING:
    from planner.ir.graph import LayerGraph


def inspect(
    asked: AskedModel,
    terminal: Terminal,
    batch: Annotated[
        int, typer.Option(min=1, metavar="B", help="Samples; all figures are for so many, so 1 gives those per sample.")
    ] = 1,
    evaluation: Annotated[
        bool, typer.Option("--eval", help="As the model runs in evaluation: no dropout, no batch statistics.")
    ] = False,
    form: Annotated[
        Literal["table", "json", "csv", "dot"], typer.Option("--format", help="What to print; dot is for Graphviz.")
    ] = "table",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write it here instead of stdout.")] = None,
) -> None:
    """List the layers of a model: shapes, parameters, FLOP, bytes, and what each can be split by."""
    if output is not None:
        refuse_unwritable(output)
    with terminal.working(f"tracing {asked.model}"):
        graph = _layers(asked, batch, training=not evaluation)
    rows = inspection.rows_of_layers(graph)
    summary = inspection.totals_sentence(inspection.totals_of(rows), graph, training=not evaluation)
    match form:
        case "table":
            parts = list(_tables(graph, rows, summary))
            if output is None:
                for part in parts:
                    terminal.out.print(part)
                return
            text = as_text(parts)
        case "json":
            text = json.dumps(inspection.document(graph, rows, training=not evaluation), indent=2) + "\n"
        case "csv":
            text = inspection.as_csv(rows)
        case "dot":
            text = dot(graph)
    if output is None:
        typer.echo(text, nl=False)
        return
    write_atomically(output, text)
    terminal.err.print(summary)
    terminal.err.print(f"wrote {output}")


def _layers(asked: AskedModel, batch: int, *, training: bool) -> "LayerGraph":
    arguments = asked.arguments()
    asked.input_shapes()  # refuses what cannot be understood, before torch is loaded
    from planner.api import example_inputs
    from planner.frontend.lower import trace_layers
    from planner.frontend.source import load_model

    model = load_model(asked.model, arguments)
    shapes, named = asked.inputs_of(model.input_shapes)
    keywords = dict(zip(named, example_inputs(tuple(named.values()), batch), strict=True))
    inputs = example_inputs(shapes, batch)
    return trace_layers(model.module, inputs, model.name, keywords=keywords, training=training).layers


def _tables(graph: "LayerGraph", rows: tuple[inspection.LayerRow, ...], summary: str) -> Iterator[Rendered | str]:
    yield rendered(inspection.layers(rows, graph.name))
    yield ""
    yield summary
    yield inspection.LEGEND
    yield ""
    unsplit = inspection.parts_by_sample(rows)
    if unsplit:
        yield rendered(inspection.parts(unsplit))
    yield inspection.parts_sentence(unsplit)
