"""Counts the bytes that autograd holds for backward while a training step runs, and the most that were alive."""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch


class SavedBytes:
    """Bytes of the storages that autograd holds: each once, those of the model's state left out.

    Attributes:
        now: held at the moment.
        peak: the most that were held at once.
    """

    def __init__(self, state: Iterable[torch.Tensor]) -> None:
        """Leave out the storages of these tensors: parameters and buffers."""
        self.now = self.peak = 0
        self._state = {_key(t) for t in state}
        self._holders: dict[int, int] = {}

    @contextmanager
    def counting(self) -> Iterator["SavedBytes"]:
        """Count what this thread's forward passes save, until backward frees it."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
            yield self

    def _pack(self, tensor: torch.Tensor) -> "_Saved":
        saved = _Saved(tensor)
        key = _key(tensor)
        if key not in self._state:
            if key not in self._holders:
                self.now += tensor.untyped_storage().nbytes()
                self.peak = max(self.peak, self.now)
            self._holders[key] = self._holders.get(key, 0) + 1
            weakref.finalize(saved, self._free, key, tensor.untyped_storage().nbytes()).atexit = False
        return saved

    def _free(self, key: int, num_bytes: int) -> None:
        self._holders[key] -= 1
        if not self._holders[key]:
            del self._holders[key]  # the storage's number may be given to another one now
            self.now -= num_bytes


class _Saved:
    """What autograd holds instead of a tensor; dies when autograd lets go."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor.detach()  # of the same storage; its own history would be a cycle


def _unpack(saved: _Saved) -> torch.Tensor:
    return saved.tensor


def _key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def saved_peak(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> int:
    """Run a forward and a backward pass of the sum of all results; return the most bytes that autograd held."""
    counter = SavedBytes([*module.parameters(), *module.buffers()])
    with counter.counting():
        found = module(*inputs)
    sum(x.sum() for x in _tensors(found)).backward()  # type: ignore[union-attr]  # the first of a sum is 0
    return counter.peak


def _tensors(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)
