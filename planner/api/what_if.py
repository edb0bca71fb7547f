"""What if the machine, its links or the batch were others: the strategies compared in every such case."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from planner.api.comparing import Comparison, compare_with
from planner.api.machine import Machine
from planner.api.planning import Planner
from planner.devices.variants import first_devices, with_outer_rate
from planner.errors import InfeasibleError, LayerwiseError, NoPlanError


@dataclass(frozen=True, slots=True)
class Case:
    """A machine and a batch to compare strategies on.

    Attributes:
        cluster: name of the machine that this one is made of.
        share: of the devices of that machine that this one has.
        machine: this one.
        batch: samples of a step.
        link_bytes_per_s: of the outermost links, in each direction, where they are not those of the cluster.
        fixed_batch: the batch was asked for, else it grows with the devices.
    """

    cluster: str
    share: float
    machine: Machine
    batch: int
    link_bytes_per_s: float | None = None
    fixed_batch: bool = False

    @property
    def num_devices(self) -> int:
        """The devices of the machine."""
        return len(self.machine.graph.devices)

    @property
    def num_whole(self) -> int:
        """The devices of the machine that this one is made of."""
        return round(self.num_devices / self.share)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a case came to.

    Attributes:
        case: the case.
        comparison: of its strategies; None where there is no plan.
        error: why there is none.
    """

    case: Case
    comparison: Comparison | None
    error: LayerwiseError | None = None


def cases(
    machines: Sequence[Machine],
    *,
    samples_per_device: int = 32,
    devices: Sequence[int] = (),
    link_rates: Sequence[float] = (),
    batches: Sequence[int] = (),
) -> tuple[Case, ...]:
    """Return all combinations, machine by machine; what is left empty stays as it is.

    Args:
        machines: to choose from.
        samples_per_device: of a step, where no batches are given.
        devices: how many of each to use, see ``planner.devices.variants.first_devices``.
        link_rates: of the outermost links of each, in bytes per second, see ``with_outer_rate`` there.
        batches: samples of a step.

    Raises:
        UsageError: a machine has no such part, or no links.
    """
    found = []
    for whole in machines:
        size = len(whole.graph.devices)
        for count in devices or (size,):
            part = replace(whole, graph=first_devices(whole.graph, count))
            for rate in link_rates or (None,):
                graph = part.graph if rate is None or count == 1 < size else with_outer_rate(part.graph, rate)
                for batch in batches or (None,):
                    size_of_batch = samples_per_device * count if batch is None else batch
                    case = Case(
                        whole.graph.name, count / size, replace(part, graph=graph), size_of_batch, rate,
                        batch is not None,
                    )  # fmt: skip
                    found.append(case)
    return tuple(found)


def what_if(
    planner: Planner,
    asked: Sequence[Case],
    solvers: Sequence[str] = (),
    progress: Callable[[Case], object] = lambda _: None,
) -> Iterator[Outcome]:
    """Compare the strategies in one case after the other.

    Args:
        planner: of the model, with what was asked of the plan; its own machine and batch do not matter.
        asked: the cases.
        solvers: as of ``compare_with``.
        progress: is told of every case before it is looked at.

    Raises:
        UsageError: what was asked of the plan is not possible on a machine.
    """
    traced: dict[int, Planner] = {}  # a model is traced once for each batch
    for case in asked:
        progress(case)
        here = traced[case.batch] = traced.get(case.batch, planner).on(case.machine, case.batch)
        try:
            yield Outcome(case, compare_with(here, solvers))
        except (InfeasibleError, NoPlanError) as error:
            yield Outcome(case, None, error)
