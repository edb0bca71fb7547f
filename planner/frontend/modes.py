"""Does a model's own code ask whether it is in training? Then it may be another graph in evaluation."""

import sys
import types
from collections.abc import Iterator

from torch import fx, nn


def asks_for_mode(model: nn.Module) -> bool:
    """Return whether code of a model reads ``training``: in its classes, or in functions of the files they are in.

    Modules of ``torch.nn`` follow the mode by themselves. True may be wrong, which costs a second trace.
    """
    classes = {c for module in model.modules() for c in type(module).__mro__ if _is_own(c.__module__)}
    homes = {c.__module__ for c in classes}
    found = [value for c in classes for value in vars(c).values()]
    found += [value for name in homes if name in sys.modules for value in vars(sys.modules[name]).values()]
    found += [vars(module)["forward"] for module in model.modules() if "forward" in vars(module)]
    return any("training" in code.co_names for value in found for code in _codes(value))


def _is_own(module: str) -> bool:
    return not (module == "builtins" or module.startswith("torch."))


def _codes(value: object) -> Iterator[types.CodeType]:
    """Yield the code of a function or method, with that of the functions in it."""
    value = getattr(value, "fget", value)
    value = getattr(value, "__func__", value)
    value = getattr(value, "__wrapped__", value)
    stack = [code] if isinstance(code := getattr(value, "__code__", None), types.CodeType) else []
    while stack:
        code = stack.pop()
        yield code
        stack.extend(c for c in code.co_consts if isinstance(c, types.CodeType))


def is_same(a: fx.Graph, b: fx.Graph) -> bool:
    """Return whether two graphs do the same: the same calls with the same arguments, in one order."""

    def calls(graph: fx.Graph) -> list[tuple[object, ...]]:
        return [(node.op, node.name, str(node.target), str(node.args), str(node.kwargs)) for node in graph.nodes]

    return calls(a) == calls(b)
