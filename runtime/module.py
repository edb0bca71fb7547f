"""The parallel module of one rank: what training loops call on it beside forward and backward."""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, Self

import torch
from torch import fx, nn

from planner.errors import MismatchError, UsageError
from planner.ir.layout import Layout
from planner.ir.rules import InputOutput
from planner.ir.transfer import StepKind
from planner.plan.schema import Plan
from runtime.comm.exchange import Batch, named
from runtime.evaluation import Evaluation
from runtime.feed import REFUSED, batch_of, refuse_other_region, takes_other_sizes
from runtime.graphs import uncompiled
from runtime.parameters.clipping import clip_grad_norm
from runtime.parameters.local import Held, local_piece
from runtime.parameters.reducer import Reducer
from runtime.parameters.sharding import Shards
from runtime.state import StepState, is_in_backward

_MADE_ANEW = frozenset({"_graph", "_reducer", "_evaluator", "forward"})
"""Attributes that a copy of a parallel module does not take over."""


class ParallelModule(fx.GraphModule):
    """One rank's part of a planned model: local parameters under their original names.

    ``print(module.code)`` shows what it runs. After ``loss.backward()`` every gradient is that of
    the mean loss over the global batch, as one device would have it.

    ``copy.deepcopy`` gives a module with parameters and buffers of its own that talks over the same process groups, so
    ``torch.optim.swa_utils.AveragedModel(net)`` works; like any forward pass, one of the copy is made on all ranks.

    Attributes:
        plan: that it runs.
        held: what the ranks store of every parameter and buffer, by every name that it has.
    """

    plan: Plan
    held: dict[str, Held]
    _state: StepState
    _reducer: Reducer
    _shards: Shards
    _inputs: dict[str, Layout]
    _evaluation: Evaluation | str | None

    # ---- gradients

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulate gradients on this rank only; the next backward pass outside reduces their sum."""
        self._reducer.enabled = False
        try:
            yield
        finally:
            self._reducer.enabled = True

    def reduce_gradients(self) -> None:
        """Reduce what backward passes inside of ``no_sync()`` have accumulated, without another pass.

        Parameters must not be sharded. Every rank must call it.
        """
        self._reducer.flush()

    def clip_grad_norm_(
        self,
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        foreach: bool | None = None,
    ) -> torch.Tensor:
        """Scale the gradients so that the norm of all of them, over all ranks, is at most ``max_norm``.

        Use this instead of ``torch.nn.utils.clip_grad_norm_``, which knows this rank's pieces only. Every rank must
        call it, behind a backward pass outside of ``no_sync()``. What several ranks hold counts once.

        Args:
            max_norm: the largest norm that is left as it is.
            norm_type: the p of the p-norm; may be infinite, but not 0.
            error_if_nonfinite: raise where the norm is infinite or not a number, on every rank.
            foreach: as of torch's function: whether to use its implementation for many tensors at once.

        Returns:
            The norm before, equal on all ranks; a scalar tensor.

        Raises:
            UsageError: ``norm_type`` is 0, which counts tensors.
            RuntimeError: as ``error_if_nonfinite`` says.
        """
        pairs = [(parameter, self._copies(name)) for name, parameter in self.named_parameters()]
        return clip_grad_norm(pairs, self._gathered, max_norm, norm_type, error_if_nonfinite, foreach)

    def clip_grad_value_(self, clip_value: float, foreach: bool | None = None) -> None:
        """Clip every element of the gradients; the same as ``torch.nn.utils.clip_grad_value_`` on the parameters."""
        nn.utils.clip_grad_value_(self.parameters(), clip_value, foreach)

    def add_over_ranks(self, numbers: torch.Tensor) -> None:
        """Add a contiguous tensor over all ranks of the plan, in place; every rank must call it."""
        everyone = tuple(range(len(self.plan.mesh.axes)))
        if everyone:
            with named(StepKind.ALL_REDUCE, self._state.communicator, "numbers of the whole model"):
                self._state.communicator.all_reduce(numbers, everyone)

    def _copies(self, name: str) -> int:
        """Return how many ranks hold the same piece of a parameter; all, where the model did not have it."""
        return len(self.held[name].holders) if name in self.held else self.plan.mesh.size

    def _gathered(self, number: torch.Tensor) -> torch.Tensor:
        """Return a scalar of every rank."""
        size, everyone = self.plan.mesh.size, tuple(range(len(self.plan.mesh.axes)))
        own = number.view(1)
        with named(StepKind.ALL_GATHER, self._state.communicator, "the norm of the gradients"):
            return self._state.communicator.all_gather(own, [1] * size, everyone) if everyone else own

    def _take_unused(
        self,
        model: nn.Module,
        pieces: Mapping[int, nn.Parameter],
        cut: Mapping[str, Layout],
        keeps: Callable[[str], bool],
    ) -> None:
        """Register what ``forward`` does not read, and further names of what it reads, so that no name is missing.

        Args:
            model: the whole.
            pieces: local parameters by identity of the whole ones.
            cut: by name, layouts of what layers read: also of those that this rank leaves out.
            keeps: which names are wanted.
        """
        position = self._state.communicator.position
        known = self.state_dict(keep_vars=True)
        for name, tensor in model.state_dict(keep_vars=True).items():
            if name in known or not isinstance(tensor, torch.Tensor) or not keeps(name):
                continue
            path, _, own = name.rpartition(".")
            holder: nn.Module = self
            for part in path.split(".") if path else ():
                if part not in holder._modules:
                    holder.add_module(part, nn.Module())
                holder = holder.get_submodule(part)
            if isinstance(tensor, nn.Parameter):
                holder.register_parameter(own, pieces.get(id(tensor), tensor))
            else:
                holder.register_buffer(own, local_piece(tensor, cut[name], position) if name in cut else tensor)

    # ---- modes

    def train(self, mode: bool = True) -> Self:
        """Set the mode, as of every module; where the model's code asks for it, another graph runs in evaluation."""
        super().train(mode)
        self._choose_graph()
        return self

    def _choose_graph(self) -> None:
        """Let ``forward`` run the graph of the mode; ``self.graph`` and ``self.code`` are those of training."""
        vars(self).pop("forward", None)
        if not self.training and isinstance(self._evaluation, Evaluation):
            found = vars(self).get("_evaluator") or self._evaluation.bound(self)
            vars(self)["_evaluator"] = found  # past nn.Module, which would make it a part of this one
            self._shards.follow(found)
            vars(self)["forward"] = found.forward

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Convert tensors (``to``, ``double``, ``cuda``); what refers to them is made anew."""
        super()._apply(fn, recurse)
        self._shards.refresh()
        self._reducer.refresh()
        self._state.dtype = next((p.dtype for p in self.parameters() if p.is_floating_point()), self._state.dtype)
        vars(self).pop("_evaluator", None)
        if isinstance(self._evaluation, Evaluation):
            self._evaluation.convert(fn)
        self._choose_graph()
        return self

    # ---- copies

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        for shared in (self._state.communicator, self.plan, self.held):
            memo[id(shared)] = shared
        found = type(self).__new__(type(self))
        memo[id(self)] = found
        fx.GraphModule.__init__(found, {}, fx.Graph(), type(self).__name__)
        vars(found).update(copy.deepcopy({k: v for k, v in vars(self).items() if k not in _MADE_ANEW}, memo))
        found._shards.refresh()
        found._reducer = self._reducer.copied(memo)
        found._shards.serve(found._reducer)
        found.graph = copy.deepcopy(self.graph)
        found._choose_graph()
        return found

    def __reduce__(self) -> NoReturn:
        raise UsageError(
            "a parallel module cannot be pickled: it talks through process groups of this job. Save its tensors "
            "(state_dict()), or the checkpoint of runtime.checkpoint, and parallelize the model again."
        )

    # ---- forward

    @uncompiled
    def _before_forward(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.training and isinstance(self._evaluation, str):
            raise UsageError(self._evaluation)
        state = self._state
        self._shards.prepare()
        if not is_in_backward():  # else torch.utils.checkpoint computes a pass again
            self._reducer.reset()
        state.current_batch()  # that of an earlier pass nobody asked for
        io = self.plan.input_output
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        try:
            passed = self._passed(args, kwargs, tensors)
        except MismatchError:
            if io is not InputOutput.GLOBAL:
                state.communicator.start_gather_ints(REFUSED)()
            raise
        if any(part.training for part in self.modules()):
            state.step = state.passes.begin(state.step, tensors)
        if io is InputOutput.GLOBAL:
            state.batch = Batch(state.rank_samples)
            self._shards.enter(self.training)
            return
        pending = state.communicator.start_gather_ints(state.rank_samples)
        mesh, position, layouts = self.plan.mesh, state.communicator.position, self._inputs
        first = next((layouts[name] for name in passed), next(iter(layouts.values())))

        def resolve() -> Batch:
            with named(StepKind.ALL_GATHER, state.communicator, "the numbers of samples"):
                sizes = pending()
            batch = batch_of(io, first, sizes)
            if io is InputOutput.LOCAL:
                refuse_other_region(layouts, mesh, position, passed, batch.size)
            return batch

        state.resolve_batch = resolve
        self._shards.enter(self.training)

    def _passed(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: Sequence[torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Return the inputs with samples by name; note how many samples this rank passes.

        Raises:
            MismatchError: they do not fit the plan, or each other.
        """
        state, layouts, plan = self._state, self._inputs, self.plan
        named = dict(zip(layouts, args, strict=False)) | {self._names.get(n, n): x for n, x in kwargs.items()}
        passed = {
            name: x
            for name, layout in layouts.items()
            if isinstance(x := named.get(name), torch.Tensor) and layout.shape[:1] == (plan.batch,)
        }
        samples = {x.shape[0] for x in tensors if x.dim()}
        is_local = plan.input_output is InputOutput.LOCAL and passed  # inputs may be split in different ways
        if len(samples) != 1 and not is_local:
            raise MismatchError(f"the inputs have {sorted(samples)} samples; all need the batch as their first size")
        if not self._takes_other_sizes:
            refuse_other_region(layouts, plan.mesh, state.communicator.position, passed)
        state.rank_samples = next(iter(passed.values())).shape[0] if is_local else samples.pop()
        return passed

    @functools.cached_property
    def _names(self) -> dict[str, str]:
        """By the names of the arguments of ``forward``, those of the plan."""
        return {str(node.target): node.name for node in self.graph.find_nodes(op="placeholder")}

    @functools.cached_property
    def _takes_other_sizes(self) -> bool:
        return takes_other_sizes(self.plan)

    @uncompiled
    def _after_forward(self, *_: Any) -> None:
        self._state.step = self._state.passes.end(self._state.step)
        self._shards.leave()


class Container(nn.Module):
    """Stands for a module of the user's whose ``forward`` was traced: it holds the parts under their names."""

    def _refuse_hook(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        parts = ", ".join(name for name, _ in self.named_children())
        raise UsageError(
            f"a hook on this module would never be called: its forward() was traced, and only its operators run. "
            f"Register the hook on one of its parts ({parts}), or on the parallel module."
        )

    register_forward_hook = _refuse_hook
    register_forward_pre_hook = _refuse_hook
    register_full_backward_hook = _refuse_hook
    register_full_backward_pre_hook = _refuse_hook


_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip


def keep_hooks(local: nn.Module, model: nn.Module) -> None:
    """Let hooks on modules of the model be called by what stands for them, those that come later too."""
    originals = dict(model.named_modules())
    given = {id(part) for part in model.modules()}
    for name, part in local.named_modules():
        if type(part) is nn.Module and id(part) not in given:
            part.__class__ = Container
        original = originals.get(name)
        if original is None or original is part or isinstance(part, Container):
            continue
        for kind in _HOOKS:
            if name:
                vars(part)[kind] = vars(original)[kind]
            else:
                vars(part)[kind].update(vars(original)[kind])
        vars(part)["_is_full_backward_hook"] = vars(original).get("_is_full_backward_hook")
