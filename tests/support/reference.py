"""The reference page of the Python interface, made of signatures and docstrings."""

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from support.pages import ROOT

PAGE = ROOT / "planner" / "docs" / "api.md"
WIDTH = 100
QUOTE = "'\""
HEAD = """# Python interface

Made of the docstrings; names that are listed here stay. This page is written anew by
`LAYERWISE_WRITE_PAGES=1 pytest tests/test_interface.py`.
"""
_SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields|Example):$")
_ITEM = re.compile(r"([\w*]+): (.*)$", re.DOTALL)
_Definition = ast.FunctionDef | ast.ClassDef


def reference(names: Mapping[str, Sequence[str]]) -> str:
    """Return the page for these names, by module."""
    parts = [HEAD]
    for module, of_module in names.items():
        parts.append(f"## {module}\n")
        parts += [_entry(module, name, getattr(importlib.import_module(module), name)) for name in of_module]
    text = re.sub(r"\n{3,}(?!class )", "\n\n", "\n".join(parts))
    return text.rstrip("\n") + "\n"


def definition(found: Any) -> _Definition:
    """Return the code of a function or class; of an overloaded function the one with the body."""
    return _Code(found).node


def methods(node: ast.ClassDef) -> list[ast.FunctionDef]:
    """Return the public methods and properties that a class defines itself."""
    return [each for each in node.body if isinstance(each, ast.FunctionDef) and not each.name.startswith("_")]


class _Code:
    """A function or class, and its parts as they are written."""

    def __init__(self, found: Any) -> None:
        self._source = textwrap.dedent(inspect.getsource(found))
        (node,) = ast.parse(self._source).body
        assert isinstance(node, _Definition)
        self.node: _Definition = node

    def text(self, part: ast.AST) -> str:
        return (
            " ".join((ast.get_source_segment(self._source, part) or "").split()).replace("( ", "(").replace(", )", ")")
        )

    def title(self) -> str:
        """Return a signature, or a class with its fields."""
        if isinstance(self.node, ast.FunctionDef):
            return self.signature(self.node)
        bases = f"({', '.join(map(self.text, self.node.bases))})" if self.node.bases else ""
        fields = [each for each in self.node.body if isinstance(each, ast.AnnAssign)]
        lines = [self.text(each) for each in fields if not self.text(each.target).startswith("_")]
        return f"class {self.node.name}{bases}" + (":\n" + "\n".join(f"    {line}" for line in lines) if lines else "")

    def signature(self, node: ast.FunctionDef) -> str:
        arguments = list(self._arguments(node.args))
        line = f"def {node.name}({', '.join(arguments)}){self._returned(node)}"
        if len(line) <= WIDTH:
            return line
        return f"def {node.name}(\n" + "".join(f"    {each},\n" for each in arguments) + f"){self._returned(node)}"

    def method(self, node: ast.FunctionDef) -> str:
        """Return how a method or property is used."""
        kinds = {self.text(each) for each in node.decorator_list}
        if kinds & {"property", "cached_property"}:
            return node.name + (f": {self.text(node.returns)}" if node.returns else "")
        arguments = list(self._arguments(node.args))
        if "staticmethod" not in kinds:
            arguments = arguments[1:]
        return f"{node.name}({', '.join(arguments)}){self._returned(node)}"

    def _returned(self, node: ast.FunctionDef) -> str:
        return f" -> {self.text(node.returns).strip(QUOTE)}" if node.returns else ""

    def _arguments(self, found: ast.arguments) -> Iterator[str]:
        positional = [*found.posonlyargs, *found.args]
        defaults = [None] * (len(positional) - len(found.defaults)) + list(found.defaults)
        for argument, default in zip(positional, defaults, strict=True):
            yield self._argument(argument, default)
        if found.vararg is not None:
            yield "*" + self._argument(found.vararg, None)
        elif found.kwonlyargs:
            yield "*"
        for argument, default in zip(found.kwonlyargs, found.kw_defaults, strict=True):
            yield self._argument(argument, default)
        if found.kwarg is not None:
            yield "**" + self._argument(found.kwarg, None)

    def _argument(self, found: ast.arg, default: ast.expr | None) -> str:
        kind = f": {self.text(found.annotation)}" if found.annotation else ""
        return f"{found.arg}{kind}" + (f"{' = ' if kind else '='}{self.text(default)}" if default else "")


def _entry(module: str, name: str, found: Any) -> str:
    code = _Code(found)
    gap = "\n\n" if isinstance(code.node, ast.ClassDef) else "\n"
    fence = f"```python\nfrom {module} import {name}\n{gap}{code.title()}\n```\n"
    lines = [f"### {name}\n", fence, _text(found.__doc__ or "")]
    own = methods(code.node) if isinstance(code.node, ast.ClassDef) else []
    lines += [f"**`{code.method(each)}`** {_text(ast.get_docstring(each) or '')}" for each in own]
    return "\n".join(lines)


def _text(docstring: str) -> str:
    """Return a docstring in Google's style as Markdown."""
    blocks = re.split(r"\n(?=(?:Args|Attributes|Raises|Returns|Yields|Example):\n)", inspect.cleandoc(docstring))
    return "".join(_block(block.strip("\n")) for block in blocks if block.strip())


def _block(text: str) -> str:
    head, _, rest = text.partition("\n")
    section = _SECTION.match(head)
    if section is None:
        return re.sub(r"``([^`]+)``", r"`\1`", _literal(text)) + "\n\n"
    body = textwrap.dedent(rest)
    if section[1] == "Example":
        return f"```\n{body.strip()}\n```\n\n"
    entries = (" ".join(entry.split()) for entry in re.split(r"\n(?=\S)", body.strip("\n")) if entry.strip())
    lines = ("- " + _ITEM.sub(r"`\1`: \2", entry) for entry in entries)
    return f"{section[1]}:\n\n" + re.sub(r"``([^`]+)``", r"`\1`", "\n".join(lines)) + "\n\n"


def _literal(text: str) -> str:
    """Return a text whose literal blocks, behind a line of two colons, are fenced."""

    def fenced(match: re.Match[str]) -> str:
        return f"```\n{textwrap.dedent(match[1]).rstrip()}\n```\n"

    return re.sub(r"^::\n\n((?: {4}.*\n?|\n)+)", fenced, text, flags=re.MULTILINE)
