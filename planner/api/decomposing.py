"""What training by domain decomposition is predicted to cost, beside the network that sees the whole input."""

from dataclasses import dataclass

import torch
from torch import nn

from planner.api.machine import Machine
from planner.api.options import Options, Origin
from planner.api.planning import example_inputs, prepare
from planner.frontend.decomposition import Decomposition, Factory, assemble, local_network
from planner.ir.tensor import DType


@dataclass(frozen=True, slots=True)
class PricedNetwork:
    """A network on one device.

    Attributes:
        name: of the network.
        input_shape: of one sample.
        num_params: trainable.
        step_s: predicted training step of one batch.
        memory_bytes: predicted peak.
    """

    name: str
    input_shape: tuple[int, ...]
    num_params: int
    step_s: float
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class PricedDecomposition:
    """Predicted steps of a CNN-DNN's stages.

    Attributes:
        changes: how the model differs from the one that sees the whole input.
        whole: the factory's network for the whole input.
        local: the local networks.
        coarse: the dense network.
        sent_bytes: by each local network for each training sample, once: its class probabilities.
    """

    changes: str
    whole: PricedNetwork
    local: tuple[PricedNetwork, ...]
    coarse: PricedNetwork
    sent_bytes: int

    def local_step_s(self, num_ranks: int) -> float:
        """Return the step of all local networks on so many ranks; rank r has networks r, r + num_ranks and so on."""
        return max(sum(net.step_s for net in self.local[rank::num_ranks]) for rank in range(num_ranks))


def price_decomposition(
    factory: Factory, decomposition: Decomposition, machine: Machine, batch: int, options: Options | None = None
) -> PricedDecomposition:
    """Return what the stages of a CNN-DNN cost; no weight is made.

    Args:
        factory: of the local networks.
        decomposition: of the input.
        machine: every network is priced on one of its devices.
        batch: samples a step.
        options: precision and optimizer count.

    Raises:
        UsageError: the networks do not fit their parts.
        TraceError: one cannot be traced.
    """
    asked = options or Options()

    def priced(name: str, module: nn.Module, shape: tuple[int, ...]) -> PricedNetwork:
        inputs = example_inputs([shape], batch)
        planner = prepare(module, inputs, machine, asked, Origin(name, name))
        one = machine.graph.mesh_of([(1,) for _ in machine.graph.levels])
        search = planner.search(one)
        timeline = search.forced((0,) * len(planner.traced.layers.layers)).timeline
        return PricedNetwork(name, shape, planner.traced.layers.num_params, timeline.step_s, timeline.memory_bytes)

    with torch.device("meta"):
        whole = Decomposition(decomposition.input_shape, (1,) * len(decomposition.grid))
        shapes = decomposition.local_shapes
        net = assemble(decomposition, [local_network(factory, decomposition, i) for i in range(len(shapes))])
        features = net.num_classes * len(shapes)
        return PricedDecomposition(
            net.changes_model,
            priced("whole input", local_network(factory, whole, 0), decomposition.input_shape),
            tuple(priced(f"local {i}", net.nets[i], shape) for i, shape in enumerate(shapes)),
            priced("coarse", net.coarse, (features,)),
            net.num_classes * DType.FLOAT32.item_bytes,
        )
