"""Paths of the machine that a run was made on, which nothing that is given away may name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from qlora.paths import cache_dir
from qlora.recipe import Recipe


class Private:
    """Knows the folders of a run, and takes them out of texts: what is below them is named from there."""

    def __init__(self, recipe: Recipe, run: Path) -> None:
        named = [Path(text) for text in _strings(recipe.model_dump(mode="json")) if Path(text).is_absolute()]
        folders = {Path.home(), Path.cwd(), cache_dir(), run.absolute().parent, *(path.parent for path in named)}
        self._folders = sorted({str(each) for folder in folders for each in (folder, folder.resolve())}, key=len)

    def text(self, text: str) -> str:
        """A text in which these folders are not named."""
        return "." if text in self._folders else self._pattern.sub("", text)

    def value(self, value: Any) -> Any:
        """Plain data, every text in it so."""
        if isinstance(value, dict):
            return {self.text(key): self.value(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.value(item) for item in value]
        return self.text(value) if isinstance(value, str) else value

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        longest_first = [re.escape(folder.rstrip("/")) for folder in reversed(self._folders) if folder.strip("/")]
        return re.compile(rf"(?<![\w.~/-])(?:{'|'.join(longest_first)})/")


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)
