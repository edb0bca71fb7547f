"""The proxies of the tracer, which know their values on the meta device."""

import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from planner.errors import TraceError
from planner.frontend.batch import PROBE, origin_of_call, tagged


class ConcreteProxy(fx.Proxy):
    """A proxy that knows its value on the meta device."""

    value: Any

    def __getattr__(self, name: str) -> Any:
        value = self.__dict__.get("value")
        found = getattr(value, name)  # an unknown attribute raises AttributeError as eager code would
        if isinstance(found, torch.Tensor):  # such as x.T
            return self.tracer.create_proxy("call_function", getattr, (self, name), {})
        return super().__getattr__(name) if callable(found) else tagged(found)

    def __len__(self) -> int:
        if len(self.value) % PROBE == 0 and self.value.numel():
            self.tracer.has_counted_samples = True  # type: ignore[attr-defined]  # of the tracer below
        return len(self.value)

    def __iter__(self) -> Iterator[fx.Proxy]:
        if isinstance(self.value, torch.Tensor) and self.value.shape[0] % PROBE == 0:
            raise takes_samples_apart()
        return iter([self[i] for i in range(len(self.value))])  # type: ignore[index]  # a Proxy forwards it

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", write_items, (self, index, value), {})

    def __bool__(self) -> bool:
        return bool(self._number("its truth"))

    def __int__(self) -> int:
        return int(self._number("its integer value"))

    def __float__(self) -> float:
        return float(self._number("its value"))

    def __index__(self) -> int:
        return int(self._number("its integer value"))

    def _number(self, what: str) -> Any:
        raise needs_value(what)


def write_items(x: torch.Tensor, index: Any, value: Any) -> torch.Tensor:
    """Write into some elements of a tensor, as ``x[index] = value`` does, and return it."""
    x[index] = value
    return x


@functools.cache
def call_of(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Return a plain function that applies a user's ``autograd.Function``, under its name."""

    def call(*args: Any) -> Any:
        return function.apply(*args)

    call.__name__ = call.__qualname__ = function.__name__
    call.__module__ = function.__module__
    call.elementwise = getattr(function, "elementwise", False) is True  # type: ignore[attr-defined]  # of this function
    return call


def says_elementwise(node: fx.Node) -> bool:
    """Return whether a node calls a user's ``autograd.Function`` whose class says ``elementwise = True``.

    Nobody can see it from outside, so without the word such a function is split by samples only.
    """
    return node.op == "call_function" and getattr(node.target, "elementwise", False) is True


def takes_samples_apart() -> TraceError:
    """Return the error for a loop over the samples of a batch."""
    return TraceError(
        f"{origin_of_call()} takes the batch apart sample by sample. Treat all samples at once, or make the module "
        "around it a leaf with planner.frontend.custom.register_module."
    )


def needs_value(what: str, place: str | None = None) -> TraceError:
    """Return the error for a decision by what a tensor holds."""
    return TraceError(
        f"{place or origin_of_call()} needs the value of a tensor ({what}), which is not known before the model runs. "
        "Plan the parts before and after it apart (backbone and head), move the decision out of forward(), or make "
        "the module around it a leaf with planner.frontend.custom.register_module."
    )


def _writing(function: Callable[[Any, Any], Any]) -> Callable[[ConcreteProxy, Any], Any]:
    def method(self: ConcreteProxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor"):
    setattr(ConcreteProxy, f"__{_name}__", _writing(getattr(operator, _name)))  # fx would make `x += y` out of place
