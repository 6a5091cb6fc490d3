"""A packaged recipe as one text: what it extends laid under it, each key with the comments beside it.

Works on lines, so it wants sections in block style with keys indented by two spaces, and comments before what they are
about, as the packaged recipes have them.
"""

from __future__ import annotations

import re
from pathlib import Path

from qlora.recipe import Recipe

KEY = re.compile(r"( {2})?([A-Za-z_]\w*):")
Sections = dict[str, dict[str, list[str]]]
"""Section → key → its lines, those of comments before it included; a section's own first line is that of the key ""."""


def flattened(path: Path) -> str:
    """The text of a recipe without `extends`: its header, then its keys and those that it takes over."""
    header, sections = _parsed(path)
    order = list(Recipe.model_fields)
    lines = [line for name in sorted(sections, key=order.index) for found in sections[name].values() for line in found]
    return "".join([*header, *lines])


def _parsed(path: Path) -> tuple[list[str], Sections]:
    header: list[str] = []
    own: Sections = {}
    keys: dict[str, list[str]] = {}
    comments: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        found = KEY.match(line)
        if found is None and not own:
            header.append(line)
        elif found is None and line.lstrip().startswith("#"):
            comments.append(line)
        elif found is None:
            keys[list(keys)[-1]].append(line)
        else:
            if found[1] is None:
                keys = own.setdefault(found[2], {})
            keys[found[2] if found[1] else ""] = [*comments, line]
            comments = []
    parent = own.pop("extends", None)
    if parent is None:
        return header, own
    base = _parsed(path.parent / parent[""][-1].partition(":")[2].strip())[1]
    return header, base | {name: base.get(name, {}) | found for name, found in own.items()}
