"""Every network of ``support.networks``: the traced graph computes what the module computes, at any batch size."""

import functools
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from planner.errors import TraceError
from planner.frontend.lower import TracedModel, trace_layers
from planner.ir import ops
from support.binding import differences, observe, observe_graph
from support.networks import NETWORKS, REFUSABLE
from support.networks.shapes import Deep

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")

MODES = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
MIXING = {"two views as one batch", "keypoints"}
"""Networks that put samples together, or pick them by their numbers."""
EVERY = pytest.mark.parametrize("name", NETWORKS)
PRODUCTS = {nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trace(name: str, module: nn.Module, *, training: bool = True) -> TracedModel:
    network = NETWORKS[name]
    inputs, keywords = network.example(network.batches[0])
    return trace_layers(module, inputs, name, keywords=keywords, training=training)


@functools.cache
def traced(name: str, *, training: bool = True) -> TracedModel:
    return trace(name, NETWORKS[name].module(training=training), training=training)


def state_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return dict([*module.named_parameters(), *module.named_buffers()])


@MODES
@EVERY
def test_the_graph_is_the_module_bit_for_bit_at_any_batch(name: str, training: bool) -> None:
    network = NETWORKS[name]
    for batch in network.batches:
        eager, bound = (network.module(training=training) for _ in range(2))
        inputs, keywords = network.example(batch)
        wanted = observe(eager, inputs, keywords)
        assert all(x.isfinite().all() for key, x in wanted.items() if "output" in key and torch.is_tensor(x))
        found = observe_graph(traced(name, training=training), bound, inputs, keywords)
        assert differences(found, wanted) == [], f"at a batch of {batch}"


@pytest.mark.parametrize("name", REFUSABLE)
def test_what_may_be_refused_is_bound_right_or_refused_with_its_place(name: str) -> None:
    network = REFUSABLE[name]
    try:
        found = trace_layers(network.module(), network.example(4)[0])
    except TraceError as error:
        assert "/tests/support/networks/" in str(error)  # noqa: PT017  # either way is right
        assert "in place" in str(error) or "number of samples" in str(error)  # noqa: PT017  # see above
        return
    inputs, _ = network.example(3)
    assert differences(observe_graph(found, network.module(), inputs, {}), observe(network.module(), inputs, {})) == []


def called(name: str) -> Counter[str]:
    """Return how often each convolution or linear layer is called, those inside of torch's own modules left out."""
    module, calls = NETWORKS[name].module(), Counter[str]()
    parts = dict(module.named_modules())
    of_torch = [
        path for path, part in parts.items()
        if type(part).__module__.startswith("torch.nn.") and not isinstance(part, nn.Sequential | nn.ModuleList)
    ]  # fmt: skip
    for path, part in parts.items():
        if path and type(part) in PRODUCTS and not any(path.startswith(f"{outer}.") for outer in of_torch):
            part.register_forward_hook(lambda *_, path=path: calls.update([path]))
    inputs, keywords = NETWORKS[name].example(2)
    module(*inputs, **keywords)
    return calls


@EVERY
def test_every_call_of_a_product_is_in_a_layer_under_the_name_of_the_user(name: str) -> None:
    graph = traced(name)
    inside = {
        id_: [node.target for node in graph.graph.nodes if node.op == "call_module" and node.name in nodes]
        for id_, nodes in graph.nodes.items()
    }
    calls = called(name)
    assert Counter(str(t) for targets in inside.values() for t in targets if t in calls) == calls
    for layer in graph.layers.layers:
        if layer.op.kind in {"conv", "conv_transpose", "linear"} and inside[layer.id]:
            assert layer.id.split("@")[0] == inside[layer.id][0]


@pytest.mark.parametrize("name", [n for n in NETWORKS if n not in MIXING])
def test_outputs_hold_whole_samples_so_that_each_rank_gets_its_own(name: str) -> None:
    outputs = [layer.output for layer in traced(name).layers.layers if isinstance(layer.op, ops.Output)]
    assert outputs
    assert [spec for spec in outputs if spec.shape and spec.sample_dim is None] == []


@EVERY
def test_every_used_parameter_is_in_a_layer_under_the_name_of_the_user(name: str) -> None:
    network = NETWORKS[name]
    module = network.module()
    inputs, keywords = network.example(network.batches[0])
    observe(module, inputs, keywords)
    used = {path for path, parameter in module.named_parameters() if parameter.grad is not None}
    found = {parameter.name for layer in traced(name).layers.layers for parameter in layer.params}
    assert used <= found <= state_of(module).keys()


@EVERY
def test_tracing_again_gives_the_same_layers(name: str) -> None:
    module = NETWORKS[name].module()
    digests = {trace(name, m).layers.digest for m in (module, module, NETWORKS[name].module())}
    assert digests == {traced(name).layers.digest}


@EVERY
def test_tracing_neither_changes_the_module_nor_draws_random_numbers(name: str) -> None:
    module = NETWORKS[name].module(training=False)
    next(module.children(), module).train()  # a mixture, as in fine-tuning
    modes = [part.training for part in module.modules()]
    before = {path: tensor.clone() for path, tensor in state_of(module).items()}
    random = torch.get_rng_state()
    trace(name, module)
    after = state_of(module)
    assert [part.training for part in module.modules()] == modes
    assert before.keys() == after.keys()
    assert all(torch.equal(before[path], after[path]) and after[path].grad is None for path in before)
    assert torch.equal(torch.get_rng_state(), random)


def test_a_thousand_layers_are_traced() -> None:
    """Recursion and quadratic passes over the graph would show here."""
    module, x = Deep(500), torch.randn(2, 3, 8, 8)
    found = trace_layers(module, (x,))
    convolutions = [layer.id for layer in found.layers.layers if layer.op.kind == "conv"]
    assert len(convolutions) == 1001
    assert convolutions[-1] == "blocks.499.1"
