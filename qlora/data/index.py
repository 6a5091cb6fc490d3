"""What tells the rows of a source apart: a digest of each, and of what comes before its answer.

That is all that splits, weights and duplicates are decided by: 16 bytes a row, read once and kept in the cache.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qlora.data.cache import cached, key_of
from qlora.data.formats import Chat, Completion, Example, Examples, single
from qlora.data.sources import BadRows, source_digest
from qlora.errors import Problem
from qlora.recipe import Source

ProgressCallback = Callable[[int, int], None]
"""Called with what is done and what there is in all."""

REPORTED = 1000  # parts of a source after each of which progress is reported


@dataclass(frozen=True)
class Index:
    """Digests of N rows: uint64 [N], the first bytes of a SHA-256, so that their order is that of the digests."""

    whole_N: np.ndarray
    prompt_N: np.ndarray
    """Plain text has no part before an answer: as `whole_N`."""

    def __len__(self) -> int:
        return len(self.whole_N)

    def weighted(self, weight: float) -> np.ndarray:
        """Numbers of rows, each as often as the weight says; of a fraction, those that content chooses, in order."""
        whole = int(weight)
        every = np.tile(np.arange(len(self)), whole)
        count = round((weight - whole) * len(self))
        if count == 0:
            return every
        # Equal digests in their order: sorting is stable.
        return np.concatenate([every, np.sort(np.argsort(self.whole_N, kind="stable")[:count])])


def content_key(source: Source) -> list[Any]:
    """All that decides which rows a source has, for keys of the cache."""
    return [source_digest(source), source.format, source.columns, source.max_rows]


def read_index(source: Source, progress: ProgressCallback | None = None) -> Index:
    """Reads a source once.

    Raises `UserError` for a source that cannot be read, and for rows that do not fit the format: all counted, the first
    ones shown.
    """
    return cached(
        key_of("index", *content_key(source)), lambda folder: _write(source, folder / "index.npy", progress), _read
    )


def _read(folder: Path) -> Index:
    digests_N2 = np.load(folder / "index.npy", mmap_mode="r")
    return Index(digests_N2[:, 0], digests_N2[:, 1])


def _write(source: Source, file: Path, progress: ProgressCallback | None) -> None:
    digests, bad, reported = array("Q"), BadRows(), 0
    for row in Examples(source):
        if isinstance(row.example, Problem):
            bad.add(row.example)
        else:
            digests.extend(_digests(row.example))
        if progress is not None and row.share * REPORTED >= reported + 1:
            reported = int(row.share * REPORTED)
            progress(reported, REPORTED)
    bad.raise_any(len(digests) // 2 + bad.count)
    np.save(file, np.frombuffer(digests, dtype=np.uint64).reshape(-1, 2))


def _digests(example: Example) -> tuple[int, int]:
    """Of an example, and of what comes before its answer."""
    whole = _digest(example)
    answered = single(example)
    if isinstance(answered, Chat):
        return whole, _digest((answered.messages[:-1], answered.tools))
    return whole, _digest(answered.prompt) if isinstance(answered, Completion) else whole


def _digest(content: Any) -> int:
    return int.from_bytes(hashlib.sha256(repr(content).encode()).digest()[:8], "big")
