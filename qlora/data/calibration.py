"""Draws the token rows that GPTQ calibrates on: rendered training rows, and a share of general text if asked for.

Calibrating on the task alone costs general ability, and on general text alone costs the task; a mix is the recipe's
knob. Rows are whole and unpadded: a pad token in a Hessian is an activation that serving never sees.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from qlora.data.rendering import RenderedRow
from qlora.data.templates import adds_bos
from qlora.errors import UserError

_CHARACTERS_PER_TOKEN = 16  # more than any text needs, so that a window of it always holds enough tokens


def calibration_rows(
    train: Sequence[RenderedRow],
    *,
    samples: int,
    max_length: int,
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
    exclude: Sequence[RenderedRow] = (),
    mix: tuple[Sequence[str], float] | None = None,
) -> list[list[int]]:
    """Token ids of `samples` calibration rows of at most `max_length` tokens each; the same for the same seed.

    train: rendered rows of the training split; duplicates count once. If there are fewer than asked for, all are taken,
        and general text shrinks with them, so that its share holds.
    exclude: rendered evaluation rows; a training row with the same tokens is not used.
    mix: general texts and the share (0 to 1) of rows made of them. Their lengths follow those of the training rows.

    Raises `UserError` when no row is left after the exclusion, or when the general text is too short.
    """
    held_out = {tuple(row.input_ids) for row in exclude}
    candidates = [ids for ids in dict.fromkeys(tuple(row.input_ids) for row in train) if ids not in held_out]
    if not candidates:
        raise UserError(
            "no training row is left to calibrate on: all of them are evaluation rows too",
            where="quantize.calibration",
            fix="evaluate on rows that are not trained on",
        )
    rng = random.Random(seed)
    wanted_general = round(samples * mix[1]) if mix else 0
    wanted_task = samples - wanted_general
    task = [list(ids[:max_length]) for ids in rng.sample(candidates, min(wanted_task, len(candidates)))]
    if mix is None:
        return task
    general = round(wanted_general * len(task) / wanted_task) if wanted_task else wanted_general
    lengths = [min(len(ids), max_length) for ids in rng.choices(candidates, k=general)]
    rows = task + _general_rows(mix[0], lengths, tokenizer, rng)
    rng.shuffle(rows)
    return rows


def _general_rows(
    texts: Sequence[str], lengths: Sequence[int], tokenizer: PreTrainedTokenizerBase, rng: random.Random
) -> list[list[int]]:
    """One row of each length, from windows spread evenly over the texts; each starts at a line or a word."""
    corpus = "\n\n".join(texts)
    prefix = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    rows = []
    for index, length in enumerate(lengths):
        # One window in each equal stretch of the corpus, so that windows differ as long as the corpus allows it.
        first, last = (len(corpus) * step // len(lengths) for step in (index, index + 1))
        needed = length * _CHARACTERS_PER_TOKEN
        start = _next_boundary(corpus, min(rng.randrange(first, max(first + 1, last)), max(0, len(corpus) - needed)))
        ids = tokenizer(corpus[start : start + needed], add_special_tokens=False, verbose=False)["input_ids"]
        row = (prefix + ids)[:length]
        if len(row) < length:
            raise UserError(
                f"the general text is too short: {len(corpus)} characters, and a calibration row needs {length} tokens",
                where="quantize.calibration.mix",
                fix="give more text, or lower quantize.calibration.max_length",
            )
        rows.append(row)
    return rows


def _next_boundary(text: str, start: int) -> int:
    """The first start of a line, else of a word, within 200 characters of `start`; `start` itself if there is none."""
    if start == 0:
        return 0
    for separator in ("\n", " "):
        found = text.find(separator, start, start + 200)
        if found >= 0:
            return found + 1
    return start
