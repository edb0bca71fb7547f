"""From a module and example inputs to an ``fx.Graph`` whose every node knows its shape.

The tracer is shape-concrete: each proxy carries the value that the operator gives on the meta
device, so shapes, ``len`` and comparisons of sizes are plain Python values, and no weight is ever
materialised. All modules of ``torch.nn`` but the containers are leaves and keep their names.
"""

import copy
import inspect
import operator
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import fx, nn

from planner.errors import TraceError

Inputs = tuple[torch.Tensor, ...]

_LIBRARIES = (str(Path(torch.__file__).parent), str(Path(__file__).parent), "<")
_READ_VALUES = frozenset({"item", "tolist", "numpy"})


class _ConcreteProxy(fx.Proxy):
    """A proxy that knows its value on the meta device."""

    value: Any

    def __getattr__(self, name: str) -> Any:
        value = self.__dict__.get("value")
        found = getattr(value, name)  # an unknown attribute raises AttributeError as eager code would
        if isinstance(found, torch.Tensor):  # such as x.T
            return self.tracer.create_proxy("call_function", getattr, (self, name), {})
        return super().__getattr__(name) if callable(found) else found

    def __len__(self) -> int:
        return len(self.value)

    def __iter__(self) -> Iterator[fx.Proxy]:
        return iter([self[i] for i in range(len(self.value))])  # type: ignore[index]  # a Proxy forwards it

    def __bool__(self) -> bool:
        return bool(self._number("its truth"))

    def __int__(self) -> int:
        return int(self._number("its integer value"))

    def __float__(self) -> float:
        return float(self._number("its value"))

    def __index__(self) -> int:
        return int(self._number("its integer value"))

    def _number(self, what: str) -> Any:
        raise _needs_value(what)


def _needs_value(what: str) -> TraceError:
    return TraceError(
        f"{origin_of_call()} needs the value of a tensor ({what}), which is not known before the model runs. "
        "Plan the parts before and after it apart, or move the decision out of forward()."
    )


def _writing(function: Callable[[Any, Any], Any]) -> Callable[[_ConcreteProxy, Any], Any]:
    def method(self: _ConcreteProxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor"):
    setattr(_ConcreteProxy, f"__{_name}__", _writing(getattr(operator, _name)))  # fx would make `x += y` out of place


class _Tracer(fx.Tracer):
    """Executes every operator on meta tensors while it is recorded."""

    proxy_buffer_attributes = True
    _running = False  # while an operator is executed, fx's hooks on modules are to keep out of the way

    def __init__(self, inputs: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self._inputs = tuple(inputs)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Return forward() and its arguments: placeholders for the given inputs, defaults for all others."""
        del is_module, concrete_args
        names = [p.name for p in inspect.signature(root_fn).parameters.values()][1:]
        names += [f"{names[-1] if names else 'input'}_{i}" for i in range(len(self._inputs))]  # of *inputs
        placeholders = []
        for name, value in zip(names, self._inputs, strict=False):
            proxy = self.create_proxy("placeholder", name, (), {})
            proxy.value = proxy.node.meta["val"] = value
            placeholders.append(proxy)
        return root_fn, [self.root, *placeholders]

    def create_proxy(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str | None = None,
        type_expr: Any = None,
        proxy_factory_fn: Callable[[fx.Node], fx.Proxy] | None = None,
    ) -> Any:
        value = None
        if kind == "call_method" and target in _READ_VALUES:
            raise _needs_value(f"{target}()")
        if kind in {"call_function", "call_method", "call_module", "get_attr"}:
            value = self._run(kind, target, _values(args), _values(kwargs))
            if not _has_tensor(value):
                return value
        proxy = super().create_proxy(kind, target, args, kwargs, name, type_expr, proxy_factory_fn)
        assert isinstance(proxy, _ConcreteProxy)
        proxy.value = value
        proxy.node.meta.update(val=value, scope=self.scope.module_path, origin=origin_of_call())
        return proxy

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return whether a module is one operator: torch's own, or a subclass that keeps torch's ``forward``."""
        keeps_forward = type(m).forward.__module__.startswith("torch.nn.") and not isinstance(m, nn.Sequential)
        return keeps_forward or super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _ConcreteProxy(node, self)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self._running else super().getattr(attr, attr_val, parameter_proxy_cache)

    def _run(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        self._running = True
        try:
            match kind:
                case "get_attr":
                    return _attribute(self.root, target)
                case "call_module":
                    return self.root.get_submodule(target).forward(*args, **kwargs)
                case "call_method":
                    return getattr(args[0], target)(*args[1:], **kwargs)
                case _:
                    return target(*args, **kwargs)
        finally:
            self._running = False


def _value(argument: Any) -> Any:
    return argument.value if isinstance(argument, _ConcreteProxy) else argument


def _values(structure: Any) -> Any:
    return fx.node.map_aggregate(structure, _value)


def _has_tensor(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return True
    if isinstance(value, dict):
        return any(map(_has_tensor, value.values()))
    return isinstance(value, tuple | list) and any(map(_has_tensor, value))


def _attribute(root: nn.Module, path: str) -> Any:
    value: Any = root
    for part in path.split("."):
        value = getattr(value, part)
    return value


def origin_of_call() -> str:
    """Return ``file:line`` of the innermost frame that belongs to the user."""
    return next(_users(traceback.walk_stack(sys._getframe(1))), "forward()")


def _origin_of_error(error: Exception) -> str:
    return ([*_users(traceback.walk_tb(error.__traceback__))] or ["forward()"])[-1]


def _users(frames: Iterable[tuple[FrameType, int]]) -> Iterator[str]:
    for frame, line in frames:
        if frame.f_back is not None and not frame.f_code.co_filename.startswith(_LIBRARIES):
            yield f"{frame.f_code.co_filename}:{line}"


def on_meta(module: nn.Module) -> nn.Module:
    """Return a copy of a module whose parameters and buffers are on the meta device."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        shell = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        memo[id(parameter)] = shell
    for buffer in module.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(module, memo)


def trace(module: nn.Module, example_inputs: Inputs) -> fx.Graph:
    """Trace a module in training mode on the meta device.

    Args:
        module: any module; it is neither changed nor run.
        example_inputs: positional inputs with the global batch as their first size, on any device.

    Returns:
        The graph. ``node.meta`` holds ``val`` (a meta tensor), ``scope`` (the module path of the
        caller) and ``origin`` (file and line). It binds to real weights by
        ``fx.GraphModule(module, graph)``.

    Raises:
        TraceError: the model needs the value of a tensor, or fails on these input shapes.
    """
    root = on_meta(module).train()
    values = [x.to("meta") for x in example_inputs]
    shapes = ", ".join(str(tuple(x.shape)) for x in values)
    name = type(module).__name__
    try:
        inspect.signature(root.forward).bind(*values)
    except TypeError as error:
        wanted = ", ".join(inspect.signature(root.forward).parameters)
        raise TraceError(f"{name} takes the inputs {wanted}, but {len(values)} were given: {shapes}") from error
    try:
        return _Tracer(values).trace(root)
    except TraceError:
        raise
    except Exception as error:  # whatever the user's forward() raises on these shapes
        place = _origin_of_error(error)
        raise TraceError(
            f"{place}: {name} fails on inputs of shape {shapes}: {type(error).__name__}: {error}"
        ) from error
