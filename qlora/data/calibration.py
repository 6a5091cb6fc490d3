"""Draws the token rows that quantization calibrates on: rendered training rows, general text, or a mix of both.

Calibrating on the task alone costs general ability, and on general text alone costs the task; a mix is the recipe's
knob. Rows are unpadded: a pad token in a Hessian is an activation that serving never sees.

How long rows are: training rows and strings of a list keep their length, cut at `max_length`; general text is joined
and fills `max_length`, since it has no length of its own. A mix counts tokens, since its rows are of other lengths.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from qlora.data.corpora import GENERAL, corpus_texts
from qlora.data.rendering import IGNORED, RenderedRow
from qlora.data.store import Rows, digest_of
from qlora.data.templates import adds_bos
from qlora.errors import UserError
from qlora.recipe import Calibration, Quantize

_CHARACTERS_PER_TOKEN = 16  # more than any text needs, so that a window of it always holds enough tokens


@dataclass(frozen=True)
class CalibrationRow:
    """A row to calibrate on, without padding."""

    input_ids: tuple[int, ...]
    loss: tuple[bool, ...] | None = None
    """Per position, whether the prediction made there (of the next token) was trained on; never at the last position.
    None for text that is not from the training rows, where every position counts."""


def calibration_rows(
    section: Calibration,
    train: Rows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    exclude: Rows | None = None,
    used: Sequence[CalibrationRow] = (),
) -> list[CalibrationRow]:
    """The rows that a recipe's `quantize.calibration` asks for; the same for the same seed.

    train: rendered rows of the training split; duplicates count once. exclude: rendered evaluation rows; a training row
    with the same tokens is not used, nor is one that is among `used`. Where there are fewer rows than asked for, all
    are taken, and the mix shrinks with them, so that its share holds.

    Raises `UserError` when nothing is left to draw from, when a text is too short, or cannot be read.
    """
    draw = _Draw(train, exclude, used, tokenizer, section.max_length, random.Random(seed))
    rows = list(draw.rows(section.from_, section.samples))
    if section.mix is not None:
        tokens = sum(len(row.input_ids) for row in rows)
        rows += draw.tokens(section.mix.from_, tokens * section.mix.share / (1 - section.mix.share))
        draw.rng.shuffle(rows)
    return rows


def refinement_rows(
    section: Quantize,
    train: Rows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    exclude: Rows | None,
    calibration: Sequence[CalibrationRow],
) -> tuple[list[CalibrationRow], list[CalibrationRow]]:
    """(rows that refinement learns from, rows that decide whether its result is kept), drawn as calibration rows are.

    To learn from: as many as `quantize.refine` asks for, or as hold the tokens of all its steps. To decide: rows that
    are neither learnt from nor in `calibration`, on which a checkpoint looks better than it is; `held_out` of the
    number of the others, or what is left. None where rows are not drawn from the training split, or where fewer are
    left than `held_out` of the calibration rows.
    """
    refine = section.refine
    assert refine is not None, "the recipe refines"
    mean = sum(len(row.input_ids) for row in calibration) / len(calibration)
    count = refine.samples or math.ceil(refine.steps * refine.tokens_per_step / mean)
    draw = _Draw(train, exclude, calibration, tokenizer, section.calibration.max_length, random.Random(seed))
    left = len(draw.train_rows()) if section.calibration.from_ == "train" else 0
    deciding: list[CalibrationRow] = []
    if left >= max(1, round(refine.held_out * len(calibration))):
        some = section.calibration.model_copy(update={"samples": min(left, max(1, round(refine.held_out * count)))})
        deciding = calibration_rows(some, train, tokenizer, seed=seed + 1, exclude=exclude, used=calibration)
    many = section.calibration.model_copy(update={"samples": count})
    return calibration_rows(many, train, tokenizer, seed=seed, exclude=exclude, used=deciding), deciding


def general_rows(
    source: str | Sequence[str], tokenizer: PreTrainedTokenizerBase, tokens: int, max_length: int
) -> list[RenderedRow]:
    """Rows of the text that `evaluate.general` names, with a label at every token; about `tokens` of them, always the
    same. Raises as `calibration_rows` does."""
    draw = _Draw(Rows.of([]), None, (), tokenizer, max_length, random.Random(0), GENERAL)
    found = (list(row.input_ids) for row in draw.tokens(source, tokens))
    return [RenderedRow(ids, ids, 0, False, None) for ids in found]


@dataclass(frozen=True)
class _Draw:
    """Draws rows of each kind, with one generator for all of them."""

    train: Rows
    exclude: Rows | None
    used: Sequence[CalibrationRow]
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    rng: random.Random
    key: str = "quantize.calibration"
    """Of the recipe, what asks for the rows."""

    def rows(self, source: str | Sequence[str], count: int) -> Iterable[CalibrationRow]:
        """`count` rows of a kind that `quantize.calibration.from` names, or all there are."""
        if source == "train":
            return self._train_rows(count)
        if isinstance(source, str):
            return self._windows(source, count)
        return self._strings(source, count)

    def tokens(self, source: str | Sequence[str], wanted: float) -> list[CalibrationRow]:
        """As many rows of a kind as come closest to `wanted` tokens, at least one, or all there are."""
        if isinstance(source, str) and source != "train":
            return self._windows(source, max(1, round(wanted / self.max_length)))
        found: list[CalibrationRow] = []
        for row in self.rows(source, sys.maxsize):
            if found and wanted < len(row.input_ids) / 2:
                break
            found.append(row)
            wanted -= len(row.input_ids)
        return found

    def train_rows(self) -> Rows:
        """The training rows that may be drawn, each once."""
        good = self.train.good
        digests_N = good.column("ids")
        _, first = np.unique(digests_N, return_index=True)
        allowed_N = np.zeros(len(good), dtype=bool)
        allowed_N[first] = True
        if self.exclude is not None:
            allowed_N &= ~np.isin(digests_N, self.exclude.column("ids"))
        used = {row.input_ids for row in self.used}
        # As short as a row that is used: the whole row's digest says whether it is the same.
        used_N = np.array([digest_of(np.array(ids, dtype=np.uint32)) for ids in used], dtype=np.uint64)
        same_N = np.isin(digests_N, used_N)
        for index in np.flatnonzero(allowed_N & ~same_N & (good.column("length") > self.max_length)) if used else ():
            same_N[index] = tuple(good[int(index)].input_ids[: self.max_length]) in used
        return good.select(allowed_N & ~same_N)

    def _train_rows(self, count: int) -> Iterator[CalibrationRow]:
        candidates = self.train_rows()
        if not candidates:
            raise UserError(
                "no training row is left to calibrate on: all of them are evaluation rows too",
                where="quantize.calibration",
                fix="evaluate on rows that are not trained on",
            )
        drawn = self.rng.sample(range(len(candidates)), min(count, len(candidates)))
        return (calibration_row(candidates[index], self.max_length) for index in drawn)

    def _strings(self, texts: Sequence[str], count: int) -> list[CalibrationRow]:
        encoded = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        empty = [repr(text) for text, ids in zip(texts, encoded, strict=True) if not ids]
        if empty:
            raise UserError(f"a text without tokens: {empty[0]}", self.key, "leave it out")
        drawn = self.rng.sample(encoded, min(count, len(encoded)))
        return [CalibrationRow(tuple((self._prefix + ids)[: self.max_length]), None) for ids in drawn]

    def _windows(self, name: str, count: int) -> list[CalibrationRow]:
        """Rows of `max_length` tokens, from windows spread evenly over the corpus; each starts at a line or a word."""
        corpus = "\n\n".join(corpus_texts(name, GENERAL) if self.key == GENERAL else corpus_texts(name))
        needed = self.max_length * _CHARACTERS_PER_TOKEN
        latest = max(0, len(corpus) - needed)
        rows = []
        for index in range(count):
            # One window in each equal stretch of the corpus, so that windows differ as long as the corpus allows it.
            first, last = (latest * step // count for step in (index, index + 1))
            start = _next_boundary(corpus, self.rng.randrange(first, max(first + 1, last)))
            text = corpus[start : start + needed]
            ids = self._prefix + self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            if len(ids) < self.max_length:
                raise UserError(
                    f"{name} is too short: {len(corpus)} characters, and a row needs {self.max_length} tokens",
                    where=self.key,
                    fix="give more text" + ("" if self.key == GENERAL else f", or lower {self.key}.max_length"),
                )
            rows.append(CalibrationRow(tuple(ids[: self.max_length]), None))
        return rows

    @property
    def _prefix(self) -> list[int]:
        return [self.tokenizer.bos_token_id] if adds_bos(self.tokenizer) else []


def calibration_row(row: RenderedRow, max_length: int) -> CalibrationRow:
    """A rendered row, cut at `max_length`, with the positions whose prediction carries loss."""
    ids = row.input_ids[:max_length]
    loss = [label != IGNORED for label in row.labels[1 : len(ids)]]
    return CalibrationRow(tuple(ids), (*loss, False))


def _next_boundary(text: str, start: int) -> int:
    """The first start of a line, else of a word, within 200 characters of `start`; `start` itself if there is none."""
    if start == 0:
        return 0
    for separator in ("\n", " "):
        found = text.find(separator, start, start + 200)
        if found >= 0:
            return found + 1
    return start
