"""Random networks under random legal plans against one device: outputs, all gradients, weights, buffers, in float64."""

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from planner.api import Options, Origin, Planner, machine_of, prepare
from planner.frontend.lower import TracedModel
from planner.ir.dimension import Dimension
from planner.ir.graph import is_pinned, tied_layers
from planner.ir.mesh import Mesh
from planner.ir.recompute import all_recomputing
from planner.ir.rules import InputOutput, is_io_legal, is_legal
from planner.ir.split import LayerId, Split
from planner.plan import Plan
from runtime.data import own_samples
from runtime.launch import Process
from runtime.parallel import ParallelModule, parallelize, trace_for
from support.equality import STEPS, own_parts, relative, run_ranks
from support.plans import document
from support.random_networks import Network, Recipe, build, data, loss_of

Pick = Callable[[int], int]
"""Returns a random number below the given one."""

DIMENSIONS = frozenset(Dimension) - {Dimension.BROADCAST}
TOLERANCE = 1e-8
"""Relative to the largest value of a tensor, and of all tensors of its kind by ``FLOOR``."""
FLOOR = 1e-3
"""A batch norm of what hardly varies multiplies rounding by 1 / sqrt(eps), 300: behind two softmax by 3e-13 of all."""
SMALLEST = 1e-5
"""What is smaller is rounding noise: behind a norm of one channel every gradient is zero."""


@dataclass(frozen=True)
class Reference:
    """What one device computes in some steps: outputs, losses and input gradients of each, and what is left.

    ``gradients`` are those of the last step, ``state`` are parameters and buffers behind it.
    """

    outputs: list[torch.Tensor]
    losses: list[float]
    input_gradients: list[torch.Tensor]
    gradients: dict[str, torch.Tensor]
    state: dict[str, torch.Tensor]


def train(net: torch.nn.Module, recipe: Recipe, x: torch.Tensor, target: torch.Tensor) -> Reference:
    """Train for some steps of SGD with momentum."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    outputs, losses, input_gradients = [], [], []
    for _ in range(STEPS):
        optimizer.zero_grad()
        given = x.clone().requires_grad_()
        passed = given.clone()  # a network may begin with a write in place
        output = net(passed, target) if recipe.inside else net(passed)
        loss = output if recipe.inside else loss_of(recipe, output, target)
        loss.backward()
        optimizer.step()
        outputs.append(output.detach())
        losses.append(float(loss.detach()))
        assert given.grad is not None
        input_gradients.append(given.grad)
    state = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    gradients = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
    return Reference(outputs, losses, input_gradients, gradients, {n: t.detach() for n, t in state.items()})


def reference(recipe: Recipe) -> Reference:
    """Train on one device."""
    return train(build(recipe), recipe, *data(recipe))


def is_steady(recipe: Recipe) -> bool:
    """Return whether rounding of the input leaves one device's outputs and input gradients as they are.

    Maxima of equal values do not: which of them gets the gradient hangs on the last bit.
    """
    x, target = data(recipe)
    noise = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(0))
    one, other = (train(build(recipe), recipe, each, target) for each in (x, x * (1 + 1e-15 * noise)))
    pairs = zip([*one.outputs, *one.input_gradients], [*other.outputs, *other.input_gradients], strict=True)
    return all(relative(a, b, max(float(b.abs().max()), SMALLEST)) < TOLERANCE for a, b in pairs)


def planner_for(recipe: Recipe, num_ranks: int, io: Literal["global"] | None = None) -> Planner:
    """Return the planner of a network on equal devices; every dimension may be split."""
    net: Network = build(recipe)
    x, target = data(recipe)
    inputs = (x, target) if recipe.inside else (x,)
    options = Options(dimensions=DIMENSIONS, all_devices=True, io=io)
    return prepare(net, inputs, machine_of(devices=num_ranks), options, Origin("random", "random"))


def random_plan(planner: Planner, pick: Pick) -> Plan:
    """Return a plan with a random legal split for every layer, on a random candidate mesh; nothing is priced.

    Splits without idle ranks are preferred, so that little is merely replicated. The first options are the plainest.
    """
    meshes = planner.meshes()
    mesh = meshes[pick(len(meshes))]
    space, graph = planner.space(mesh), planner.traced.layers
    chosen: list[Split] = []
    for i, (layer, leader) in enumerate(zip(graph.layers, space.leaders, strict=True)):
        if leader != i:
            chosen.append(chosen[leader])
            continue
        options = sorted(space.splits[layer.id], key=lambda s: s.dimensions.count(Dimension.REPLICATE), reverse=True)
        busy = [s for s in options if Dimension.REPLICATE not in s.dimensions]
        options = busy if busy and pick(4) else options
        chosen.append(options[pick(len(options))])
    return plan_with(planner, mesh, space.io, dict(zip((x.id for x in graph.layers), chosen, strict=True)), pick)


def unequal_plan(planner: Planner, pick: Pick) -> Plan:
    """Return ``random_plan`` where many layers have shares, and many run on one coordinate of an axis."""
    plan = random_plan(planner, pick)
    mesh, graph, io = plan.mesh, planner.traced.layers, InputOutput(plan.io)
    strategy, leaders = dict(plan.strategy), tied_layers(planner.traced.layers)
    ends = {axis.name: tuple(1 + pick(3) for _ in range(axis.size)) for axis in mesh.axes if pick(3)}
    for i, layer in enumerate(graph.layers):
        split = strategy[layer.id]
        if leaders[i] != i:
            strategy[layer.id] = strategy[graph.layers[leaders[i]].id]
        elif is_pinned(layer.op):
            wanted = split.with_shares(ends)
            strategy[layer.id] = wanted if is_io_legal(layer, mesh, io, wanted) else split
        else:
            members = [graph.layers[k] for k, leader in enumerate(leaders) if leader == i]
            for wanted in (_unequal(split, mesh, pick), _unequal(split, mesh, pick)):
                if all(is_legal(each, graph, mesh, wanted) for each in members):
                    strategy[layer.id] = wanted
                    break
    return plan_with(planner, mesh, io, strategy, pick)


def _unequal(split: Split, mesh: Mesh, pick: Pick) -> Split:
    """Return a split with random shares; an axis may come to hold the layer on one coordinate."""
    axes, shares = [], {}
    for axis, (name, dimension) in zip(mesh.axes, split.axes, strict=True):
        if not pick(3):
            holder = pick(axis.size)
            shares[name] = tuple(int(c == holder) for c in range(axis.size))
            axes.append((name, Dimension.REPLICATE))
        else:
            axes.append((name, dimension))
            if dimension is not Dimension.REPLICATE and pick(4):
                shares[name] = tuple(1 + pick(3) for _ in range(axis.size))
    return Split(tuple(axes), tuple(shares.items()))


def plan_with(planner: Planner, mesh: Mesh, io: InputOutput, strategy: Mapping[LayerId, Split], pick: Pick) -> Plan:
    """Return the plan of a strategy, with made-up figures."""
    graph = planner.traced.layers
    found = document()
    cost = found["stages"][0]["layers"][0]["cost"]
    layers = [
        {
            "id": x.id,
            "op": x.op.kind,
            "split": dict(strategy[x.id].axes),
            "shares": {axis: list(own) for axis, own in strategy[x.id].shares},
            "cost": cost,
            "memory_bytes": 1,
            "overlap": x.op.kind == "conv" and pick(2) == 1,
        }
        for x in graph.layers
    ]
    inputs = [
        {"name": layer.id, "shape": list(layer.output.shape), "dtype": layer.output.dtype, "keyword": False}
        for layer in graph.layers
        if layer.op.kind == "input"
    ]
    found["model"] |= {"name": graph.name, "graph_sha256": graph.digest, "inputs": inputs}
    axes = [{"name": a.name, "size": a.size} for a in mesh.axes]
    found["stages"] = [{"mesh": {"axes": axes, "ranks": list(range(mesh.size))}, "layers": layers}]
    found |= {"batch": graph.batch, "io": io.value, "bucket_bytes": (2**20, 64, 4096)[pick(3)]}
    found["cluster"]["num_devices"] = mesh.size
    able = sorted(all_recomputing(graph, mesh, strategy))
    return Plan.from_json(json.dumps(found)).with_recomputing({layer for layer in able if pick(2) == 1})


def differences(
    net: ParallelModule, traced: TracedModel, position: int, found: Reference, expected: Reference
) -> Iterator[tuple[str, float]]:
    """Yield by how much a rank's tensors differ from one device's, by name."""
    part = own_samples(net.plan, net.plan.mesh.ranks[position])
    for k, (mine, whole) in enumerate(zip(found.outputs, expected.outputs, strict=True)):
        yield f"output {k}", relative(mine, whole[part] if whole.dim() else whole, _scale(whole, expected.outputs))
    for k, (mine, whole) in enumerate(zip(found.input_gradients, expected.input_gradients, strict=True)):
        share = len(whole[part]) / len(whole)  # the rank's gradient is that of its own mean, as under DDP
        yield f"input gradient {k}", relative(mine * share, whole[part], _scale(whole, expected.input_gradients))
    parts = own_parts(net.plan, traced, position)
    for kind, mine_of, wholes in (
        ("gradient of", found.gradients, expected.gradients), ("updated", found.state, expected.state),
    ):  # fmt: skip
        assert set(mine_of) == set(wholes), set(mine_of) ^ set(wholes)
        for name, whole in wholes.items():
            own = whole[parts[name]] if name in parts else whole
            scale = _scale(whole, list(wholes.values()))
            yield f"{kind} {name}", relative(mine_of[name], own, scale) if own.numel() else float(mine_of[name].numel())


def _scale(whole: torch.Tensor, all_of_a_kind: list[torch.Tensor]) -> float:
    largest = max(float(t.abs().max()) for t in all_of_a_kind if t.is_floating_point())
    return max(float(whole.abs().max()), FLOOR * largest, SMALLEST)


def check_rank(
    net: ParallelModule, traced: TracedModel, position: int, recipe: Recipe, expected: Reference
) -> dict[str, float]:
    """Train this rank's part; return every difference above the tolerance."""
    x, target = data(recipe)
    part = own_samples(net.plan, net.plan.mesh.ranks[position])
    found = train(net, recipe, x[part], target[part])
    each = differences(net, traced, position, found, expected)
    return {name: value for name, value in each if not value < TOLERANCE}


def on_threads(recipe: Recipe, plan: Plan, expected: Reference) -> list[str]:
    """Run a plan with ranks as threads; return what differs."""

    def work(net: ParallelModule, traced: TracedModel, position: int) -> dict[str, float]:
        return check_rank(net, traced, position, recipe, expected)

    found = run_ranks(functools.partial(build, recipe), plan, work)
    return [f"rank {r}, {name}: {value:.1e}" for r, each in enumerate(found) for name, value in each.items()]


def on_process(argument: dict[str, Any], process: Process) -> list[dict[str, float]]:
    """Return, for each case, what differs on this rank; cases are texts of recipes and plans."""
    torch.set_num_threads(1)
    found = []
    for case in argument["cases"]:
        recipe, plan = Recipe.from_json(case["recipe"]), Plan.from_json(case["plan"])
        model = build(recipe)
        traced = trace_for(model, plan)
        net = parallelize(model, plan)
        position = plan.mesh.ranks.index(process.rank)
        found.append(check_rank(net, traced, position, recipe, reference(recipe)))
    return found
