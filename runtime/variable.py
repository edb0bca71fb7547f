"""`variable_batch`: one weird trick's turns, and linear layers that are updated in each of them [OWT14, Section 4]."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from planner.errors import MismatchError, UsageError
from planner.frontend.lower import TracedModel
from planner.frontend.parameters import parameter_names
from planner.frontend.stages import stage_models
from planner.ir.layout import Interval
from planner.ir.mesh import Mesh, MeshAxis
from planner.ir.stages import homes
from planner.ir.turns import Scheme, turns
from planner.plan.halves import Half, halves
from planner.plan.schema import Plan
from runtime.agreement import start_together
from runtime.amp import GradScaler
from runtime.comm.communicator import Communicator
from runtime.comm.groups import ProcessGroups
from runtime.comm.staging import communicator_of
from runtime.feed import REFUSED
from runtime.lowering.lower import communication_axes
from runtime.module import ParallelModule
from runtime.parallel import agree, lower_as, trace_for
from runtime.parameters.local import tensors_of
from runtime.pipeline.holding import HeldStages, whole_shapes
from runtime.turns import Arriving, Turns

LossFunction = Callable[..., torch.Tensor]


def variable_batch(
    model: nn.Module,
    plan: Plan,
    loss_fn: LossFunction,
    *,
    scheme: Scheme = "c",
    num_turns: int | None = None,
    first: str | None = None,
    timeout_s: float = 60.0,
) -> "VariableBatch":
    """Return this rank's part of a model whose linear layers work through each batch in turns.

    Every rank calls it with the same plan, such as ``conv-data-fc-model``, and passes its own samples to ``step``: the
    layers in front of the linear ones run once, on the whole batch; the linear ones turn by turn, while the samples of
    the next turn and the gradients of the last one travel. Parameters and buffers of rank 0 are broadcast first.

    Args:
        model: the planned network with its weights, on the device that this rank uses.
        plan: of one stage, without sharded parameters.
        loss_fn: from the output of the model, and the target where ``step`` gets one, to a scalar: the mean loss over
            the samples that it is given, those of a turn.
        scheme: who hands over which samples in which turn, see ``planner.ir.turns``.
        num_turns: of a batch: m / n for batches of m samples for the convolutions, n for the linear layers. The number
            of ranks unless given; 1 in scheme (a).
        first: layer with which the linear part begins; the first linear layer behind the last convolution unless given.
        timeout_s: after which a collective with a missing peer fails.

    Raises:
        UsageError: torch.distributed is not initialised, the plan is for another number of ranks or has several stages
            or sharded parameters, the scheme has no such number of turns, or the model has no such linear part.
        MismatchError: the plan was made for another model; or ranks have different plans, models or code.
        RunError: a rank did not come.
    """

    def check() -> tuple[int, Parts]:
        count = number_of_turns(plan, scheme, num_turns)
        return count, cut_in_two(trace_for(model, plan), plan, first)

    asked = f"variable_batch, scheme {scheme}, {num_turns} turns, from {first}"
    count, both = start_together(asked, model, plan, check)
    axes = set().union(*(communication_axes(part, half.plan) for part, half in both))
    inner = communicator_of(plan.mesh, ProcessGroups(plan.mesh, axes, timeout_s))
    flat = in_a_row(plan)
    outer = communicator_of(flat, ProcessGroups(flat, [(0,)] if flat.axes else [], timeout_s, user="turns"))
    return assembled(model, both, plan, (inner, outer), loss_fn, scheme, count)


def in_a_row(plan: Plan) -> Mesh:
    """Return all ranks of a plan on one axis."""
    count = plan.num_ranks
    return Mesh((MeshAxis("rank", count),) if count > 1 else (), tuple(range(count)))


def number_of_turns(plan: Plan, scheme: Scheme, num_turns: int | None) -> int:
    """Return the number of turns of a batch.

    Raises:
        UsageError: the scheme has no such number, or the plan cannot be run so.
    """
    if plan.only_stage.parameter_sharding != "none":
        raise UsageError("variable batch: parameters must be whole or split by the layers; plan without sharding")
    count = num_turns if num_turns is not None else (1 if scheme == "a" else plan.num_ranks)
    try:
        turns(scheme, (1,) * plan.num_ranks, count)
    except ValueError as error:
        raise UsageError(f"num_turns: {error}") from None
    return count


Parts = tuple[tuple[TracedModel, Half], tuple[TracedModel, Half]]


def cut_in_two(traced: TracedModel, plan: Plan, first: str | None) -> Parts:
    """Return the traced model and the plan of the layers in front of the linear ones, and of those."""
    front, back = halves(plan, traced.layers, first)
    refused = None
    if traced.evaluation is not None:
        refused = (
            "the model's code asks for its mode, and its two parts run what it does in training only. Evaluate the "
            "unparallelized model with the weights of a checkpoint (runtime.checkpoint.export)."
        )
    models = stage_models(replace(traced, evaluation=None), (front.layers, back.layers))
    one, two = (replace(part, evaluation=refused) for part in models)
    return (one, front), (two, back)


def assembled(
    model: nn.Module,
    parts: Parts,
    plan: Plan,
    communicators: tuple[Communicator, Communicator],
    loss_fn: LossFunction,
    scheme: Scheme,
    num_turns: int,
) -> "VariableBatch":
    """Return the module of the communicators' rank; every rank must call it.

    Args:
        model: with its weights.
        parts: of ``cut_in_two``.
        plan: of the whole model.
        communicators: of the ranks as the plan has them, and of all ranks on one axis for what moves in turns.
        loss_fn: as of ``variable_batch``.
        scheme: likewise.
        num_turns: likewise.
    """
    inner, outer = communicators
    seed = agree(model, inner)
    home, names = homes(half.layers for _, half in parts), parameter_names(model)
    places = {name: home.get(names[id(tensor)], 0) for name, tensor in tensors_of(model).items()}
    modules = [
        lower_as(ParallelModule, model, traced, half.plan, inner, seed, _kept_at(i, places))
        for i, (traced, half) in enumerate(parts)
    ]
    found = VariableBatch(modules, plan, outer, whole_shapes(model))
    found._turns, found._loss_fn, found.scheme, found.num_turns = Turns(outer), loss_fn, scheme, num_turns
    return found


def _kept_at(part: int, places: Mapping[str, int]) -> Callable[[str], bool]:
    return lambda name: places[name] == part


class VariableBatch(HeldStages):
    """This rank's part of a model whose linear layers work in turns; made by ``runtime.variable_batch``.

    Attributes:
        scheme: who hands over which samples in which turn.
        num_turns: of a batch.
    """

    scheme: Scheme
    num_turns: int
    _turns: Turns
    _loss_fn: LossFunction

    @property
    def front(self) -> ParallelModule:
        """The layers in front of the linear ones."""
        return self.held_stages[0]

    @property
    def linear(self) -> ParallelModule:
        """The linear layers, from the first one on."""
        return self.held_stages[1]

    def step(
        self,
        *inputs: Any,
        target: Any = None,
        optimizer: Optimizer | None = None,
        scaler: GradScaler | None = None,
        **keywords: Any,
    ) -> torch.Tensor:
        """Do forward and backward of one batch; every rank must call it, with its own samples.

        Without an optimizer gradients are those of the mean loss over the batch, added to those that were there, and
        the caller updates: exactly synchronous SGD. With one, the linear layers are updated behind every turn, with the
        gradient of that turn's mean loss, and all others once, behind the last turn. Momentum, weight decay and all
        else that the optimizer does are applied in each update; those in turns see parameters of the linear layers
        only. A sample's gradient goes through the linear layers' weights of its own turn. Gradients that were there are
        dropped.

        Args:
            inputs: of the model; this rank's samples.
            target: a tensor, or tensors in tuples, lists and dicts, likewise. Without one, ``loss_fn`` gets the output.
            optimizer: over ``parameters()``; it must leave parameters alone whose ``grad`` is None, as torch's do.
            scaler: of the loss, for fp16. With an optimizer it updates here as well: an update whose gradients overflow
                on any rank is left out on all, the scale changes behind the batch. Without one the caller calls its
                ``step`` and ``update``.
            keywords: inputs of the model that are passed by name.

        Returns:
            The mean loss over the batch of all ranks, equal on all of them; a scalar tensor.

        Raises:
            UsageError: the scaler is none of ``runtime``, whose ranks agree.
            MismatchError: a rank has no samples, or other numbers of targets and of inputs.
            RunError: a rank died or hangs.
        """
        updates = _Updates(optimizer, scaler)
        counts = self._counts((*inputs, *keywords.values()), target)
        rounds = turns(self.scheme, counts, self.num_turns)
        if optimizer is not None:
            optimizer.zero_grad()
        (features,) = self.front(*inputs, **keywords)
        gradient = torch.empty_like(features) if features.requires_grad else None
        total, returning = torch.zeros((), device=features.device), None
        for k, (x, wanted) in enumerate(self._handed_over(features.detach(), target, rounds)):
            sizes = [b - a for a, b in rounds[k]]
            share = sum(sizes) / sum(counts)
            loss = self._turn(x.requires_grad_(gradient is not None), wanted, share, updates, k == len(rounds) - 1)
            total = total + loss * share
            if gradient is not None:
                _take(gradient, returning)
                assert x.grad is not None
                addends = x.grad if optimizer is None else x.grad * share
                arriving = self._turns.start_returning(addends, sizes, "the gradients of a turn")
                returning = rounds[k][self._turns.rank], arriving
        if gradient is not None:
            _take(gradient, returning)
            features.backward(gradient)
        updates.step()
        updates.end()
        return total

    def _turn(self, x: torch.Tensor, target: Any, share: float, updates: "_Updates", is_last: bool) -> torch.Tensor:
        """Do forward and backward of the linear layers on a turn's samples; return their mean loss."""
        # without updates what is reduced, behind the last turn, is the sum over all of them
        with nullcontext() if updates.in_turns or is_last else self.linear.no_sync():
            loss = self._loss(x, target)
            updates.scaled(loss if updates.in_turns else loss * share).backward()
        updates.step()
        if updates.in_turns:
            self.linear.zero_grad()
        return loss.detach()

    def _counts(self, inputs: Sequence[Any], target: Any) -> list[int]:
        """Return how many samples each rank has.

        Raises:
            MismatchError: a rank has none, or targets of other samples.
        """
        leaves = [t for t in tree_leaves([*inputs, target]) if _has_samples(t)]
        sizes = sorted({t.shape[0] for t in leaves})
        counts = self._turns.start_counting(sizes[0] if len(sizes) == 1 else REFUSED)()
        if len(sizes) != 1:
            raise MismatchError(f"inputs and target have {sizes} samples on this rank; all need the same number")
        if min(counts) < 1:
            refused = ", where -1 stands for what a rank refused: see its own message" if min(counts) == REFUSED else ""
            raise MismatchError(f"the ranks passed {tuple(counts)} samples{refused}; every rank needs at least one")
        return counts

    def _handed_over(
        self, features: torch.Tensor, target: Any, rounds: Sequence[tuple[Interval, ...]]
    ) -> Iterator[tuple[torch.Tensor, Any]]:
        """Yield the samples and targets of every turn; those of the next one are under way then."""
        leaves, structure = tree_flatten(target)

        def start(turn: tuple[Interval, ...]) -> Callable[[], tuple[torch.Tensor, Any]]:
            (a, b), sizes = turn[self._turns.rank], [b - a for a, b in turn]
            x = self._turns.start_gathering(features[a:b], sizes, "the samples of a turn")
            wanted = [
                self._turns.start_gathering(t[a:b], sizes, "the targets of a turn") if _has_samples(t) else _given(t)
                for t in leaves
            ]
            return lambda: (x(), tree_unflatten([t() for t in wanted], structure))

        arriving = start(rounds[0])
        for after in (*rounds[1:], None):
            found = arriving()
            if after is not None:
                arriving = start(after)
            yield found

    def _loss(self, x: torch.Tensor, target: Any) -> torch.Tensor:
        output = self.linear(x)
        loss = self._loss_fn(output) if target is None else self._loss_fn(output, target)
        if loss.dim():
            raise UsageError(f"loss_fn returned a tensor of shape {tuple(loss.shape)}; it must return the mean loss")
        return loss

    def evaluate(self, *inputs: Any, **keywords: Any) -> Any:
        """Return the output for this rank's samples; every rank must call it, with at least one. Call ``eval()`` first.

        Raises:
            MismatchError: a rank has no samples.
        """
        counts, rank = self._counts((*inputs, *keywords.values()), None), self._turns.rank
        start, size = sum(counts[:rank]), sum(counts)
        with torch.no_grad():
            (features,) = self.front(*inputs, **keywords)
            output = self.linear(self._turns.start_gathering(features, counts, "the samples")())
        return tree_map(
            lambda t: t[start : start + counts[rank]] if _has_samples(t) and t.shape[0] == size else t, output
        )

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        """Raise: the linear layers work in turns."""
        raise UsageError("a variable batch has no forward(): call step(...) to train, and evaluate(...) for the output")


class _Updates:
    """Who updates parameters in the turns of a batch, if anybody does, and how losses are scaled."""

    def __init__(self, optimizer: Optimizer | None, scaler: torch.amp.GradScaler | None) -> None:
        if scaler is not None and not isinstance(scaler, GradScaler):
            raise UsageError("the scaler must be a runtime.GradScaler(net): with torch's own, ranks skip updates alone")
        self._optimizer, self._scaler = optimizer, scaler

    @property
    def in_turns(self) -> bool:
        """Whether parameters are updated here."""
        return self._optimizer is not None

    def scaled(self, loss: torch.Tensor) -> torch.Tensor:
        """Return what backward begins with."""
        return loss if self._scaler is None else self._scaler.scale(loss)

    def step(self) -> None:
        """Update what has gradients."""
        if self._optimizer is not None and self._scaler is not None:
            self._scaler.step_in_turn(self._optimizer)
        elif self._optimizer is not None:
            self._optimizer.step()

    def end(self) -> None:
        """Let the scale follow from what the turns came by."""
        if self._optimizer is not None and self._scaler is not None:
            self._scaler.update()


def _has_samples(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0


def _given(value: Any) -> Callable[[], Any]:
    return lambda: value


def _take(gradient: torch.Tensor, returning: tuple[Interval, Arriving] | None) -> None:
    """Put the gradients of a turn that are on their way to their place, if there are any."""
    if returning is not None:
        (a, b), arriving = returning
        gradient[a:b] = arriving()
