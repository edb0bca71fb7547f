"""The state of a ``torch.optim`` optimizer in pieces: by the names of parameters, cut as the parameters."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

from planner.errors import MismatchError, UsageError
from planner.ir.region import Region
from runtime.checkpoint.whole import Part, Piece, whole_tensor
from runtime.parameters.local import Held

OPTIONS_OF_THE_MACHINE: Final = {"foreach", "fused", "capturable", "differentiable"}
"""Options of a parameter group that say how a step is computed; they stay as they are when a state is loaded."""

State = dict[str, dict[str, Any]]
"""By the name of a parameter and of a state."""


@dataclass(frozen=True)
class OptimizerPart:
    """What one rank has of an optimizer.

    Attributes:
        kind: the class.
        groups: of every parameter group, ``names`` of its parameters and ``options``.
        tensors: of the state, by the names of parameter and state.
        numbers: what is no tensor, likewise.
    """

    kind: str
    groups: list[dict[str, Any]]
    tensors: dict[tuple[str, str], Piece]
    numbers: State

    @staticmethod
    def of(part: Part, optimizer: torch.optim.Optimizer) -> "OptimizerPart":
        """Return this rank's part.

        Raises:
            UsageError: the optimizer has other parameters than the model, or a state that cannot be cut as they are.
        """
        names = parameter_names(part, optimizer)
        tensors: dict[tuple[str, str], Piece] = {}
        numbers: State = {}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = names[id(parameter)]
                for key, value in optimizer.state.get(parameter, {}).items():
                    if isinstance(value, torch.Tensor):
                        tensors[name, key] = _slot(part.held[name], key, value)
                    elif value is None or isinstance(value, bool | int | float | str):
                        numbers.setdefault(name, {})[key] = value
                    else:
                        raise UsageError(
                            f"{type(optimizer).__name__} keeps a {type(value).__name__} as {key!r} of {name!r}: only "
                            "tensors and numbers of a parameter can be saved in pieces"
                        )
        groups = [
            {
                "names": [names[id(p)] for p in group["params"]],
                "options": {k: v for k, v in group.items() if k not in {"params", "param_names"}},
            }
            for group in optimizer.param_groups
        ]
        return OptimizerPart(type(optimizer).__name__, groups, tensors, numbers)

    def complete(self, part: Part) -> "OptimizerPart":
        """Return what all ranks have, where stages hold different parameters; all ranks must call it then.

        Groups of equal number and options are one. Tensors of other stages are empty here.
        """
        if part.elsewhere is None or part.mesh.size == 1:
            return self
        merged: list[dict[str, Any]] = []
        numbers: State = {}
        for groups, theirs in part.everyones((self.groups, self.numbers)):
            numbers.update(theirs)
            for number, group in enumerate(groups):
                alike = [g for g in merged if g["number"] == number and _equal(g["options"], group["options"])]
                same = alike[0] if alike else None
                if same is None:
                    merged.append({**group, "number": number, "names": list(group["names"])})
                else:
                    same["names"] += [name for name in group["names"] if name not in same["names"]]
        merged.sort(key=lambda group: group["number"])
        groups = [{"names": group["names"], "options": group["options"]} for group in merged]
        tensors = part.complete({(name, key): piece for (name, key), piece in self.tensors.items()})
        return OptimizerPart(self.kind, groups, {(name, key): piece for (name, key), piece in tensors.items()}, numbers)


def of_all_ranks(part: Part, mine: OptimizerPart | None) -> OptimizerPart | None:
    """Return what all ranks have of an optimizer, None where nobody has one; all ranks must call it.

    Ranks whose stages have no parameters have no optimizer.
    """
    if part.elsewhere is not None and part.mesh.size > 1:
        kinds = [kind for kind in part.everyones(None if mine is None else mine.kind) if kind is not None]
        if mine is None and kinds:
            mine = OptimizerPart(kinds[0], [], {}, {})
    return None if mine is None else mine.complete(part)


def parameter_names(part: Part, optimizer: torch.optim.Optimizer) -> dict[int, str]:
    """Return the names of an optimizer's parameters, by identity.

    Raises:
        UsageError: one is not of the model.
    """
    names = {id(tensor): name for name, tensor in part.tensors.items()}
    for index, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if id(parameter) not in names:
                raise UsageError(
                    f"group {index} of the optimizer has a parameter of shape {tuple(parameter.shape)} that is not of "
                    "the given module: make the optimizer of the parallel module's parameters()"
                )
    return names


def _slot(place: Held, key: str, value: torch.Tensor) -> Piece:
    """Return how the ranks store a tensor of a parameter's state."""
    shape = tuple(value.shape)
    if shape == place.region.shape:
        return Piece(value, place.shape, place.regions, place.position)
    if shape and any(region.shape != place.shape for region in place.regions):
        raise UsageError(
            f"state {key!r} of {place.name!r} has shape {shape}, and the ranks hold pieces of the parameter "
            f"({place.region.shape} here): it cannot be cut as the parameter is"
        )
    whole = Region((0,) * len(shape), shape)
    return Piece(value, shape, (whole,) * len(place.regions), place.position)


def target(place: Held, parameter: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, key: str) -> Piece:
    """Return memory for this rank's piece of a stored state.

    Args:
        place: of the parameter.
        parameter: this rank's piece of it.
        shape: of the stored state.
        dtype: likewise.
        key: its name.

    Raises:
        MismatchError: it can neither be cut as the parameter nor taken whole.
    """
    if shape == place.shape:
        fresh = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
        return Piece(fresh, shape, place.regions, place.position)
    if shape and place.region.shape != place.shape:
        raise MismatchError(f"state {key!r} of {place.name!r} has shape {shape} and cannot be cut as the parameter is")
    whole = Region((0,) * len(shape), shape)
    return Piece(torch.empty(shape, dtype=dtype), shape, (whole,) * len(place.regions), place.position)


def of_this_rank(part: Part, saved: Any) -> list[dict[str, Any]]:
    """Return saved groups without the parameters that only ranks of other stages have."""
    elsewhere = part.elsewhere or {}
    return [{**group, "names": [name for name in group["names"] if name not in elsewhere]} for group in saved]


def matched(optimizer: torch.optim.Optimizer, names: Mapping[int, str], kind: str, saved: Any) -> list[dict[str, Any]]:
    """Return the saved options of every parameter group, found by the names of its parameters.

    Args:
        optimizer: that gets them.
        names: of its parameters, by identity.
        kind: the class that was saved.
        saved: its groups, as of ``OptimizerPart``.

    Raises:
        MismatchError: it is another optimizer, has other parameters, or groups them otherwise.
    """
    if kind != type(optimizer).__name__:
        raise MismatchError(f"the state is of {kind}, the optimizer is {type(optimizer).__name__}")
    of: dict[str, int] = {name: index for index, group in enumerate(saved) for name in group["names"]}
    mine = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    here = {name for group in mine for name in group}
    problems = [f"{name} has no state there" for name in sorted(here - set(of))]
    problems += [f"{name} is not in the optimizer" for name in sorted(set(of) - here)]
    if problems:
        raise MismatchError("the saved state is of other parameters:" + "".join(f"\n  {p}" for p in problems[:20]))
    found = []
    for index, (group, members) in enumerate(zip(optimizer.param_groups, mine, strict=True)):
        sources = sorted({of[name] for name in members})
        options = [saved[source]["options"] for source in sources]
        if any(not _equal(other, options[0]) for other in options[1:]):
            raise MismatchError(
                f"group {index} of the optimizer has parameters of the saved groups {sources}, whose options differ; "
                "group the parameters as when it was saved"
            )
        own = {k: v for k, v in group.items() if k not in {"params", "param_names"}}
        kept = {k: v for k, v in own.items() if k in OPTIONS_OF_THE_MACHINE}
        found.append({**own, **(options[0] if options else {}), **kept})
    return found


def _equal(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return a.keys() == b.keys() and all(bool(torch.as_tensor(a[k] == b[k]).all()) for k in a)


def restore(
    optimizer: torch.optim.Optimizer, names: Mapping[int, str], state: State, options: Iterable[Mapping[str, Any]]
) -> None:
    """Give an optimizer a state of this rank's pieces and options of its groups, as ``load_state_dict`` does."""
    indices: dict[int, int] = {}
    groups = []
    for group, chosen in zip(optimizer.param_groups, options, strict=True):
        for parameter in group["params"]:
            indices[id(parameter)] = len(indices)
        groups.append({**chosen, "params": [indices[id(p)] for p in group["params"]]})
    by_index = {index: state[names[i]] for i, index in indices.items() if names[i] in state}
    optimizer.load_state_dict({"state": by_index, "param_groups": groups})


def full_optimizer_state_dict(
    net: nn.Module, optimizer: torch.optim.Optimizer, *, everywhere: bool = False
) -> dict[str, Any]:
    """Return the state of an optimizer with whole tensors, by the names of the parameters.

    Its form is that of ``torch.distributed.checkpoint.state_dict.get_optimizer_state_dict``, whose counterpart
    ``set_optimizer_state_dict`` takes it for the model that was parallelized and an optimizer of it. (The numbers of
    ``Optimizer.state_dict`` would be wrong there: parameters may have another order.) Every rank must call it.

    Args:
        net: of ``parallelize``.
        optimizer: of its parameters.
        everywhere: on every rank; else on the first rank only, and the others get an empty dict.

    Raises:
        UsageError: as of ``OptimizerPart.of``.
    """
    part = Part.of(net)
    mine = OptimizerPart.of(part, optimizer).complete(part)
    state: State = {name: dict(numbers) for name, numbers in mine.numbers.items()}
    for name, key in sorted(mine.tensors):  # one order on all ranks
        whole = whole_tensor(mine.tensors[name, key], part, everywhere=everywhere)
        if whole is not None:
            state.setdefault(name, {})[key] = whole
    if part.position and not everywhere:
        return {}
    return {"state": state, "param_groups": [{**g["options"], "params": g["names"]} for g in mine.groups]}


def load_full_optimizer(net: nn.Module, optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Give an optimizer of a parallel module its pieces of a state with whole tensors.

    Args:
        net: of ``parallelize``.
        optimizer: of its parameters.
        state_dict: as of ``full_optimizer_state_dict``; the same on every rank.

    Raises:
        MismatchError: the state is of other parameters, or groups them otherwise; nothing was changed.
        UsageError: the optimizer has parameters that are not of the module.
    """
    part = Part.of(net)
    names = parameter_names(part, optimizer)
    saved = [
        {"names": g["params"], "options": {k: v for k, v in g.items() if k not in {"params", "param_names"}}}
        for g in state_dict["param_groups"]
    ]
    options = matched(optimizer, names, type(optimizer).__name__, of_this_rank(part, saved))
    state: State = {}
    for name, values in state_dict["state"].items():
        if name in (part.elsewhere or ()):
            continue
        place = part.held[name]
        frame = Region((0,) * len(place.shape), place.shape)
        for key, value in values.items():
            piece = value
            if isinstance(value, torch.Tensor):
                slot = target(place, part.tensors[name], tuple(value.shape), value.dtype, key)
                cut = value[place.region.slices_in(frame)] if tuple(value.shape) == place.shape else value
                piece = slot.tensor.copy_(cut)
            state.setdefault(name, {})[key] = piece
    restore(optimizer, names, state, options)
