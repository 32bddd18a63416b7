"""Tables as HTML, every text escaped: for notebooks and the report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any


class Raw(str):
    """HTML that is not escaped again."""


def cell(value: Any) -> str:
    """The value as escaped text; a `Raw` as it is."""
    return value if isinstance(value, Raw) else escape(str(value))


def table(header: Sequence[Any], rows: Iterable[Sequence[Any]], caption: str = "") -> str:
    """An HTML table: first column left, the others right.

    >>> table(["a", "b"], [["<i>", 1]])
    '<table><thead><tr><th>a</th><th>b</th></tr></thead><tbody><tr><th>&lt;i&gt;</th><td>1</td></tr></tbody></table>'
    """
    head = "".join(f"<th>{cell(h)}</th>" for h in header)
    body = "".join(
        f"<tr><th>{cell(row[0])}</th>{''.join(f'<td>{cell(v)}</td>' for v in row[1:])}</tr>" for row in rows
    )
    title = f"<caption>{cell(caption)}</caption>" if caption else ""
    return f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def items(entries: Iterable[Any]) -> str:
    """An unordered list."""
    return f"<ul>{''.join(f'<li>{cell(e)}</li>' for e in entries)}</ul>"
