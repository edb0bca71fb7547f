"""`layerwise demo`: plan small CNNs, train them on real images under several strategies, compare."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.console import Console
from rich.table import Table

from planner.cli.terminal import Terminal
from planner.plan import Plan
from planner.units import format_bytes, format_seconds, parse_bit_rate

if TYPE_CHECKING:
    from planner.api import Machine
    from runtime.namespaces import Hosts

STRATEGIES: Final = ("data", "conv-data-fc-model", "auto")
PLANNED: Final = "planned"
DDP: Final = "torch DDP"
LOCAL_NORM: Final = "data, batch norm as DDP"
OTHER_NUMERICS: Final = (DDP, LOCAL_NORM)
"""With batch norm, these compute something else than one device: each rank normalises its samples alone."""


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """A network and how long it is trained."""

    model: str
    batch: int
    steps: int
    learning_rate: float
    has_batch_norm: bool


CASES: Final = (
    Case("digits-cnn", 64, 120, 0.03, has_batch_norm=True),
    Case("digits-alexnet", 64, 120, 0.03, has_batch_norm=False),
)
TIMEOUT_S: Final = 600.0


def demo(
    terminal: Terminal,
    link: Annotated[
        str | None,
        typer.Option(help="Two hosts joined by a link of this rate, such as 1gbit (root only; network namespaces)."),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the last plan goes.")] = Path("plan.json"),
) -> None:
    """Plan two small CNNs for two processes, train them on real images, compare the strategies.

    Images: the 1,797 digits that come with scikit-learn. Takes about a minute on two cores.
    """
    console = terminal.out
    console.print(
        "Two processes, real images (scikit-learn's digits), fp32, SGD with momentum. Layers and links of this machine "
        "are measured first; each strategy trains the same network on the same batches.\n"
    )
    with _hosts(link) as hosts:
        with terminal.working("measuring this machine"):
            machine = _machine(hosts)
        for case in CASES:
            with terminal.working(f"planning {case.model}"):
                plans = _plans(case, machine, hosts)
            with terminal.working(f"training {case.model} under {len(plans) + 2} strategies, {case.steps} steps each"):
                found = _train(case, plans, hosts)
            _report(console, case, plans, found, link)
            last = plans[PLANNED]
    last.save(output)
    console.print(f"The plan of {last.model.name} is in {output}: look at it with  layerwise show {output}")


@contextlib.contextmanager
def _hosts(link: str | None) -> "Iterator[Hosts | None]":
    if link is None:
        yield None
        return
    from runtime.namespaces import two_hosts

    with two_hosts(parse_bit_rate(link)) as hosts:
        yield hosts


def _machine(hosts: "Hosts | None") -> "Machine":
    """Return this host with two processes; measured anew, because a demo should show the machine as it is."""
    from planner.api import Machine, measure_host
    from planner.measure.host import machine_from

    return Machine(*machine_from(measure_host(2, hosts), 2))


def _plans(case: Case, machine: "Machine", hosts: "Hosts | None") -> dict[str, Plan]:
    from planner.api import Options, Origin, example_inputs, measure_layers, prepare
    from planner.frontend.source import load_model

    loaded = load_model(case.model)
    origin = Origin(case.model, case.model, command="layerwise demo")
    options = Options(all_devices=True)  # both processes take part, even where one alone would be faster
    planner = prepare(loaded.module, example_inputs(loaded.input_shapes, case.batch), machine, options, origin)
    planner = measure_layers(planner, hosts)
    asked = {PLANNED if name == "auto" else name: Options(solver=name, all_devices=True) for name in STRATEGIES}
    if case.has_batch_norm:
        asked[LOCAL_NORM] = Options(solver="data", sync_batch_norm=False)
    return {shown: dataclasses.replace(planner, options=options).plan() for shown, options in asked.items()}


def _train(case: Case, plans: dict[str, Plan], hosts: "Hosts | None") -> dict[str, Any]:
    from planner.measure.host import threads_per_rank
    from runtime.launch import run_local

    argument: dict[str, Any] = {
        "plans": {name: plan.to_json() for name, plan in plans.items()},
        "steps": case.steps,
        "learning_rate": case.learning_rate,
        "ddp": True,
    }
    (found, _) = run_local(
        "runtime.demo:train_digits", argument, num_ranks=2, timeout_s=TIMEOUT_S,
        threads_per_rank=threads_per_rank(2), hosts=hosts,
    )  # fmt: skip
    assert isinstance(found, dict)
    return found


def _report(console: Console, case: Case, plans: dict[str, Plan], found: dict[str, Any], link: str | None) -> None:
    from runtime.demo import largest_difference

    alone = found["one-device"]
    where = "loopback" if link is None else f"a {link} link"
    size = f"{plans[PLANNED].model.num_params:,} parameters"
    table = Table(
        title=f"{case.model}: {size}, batch {case.batch}, {case.steps} steps over {where}",
        caption="loss: its largest difference from one device's over all steps",
    )
    table.add_column("strategy", no_wrap=True)
    for column in ("predicted", "measured", "sent a step", "accuracy", "loss"):
        table.add_column(column, justify="right")
    rows = {name: row for name, row in found.items() if name != "one-device"}
    for name in sorted(rows, key=lambda n: rows[n]["step_s"]):
        plan, row = plans.get(name), rows[name]
        table.add_row(
            name,
            format_seconds(plan.totals.step_s) if plan else "",
            format_seconds(row["step_s"]),
            format_bytes(plan.totals.communication_bytes) if plan else "",
            f"{row['accuracy']:.1%}",
            f"{largest_difference(row['losses'], alone['losses']):.1e}",
            style="bold" if name == PLANNED else None,
        )
    table.add_row("one device", "", "", "", f"{alone['accuracy']:.1%}", "")
    console.print(table)
    equal = {name: row for name, row in rows.items() if not (case.has_batch_norm and name in OTHER_NUMERICS)}
    console.print(_verdict(plans[PLANNED], equal))
    if case.has_batch_norm:
        console.print(
            "DDP's batch norm normalises each rank's samples alone and sends nothing; the others normalise the whole "
            "batch, as one device does, and pay for it."
        )
    console.print()


def _verdict(plan: Plan, rows: dict[str, Any]) -> str:
    planned_s = rows[PLANNED]["step_s"]
    best = min((name for name in rows if name != PLANNED), key=lambda name: rows[name]["step_s"])
    factor = rows[best]["step_s"] / planned_s
    bound = (
        f"By its own model no strategy is faster than {format_seconds(plan.search.lower_bound_s)}, the compute that "
        f"nothing can hide; the plan is predicted within {plan.search.gap:.1%} of that."
    )
    if factor >= 1:
        return f"Planned is {factor:.2f} times as fast as the next best, {best}. {bound}"
    same = [b.name for b in plan.baselines if b.step_s <= plan.totals.step_s * 1.02]
    why = f" Predicted equal within 2%: {', '.join(same)}." if same else ""
    return f"Planned does not win here: {best} measured {1 / factor:.2f} times as fast.{why} {bound}"
