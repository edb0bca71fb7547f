"""Where the parameters of a plan lie, in the words of torch's DTensor, for those who go on with torch's own tools.

A mesh maps one to one to a ``DeviceMesh``; an axis that cuts dimension d of a tensor is ``Shard(d)``, any other one
``Replicate()``. ``runtime.dtensors`` applies the file.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from planner.ir.canonical import StrictModel, decode, read_bytes, write_atomically
from planner.ir.graph import LayerGraph
from planner.ir.layout import CHUNK, Layout, Whole
from planner.ir.rules import layouts
from planner.plan.check import refuse_other_model
from planner.plan.schema import Plan, StagePart
from planner.plan.stages import graphs_of

REPLICATE = "Replicate()"
Size = Annotated[int, Field(ge=0)]


class TensorPlacement(StrictModel):
    """A parameter or buffer.

    Attributes:
        shape: of the whole tensor.
        trainable: it has a gradient; buffers have none.
        placements: for every mesh dimension ``Shard(d)`` or ``Replicate()``; None where these words have none that
            gives every rank what the plan gives it.
        why_not: then why.
        local_shape: of the largest piece.
    """

    shape: list[Size]
    trainable: bool
    placements: list[Annotated[str, Field(pattern=r"^(Shard\(\d+\)|Replicate\(\))$")]] | None
    why_not: str = ""
    local_shape: list[Size]


class StagePlacements(StrictModel):
    """A stage: arguments of ``DeviceMesh``, and its parameters and buffers by their names in the model.

    Attributes:
        mesh_dim_names: of the mesh, outermost first.
        mesh_shape: its sizes.
        mesh_ranks: row-major.
        parameter_sharding: of the plan; it cuts further what is replicated, which is not in the placements.
        tensors: those that layers read. A model's other ones are whole on every rank.
    """

    mesh_dim_names: list[str]
    mesh_shape: list[Annotated[int, Field(ge=1)]]
    mesh_ranks: list[Size]
    parameter_sharding: Literal["none", "optimizer", "full"]
    tensors: dict[str, TensorPlacement]


class Placements(StrictModel):
    """The file of ``layerwise export --format dtensor``; several stages where the plan is a pipeline."""

    format: Literal["layerwise-dtensor"] = "layerwise-dtensor"
    schema_version: Literal[1] = 1
    model: str
    plan_sha256: str
    stages: Annotated[list[StagePlacements], Field(min_length=1)]

    @staticmethod
    def load(path: str | Path) -> "Placements":
        """Read a file.

        Raises:
            UsageError: no such file.
            FormatError: every problem with its JSON path.
        """
        return decode(Placements, read_bytes(Path(path), "placements"), f"placements {path}")

    def to_json(self) -> str:
        """Return the file's text."""
        return self.model_dump_json(indent=2) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the file; an existing one is replaced in one step."""
        write_atomically(Path(path), self.to_json())

    @property
    def missing(self) -> dict[str, str]:
        """The parameters and buffers without placements, and why."""
        return {
            name: tensor.why_not
            for stage in self.stages
            for name, tensor in stage.tensors.items()
            if tensor.placements is None
        }


def placements_of(plan: Plan, graph: LayerGraph) -> Placements:
    """Return where the parameters of a plan lie.

    Args:
        plan: of one stage, or a pipeline.
        graph: of its model; of a pipeline, for ``planner.plan.stages.microbatch_inputs``.

    Raises:
        MismatchError: the plan is for another model.
    """
    if plan.is_pipelined:
        graphs = graphs_of(plan, graph)
    else:
        refuse_other_model(plan, graph)
        graphs = (graph,)
    stages = [_stage(stage, own) for stage, own in zip(plan.stages, graphs, strict=True)]
    return Placements(model=plan.model.name, plan_sha256=plan.digest, stages=stages)


def parameter_layouts(stage: StagePart, graph: LayerGraph) -> dict[str, Layout]:
    """Return which rank of a stage holds what of every parameter and buffer that its layers read."""
    mesh, strategy = stage.mesh.mesh(), stage.strategy()
    found: dict[str, Layout] = {}
    for layer in graph.layers:
        own = layouts(layer, graph.inputs_of(layer), mesh, strategy[layer.id])
        found.update((parameter.name, layout) for parameter, layout in zip(layer.params, own.params, strict=True))
    return found


def _stage(stage: StagePart, graph: LayerGraph) -> StagePlacements:
    mesh = stage.mesh
    trainable = {parameter.name: parameter.trainable for layer in graph.layers for parameter in layer.params}
    return StagePlacements(
        mesh_dim_names=[axis.name for axis in mesh.axes] or ["rank"],
        mesh_shape=[axis.size for axis in mesh.axes] or [1],
        mesh_ranks=mesh.ranks,
        parameter_sharding=stage.parameter_sharding,
        tensors={name: _tensor(layout, trainable[name]) for name, layout in parameter_layouts(stage, graph).items()},
    )


def _tensor(layout: Layout, trainable: bool) -> TensorPlacement:
    why_not = _why_not(layout)
    words = [REPLICATE if isinstance(each, Whole) else f"Shard({each})" for each in layout.placements]
    return TensorPlacement(
        shape=list(layout.shape), trainable=trainable, placements=None if why_not else words or [REPLICATE],
        why_not=why_not, local_shape=list(layout.largest_shape()),
    )  # fmt: skip


def _why_not(layout: Layout) -> str:
    """Return why DTensor's own pieces are others than the plan's; nothing where they are the same on every rank."""
    if any(own is not None and 0 in own for own in layout.shares):
        return "only some of the ranks hold it, because the others compute another branch"
    plain = Layout(layout.shape, layout.mesh, layout.placements, (CHUNK,) * len(layout.shape))
    if all(layout.region(position) == plain.region(position) for position in range(layout.mesh.size)):
        return ""
    if layout.shares:
        return "its pieces are in proportion to the speeds of the devices, and Shard cuts equal ones"
    return "its pieces are not those of torch.chunk, axis after axis, which Shard cuts"
