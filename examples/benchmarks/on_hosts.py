"""What the benchmarks on two hosts share: planning on measured rates and layers, and races of training steps."""

import dataclasses
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from planner.api import Machine, Options, Origin, Planner, example_inputs, measure_host, measure_layers, prepare
from planner.frontend.source import load_model
from planner.ir.dimension import Dimension
from planner.measure.host import machine_from
from planner.plan import Plan
from planner.profile.table import Measurement
from planner.units import parse_bit_rate
from runtime.launch import run_local
from runtime.namespaces import Hosts, two_hosts

Layers = Mapping[str, Measurement]
Samples = dict[str, list[float]]


@dataclasses.dataclass(frozen=True)
class Case:
    """A network and what it is trained on.

    Attributes:
        model: as the command line takes it.
        batch: samples of all hosts together.
        image: of one sample, channels first.
        arguments: of the model.
        optimizer: see ``planner.api.Options``.
        options: further ones.
    """

    model: str
    batch: int
    image: tuple[int, ...]
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    optimizer: str = "momentum"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def size(self) -> str:
        """The image as text."""
        return "x".join(map(str, self.image))


@contextmanager
def planner_on_hosts(
    case: Case, rate: str, layers: Layers | None = None, microbatches: Sequence[int] = (), delay_s: float = 0.0
) -> Iterator[tuple[Planner, Hosts]]:
    """Give two hosts joined by a link of a rate, and a planner on measurements of them.

    Args:
        case: the network.
        rate: of the link, per direction, such as ``1gbit``.
        layers: times of the layers' pieces, where they were measured before; they do not depend on the link.
        microbatches: sizes of further batches, whose pieces are timed too, whole and cut by samples.
        delay_s: of the link.
    """
    with two_hosts(parse_bit_rate(rate), delay_s=delay_s) as hosts:
        yield planner_of(case, hosts, layers, microbatches), hosts


def planner_of(
    case: Case, hosts: Hosts | None, layers: Layers | None = None, microbatches: Sequence[int] = ()
) -> Planner:
    """Return a planner on measurements of two hosts, or of two processes of this one, as ``planner_on_hosts`` does."""
    machine = Machine(*machine_from(measure_host(2, hosts), 2))
    module = load_model(case.model, dict(case.arguments)).module
    options = Options(**{"all_devices": True, "optimizer": case.optimizer, **case.options})
    origin = Origin(case.model, case.model, case.arguments)
    planner = prepare(module, example_inputs([case.image], case.batch), machine, options, origin)
    if layers is None:
        layers = dict(measure_layers(planner, hosts).machine.profile.layers)
        alone = dataclasses.replace(planner.options, dimensions=frozenset({Dimension.SAMPLE}))
        for size in microbatches:
            smaller = dataclasses.replace(planner, traced=planner.retraced(size), options=alone)
            layers.update(measure_layers(smaller, hosts).machine.profile.layers)
    profile = dataclasses.replace(planner.machine.profile, layers=layers)
    return dataclasses.replace(planner, machine=Machine(planner.machine.graph, profile))


def plan_with(planner: Planner, **options: Any) -> Plan:
    """Return the plan for other options."""
    return dataclasses.replace(planner, options=dataclasses.replace(planner.options, **options)).plan()


def one_device(planner: Planner) -> str:
    """Return the mesh of one device, as the option takes it."""
    return ",".join(f"{level.name}=1" for level in planner.machine.graph.levels)


def raced(
    plans: Mapping[str, Plan], hosts: Hosts | None, function: str = "runtime.training:race", **argument: Any
) -> Samples:
    """Train strategies side by side on the hosts, a step of each after the other; return their seconds by name."""
    found, _ = run_local(
        function,
        {"plans": {name: plan.to_json() for name, plan in plans.items()}, **argument},
        num_ranks=2,
        timeout_s=3600.0,
        threads_per_rank=1,
        hosts=hosts,
    )
    assert isinstance(found, dict)
    return found


def iqr(samples: Sequence[float]) -> float:
    """Return the inter-quartile range."""
    quartiles = statistics.quantiles(samples, n=4)
    return quartiles[2] - quartiles[0]


def ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the median of the ratios of paired samples; where one has more, of its first ones."""
    return statistics.median(x / y for x, y in zip(a, b, strict=False))


def ratio_interval(a: Sequence[float], b: Sequence[float], resamples: int = 2000) -> tuple[float, float]:
    """Return a 95 % bootstrap interval of the median of the ratios of paired samples, paired as in ``ratio``."""
    count = min(len(a), len(b))
    ratios = np.asarray(a[:count]) / np.asarray(b[:count])
    drawn = np.random.default_rng(0).choice(ratios, (resamples, len(ratios)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return float(low), float(high)
