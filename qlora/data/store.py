"""Rendered rows in three flat files that are mapped into memory, so that a set may be larger than memory.

| file | holds |
| --- | --- |
| tokens | uint32: a row's token ids, then those of the worse answer of a pair; the highest bit says what carries loss |
| texts | UTF-8: the answers |
| rows | a record of `ROW` for each row: where its tokens and its answer begin, how long they are, what they are |

A row is read when it is asked for. What is held of it is its number, 8 bytes.
"""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np

from qlora.data.rendering import IGNORED, RenderedRow

LOSS = np.uint32(1 << 31)
NONE = -1  # a length or judgement of what is not there
ROW = np.dtype(
    [
        ("start", "i8"),  # in tokens
        ("text", "i8"),  # in bytes
        ("example", "i8"),  # number in the source
        ("place", "i8"),  # line or index in the file
        ("file", "i4"),
        ("ids", "u8"),  # digest of the token ids
        ("prompt_ids", "u8"),  # of those before the last answer
        ("length", "i4"),
        ("prompt_length", "i4"),
        ("rejected", "i4"),  # tokens of the worse answer
        ("supervised", "i4"),  # tokens that carry loss
        ("text_length", "i4"),
        ("first", "i4"),  # token
        ("end", "i4"),  # label of the last token
        ("doubled", "?"),  # the second token is the first again
        ("blank", "?"),  # an answer of white space
        ("truncated", "?"),
        ("good", "i1"),
    ]
)


@dataclass(frozen=True)
class Store:
    """Rows of one source. where: of a file's number and a line or index in it, what messages say."""

    tokens: np.ndarray
    texts: np.ndarray
    rows: np.ndarray
    where: Callable[[int, int], str] = "{0}:{1}".format

    @classmethod
    def mapped(cls, folder: Path, where: Callable[[int, int], str]) -> Store:
        """The files that `Writer` wrote. Raises OSError or ValueError if they are not whole."""
        tokens, texts, rows = (_map(folder / name, dtype) for name, dtype in FILES)
        found = cls(tokens, texts, rows, where)
        if len(found.rows):
            last = found.rows[-1]
            end = last["start"] + last["length"] + max(0, last["rejected"])
            if end != len(found.tokens) or last["text"] + max(0, last["text_length"]) != len(found.texts):
                raise ValueError("files do not belong together")
        return found

    def row(self, number: int) -> RenderedRow:
        about = self.rows[number]
        start, length, rejected, text = (int(about[name]) for name in ("start", "length", "rejected", "text"))
        tokens = self.tokens[start : start + length]
        ids = tokens & ~LOSS
        labels = np.where(tokens & LOSS, ids.astype(np.int64), IGNORED)
        after = self.tokens[start + length : start + length + max(0, rejected)]
        answer = self.texts[text : text + max(0, int(about["text_length"]))]
        return RenderedRow(
            ids.tolist(),
            labels.tolist(),
            int(about["prompt_length"]),
            bool(about["truncated"]),
            None if about["text_length"] == NONE else answer.tobytes().decode("utf-8", "surrogatepass"),
            None if rejected == NONE else after.tolist(),
            None if about["good"] == NONE else bool(about["good"]),
        )


FILES: tuple[tuple[str, np.dtype], ...] = (
    ("tokens", np.dtype(np.uint32)),
    ("texts", np.dtype(np.uint8)),
    ("rows", ROW),
)


def _map(file: Path, dtype: np.dtype) -> np.ndarray:
    if file.stat().st_size == 0:
        return np.empty(0, dtype)
    return np.memmap(file, dtype, mode="r").view(np.ndarray)


class Writer:
    """Appends rows to three files."""

    def __init__(self, tokens: BinaryIO, texts: BinaryIO, rows: BinaryIO) -> None:
        self._tokens, self._texts, self._rows = tokens, texts, rows
        self._start = self._text = 0

    def add(self, rows: Iterable[tuple[RenderedRow, int, int, int]]) -> None:
        """Rows, each with the number of its example, and the file and place in it."""
        records = []
        for row, example, file, place in rows:
            ids = np.array(row.input_ids, dtype=np.uint32)
            learned = np.array(row.labels) != IGNORED
            rejected = row.rejected_ids if row.rejected_ids is not None else []
            answer = (row.answer_text or "").encode("utf-8", "surrogatepass")
            self._tokens.write((ids | learned.astype(np.uint32) << np.uint32(31)).tobytes())
            self._tokens.write(np.array(rejected, dtype=np.uint32).tobytes())
            self._texts.write(answer)
            records.append(
                (
                    self._start,
                    self._text,
                    example,
                    place,
                    file,
                    digest_of(ids),
                    digest_of(ids[: row.prompt_length]),
                    len(ids),
                    row.prompt_length,
                    len(rejected) if row.rejected_ids is not None else NONE,
                    int(learned[1:].sum()),
                    len(answer) if row.answer_text is not None else NONE,
                    row.input_ids[0],
                    row.labels[-1],
                    row.input_ids[:1] == row.input_ids[1:2],
                    row.answer_text is not None and not row.answer_text.strip(),
                    row.truncated,
                    NONE if row.good is None else row.good,
                )
            )
            self._start += len(ids) + len(rejected)
            self._text += len(answer)
        self._rows.write(np.array(records, dtype=ROW).tobytes())


def digest_of(ids: np.ndarray) -> int:
    """Of token ids, uint32 [T]: 64 bits."""
    return int.from_bytes(hashlib.sha256(ids.tobytes()).digest()[:8], "big")


class Rows(Sequence[RenderedRow]):
    """Rows of stores, in any order, each read when it is asked for.

    numbers: of rows, counted through all stores.
    """

    def __init__(self, stores: Sequence[Store], numbers: np.ndarray) -> None:
        self.stores, self.numbers = stores, numbers
        self._firsts = list(accumulate((len(store.rows) for store in stores), initial=0))

    @classmethod
    def of(cls, rows: Iterable[RenderedRow]) -> Rows:
        """Rows that are there already, in memory."""
        files = BytesIO(), BytesIO(), BytesIO()
        Writer(*files).add((row, number, 0, number) for number, row in enumerate(rows))
        tokens, texts, about = (
            np.frombuffer(file.getvalue(), dtype) for file, (_, dtype) in zip(files, FILES, strict=True)
        )
        return cls([Store(tokens, texts, about)], np.arange(len(about)))

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> RenderedRow: ...
    @overload
    def __getitem__(self, index: slice) -> Rows: ...
    def __getitem__(self, index: int | slice) -> RenderedRow | Rows:
        if isinstance(index, slice):
            return self.select(index)
        store, row = self._at(index)
        return store.row(row)

    def _at(self, index: int) -> tuple[Store, int]:
        number = int(self.numbers[index])
        which = bisect_right(self._firsts, number) - 1
        return self.stores[which], number - self._firsts[which]

    def select(self, which: Any) -> Rows:
        """Those of a slice, an array of indices or one of booleans."""
        return Rows(self.stores, self.numbers[which])

    def where(self, index: int) -> str:
        """The file and line (or index) that a row came from."""
        store, row = self._at(index)
        return store.where(int(store.rows[row]["file"]), int(store.rows[row]["place"]))

    def origin(self, index: int) -> tuple[int, int]:
        """Which of the stores a row is in, and the number of its example in that source."""
        store, row = self._at(index)
        return next(place for place, each in enumerate(self.stores) if each is store), int(store.rows[row]["example"])

    def column(self, name: str) -> np.ndarray:
        """A field of `ROW`, of every row."""
        return np.concatenate([store.rows[name] for store in self.stores])[self.numbers]

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of each row, without those of worse answers, in four bytes each."""
        return array("i", self.column("length").tobytes())

    @property
    def tokens(self) -> Sequence[int]:
        """As `RenderedRow.tokens`."""
        rejected = self.column("rejected")
        twice = np.where(rejected == NONE, 0, self.column("prompt_length") + rejected)
        return array("i", (self.column("length") + twice).astype(np.int32).tobytes())

    @property
    def good(self) -> Rows:
        """Those whose answers a model should give: all but the ones that are judged bad."""
        return self.select(self.column("good") != 0)
