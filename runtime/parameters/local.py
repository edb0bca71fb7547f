"""Parameters and buffers, cut as the plan says."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import nn

from planner.errors import MismatchError
from planner.frontend.parameters import parameter_names
from planner.ir.canonical import sha256_of
from planner.ir.graph import Layer
from planner.ir.layout import BALANCED, Layout, Whole
from planner.ir.mesh import Mesh
from planner.ir.region import Region
from planner.ir.rules import LayerLayouts
from planner.ir.split import LayerId
from runtime.comm.communicator import Axes, Communicator, group_size


@dataclass(frozen=True)
class Held:
    """What the ranks store of one parameter or buffer.

    Attributes:
        name: the user's; tied parameters have one entry for each of their names, with the first of them here.
        layout: of the whole tensor, as the plan cuts it.
        regions: what the rank at each mesh position stores, in coordinates of the whole tensor. Those of the layout,
            unless it is cut further (parameter sharding); such a piece may be empty.
        position: of this rank in the mesh.
    """

    name: str
    layout: Layout
    regions: tuple[Region, ...]
    position: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole tensor."""
        return self.layout.shape

    @property
    def region(self) -> Region:
        """What this rank stores."""
        return self.regions[self.position]

    @functools.cached_property
    def holders(self) -> tuple[int, ...]:
        """The mesh positions of the ranks that store what this rank stores, itself included."""
        return tuple(position for position, region in enumerate(self.regions) if region == self.region)


def local_piece(tensor: torch.Tensor, layout: Layout, position: int) -> torch.Tensor:
    """Return this rank's piece of a whole tensor: the tensor itself where it is not cut, else a copy."""
    region = layout.region(position)
    if region.shape == tuple(tensor.shape):
        return tensor.detach()
    part = tuple(slice(a, b) for a, b in zip(region.start, region.stop, strict=True))
    return tensor.detach()[part].clone()  # in the memory format of the whole


def local_parameter(parameter: nn.Parameter, layout: Layout, position: int) -> nn.Parameter:
    """Return this rank's piece of a parameter: the parameter itself where it is not cut."""
    piece = local_piece(parameter, layout, position)
    if piece.shape == parameter.shape:
        return parameter
    return nn.Parameter(piece, parameter.requires_grad)


def refuse_differing_models(module: nn.Module, communicator: Communicator) -> None:
    """Check that all ranks have built the same model: names, shapes, element types, memory formats, modes.

    Raises:
        MismatchError: on every rank, with the ranks that differ from the first.
    """
    found = communicator.start_gather_ints(int(model_digest(module)[:15], 16))()
    if others := [r for r, d in zip(communicator.mesh.ranks, found, strict=True) if d != found[0]]:
        raise MismatchError(
            f"ranks {others} have another model than rank {communicator.mesh.ranks[0]}: {ANOTHER_MODEL}"
        )


ANOTHER_MODEL: Final = (
    "names, shapes, element types, memory formats (channels_last) or requires_grad of its parameters and buffers, or "
    "which of its modules train, differ. Build and convert the model in the same way on all ranks."
)


def model_digest(module: nn.Module) -> str:
    """Return a hash of all that ranks must have in common of a model: tensors but for their values, and modes.

    A batch norm in evaluation takes no statistics, which ranks where it trains would wait for.
    """

    def described(tensor: torch.Tensor) -> list[object]:
        order = sorted((d for d in range(tensor.dim()) if tensor.shape[d] > 1), key=tensor.stride, reverse=True)
        return [list(tensor.shape), str(tensor.dtype), order, tensor.requires_grad]

    listed = [[name, *described(t)] for name, t in tensors_of(module).items()]
    listed += [[name, each.training] for name, each in module.named_modules()]
    return sha256_of([[str(each) for each in one] for one in listed])


def broadcast_state(module: nn.Module, communicator: Communicator) -> None:
    """Overwrite all parameters and buffers with those of mesh position 0, as DistributedDataParallel does."""
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            if tensor.is_contiguous():
                communicator.broadcast(tensor.detach())
            else:
                dense = tensor.detach().contiguous()
                communicator.broadcast(dense)
                tensor.copy_(dense)


class LocalParameters:
    """One rank's pieces of a model's parameters, and what is to be done with their gradients.

    Attributes:
        gradient_scale: by which every gradient inside the network is larger than that of the mean loss.
        synchronised: by identity of a local parameter: name, parameter and the axes to reduce over.
        replicas: by identity of a local parameter, how many ranks hold the same piece.
        pieces: local parameters by identity of the whole ones; tied layers share one piece.
        factors: by name, by which a parameter's gradient is multiplied.
        cut: by name, the layout of every parameter and buffer that a layer reads.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        layouts: Mapping[LayerId, LayerLayouts],
        mesh: Mesh,
        position: int,
    ) -> None:
        self._names = parameter_names(model)
        self._layers, self._layouts, self._mesh, self._position = layers, layouts, mesh, position
        self.pieces: dict[int, nn.Parameter] = {}
        self.synchronised: dict[int, tuple[str, nn.Parameter, Axes]] = {}
        self.replicas: dict[int, int] = {}
        self.factors: dict[str, float] = {}
        self.cut: dict[str, Layout] = {}
        self.gradient_scale = self.best_gradient_scale()

    def name_of(self, tensor: torch.Tensor) -> str | None:
        """Return the name of a parameter or buffer of the model."""
        return self._names.get(id(tensor))

    def best_gradient_scale(self) -> float:
        """Return the factor on all gradients that spares most parameters a multiplication of their own.

        The gradient of a parameter that g ranks hold has to arrive g times too large (see
        ``Reducer``). With gradients g times too large from the loss on, nothing is left to do for
        it, and every other parameter pays one pass over its gradient.
        """
        num_bytes: dict[float, int] = {1.0: 0}
        for layer in self._layers:
            for parameter, layout in zip(layer.params, self._layouts[layer.id].params, strict=True):
                if parameter.trainable:
                    g = float(group_size(self._mesh, layout.axes_with(Whole.SHARED)))
                    num_bytes[g] = num_bytes.get(g, 0) + layout.region(0).volume
        return max(sorted(num_bytes), key=num_bytes.__getitem__)

    def local(self, layer: Layer, tensor: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Return the local piece of a parameter or buffer and the factor for its gradient."""
        name = self._names[id(tensor)]
        index = next(i for i, p in enumerate(layer.params) if p.name == name)
        layout: Layout = self._layouts[layer.id].params[index]
        layout = self.cut.setdefault(name, layout)
        if not isinstance(tensor, nn.Parameter):
            return local_piece(tensor, layout, self._position), 1.0
        axes = layout.axes_with(Whole.SHARED)
        piece = self.pieces.setdefault(id(tensor), local_parameter(tensor, layout, self._position))
        self.replicas[id(piece)] = group_size(self._mesh, layout.axes_with(Whole.SHARED, Whole.EQUAL))
        if axes and not layout.is_idle(self._position):  # frozen ones too: they may be thawed
            self.synchronised[id(piece)] = (name, piece, axes)
        factor = group_size(self._mesh, axes) / self.gradient_scale
        self.factors[name] = factor
        return piece, factor


def held(model: nn.Module, local: nn.Module, cut: Mapping[str, Layout], mesh: Mesh, position: int) -> dict[str, Held]:
    """Return what the ranks store of every parameter and buffer of a model, by every name that it has.

    Args:
        model: the user's, with whole tensors.
        local: this rank's version of it, under the same names.
        cut: by name, the layouts of what is not whole on every rank.
        mesh: the ranks.
        position: of this rank.
    """
    names = parameter_names(model)
    found = {}
    for name, tensor in tensors_of(model).items():
        first, shape = names[id(tensor)], tuple(tensor.shape)
        whole = Layout(shape, mesh, (Whole.EQUAL,) * len(mesh.axes), (BALANCED,) * len(shape))
        layout = cut.get(first, whole)
        found[name] = Held(first, layout, tuple(layout.region(p) for p in range(mesh.size)), position)
    return {name: found[name] for name in tensors_of(local) if name in found}


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers of a module by every name that they have."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return {**parameters, **dict(module.named_buffers(remove_duplicate=False))}
