"""Tables as HTML, for notebooks: every text escaped, no style sheet, no script."""

from collections.abc import Sequence
from html import escape


def table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, num_text: int = 1, emphasis: int | None = None
) -> str:
    """Return a table.

    Args:
        columns: headings; none of them where all are empty.
        rows: of as many cells.
        num_text: leading columns that are text; the others are numbers, aligned to the right.
        emphasis: index of the row that stands out.
    """
    styles = ["text-align:left" if i < num_text else "text-align:right" for i in range(len(columns))]
    head = f"<thead>{_row('th', columns, styles)}</thead>" if any(columns) else ""
    bold = [f"{style};font-weight:bold" for style in styles]
    body = "".join(_row("td", row, bold if i == emphasis else styles) for i, row in enumerate(rows))
    return f"<table>{head}<tbody>{body}</tbody></table>"


def titled(title: str, *parts: str) -> str:
    """Return HTML with a title above it."""
    return f"<div><b>{escape(title)}</b>{''.join(parts)}</div>"


def sentence(text: str) -> str:
    """Return a paragraph."""
    return f"<p>{escape(text)}</p>"


def folded(summary: str, content: str) -> str:
    """Return HTML that is shown when its summary is clicked."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def _row(tag: str, cells: Sequence[str], styles: Sequence[str]) -> str:
    found = (f'<{tag} style="{style}">{escape(cell)}</{tag}>' for style, cell in zip(styles, cells, strict=True))
    return f"<tr>{''.join(found)}</tr>"
