"""Options that several commands share, written once as the fields of a dataclass."""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import get_type_hints


def with_fields(function: Callable[..., None]) -> Callable[..., None]:
    """Return a command with the fields of its dataclass parameters in their place.

    typer reads a signature, and has no notion of a group of options. From

    ::

        def show(path: Path, terminal: Terminal) -> None: ...

    it gets to see ``show(*, path, verbose, quiet)``, because those are the fields of ``Terminal``.
    """
    hints = get_type_hints(function, include_extras=True)
    groups = {n: hint for n, hint in hints.items() if isinstance(hint, type) and is_dataclass(hint)}
    parameters = list(_parameters(function, groups))

    @functools.wraps(function)
    def command(**values: object) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        function(**values)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # read by inspect
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def _parameters(function: Callable[..., None], groups: Mapping[str, type]) -> Iterator[inspect.Parameter]:
    for own in inspect.signature(function).parameters.values():
        group = groups.get(own.name)
        found = inspect.signature(group).parameters.values() if group else (own,)
        for parameter in found:
            yield parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
