"""``show`` and ``check``: the commands that read a plan."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from planner.cli.terminal import Terminal, rendered
from planner.errors import UsageError
from planner.plan.schema import Plan
from planner.report import pipelines, tables

if TYPE_CHECKING:
    from planner.ir.graph import LayerGraph

PlanPath = Annotated[str, typer.Argument(metavar="PLAN", help="A plan file; - is stdin.", show_default=False)]


def show(
    path: PlanPath,
    terminal: Terminal,
    group: Annotated[
        bool,
        typer.Option("--group", help="Join consecutive layers with the same operator and split in one row."),
    ] = False,
) -> None:
    """Print a plan: totals, its stages, the split of every layer, the strategies it was held against."""
    plan = read_plan(path)
    rows = tables.rows_of_plan(plan)
    staged = (pipelines.stages(plan),) if plan.is_pipelined else ()
    for table in (tables.summary(plan), *staged, *tables.layers(plan, group), tables.strategies(rows)):
        terminal.out.print(rendered(table))
        terminal.out.print()
    totals, bound_s = plan.totals, plan.search.lower_bound_s
    if plan.is_pipelined:
        for sentence in pipelines.sentences(plan):
            terminal.out.print(sentence)
    terminal.out.print(tables.bound_sentence(totals.step_s, bound_s, "pipeline" if plan.is_pipelined else "strategy"))
    for sentence in tables.standing_sentences(rows, bound_s):
        terminal.out.print(sentence)
    terminal.out.print(tables.source_sentence(totals))


def check(
    path: PlanPath,
    terminal: Terminal,
    model: Annotated[bool, typer.Option("--model", help="Build a model of your own too, which runs its code.")] = False,
    cluster: Annotated[str | None, typer.Option(metavar="FILE|NAME", help="The machine it is to run on.")] = None,
) -> None:
    """Check that a plan is sound and belongs to its model and machine."""
    plan = read_plan(path)
    terminal.out.print("file: well-formed, its parts fit each other")
    for line in (_model_line(plan, model), _machine_line(plan, cluster)):
        terminal.out.print(line)


def read_plan(path: str) -> Plan:
    """Return the plan of a file or, for ``-``, of stdin.

    Raises:
        UsageError: no such file, or it is no valid plan.
    """
    return Plan.from_json(sys.stdin.read()) if path == "-" else Plan.load(Path(path))


def _model_line(plan: Plan, may_import: bool) -> str:
    """Check a plan against the model it names; the user's code runs only where allowed."""
    from planner.models import ENTRIES
    from planner.plan.check import refuse_other_model
    from planner.plan.stages import graphs_of

    name, source = plan.model.name, plan.model.source
    if source not in ENTRIES and not may_import:
        return f"model: not checked, because {source or name!r} is no shipped model; --model builds it"
    layers = _layers_of(plan)
    if plan.is_pipelined:
        graphs_of(plan, layers)
        return f"model: {name} has these layers, can be cut into these stages, and every split is legal"
    refuse_other_model(plan, layers)
    return f"model: {name} has these layers, and every split is legal"


def _layers_of(plan: Plan) -> "LayerGraph":
    from planner.frontend.lower import trace_layers
    from planner.frontend.source import load_model
    from planner.frontend.trace import empty_inputs
    from planner.plan.stages import microbatch_inputs

    found = load_model(plan.model.source, plan.model.arguments)
    inputs, keywords = empty_inputs(microbatch_inputs(plan))
    return trace_layers(found.module, inputs, found.name, keywords=keywords).layers


def _machine_line(plan: Plan, wanted: str | None) -> str:
    """Check a plan against the machine given, or the one that its name means."""
    from planner.plan.check import refuse_other_machine

    for graph_digest, name in _machines(plan, wanted):
        refuse_other_machine(plan, graph_digest, name)
        return f"machine: {name} is the one that it was planned for"
    return f"machine: not checked, because {plan.cluster.name!r} is no known name; give --cluster"


def _machines(plan: Plan, wanted: str | None) -> Iterator[tuple[str, str]]:
    """Yield digest and name of the machine to check against, if there is one."""
    from planner.devices.library import cluster

    if wanted is not None:
        from planner.api import machine_of  # also for local-N, which may measure

        graph = machine_of(wanted, precision=plan.precision).graph
        yield graph.digest, graph.name
        return
    name = plan.cluster.name
    if "/" in name or name.endswith(".json"):
        return  # a plan must not choose files to be read
    try:
        graph = cluster(name)
    except UsageError:
        return
    yield graph.digest, graph.name
