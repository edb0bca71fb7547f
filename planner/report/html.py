"""One HTML file from the document of a report: styles, scripts and data in it, and nothing fetched from anywhere.

Nothing that a user named becomes markup: the title is escaped, and all else is data, which the scripts put into the
page as text. Its JSON has no ``<``, so that no name can end the element that holds it. A content security policy allows
this page's own style and script by their digests and nothing else, no connection least of all.
"""

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping
from importlib.resources import files
from typing import Final

STYLE: Final = "style.css"
SCRIPTS: Final = (
    "text.js", "canvas.js", "graph.js", "timeline.js", "matrix.js", "charts.js", "table.js", "main.js",
)  # fmt: skip
"""In this order; one script together."""


def page(title: str, document: Mapping[str, object]) -> str:
    """Return the page.

    Args:
        title: of the window.
        document: of ``planner.report.document``.
    """
    style = _file(STYLE)
    script = '"use strict";\n' + "".join(_file(name) for name in SCRIPTS)
    parts = {
        "TITLE": html.escape(title), "STYLE": style, "SCRIPT": script, "DATA": data(document),
        "POLICY": f"default-src 'none'; style-src {_digest(style)}; script-src {_digest(script)}; base-uri 'none'",
    }  # fmt: skip
    return re.sub(r"\{\{([A-Z]+)\}\}", lambda found: parts[found[1]], _file("page.html"))


def data(document: Mapping[str, object]) -> str:
    """Return a document as JSON that can stand in an element of HTML."""
    text = json.dumps(document, separators=(",", ":"), allow_nan=False)
    for mark in "<>&":  # within strings only: JSON has none of these elsewhere
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    return text


def _file(name: str) -> str:
    return (files("planner.report") / "page" / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
