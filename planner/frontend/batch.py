"""Sizes that come from the batch: how they are found, kept apart, and bound to the tensors at hand.

A model is traced on a batch of ``PROBE`` samples, a prime that no size of a CNN is a multiple of.
So a size that is a multiple of it comes from the batch and nothing else. In the graph it becomes a
node that reads the batch of the tensors at hand, and the graph is right for every batch. Arithmetic
that is not right for every batch (``n - 1``, ``1 / n``) is refused.
"""

import operator
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Final

import torch
from torch import fx

from planner.errors import TraceError

PROBE: Final = 10007
"""Samples of the batch that a model is traced on."""

_LIBRARIES = (f"{Path(torch.__file__).parent}{os.sep}", f"{Path(__file__).parent}{os.sep}", "<")


def origin_of_call() -> str:
    """Return ``file:line`` of the innermost frame that belongs to the user."""
    return next(_users(traceback.walk_stack(sys._getframe(1))), "forward()")


def origin_of_error(error: Exception) -> str:
    """Return ``file:line`` of the user's innermost frame that an error came through."""
    return ([*_users(traceback.walk_tb(error.__traceback__))] or ["forward()"])[-1]


def _users(frames: Iterable[tuple[FrameType, int]]) -> Iterator[str]:
    for frame, line in frames:
        if frame.f_back is not None and not frame.f_code.co_filename.startswith(_LIBRARIES):
            yield f"{frame.f_code.co_filename}:{line}"


class BatchSize(int):
    """A size that depends on the batch. It stays one as long as it is a multiple of the number of samples."""

    def __truediv__(self, other: Any) -> Any:
        if isinstance(other, int | float) and not isinstance(other, BatchSize) and other > 0:
            found = int(self) / other
            if found.is_integer() and int(found) % PROBE == 0:
                return BatchSize(int(found))
        return self._refuse("/", other)

    def __mul__(self, other: Any) -> Any:
        return BatchSize(int(self) * other) if type(other) is int else self._refuse("*", other)

    __rmul__ = __mul__

    def __floordiv__(self, other: Any) -> Any:
        if type(other) is int and other > 0 and int(self) // PROBE % other == 0:
            return BatchSize(int(self) // other)
        if isinstance(other, BatchSize) and int(self) % int(other) == 0:
            return int(self) // int(other)
        return self._refuse("//", other)

    def __add__(self, other: Any) -> Any:
        if isinstance(other, BatchSize):
            return BatchSize(int(self) + int(other))
        return self if type(other) is int and other == 0 else self._refuse("+", other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        if isinstance(other, BatchSize):
            left = int(self) - int(other)
            return BatchSize(left) if left else 0
        return self if type(other) is int and other == 0 else self._refuse("-", other)

    def __eq__(self, other: object) -> bool:
        return self._compared("==", other, operator.eq)

    def __ne__(self, other: object) -> bool:
        return not self._compared("!=", other, operator.eq)

    def __lt__(self, other: int) -> bool:
        return self._compared("<", other, operator.lt)

    def __le__(self, other: int) -> bool:
        return self._compared("<=", other, operator.le)

    def __gt__(self, other: int) -> bool:
        return self._compared(">", other, operator.gt)

    def __ge__(self, other: int) -> bool:
        return self._compared(">=", other, operator.ge)

    def __hash__(self) -> int:
        return hash(int(self))

    def _compared(self, symbol: str, other: object, compare: Callable[[Any, Any], bool]) -> bool:
        """Compare with another size of the batch, or where every batch gives the same answer."""
        if isinstance(other, BatchSize):
            return compare(int(self), int(other))
        if not isinstance(other, int | float):
            return False
        least = int(self) // PROBE
        if compare(least, other) != compare(least << 40, other) or (symbol in {"==", "!="} and other >= least):
            self._refuse(symbol, other)
        return compare(least, other)

    def _refuse(self, symbol: str, other: object = "") -> Any:
        if isinstance(other, fx.Proxy):
            return NotImplemented  # a tensor computes with the size, not the other way round
        raise TraceError(
            f"{origin_of_call()} computes with the number of samples in the batch (n {symbol} {other}), so that a "
            "part of the batch would give another result. Use sizes as they are (x.view(x.shape[0], -1)), or make the "
            "module around it a leaf with planner.frontend.custom.register_module."
        )


def _refusing(symbol: str) -> Callable[..., Any]:
    def method(self: BatchSize, *others: Any) -> Any:
        return self._refuse(symbol, *others[:1])

    return method


for _name, _symbol in {
    "rtruediv": "/ of", "rfloordiv": "// of", "rsub": "- of", "mod": "%", "rmod": "% of", "pow": "**",
    "rpow": "** of", "neg": "negated", "float": "as a float", "lshift": "<<", "rshift": ">>", "divmod": "divmod",
}.items():  # fmt: skip
    setattr(BatchSize, f"__{_name}__", _refusing(_symbol))


def tagged(value: Any) -> Any:
    """Return sizes with those of the batch marked."""
    if type(value) is int and value > 0 and value % PROBE == 0:
        return BatchSize(value)
    if isinstance(value, torch.Size):
        return torch.Size([tagged(v) for v in value])
    if type(value) in {tuple, list}:
        return type(value)(tagged(v) for v in value)
    return value


def plain(value: Any) -> Any:
    """Return a size as a plain number."""
    return int(value) if isinstance(value, BatchSize) else value


def sample_size(x: torch.Tensor, dim: int, rows: int, multiple: int) -> int:
    """Return a multiple of the number of samples in a tensor that holds ``rows`` rows of each along ``dim``."""
    return x.shape[dim] // rows * multiple


def is_count(node: fx.Node) -> bool:
    """Return whether a node is a number of samples."""
    return node.target is sample_size


def sample_dim_of(node: fx.Node) -> int | None:
    """Return the first dimension of a node's tensor whose size is a multiple of the batch."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return None
    return next((d for d, size in enumerate(value.shape) if size % PROBE == 0 and size), None)


def is_batch_size(value: Any) -> bool:
    """Return whether a literal in the graph is a multiple of the batch."""
    return type(value) is int and value > 0 and value % PROBE == 0


def bind_batch_sizes(graph: fx.Graph) -> None:
    """Replace sizes of the probe batch, and the meta device, by nodes that read those of the tensors at hand."""
    inputs = [n for n in graph.nodes if n.op == "placeholder" and isinstance(n.meta.get("val"), torch.Tensor)]
    carrier = next((node for node in inputs if sample_dim_of(node) is not None), None)
    for node in list(graph.nodes):
        if node.op == "output":
            continue
        own = [n for n in node.all_input_nodes if sample_dim_of(n) is not None]
        source = own[0] if own else carrier
        with graph.inserting_before(node):

            def bound(value: Any, source: fx.Node | None = source) -> Any:
                if source is not None and is_batch_size(value):
                    return size_node(graph, source, value // PROBE)
                if inputs and isinstance(value, torch.device | str) and str(value) == "meta":
                    device = graph.call_function(getattr, (inputs[0], "device"))
                    device.meta["val"] = torch.device("meta")
                    return device
                return value

            node.args = fx.node.map_aggregate(node.args, bound)
            node.kwargs = fx.node.map_aggregate(node.kwargs, bound)


def size_node(graph: fx.Graph, source: fx.Node, multiple: int) -> fx.Node:
    """Insert a node with a multiple of the number of samples that a node's tensor holds."""
    dim = sample_dim_of(source)
    assert dim is not None
    node = graph.call_function(sample_size, (source, dim, source.meta["val"].shape[dim] // PROBE, multiple))
    node.meta["val"] = PROBE * multiple
    return node
