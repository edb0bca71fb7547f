"""What a pipelined plan costs on a machine: the splits are given, and the stages are simulated again."""

from typing import TYPE_CHECKING

from planner.api.pipelines.pieces import Pieces
from planner.api.pipelines.search import Pipeline, Stage, pipeline_of
from planner.cost.stages import stage_times
from planner.errors import UsageError
from planner.ir.dimension import Dimension
from planner.ir.schedule import ScheduleKind
from planner.plan.schema import Plan
from planner.plan.stages import graphs_of

if TYPE_CHECKING:
    from planner.api.planning import Planner


def price_pipeline(plan: Plan, planner: "Planner") -> Pipeline:
    """Return a pipelined plan as a pipeline, simulated on the planner's machine.

    Args:
        plan: of several stages.
        planner: of the plan's model, for the whole batch, on the machine.

    Raises:
        UsageError: the machine has too few devices.
        MismatchError: the plan was made for another model.
    """
    pieces, machine = Pieces(planner), planner.machine
    if len(machine.graph.devices) < plan.num_ranks:
        raise UsageError(f"the plan needs {plan.num_ranks} devices, {machine.graph.name} has fewer")
    traced = pieces.traced(plan.schedule.num_microbatches)
    stages = []
    for part, graph in zip(plan.stages, graphs_of(plan, traced.layers), strict=True):
        mesh = pieces.mesh(part.mesh.ranks[0], len(part.mesh.ranks))
        if mesh is None or mesh.shape != tuple(axis.size for axis in part.mesh.axes):
            mesh = part.mesh.mesh()  # across the machine's levels, or dividing one: its links are what they are
        table = pieces.table(graph, mesh, frozenset(Dimension))
        given = part.strategy()
        strategy = {layer: type(split).of(mesh, split.dimensions) for layer, split in given.items()}
        try:
            choice = table.choice(strategy)
        except ValueError as error:
            raise UsageError(f"the plan cannot be priced here: {error}") from error
        times = stage_times(table, choice, plan.bucket_bytes, recompute=part.recompute)
        stages.append(Stage(table, choice, plan.bucket_bytes, times))
    positions = len({tuple(part.mesh.ranks) for part in plan.stages})
    kind, count = ScheduleKind(plan.schedule.kind), plan.schedule.num_microbatches
    return pipeline_of(stages, kind, count, positions, pieces, traced)
