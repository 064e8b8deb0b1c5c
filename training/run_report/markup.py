"""HTML as values: text is escaped unless it is markup already. Knows no runs.

Captions and class names are foreign text; what is not `Markup` cannot become part of the page's structure.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

_VOID = ("img", "meta", "br", "col")


class Markup(str):
    """Text that is HTML; any other string is text."""

    __slots__ = ()


def escaped(text: object) -> Markup:
    """`text` as HTML that shows it; markup as it is."""
    return text if isinstance(text, Markup) else Markup(html.escape(str(text), quote=True))


def joined(*children: object) -> Markup:
    """The children one behind the other; None is left out."""
    return Markup("".join(escaped(child) for child in children if child is not None))


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """An element. Underscores in attribute names are hyphens but for one at the end, as in `class_`.

    An attribute of None or False is left out; one of True has no value.
    """
    given = "".join(
        _attribute(key, value) for key, value in attributes.items() if value is not None and value is not False
    )
    if name in _VOID:
        return Markup(f"<{name}{given}>")
    return Markup(f"<{name}{given}>{joined(*children)}</{name}>")


def _attribute(key: str, value: object) -> str:
    name = key.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{escaped(value)}"'


def section(title: str, *children: object) -> Markup:
    """A part of the page under its heading."""
    return tag("section", tag("h2", title), *children)


def note(*children: object) -> Markup:
    """A remark below or in place of a figure."""
    return tag("p", *children, class_="note")


def folded(summary: object, *children: object, is_open: bool = False) -> Markup:
    """What a reader opens when they want it."""
    return tag("details", tag("summary", summary), *children, open=is_open)


def table(heads: Sequence[object], rows: Iterable[Sequence[object]], caption: str, text_columns: int = 1) -> Markup:
    """A table whose first column names its rows; columns from `text_columns` on hold numbers, aligned right.

    caption: what the table shows, for those who do not see it.
    """
    classes = ["" if index < text_columns else "number" for index in range(len(heads))]
    head = tag(
        "tr", *(tag("th", text, scope="col", class_=kind or None) for text, kind in zip(heads, classes, strict=True))
    )
    body = [
        tag(
            "tr",
            tag("th", row[0], scope="row"),
            *(tag("td", cell, class_=kind or None) for cell, kind in zip(row[1:], classes[1:], strict=True)),
        )
        for row in rows
    ]
    shown = tag("table", tag("caption", caption), tag("thead", head), tag("tbody", *body))
    return tag("div", shown, class_="scroll", tabindex="0", role="region", aria_label=caption)
