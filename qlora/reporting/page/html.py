"""Markup from Python: elements are made by `tag`, and every text that is not markup already is escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable


class Html(str):
    """Text that is markup."""


Child = str | Iterable["Child"] | None


def text(words: object) -> Html:
    """Anything as text: what means something in HTML is escaped, and what no file can hold is replaced."""
    return Html(html.escape(str(words).encode("utf-8", "replace").decode(), quote=True))


def tag(name: str, *children: Child, **attributes: object) -> Html:
    """An element. Attributes: `class_` is class, `data_x` is data-x; None and False are left out, True has no value."""
    shown = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{text(value)}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    return Html(f"<{name}{shown}>{join(children)}</{name}>")


def empty(name: str, **attributes: object) -> Html:
    """An element of HTML that has no end tag, such as input; those of SVG have one."""
    return Html(tag(name, **attributes).removesuffix(f"</{name}>"))


def join(children: Child) -> Html:
    """Children one after the other; None is nothing."""
    if children is None:
        return Html()
    if isinstance(children, Html):
        return children
    if isinstance(children, str):
        return text(children)
    return Html("".join(join(child) for child in children))


def table(
    caption: str, heads: Iterable[Child], rows: Iterable[Html], *, class_: str = "", numbers: bool = True
) -> Html:
    """A table in a box of its own that scrolls sideways where it is wider than the page. Rows are made by `row`."""
    head = tag("thead", tag("tr", *(tag("th", each, scope="col") for each in heads)))
    made = tag(
        "table", tag("caption", caption), head, tag("tbody", *rows), class_=f"{class_} {'numbers' if numbers else ''}"
    )
    return tag("div", made, class_="scroll", role="region", aria_label=caption, tabindex="0")


def row(head: Child, *cells: Child, class_: str | None = None) -> Html:
    """A row whose first cell is its heading."""
    return tag("tr", tag("th", head, scope="row"), *(tag("td", cell) for cell in cells), class_=class_)


def with_code(words: str) -> Html:
    """Text in which `what stands between backticks` is code."""
    parts = words.split("`")
    return join(tag("code", part) if index % 2 else text(part) for index, part in enumerate(parts))
