"""``show`` and ``check``: the commands that read a plan."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from planner.cli.terminal import Terminal, rendered
from planner.errors import UsageError
from planner.ir.canonical import MAX_FILE_BYTES, read_bytes
from planner.plan.schema import Plan
from planner.report import pipelines, tables

PlanPath = Annotated[str, typer.Argument(metavar="PLAN", help="A plan file; - is stdin.", show_default=False)]


def show(
    path: PlanPath,
    terminal: Terminal,
    group: Annotated[
        bool,
        typer.Option("--group", help="Join consecutive layers with the same operator and split in one row."),
    ] = False,
) -> None:
    """Print a plan: totals, its stages, the split of every layer, the strategies it was held against.

    Or a partition for inference: its devices, the layers on them, and what simpler methods find.
    """
    text = _text(path)
    if _is_partition(text):
        _show_partition(path, text, terminal)
        return
    plan = _plan(path, text)
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
    for sentence in tables.branch_sentences(plan.search.branches, totals.step_s):
        terminal.out.print(sentence)
    for sentence in tables.standing_sentences(rows, bound_s):
        terminal.out.print(sentence)
    terminal.out.print(tables.source_sentence(plan))
    for sentence in tables.change_sentences(plan.model.changes):
        terminal.out.print(sentence)


def check(
    path: PlanPath,
    terminal: Terminal,
    model: Annotated[bool, typer.Option("--model", help="Build a model of your own too, which runs its code.")] = False,
    cluster: Annotated[str | None, typer.Option(metavar="FILE|NAME", help="The machine it is to run on.")] = None,
) -> None:
    """Check that a plan is sound and belongs to its model and machine."""
    plan = read_plan(path)
    terminal.out.print("file: well-formed, its parts fit each other")
    for sentence in tables.change_sentences(plan.model.changes):
        terminal.out.print(sentence)
    with terminal.working(f"checking {plan.model.name}"):
        lines = [_model_line(plan, model), _machine_line(plan, cluster)]
    for line in lines:
        terminal.out.print(line)


def read_plan(path: str) -> Plan:
    """Return the plan of a file or, for ``-``, of stdin.

    Raises:
        UsageError: no such file, or it is no valid plan.
    """
    return _plan(path, _text(path))


def _plan(path: str, text: bytes) -> Plan:
    return Plan.from_json(text, "plan" if path == "-" else f"plan {path}")


def _text(path: str) -> bytes:
    if path != "-":
        return read_bytes(Path(path), "plan")
    stream = getattr(sys.stdin, "buffer", None)  # text that is put in its place has none
    most = MAX_FILE_BYTES + 1
    return stream.read(most) if stream is not None else sys.stdin.read(most).encode("utf-8", "surrogatepass")


def _is_partition(text: bytes) -> bool:
    """Return whether a file calls itself a partition, before it is decoded; a plan has no such key and value."""
    return re.search(rb'"kind"\s*:\s*"partition"', text) is not None


def _show_partition(path: str, text: bytes, terminal: Terminal) -> None:
    from planner.inference.schema import Partition
    from planner.report import partitions

    found = Partition.from_json(text, "partition" if path == "-" else f"partition {path}")
    for table in partitions.tables(found):
        terminal.out.print(rendered(table))
        terminal.out.print()
    terminal.out.print(partitions.bound_sentence(found))


def _model_line(plan: Plan, may_import: bool) -> str:
    """Check a plan against the model it names; the user's code runs only where allowed."""
    from planner.api import layer_graph
    from planner.models import ENTRIES
    from planner.plan.check import refuse_other_model
    from planner.plan.obeyed import refuse_disobeyed_constraints
    from planner.plan.stages import graphs_of

    name, source = plan.model.name, plan.model.source
    if source not in ENTRIES and not may_import:
        return f"model: not checked, because {source or name!r} is no shipped model; --model builds it"
    layers = layer_graph(plan)
    if plan.is_pipelined:
        refuse_disobeyed_constraints(plan, graphs_of(plan, layers))
        return f"model: {name} has these layers, can be cut into these stages, and every split is legal{_obeyed(plan)}"
    refuse_other_model(plan, layers)
    refuse_disobeyed_constraints(plan, [layers])
    return f"model: {name} has these layers, and every split is legal{_obeyed(plan)}"


def _obeyed(plan: Plan) -> str:
    return " and as the constraints say" if plan.search.constraints else ""


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
