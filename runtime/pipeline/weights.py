"""Which weights a backward pass reads where the optimizer steps between it and its forward pass.

autograd keeps what backward needs by reference, and refuses when a weight was written in place since. The hooks here
tell weights from activations among what it keeps. Activations stay as they are. Of a weight, a view of one
(``weight.t()`` of a linear layer) or a cast of one (autocast), only the place is kept; the values come from it when
backward asks:

- *current* weights [Zhang & Abdelrahman 2021]: those of the moment of backward, on the stored activations;
- *stashed* weights [PipeDream, SOSP 2019]: those of the forward pass. A version is copied when the optimizer is about
  to overwrite it and a pass in flight still needs it: once, for all its uses, and never at the last stage.

What is computed from weights in another way (a normalised weight) is an activation. The only file that uses the private
``torch.utils._python_dispatch``.
"""

import contextlib
import functools
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

_DEVICES = ("cpu", "cuda")


def is_autocast() -> bool:
    """Return whether autocast is on in this thread."""
    return any(torch.is_autocast_enabled(device) for device in _DEVICES)


def without_autocast() -> contextlib.ExitStack:
    """Return a context in which a backward pass runs in the types that its forward pass chose."""
    stack = contextlib.ExitStack()
    for device in _DEVICES:
        if torch.is_autocast_enabled(device):
            stack.enter_context(torch.autocast(device, enabled=False))
    return stack


@dataclass(eq=False)
class _Version:
    """Values of the weights between two updates.

    Attributes:
        used: weights that a pass in flight will read, by identity.
        copies: of them, once they have been overwritten.
    """

    used: dict[int, nn.Parameter] = field(default_factory=dict)
    copies: dict[int, torch.Tensor] = field(default_factory=dict)

    def read(self, parameter: nn.Parameter) -> torch.Tensor:
        """Return the values of a weight, with its strides."""
        return self.copies.get(id(parameter), parameter.detach())

    def copy(self) -> None:
        """Keep the values of what is used."""
        for key, parameter in self.used.items():
            empty = torch.empty_strided(
                parameter.size(), parameter.stride(), dtype=parameter.dtype, device=parameter.device
            )
            self.copies[key] = empty.copy_(parameter.detach())


@dataclass(frozen=True)
class _Weight:
    """A view of a weight, or of a cast of one.

    Attributes:
        read: returns the tensor that it is a view of.
        size: of the view.
        stride: of the view.
        offset: of the view in the tensor, in elements.
    """

    read: Callable[[], torch.Tensor]
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def tensor(self) -> torch.Tensor:
        base = self.read()
        return base.as_strided(self.size, self.stride, base.storage_offset() + self.offset)


@dataclass(frozen=True)
class _Activation:
    """A tensor as it was saved, and how often it had been written until then."""

    saved: torch.Tensor
    version: int | None

    def tensor(self) -> torch.Tensor:
        if self.version is not None and self.saved._version != self.version:
            raise RuntimeError(
                f"a tensor of shape {tuple(self.saved.shape)} that the backward pass of a batch in flight needs was "
                "written in place after its forward pass. Give every batch tensors of its own."
            )
        return self.saved


class Weights:
    """The weights of one stage, as backward passes read them.

    Args:
        module: the stage.
        stash: backward reads the weights of its forward pass; else the current ones.
    """

    def __init__(self, module: nn.Module, stash: bool) -> None:
        self._module, self._stash = module, stash
        self._version = _Version()

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Return the context of a forward pass."""
        saver = _Saver(self._module, self._version)
        with contextlib.ExitStack() as stack:
            if is_autocast():
                torch.clear_autocast_cache()  # casts of weights from before an update
                stack.enter_context(_Casts(saver))
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(saver.pack, lambda kept: kept.tensor()))
            stack.callback(saver.close)
            yield

    def before_update(self) -> None:
        """Keep what passes in flight still need; call this before weights are written."""
        if not self._stash:
            return
        old = weakref.ref(self._version)
        self._version = _Version()  # the old one is gone now, unless a graph refers to it
        version = old()
        if version is not None:
            version.copy()


class _Saver:
    """Tells weights from activations in one forward pass."""

    def __init__(self, module: nn.Module, version: _Version) -> None:
        self._version = version
        self._weights: defaultdict[int, list[nn.Parameter]] = defaultdict(list)
        for parameter in module.parameters():
            self._weights[_storage(parameter)].append(parameter)
        self._buffers = {_storage(buffer) for buffer in module.buffers()}
        self._casts: dict[int, tuple[torch.Tensor, _Weight]] = {}

    def pack(self, tensor: torch.Tensor) -> _Weight | _Activation:
        found = self.weight_of(tensor)
        if found is not None:
            return found
        # running statistics go on while a batch is in flight; in training, their gradients do not read them
        is_checked = not tensor.is_inference() and _storage(tensor) not in self._buffers
        # without its grad_fn: a graph that refers to itself through Python would never be freed
        return _Activation(tensor.detach(), tensor._version if is_checked else None)

    def close(self) -> None:
        """Let go of casts: graphs refer to the hooks, and so to this."""
        self._casts.clear()

    def weight_of(self, tensor: torch.Tensor) -> _Weight | None:
        """Return the weight that a tensor shows, or None."""
        if not tensor.numel():
            return None
        storage, offset = _storage(tensor), int(tensor.storage_offset())
        if storage in self._casts:
            cast, source = self._casts[storage]
            read = functools.partial(_cast, source, tensor.dtype)
            return _Weight(read, tensor.size(), tensor.stride(), offset - int(cast.storage_offset()))
        owners = [p for p in self._weights.get(storage, ()) if p.storage_offset() <= offset and p.dtype == tensor.dtype]
        if not owners:
            return None
        parameter = max(owners, key=lambda p: p.storage_offset())
        self._version.used[id(parameter)] = parameter
        read = functools.partial(self._version.read, parameter)
        return _Weight(read, tensor.size(), tensor.stride(), offset - int(parameter.storage_offset()))

    def note_cast(self, source: torch.Tensor, cast: torch.Tensor) -> None:
        """Remember what a cast was made of, if that is a weight."""
        weight = self.weight_of(source)
        if weight is not None and _storage(source) != _storage(cast):
            self._casts[_storage(cast)] = cast, weight


class _Casts(TorchDispatchMode):
    """Sees the casts that autocast makes; autograd gets them as tensors of their own."""

    def __init__(self, saver: _Saver) -> None:
        super().__init__()
        self._saver = saver

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default:
            self._saver.note_cast(args[0], result)
        return result


def _cast(source: _Weight, dtype: torch.dtype) -> torch.Tensor:
    return source.tensor().to(dtype)


def _storage(tensor: torch.Tensor) -> int:
    """Return where a tensor's memory begins; two tensors that are alive share it or do not."""
    return tensor.untyped_storage().data_ptr()
