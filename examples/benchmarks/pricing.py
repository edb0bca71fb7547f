"""Seconds of planning, phase by phase, for a network on a shipped machine.

    python -m examples.benchmarks.pricing [--model resnet152] [--cluster 8x8-a100-ib400] [--mesh 8x8 --mesh 8x2x4]

``space`` lists the legal splits of every layer, ``layers`` and ``edges`` price them all, ``dp`` is one exact search by
elimination, ``step`` the mean of simulated steps of the plan it finds, as local search asks for them. Nothing is
measured on the machine that is planned for: layers are priced by its data sheet. What Python keeps from
mesh to mesh helps the later ones little, because their layouts differ.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from planner.api import Machine, Options, Origin, example_inputs, machine_of, prepare
from planner.cost.model import CostModel, Settings
from planner.cost.simulate import simulated_step_s
from planner.cost.table import CostTable, layer_numbers, price_edges, price_layers
from planner.errors import LayerwiseError, UsageError
from planner.frontend.source import load_model
from planner.ir.bucket import DEFAULT_BUCKET_BYTES
from planner.ir.graph import LayerGraph
from planner.ir.mesh import Mesh
from planner.ir.rules import default_io
from planner.search.elimination import solve_dp
from planner.search.formulate import formulate
from planner.space.enumerate import enumerate_splits

STEPS = 20
"""Simulated steps behind the mean."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Phases:
    """Seconds of each phase on one mesh, and how much there was to price."""

    mesh: str
    splits: int
    space_s: float
    layers_s: float
    edges_s: float
    dp_s: float
    step_s: float

    @property
    def pricing_s(self) -> float:
        """Space, layers and edges together."""
        return self.space_s + self.layers_s + self.edges_s


def measure(graph: LayerGraph, machine: Machine, mesh: Mesh) -> Phases:
    """Return the seconds of each phase on one mesh."""
    space, space_s = timed(lambda: enumerate_splits(graph, mesh, default_io(graph.batch, mesh.size)))
    model = CostModel.of(graph, machine.graph, mesh, machine.profile, Settings())
    numbers, numbers_s = timed(lambda: layer_numbers(space, model))
    layers, layers_s = timed(lambda: price_layers(space, model, numbers))
    edges, edges_s = timed(lambda: price_edges(space, model, numbers))
    table = CostTable(space, model, layers, edges)
    formulation, formulate_s = timed(lambda: formulate(table))
    solution, dp_s = timed(lambda: solve_dp(formulation.problem))
    choice = formulation.layer_choice(solution.choice) if solution.choice is not None else (0,) * len(layers)
    _, steps_s = timed(lambda: [simulated_step_s(table, choice, DEFAULT_BUCKET_BYTES) for _ in range(STEPS)])
    return Phases(
        "x".join(map(str, mesh.shape)), sum(map(len, space.splits.values())),
        space_s, numbers_s + layers_s, edges_s, formulate_s + dp_s, steps_s / STEPS,
    )  # fmt: skip


def timed(run: Callable[[], T]) -> tuple[T, float]:
    """Return a result and the seconds it took."""
    start = time.perf_counter()
    result = run()
    return result, time.perf_counter() - start


def main() -> None:
    """Measure, and print a row for each mesh."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet152", help="a name; networks of torchvision and timm need 'zoo'")
    parser.add_argument("--cluster", default="8x8-a100-ib400")
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--mesh", action="append", help="sizes of the axes, such as 8x2x4; may be repeated")
    arguments = parser.parse_args()
    machine = machine_of(arguments.cluster)
    model = load_model(arguments.model)
    inputs = example_inputs(model.input_shapes, arguments.batch)
    graph = prepare(model.module, inputs, machine, Options(), Origin(arguments.model)).traced.layers
    meshes = {"x".join(map(str, mesh.shape)): mesh for mesh in machine.graph.meshes()}
    print(
        f"{arguments.model} on {arguments.cluster}, {len(graph.layers)} layers, {sum(1 for _ in graph.edges())} edges"
    )
    print(f"{'mesh':<10}{'splits':>8}{'space':>8}{'layers':>8}{'edges':>8}{'pricing':>9}{'dp':>8}{'step':>10}")
    for name in arguments.mesh or ["8x8", "8x2x4"]:
        if name not in meshes:
            raise UsageError(f"{arguments.cluster} has no mesh {name}, only {', '.join(meshes)}")
        found = measure(graph, machine, meshes[name])
        print(
            f"{found.mesh:<10}{found.splits:>8}{found.space_s:>7.2f}s{found.layers_s:>7.2f}s{found.edges_s:>7.2f}s"
            f"{found.pricing_s:>8.2f}s{found.dp_s:>7.2f}s{found.step_s * 1e3:>8.2f}ms"
        )


if __name__ == "__main__":
    try:
        main()
    except LayerwiseError as error:
        sys.exit(f"error: {error}")
