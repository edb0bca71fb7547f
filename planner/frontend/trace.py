"""From a module and example inputs to an ``fx.Graph`` whose every node knows its shape.

The tracer is shape-concrete: each proxy carries the value that the operator gives on the meta
device, so shapes, ``len`` and comparisons of sizes are plain Python values, and no weight is ever
materialised. All modules of ``torch.nn`` but the containers are leaves and keep their names.

The model is traced on a batch of a prime number of samples, see ``planner.frontend.batch``.
"""

import contextlib
import copy
import inspect
import io
import itertools
import logging
import operator
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Final, Literal, Protocol

import torch
from torch import fx, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import prune
from torch.overrides import TorchFunctionMode

from planner.errors import TraceError
from planner.frontend.batch import (
    PROBE,
    bind_batch_sizes,
    is_batch_size,
    origin_of_call,
    origin_of_error,
    plain,
    tagged,
)
from planner.frontend.custom import custom_rule, is_custom
from planner.frontend.proxy import ConcreteProxy, call_of, needs_value, takes_samples_apart
from planner.frontend.stand_ins import LightBatchNorm, Unseen, light_attention
from planner.ir.tensor import DType

Inputs = tuple[torch.Tensor, ...]
Keywords = Mapping[str, torch.Tensor]
NO_KEYWORDS: Final[Keywords] = MappingProxyType({})

Tracer = Literal["auto", "fx", "export"]
_log = logging.getLogger(__name__)
_ONE_AT_A_TIME = threading.RLock()
"""Tracing changes modules for the whole process, and puts back what it found."""

MAX_SINGLE_SAMPLES: Final = 32
"""Samples that a model may name by number; more is a loop over the batch."""

_READ_VALUES = frozenset({"item", "tolist", "numpy"})
_FACTORIES = frozenset({
    torch.arange, torch.linspace, torch.logspace, torch.zeros, torch.ones, torch.full, torch.empty, torch.eye,
    torch.rand, torch.randn, torch.randint, torch.randperm, torch.tensor, torch.as_tensor, torch.tril_indices,
    torch.triu_indices, torch.hann_window, torch.hamming_window,
})  # fmt: skip
_RANDOM_LEAVES = frozenset({"DropPath", "StochasticDepth"})
"""Classes of the model zoos that drop whole samples; one operator, not the arithmetic in it."""


class _Factories(TorchFunctionMode):
    """Records calls that make tensors out of nothing, which no proxy would see."""

    def __init__(self, tracer: "_Tracer") -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        if self._tracer.is_running or func not in _FACTORIES:
            return func(*args, **(kwargs or {}))
        return self._tracer.create_proxy("call_function", func, args, kwargs or {})


class _Tracer(fx.Tracer):
    """Executes every operator on meta tensors while it is recorded."""

    proxy_buffer_attributes = True
    has_counted_samples = False  # the model called len() on a batch, whose arithmetic nobody sees
    is_running = False  # while an operator is executed, fx's hooks on modules are to keep out of the way

    def __init__(self, inputs: Iterable[torch.Tensor], keywords: Keywords) -> None:
        super().__init__()
        self._inputs, self._keywords = tuple(inputs), keywords
        self._names: dict[int, str] = {}
        self._saved: list[torch.Tensor] = []
        self._single_samples = 0
        self._thread = threading.get_ident()

    @property
    def is_elsewhere(self) -> bool:
        """Whether another thread calls: what fx changes in modules while it traces is the whole process's."""
        return threading.get_ident() != self._thread

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Return forward() and its arguments: placeholders for the given inputs, defaults for all others."""
        del is_module, concrete_args
        names = [p.name for p in inspect.signature(root_fn).parameters.values()][1:]
        names += [f"{names[-1] if names else 'input'}_{i}" for i in range(len(self._inputs))]  # of *inputs
        given = [self._placeholder(name, x) for name, x in zip(names, self._inputs, strict=False)]
        named = {name: self._placeholder(name, x) for name, x in self._keywords.items()}
        self._names = {id(t): name for name, t in _tensors(self.root)}
        return lambda root, *args: root_fn(root, *args, **named), [self.root, *given]

    def _placeholder(self, name: str, value: torch.Tensor) -> fx.Proxy:
        proxy = self.create_proxy("placeholder", name, (), {})
        assert isinstance(proxy, ConcreteProxy)
        proxy.value = proxy.node.meta["val"] = value
        return proxy

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
            raise needs_value(f"{target}()")
        if kind in {"call_function", "call_method", "call_module", "get_attr"}:
            args, kwargs = fx.node.map_aggregate((args, kwargs), plain)
            self._count_single_samples(target, args)
            self._refuse_foreign_tensors((args, kwargs))
            if not torch.is_grad_enabled() and kind != "get_attr" and target != "detach":
                args, kwargs = fx.node.map_aggregate((args, kwargs), self._detached)
            self._saved.clear()
            value = self._run(kind, target, _values(args), _values(kwargs))
            if not _has_tensor(value):
                return tagged(value)
            if isinstance(value, tuple | list) and value and len(value) % PROBE == 0:
                raise takes_samples_apart()
        proxy = super().create_proxy(kind, target, args, kwargs, name, type_expr, proxy_factory_fn)
        assert isinstance(proxy, ConcreteProxy)
        proxy.value = value
        proxy.node.meta.update(
            val=value, scope=self.scope.module_path, origin=origin_of_call(), saved=tuple(self._saved)
        )
        if kind == "call_module" and not torch.is_grad_enabled() and isinstance(value, torch.Tensor):
            return self.create_proxy("call_method", "detach", (proxy,), {})  # its parameters have a history
        return proxy

    def _detached(self, argument: Any) -> Any:
        """Return an argument of a call under ``torch.no_grad()`` without its history."""
        value = _value(argument)
        has_history = isinstance(value, torch.Tensor) and value.requires_grad
        return self.create_proxy("call_method", "detach", (argument,), {}) if has_history else argument

    def _count_single_samples(self, target: Any, args: tuple[Any, ...]) -> None:
        """Refuse loops over the samples of a batch."""
        if target is operator.getitem and isinstance(args[0], ConcreteProxy):
            value, items = args[0].value, args[1] if isinstance(args[1], tuple) else (args[1],)
            grown = isinstance(value, torch.Tensor) and value.dim() and value.shape[0] and value.shape[0] % PROBE == 0
            self._single_samples += bool(grown) and type(items[0]) is int
            if self._single_samples > MAX_SINGLE_SAMPLES:
                raise takes_samples_apart()

    def _refuse_foreign_tensors(self, arguments: Any) -> None:
        def check(a: Any) -> Any:
            if isinstance(a, torch.Tensor) and id(a) not in self._names:
                raise TraceError(
                    f"{origin_of_call()} uses a tensor that is neither an input nor an attribute of the module nor "
                    "made by a factory of torch. Register it as a buffer."
                )
            return a

        fx.node.map_aggregate(arguments, check)

    def create_arg(self, a: Any) -> Any:
        """Return what a node stores for an argument; tensors of the module become ``get_attr`` nodes."""
        if isinstance(a, torch.Tensor):
            self._refuse_foreign_tensors(a)
            return self.create_proxy("get_attr", self._names[id(a)], (), {}).node
        return super().create_arg(a)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Record a call of a module; calls inside of a leaf just run."""
        if self.is_running or self.is_elsewhere:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return whether a module is one operator: torch's own, or a subclass that keeps torch's ``forward``."""
        if type(m).__name__ in _RANDOM_LEAVES or is_custom(type(m)):
            return True
        if hasattr(m, "parametrizations") or _is_pruned_product(m):
            return False  # its weight is computed from others
        home = m.forward.__module__  # an instance may have a forward of its own
        if home.startswith("torch.nn.utils"):
            return False
        keeps_forward = home.startswith("torch.nn.") and not isinstance(m, nn.Sequential)
        return keeps_forward or super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return ConcreteProxy(node, self)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Return a proxy for a tensor of the module; fx itself would look through all of them each time."""
        del attr
        name = self._names.get(id(attr_val)) if isinstance(attr_val, torch.Tensor) else None
        if self.is_running or self.is_elsewhere or name is None:
            return attr_val
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    def _run(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:  # noqa: PLR0911  # a table of kinds
        self.is_running = True
        try:
            match kind:
                case "get_attr":
                    return attribute(self.root, target)
                case "call_module":
                    module = self.root.get_submodule(target)
                    if is_custom(type(module)) and (shape_of := custom_rule(type(module)).output_shape):
                        return Unseen.apply(shape_of, *args, *kwargs.values(), *module.parameters())
                    if isinstance(module, _BatchNorm) and module.training:
                        return LightBatchNorm.apply(args[0], module.weight)
                    return module.forward(*args, **kwargs)
                case "call_method":
                    return getattr(args[0], target)(*args[1:], **kwargs)
                case _ if getattr(target, "__name__", "") == "scaled_dot_product_attention":
                    return light_attention(target, *args, **kwargs)
                case _ if target is functional.batch_norm:
                    return LightBatchNorm.apply(args[0], args[3] if len(args) > 3 else kwargs.get("weight"))
                case _ if target in _FACTORIES:
                    return target(*args, **{**kwargs, "device": "meta"})
                case _:
                    return target(*args, **kwargs)
        finally:
            self.is_running = False

    def record(self, root: nn.Module) -> fx.Graph:
        """Trace a module; every node's ``meta["saved"]`` holds what autograd keeps for its backward."""
        state, saved = {t.untyped_storage()._cdata for _, t in _tensors(root)}, self._saved

        def keep(tensor: torch.Tensor) -> torch.Tensor:  # autograd keeps it: with self in it, nothing would be freed
            if tensor.untyped_storage()._cdata not in state:
                saved.append(tensor)
            return tensor

        with (
            _Factories(self),
            _watched(self),
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
        ):
            graph = self.trace(root)
        saved.clear()
        return graph


@contextlib.contextmanager
def _watched(tracer: _Tracer) -> Iterator[None]:
    """Record a user's ``autograd.Function`` as one call, and let attention keep what the fused kernel keeps."""
    apply = torch.autograd.Function.__dict__["apply"]
    attention = functional.scaled_dot_product_attention

    def watched_apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if tracer.is_running or not any(isinstance(a, ConcreteProxy) for a in args):
            return apply.__func__(cls, *args, **kwargs)
        return tracer.create_proxy("call_function", call_of(cls), args, kwargs)

    def watched_attention(*args: Any, **kwargs: Any) -> Any:
        is_traced = tracer.is_running and not tracer.is_elsewhere
        return light_attention(attention, *args, **kwargs) if is_traced else attention(*args, **kwargs)

    torch.autograd.Function.apply = classmethod(watched_apply)  # type: ignore[assignment]  # put back
    functional.scaled_dot_product_attention = watched_attention
    try:
        yield
    finally:
        torch.autograd.Function.apply = apply  # type: ignore[method-assign]  # as it was
        functional.scaled_dot_product_attention = attention


def _is_pruned_product(module: nn.Module) -> bool:
    """Return whether a hook of ``torch.nn.utils.prune`` computes the weight of a convolution or linear layer."""
    hooks = module._forward_pre_hooks.values()
    return isinstance(module, _ConvNd | nn.Linear) and any(isinstance(hook, prune.BasePruningMethod) for hook in hooks)


def _value(argument: Any) -> Any:
    return argument.value if isinstance(argument, ConcreteProxy) else argument


def _values(structure: Any) -> Any:
    return fx.node.map_aggregate(structure, _value)


def _has_tensor(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return True
    if isinstance(value, dict):
        return any(map(_has_tensor, value.values()))
    return isinstance(value, tuple | list) and any(map(_has_tensor, value))


def attribute(root: nn.Module, path: str) -> Any:
    """Return the attribute of a module at a dotted path."""
    return operator.attrgetter(path)(root)


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a module by dotted path: parameters, buffers, plain attributes."""
    yield from module.named_parameters()
    yield from module.named_buffers()
    for name, part in module.named_modules():
        for attr, value in vars(part).items():
            if isinstance(value, torch.Tensor):
                yield f"{name}.{attr}" if name else attr, value


def on_meta(module: nn.Module) -> nn.Module:
    """Return a copy of a module whose parameters, buffers and other tensors are on the meta device."""
    memo: dict[int, Any] = {}
    for _, tensor in _tensors(module):
        shell = torch.empty_like(tensor, device="meta", requires_grad=False)
        if isinstance(tensor, nn.Parameter):
            shell = nn.Parameter(shell, tensor.requires_grad)
        memo[id(tensor)] = shell
    return copy.deepcopy(module, memo)


class NamedInput(Protocol):
    """An input of a model, as plan files hold it: the whole batch's shape, and whether it is passed by keyword."""

    name: str
    shape: list[int]
    dtype: DType
    keyword: bool


def empty_inputs(described: Iterable[NamedInput]) -> tuple[Inputs, Keywords]:
    """Return meta tensors for the inputs of a plan: positional ones, and those by keyword."""
    made = [(x, torch.empty(tuple(x.shape), dtype=getattr(torch, x.dtype), device="meta")) for x in described]
    return tuple(t for x, t in made if not x.keyword), {x.name: t for x, t in made if x.keyword}


def trace(
    module: nn.Module,
    example_inputs: Inputs,
    keywords: Keywords = NO_KEYWORDS,
    *,
    training: bool = True,
    tracer: Tracer = "auto",
) -> fx.Graph:
    """Trace a module on the meta device.

    Args:
        module: any module; it is neither changed nor run.
        example_inputs: positional inputs with the global batch as their first size, on any device.
        keywords: keyword inputs by name.
        training: trace what it does in training, or else in evaluation.
        tracer: ``fx`` (the concrete tracer), ``export``, or export where fx fails.

    Returns:
        The graph, right for any batch. ``node.meta`` holds ``val`` (a meta tensor for a batch of
        ``PROBE`` samples), ``scope`` (the module path of the caller), ``origin`` (file and line)
        and ``saved`` (the tensors that its backward needs, weights and buffers left out). It binds to real weights by
        ``fx.GraphModule(module, graph)``.

    Raises:
        TraceError: the model needs the value of a tensor, or fails on these input shapes.
    """
    for name in ("code", "graph"):
        if name in module._modules:
            raise TraceError(
                f"{type(module).__name__} has a submodule called {name!r}, a name that every graph module of torch.fx "
                "takes for itself. Rename it."
            )
    root = on_meta(module).train(training)
    values = tuple(x.detach().to("meta") for x in example_inputs)
    named = {name: x.detach().to("meta") for name, x in keywords.items()}
    _refuse_wrong_arguments(module, values, named)
    batch = next((x.shape[0] for x in (*values, *named.values()) if x.dim()), 0)

    def probe(x: torch.Tensor) -> torch.Tensor:
        return x.new_empty((PROBE, *x.shape[1:])) if x.dim() and x.shape[0] == batch else x

    with _ONE_AT_A_TIME:
        try:
            graph = _traced(root, tuple(map(probe, values)), {k: probe(x) for k, x in named.items()}, tracer)
        except TraceError:
            raise
        except Exception as error:  # whatever the user's forward() raises on these shapes
            raise _failure(root, values, named, error) from error
    bind_batch_sizes(graph)
    return graph


def _traced(root: nn.Module, values: Inputs, keywords: Keywords, tracer: Tracer) -> fx.Graph:
    if tracer == "export":
        return _exported(root, values, keywords)
    try:
        found = _Tracer(values, keywords)
        graph = found.record(root)
    except TraceError:
        raise
    except Exception as error:
        if tracer == "fx":
            raise
        with contextlib.suppress(Exception):  # the first error is the one that speaks of the user's code
            graph = _exported(root, values, keywords)
            _log.info("traced by torch.export, because the tracer failed: %s: %s", type(error).__name__, error)
            return graph
        raise
    if found.has_counted_samples:
        _refuse_counted_samples(root, values, keywords, graph)
    return graph


def _refuse_counted_samples(root: nn.Module, values: Inputs, keywords: Keywords, graph: fx.Graph) -> None:
    """Check that a model that calls ``len`` on a batch only uses multiples of it, by tracing another batch.

    Raises:
        TraceError: a number in the graph is no multiple of the batch, but changes with it.
    """

    def doubled(x: torch.Tensor) -> torch.Tensor:
        return x.new_empty((2 * PROBE, *x.shape[1:])) if x.dim() and x.shape[0] == PROBE else x

    other = _Tracer(tuple(map(doubled, values)), {k: doubled(x) for k, x in keywords.items()}).record(root)
    nodes = itertools.zip_longest(graph.nodes, other.nodes)
    differing = next((a or b for a, b in nodes if a is None or b is None or not _scales(a, b)), None)
    if differing is not None:
        raise TraceError(
            f"{differing.meta.get('origin', 'forward()')} computes with the number of samples in the batch (its len), "
            "so that a part of the batch would give another result. Use sizes as they are (x.view(len(x), -1))."
        )


def _scales(a: fx.Node, b: fx.Node) -> bool:
    """Return whether two nodes are the same but for multiples of the batch, which has doubled."""

    def numbers(node: fx.Node) -> list[Any]:
        found: list[Any] = []
        fx.node.map_aggregate(
            (node.args, node.kwargs), lambda v: found.append(v) if isinstance(v, int | float) else None
        )
        return found

    pairs = itertools.zip_longest(numbers(a), numbers(b))
    return a.target == b.target and all(y == (2 * x if is_batch_size(x) else x) for x, y in pairs)


def _exported(root: nn.Module, values: Inputs, keywords: Keywords) -> fx.Graph:
    from planner.frontend.export import trace_by_export

    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # where export fails too, the first error says more than its reports
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # torch prints the graph until there, of any length
            graph = trace_by_export(root, values, keywords)
    finally:
        logging.disable(level)
    graph.traced_by = "export"  # type: ignore[attr-defined]  # a note for reports
    return graph


def _failure(root: nn.Module, values: Inputs, keywords: Keywords, error: Exception) -> TraceError:
    """Return what goes wrong with the batch that the user gave, whose sizes say more than those of the probe."""
    try:
        _Tracer(values, keywords).record(root)
    except TraceError as found:
        return found
    except Exception as found:
        return _as_trace_error(found, root, values, keywords)
    return TraceError(
        f"{origin_of_error(error)}: {type(root).__name__} runs on the given batch, but not on any number of samples, "
        f"so the batch cannot be split: {type(error).__name__}: {error} (with {PROBE} samples)"
    )


def _as_trace_error(error: Exception, module: nn.Module, values: Inputs, keywords: Keywords) -> TraceError:
    if "nonzero" in str(error) or "data-dependent" in str(error).lower() or "DataDependent" in type(error).__name__:
        return needs_value("a size that depends on values", origin_of_error(error))
    shapes = ", ".join(str(tuple(x.shape)) for x in (*values, *keywords.values()))
    return TraceError(
        f"{origin_of_error(error)}: {type(module).__name__} fails on inputs of shape {shapes}: "
        f"{type(error).__name__}: {error}"
    )


def _refuse_wrong_arguments(module: nn.Module, values: Inputs, keywords: Keywords) -> None:
    try:
        inspect.signature(module.forward).bind(*values, **keywords)
    except TypeError as error:
        shapes = ", ".join(str(tuple(x.shape)) for x in values)
        named = "".join(f", {name}={tuple(x.shape)}" for name, x in keywords.items())
        wanted = ", ".join(inspect.signature(module.forward).parameters)
        raise TraceError(
            f"{type(module).__name__} takes the inputs {wanted}, but {len(values) + len(keywords)} were given: "
            f"{shapes}{named}"
        ) from error
