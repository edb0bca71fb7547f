"""How torch.compile sees what the runtime puts into graphs."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def uncompiled(function: Callable[P, R]) -> Callable[P, R]:
    """Keep torch.compile out of a function and of all that it calls: a graph ends in front of it.

    Collectives, and what depends on the sizes of other ranks' batches, are no part of a compiled graph.
    ``torch.compiler.disable`` loads the compiler, which takes seconds; here the first call does (as the first
    optimizer that a process makes does), not the import.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        eager: Callable[P, R] | None = getattr(function, "eager", None)
        if eager is None:
            eager = torch.compiler.disable(function)
            function.eager = eager  # type: ignore[attr-defined]  # a note on the function
        return eager(*args, **kwargs)

    return run
