"""From the MODEL argument to a module.

MODEL is a name of ``planner.models``, ``torchvision:NAME``, ``timm:NAME`` (``planner.frontend.zoo``),
``package.module:callable`` or ``path/to/file.py:callable``.
Modules are looked up as ``python -m`` does, the current folder first. Loading runs the user's code,
which may raise anything: this boundary turns it into a ``UsageError`` and keeps the cause.
"""

import hashlib
import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, Final

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from planner.errors import UsageError
from planner.frontend import zoo
from planner.models import entry

Shape = tuple[int, ...]

_LOGGER = logging.getLogger(__name__)
_DRAWS: Final = frozenset({torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.bernoulli_})


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A module and where it came from.

    Attributes:
        module: the network; on the meta device unless asked otherwise or it cannot be built there.
        name: the registered name, that of the library, or that of the callable.
        source: the reference as the user gave it.
        input_shapes: of one sample of each input, without the batch; empty where unknown.
    """

    module: nn.Module
    name: str
    source: str
    input_shapes: tuple[Shape, ...]


def load_model(
    reference: str, arguments: Mapping[str, object] = MappingProxyType({}), *, device: str = "meta"
) -> LoadedModel:
    """Return the model that a MODEL argument means.

    Args:
        reference: a registered name, ``torchvision:NAME``, ``timm:NAME``, ``package.module:callable``
            or ``path/to/file.py:callable``. The callable, or the module it returns, may carry an
            ``input_shape``, or ``input_shapes`` for several inputs.
        arguments: keyword arguments of the callable.
        device: where the weights are made; on ``meta`` they take no memory. For a callable that fails
            there, only its weights are; one that fails then too is built on the CPU.

    Raises:
        UnknownNameError: a plain name that is not registered, or one that the library does not know.
        UsageError: the library, file, module or callable does not exist, raises, or returns no module.
    """
    place, colon, attribute = reference.rpartition(":")
    if not colon:
        known = entry(reference)
        module = _call(known.build, reference, arguments, [device])
        return LoadedModel(module, known.name, reference, known.input_shapes)
    library, _, name = reference.partition(":")
    if library in zoo.LIBRARIES:
        found = zoo.find(reference, arguments)
        whole = _call(found.build, reference, arguments, _ways(device))
        return LoadedModel(found.part(whole), name, reference, found.input_shapes(whole))
    path = Path(place) if place.endswith(".py") else None
    with _on_sys_path(Path(os.path.realpath(path.parent)) if path else Path.cwd()):
        factory = _find(reference, path or place, attribute)
        module = _call(factory, reference, arguments, _ways(device))
    return LoadedModel(module, attribute, reference, _input_shapes(factory) or _input_shapes(module))


def load_callable(reference: str, what: str) -> Callable[..., Any]:
    """Return the callable that ``package.module:callable`` or ``path/to/file.py:callable`` means.

    Args:
        reference: as a MODEL argument.
        what: it is, for the message.

    Raises:
        UsageError: the file, module or callable does not exist, or its code raises.
    """
    place, colon, attribute = reference.rpartition(":")
    if not colon:
        raise UsageError(f"{what} {reference!r}: give package.module:callable or path/to/file.py:callable")
    path = Path(place) if place.endswith(".py") else None
    with _on_sys_path(Path(os.path.realpath(path.parent)) if path else Path.cwd()):
        return _find(reference, path or place, attribute)


@contextmanager
def _on_sys_path(folder: Path) -> Iterator[None]:
    """Let imports see this folder first, for a while."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with suppress(ValueError):  # the user's code may have removed it
            sys.path.remove(str(folder))


def _find(reference: str, place: Path | str, attribute: str) -> Callable[..., object]:
    """Return the callable of this name in a file or module."""
    if isinstance(place, Path) and not os.path.isfile(place):  # noqa: PTH113  # that of Path raises for long names
        raise UsageError(f"model {reference!r}: there is no file {str(place)!r}")
    try:
        module = _run_file(place) if isinstance(place, Path) else importlib.import_module(place)
    except Exception as error:
        raise UsageError(
            f"model {reference!r}: cannot import {str(place)!r}: {type(error).__name__}: {error}"
        ) from error
    try:
        found: object = attrgetter(attribute)(module)
    except AttributeError as error:
        raise UsageError(f"model {reference!r}: {str(place)!r} has no {attribute!r}") from error
    if not callable(found):
        raise UsageError(
            f"model {reference!r}: {attribute!r} is a {type(found).__name__}, not a callable that "
            "returns a torch.nn.Module"
        )
    return found


def _run_file(path: Path) -> ModuleType:
    """Return a file as a module, under a name of its own that clashes with no import."""
    name = f"layerwise_model_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None, "every .py file has a loader"
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look classes up there
    spec.loader.exec_module(module)
    return module


_META_WEIGHTS = "meta weights"


def _ways(device: str) -> tuple[str, ...]:
    """Return where to build a model, best first; some cannot be built on the meta device."""
    return ("meta", _META_WEIGHTS, "cpu") if device == "meta" else (device, "cpu")


def _call(
    factory: Callable[..., object],
    reference: str,
    arguments: Mapping[str, object],
    devices: Iterable[str],
) -> nn.Module:
    """Return what the callable builds in the first of the ways that does not raise."""
    failure: Exception | None = None
    for device in devices:
        try:
            with _weights_on_meta() if device == _META_WEIGHTS else torch.device(device), _NoDraws():
                module = factory(**arguments)
        except Exception as error:
            _LOGGER.info("model %s cannot be built on %s: %s", reference, device, error)
            failure = error
            continue
        if not isinstance(module, nn.Module):
            raise UsageError(f"model {reference!r} returned a {type(module).__name__}, not a torch.nn.Module")
        return module
    given = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    raise UsageError(
        f"model {reference!r} called with ({given}) raised {type(failure).__name__}: {failure}"
    ) from failure


class _NoDraws(TorchFunctionMode):
    """Skip drawing initial values of tensors on the meta device: there are none, and it imports torch's compiler."""

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Iterable[type],  # the protocol's
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        if func in _DRAWS and isinstance(args[0], torch.Tensor) and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


@contextmanager
def _weights_on_meta() -> Iterator[None]:
    """Make parameters without memory, and all else on the CPU: for models that compute their sizes with tensors."""
    register = nn.Module.register_parameter

    def without_memory(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None:
            param = nn.Parameter(param.to("meta"), param.requires_grad)
        register(module, name, param)

    nn.Module.register_parameter = without_memory  # type: ignore[method-assign,assignment]  # put back below
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]  # as it was


def _input_shapes(owner: object) -> tuple[Shape, ...]:
    """Return the attribute ``input_shapes`` or ``input_shape``; empty where it is missing or means something else."""
    shapes = getattr(owner, "input_shapes", None) or [getattr(owner, "input_shape", None)]
    if not isinstance(shapes, tuple | list) or not all(map(_is_shape, shapes)):
        return ()
    return tuple(tuple(shape) for shape in shapes)


def _is_shape(value: object) -> bool:
    return isinstance(value, tuple | list) and bool(value) and all(isinstance(n, int) and n >= 1 for n in value)
