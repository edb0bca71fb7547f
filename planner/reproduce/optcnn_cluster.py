"""OptCNN [OptCNN18, Figures 7 and 8] on 16 P100: its bytes per step and images per second against ours.

Its cost is the sum of compute, transfers and synchronisation, nothing overlapped, where each layer's parameters
are kept by a parameter server. So that is the mode to compare: our costs on our device graph, additive, with
gradients pushed to servers and parameters fetched (``ParameterServers``), batch norms on each GPU's own samples. Our
simulated step, with ring collectives behind backward, stands beside it.

Compute is the data sheet's roofline. It cannot know cuDNN's Winograd convolutions, which exceed the direct FLOP
rate; so there are two predictions: as it is, and with all compute times a network's multiple of it, such that one GPU
reaches the published rate.
"""

import math
from dataclasses import dataclass, replace
from typing import Final

from planner.api import Machine, Options, Origin, Planner, example_inputs, machine_of, prepare
from planner.cost.accounting import Volume, received_elements, step_volume
from planner.cost.model import CostModel, Settings
from planner.cost.table import CostTable
from planner.cost.transfer import Price, Reduction, StepPricer
from planner.devices.measured import CollectiveKind
from planner.devices.route import Router
from planner.frontend.source import load_model
from planner.ir.dimension import Dimension
from planner.ir.ops import Linear
from planner.ir.rules import InputOutput
from planner.ir.tensor import DType
from planner.search.auto import Planned, Search
from planner.search.problem import Limits
from planner.space.enumerate import enumerate_splits

CLUSTER: Final = "4x4-p100-ib100"
BATCH: Final = 32
"""Images of each GPU."""
MODELS: Final = {
    "alexnet": ("alexnet", {}),
    "vgg16": ("vgg16", {}),
    "inception-v3": ("torchvision:inception_v3", {"aux_logits": False}),
}
"""MODEL and its arguments."""
STRATEGIES: Final = ("model", "data", "conv-data-fc-model", "layer-wise")
PUBLISHED_ONE_GPU: Final = {"alexnet": 745.0, "vgg16": 184.0, "inception-v3": 157.0}
PUBLISHED_IMAGES_PER_S: Final = {
    "alexnet": (3305, 3232, 4262, 9050),
    "vgg16": (1049, 1661, 1991, 2717),
    "inception-v3": (160, 1691, 1746, 2431),
}
"""On 16 GPUs, in the order of ``STRATEGIES``."""
PUBLISHED_GIB: Final = {
    "alexnet": (2.26, 8.90, 1.06, 0.39),
    "vgg16": (28.8, 16.4, 3.69, 1.63),
    "inception-v3": (27.6, 2.84, 2.72, 2.25),
}
"""Per step, likewise."""
DIMENSIONS: Final = (Dimension.SAMPLE, Dimension.OUT_CHANNEL, Dimension.HEIGHT, Dimension.WIDTH)
"""That the paper splits."""
EXAMPLE_BATCH: Final = 320
"""Of two GPUs together, in the example of VGG-16's first linear layer: the one that fits its 32 MB.

With the 32 images per GPU of its measurements the layer would move 6.4 MB.
"""
PUBLISHED_EXAMPLE_MB: Final = (408.0, 32.0)
"""Data parallelism, split channels."""


@dataclass(frozen=True)
class ParameterServers(StepPricer):
    """Prices a gradient reduction as [OptCNN18] does: push gradients, fetch parameters.

    A layer's server is taken to be spread over the GPUs that share the layer, so that no link carries more than
    another: each GPU sends 1 / p of its gradient to each other one, and gets as much back.
    """

    def all_reduce(self, axes: tuple[int, ...], num_bytes: int) -> Price:
        """Return the price of pushing a gradient of so many bytes and fetching the parameters."""
        size = math.prod(self.router.mesh.shape[a] for a in axes)
        once = self.exchange(axes, round((size - 1) / size * num_bytes))
        return once + once

    def reduction(
        self, axes: tuple[int, ...], num_bytes: int, kind: CollectiveKind = CollectiveKind.ALL_REDUCE
    ) -> Reduction:
        """Return the same behind computation; servers are the only kind."""
        del kind
        price = self.all_reduce(axes, num_bytes)
        return Reduction(price.seconds, price.seconds, 0.0, price.levels)


@dataclass(frozen=True, slots=True)
class Rates:
    """Images per second of a strategy.

    Attributes:
        additive: as the paper counts: nothing overlapped, parameter servers.
        rings: nothing overlapped, our all-reduces.
        simulated: of our runtime: our all-reduces, behind backward.
    """

    additive: float
    rings: float
    simulated: float


def one_gpu_rate(network: str) -> float:
    """Return the images per second of one GPU by its data sheet."""
    planner = planner_of(network, BATCH, machine_of("1xp100-nvlink"))
    return BATCH / planner.search(planner.meshes()[0]).fixed("data").timeline.step_s


def image_rates(network: str, compute_factor: float = 1.0) -> dict[str, Rates]:
    """Return the predicted rates of every strategy on the cluster.

    Args:
        network: of ``MODELS``.
        compute_factor: by which compute takes longer than the data sheet says.
    """
    machine = slower(machine_of(CLUSTER), compute_factor)
    planner = planner_of(network, BATCH * len(machine.graph.devices), machine)
    published, ours = _search(planner, ParameterServers), _search(planner, StepPricer)
    images = planner.traced.layers.batch
    return {
        name: Rates(
            images / _additive_s(published, name),
            images / _additive_s(ours, name),
            images / _planned(ours, name).timeline.step_s,
        )
        for name in STRATEGIES
    }


def server_rates(network: str, machine: Machine) -> dict[str, float]:
    """Return the images per second of every strategy on a machine: nothing overlapped, parameter servers."""
    planner = planner_of(network, BATCH * len(machine.graph.devices), machine)
    search = _search(planner, ParameterServers)
    return {name: planner.traced.layers.batch / _additive_s(search, name) for name in STRATEGIES}


def volumes(network: str) -> dict[str, Volume]:
    """Return the bytes of a step on the cluster, counted as the paper counts."""
    machine = machine_of(CLUSTER)
    search = _search(planner_of(network, BATCH * len(machine.graph.devices), machine), ParameterServers)
    return {name: step_volume(search.table, _planned(search, name).choice) for name in STRATEGIES}


def first_linear_layer_bytes() -> tuple[int, float]:
    """Return the bytes that VGG-16's first linear layer costs each of two GPUs.

    Returns:
        Its gradients under data parallelism; and where its output channels are split, behind a part that is
        split by samples, the inputs that a GPU lacks and as many of their gradients.
    """
    planner = planner_of("vgg16", EXAMPLE_BATCH, machine_of("2xp100-nvlink"))
    search = planner.search(planner.meshes()[0])
    table, graph = search.table, search.table.space.graph
    i, first = next((i, layer) for i, layer in enumerate(graph.layers) if isinstance(layer.op, Linear))
    data, mixed = search.fixed("data").choice, table.strategy(search.fixed("conv-data-fc-model").choice)
    producer = graph[first.inputs[0]]
    have = table.model.layouts(producer, mixed[producer.id]).output
    need = table.model.layouts(first, mixed[first.id]).inputs[0]
    moved = received_elements(have.value, need.value) + received_elements(need.gradient, have.gradient)
    return sum(table.layers[i][data[i]].sync.values()), moved * DType.FLOAT32.item_bytes / table.model.mesh.size


def planner_of(network: str, batch: int, machine: Machine, mesh: str | None = None) -> Planner:
    """Return a network on a machine with the paper's space, batch norms on each GPU's own samples.

    Args:
        network: of ``MODELS``, or the name of another one.
        batch: of all GPUs.
        machine: the machine.
        mesh: the one to search; whole levels and their factors where None.
    """
    reference, arguments = MODELS.get(network, (network, {}))
    loaded = load_model(reference, arguments)
    images = example_inputs(loaded.input_shapes, batch)
    options = Options(sync_batch_norm=False, dimensions=DIMENSIONS, io="per-rank", mesh=mesh)
    return prepare(loaded.module, images, machine, options, Origin(network, reference))


def slower(machine: Machine, factor: float) -> Machine:
    """Return a machine whose devices take longer by a factor."""
    rates = machine.profile.roofline
    roofline = replace(
        rates,
        flop_per_s={kind: rate / factor for kind, rate in rates.flop_per_s.items()},
        bandwidth_bytes_per_s=rates.bandwidth_bytes_per_s / factor,
        launch_s=rates.launch_s * factor,
        update_bytes_per_s=rates.update_bytes_per_s / factor,
    )
    return Machine(machine.graph, replace(machine.profile, roofline=roofline))


def _search(planner: Planner, pricer: type[StepPricer]) -> Search:
    """Return the search of the paper's space with gradient reductions priced so."""
    graph, machine, mesh = planner.traced.layers, planner.machine, planner.meshes()[0]
    model = CostModel.of(graph, machine.graph, mesh, machine.profile, Settings(sync_batch_norm=False))
    model = replace(model, pricer=pricer(Router(machine.graph, mesh)))
    space = enumerate_splits(graph, mesh, InputOutput.PER_RANK, DIMENSIONS)
    return Search(CostTable.of(space, model), planner.limit_bytes, Limits())


def _planned(search: Search, strategy: str) -> Planned:
    return search.solve("dp") if strategy == "layer-wise" else search.fixed(strategy)


def _additive_s(search: Search, strategy: str) -> float:
    """Return the sum of compute, transfers and synchronisation."""
    planned = _planned(search, strategy)
    pricer = search.table.model.pricer
    costs = (costs[c] for costs, c in zip(search.table.layers, planned.choice, strict=True))
    sync_s = sum(pricer.all_reduce(axes, num_bytes).seconds for c in costs for axes, num_bytes in c.sync.items())
    return planned.timeline.compute_s + planned.timeline.blocking_s + sync_s


def compute_factor(network: str) -> float:
    """Return by how much a GPU's compute must take longer than the data sheet says to reach the published rate."""
    return one_gpu_rate(network) / PUBLISHED_ONE_GPU[network]
