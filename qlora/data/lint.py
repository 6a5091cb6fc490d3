"""Looks at rendered rows before any GPU time is spent: what is learned, what is cut, and what is likely a mistake.

A problem makes training wrong or pointless; a warning is something a person should have seen.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from qlora.data.preparation import PreparedData, unsupervised_rows
from qlora.data.rendering import IGNORED, RenderedRow
from qlora.data.store import NONE, Rows
from qlora.errors import Problem

_MARKER = re.compile(r"<[|｜][^<>|｜\s]+[|｜]>|<(?:start|end)_of_turn>")  # how chat templates write special tokens
_LOW_SUPERVISION = 0.01  # share of tokens below which most compute goes into reading prompts


HISTOGRAM_PARTS = 24


@dataclass(frozen=True)
class SplitReport:
    """Counts of one split; lengths are tokens per row at the given percentiles.

    histogram: rows by tokens, in parts of equal width from the shortest to the longest row.
    """

    name: str
    rows: int
    tokens: int
    supervised_tokens: int
    supervised_share: float
    truncated: int
    dropped: int
    unsupervised_rows: int
    empty_answers: int
    double_bos: int
    missing_end: int
    duplicates: int
    lengths: dict[str, int]
    histogram: list[int]


@dataclass(frozen=True)
class LintReport:
    """What lint found; `problems` must be fixed, `warnings` must be seen.

    overlap_rows: evaluation rows that are training rows too. overlap_prompts: those whose prompt is also trained on.
    """

    splits: list[SplitReport]
    overlap_rows: int
    overlap_prompts: int
    problems: list[Problem]
    warnings: list[Problem]

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class Segment:
    """A run of text that is supervised, or not, as a whole."""

    text: str
    supervised: bool


def lint(train: PreparedData, evaluation: PreparedData | None, tokenizer: PreTrainedTokenizerBase) -> LintReport:
    """Checks the splits of `render_rows`, where rows without labels are still there to be counted."""
    splits = [train] if evaluation is None else [train, evaluation]
    reports = [_split_report(split, tokenizer) for split in splits]
    problems: list[Problem] = []
    warnings: list[Problem] = []
    for split, report in zip(splits, reports, strict=True):
        problems += _problems(split, report, tokenizer)
        warnings += _warnings(split, report)
    warnings += _end_of_turn_warnings(train, tokenizer) + _marker_warnings(train, tokenizer)
    overlap_rows, overlap_prompts = _overlap(train.rows, evaluation.rows if evaluation else None)
    if evaluation is not None and max(overlap_rows, overlap_prompts) > 0:
        warnings.append(
            Problem(
                f"{overlap_rows} of {len(evaluation.rows)} evaluation rows are training rows too, and the prompts of "
                f"{overlap_prompts} are trained on",
                "data.eval",
                "evaluate on rows that are not trained on, or the ladder measures memory",
            )
        )
    return LintReport(reports, overlap_rows, overlap_prompts, problems, warnings)


def coloured(row: RenderedRow, tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
    """The text of a row in runs of supervised and unsupervised tokens, special tokens shown, for display."""
    runs = groupby(zip(row.input_ids, row.labels, strict=True), key=lambda pair: pair[1] != IGNORED)
    return [Segment(str(tokenizer.decode([token for token, _ in run])), supervised) for supervised, run in runs]


def _split_report(split: PreparedData, tokenizer: PreTrainedTokenizerBase) -> SplitReport:
    rows, statistics = split.rows, split.statistics
    lengths_N = np.sort(rows.column("length"))
    unended_N = ~rows.column("truncated") & ~np.isin(rows.column("end"), list(_end_ids(tokenizer)))
    return SplitReport(
        name=split.split_name,
        rows=len(rows),
        tokens=statistics.tokens,
        supervised_tokens=statistics.supervised_tokens,
        supervised_share=statistics.supervised_tokens / max(1, statistics.tokens),
        truncated=statistics.truncated,
        dropped=statistics.dropped,
        unsupervised_rows=int((rows.column("supervised") == 0).sum()),
        empty_answers=int(rows.column("blank").sum()),
        double_bos=int(_has_double_bos(rows, tokenizer).sum()),
        missing_end=int(unended_N.sum()),
        duplicates=len(rows) - len(np.unique(rows.column("ids"))),
        lengths={f"p{share}": _percentile(lengths_N, share) for share in (0, 50, 90, 95, 99, 100)} if rows else {},
        histogram=_histogram(lengths_N),
    )


def _percentile(ordered_N: np.ndarray, share: int) -> int:
    """The nearest-rank percentile: the smallest value that at least `share` percent of the values do not exceed."""
    return int(ordered_N[max(0, math.ceil(len(ordered_N) * share / 100) - 1)])


def _histogram(ordered_N: np.ndarray) -> list[int]:
    if not len(ordered_N):
        return []
    width = int(ordered_N[-1] - ordered_N[0]) + 1
    parts = min(HISTOGRAM_PARTS, width)
    part_N = (ordered_N - ordered_N[0]).astype(np.int64) * parts // width
    counts: list[int] = np.bincount(part_N, minlength=parts).tolist()
    return counts


def _has_double_bos(rows: Rows, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """bool [N]. Where BOS is also the marker that opens a turn, two in a row are still never right."""
    if tokenizer.bos_token_id is None:
        return np.zeros(len(rows), dtype=bool)
    both: np.ndarray = rows.column("doubled") & (rows.column("first") == tokenizer.bos_token_id)
    return both


def _end_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def _problems(split: PreparedData, report: SplitReport, tokenizer: PreTrainedTokenizerBase) -> Iterator[Problem]:
    if report.rows == 0:
        yield Problem("no row is left", f"data, {split.split_name} split", "raise data.max_length or use more data")
    yield from unsupervised_rows(split, tokenizer).problems
    if report.double_bos:
        yield Problem(
            f"{report.double_bos} rows of the {split.split_name} split begin with two BOS tokens",
            split.rows.where(int(_has_double_bos(split.rows, tokenizer).argmax())),
            "take the BOS out of the data or the chat template: models degrade with two",
        )
    if report.missing_end:
        yield Problem(
            f"{report.missing_end} rows of the {split.split_name} split do not end with a supervised end of turn",
            f"data, {split.split_name} split",
            "the model would not learn to stop",
        )


def _warnings(split: PreparedData, report: SplitReport) -> Iterator[Problem]:
    where = f"data, {split.split_name} split"
    if report.truncated:
        longer = f"{report.truncated} of {report.rows} rows ({report.truncated / report.rows:.1%})"
        yield Problem(f"{longer} are cut: their answers have no end", where, "raise data.max_length if memory allows")
    if report.dropped:
        yield Problem(f"{report.dropped} rows are longer than data.max_length and left out", where)
    if report.empty_answers:
        yield Problem(f"{report.empty_answers} answers are empty: the model learns to say nothing there", where)
    if report.duplicates:
        yield Problem(f"{report.duplicates} rows repeat an earlier row", where)
    if report.rows and report.supervised_share < _LOW_SUPERVISION:
        yield Problem(f"only {report.supervised_share:.2%} of the tokens are learned from", where)


def _end_of_turn_warnings(split: PreparedData, tokenizer: PreTrainedTokenizerBase) -> list[Problem]:
    """Answers that end with another token than EOS, which is what servers stop at unless told otherwise."""
    whole = split.rows.select(~split.rows.column("truncated"))
    ends = Counter(dict(zip(*map(np.ndarray.tolist, np.unique(whole.column("end"), return_counts=True)), strict=True)))
    for token in (tokenizer.eos_token_id, IGNORED):
        ends.pop(token, None)
    names = ", ".join(
        f"{tokenizer.convert_ids_to_tokens(token)} ({count} rows)" for token, count in ends.most_common(3)
    )
    if not names:
        return []
    fix = "list it in eos_token_id of the base's generation_config.json too"
    return [Problem(f"answers end with {names}, and the tokenizer's EOS is {tokenizer.eos_token}", "model.base", fix)]


def _marker_warnings(split: PreparedData, tokenizer: PreTrainedTokenizerBase) -> list[Problem]:
    """Special tokens that the chat template writes and the tokenizer does not know, so that they fall into pieces."""
    pieces = {}
    for marker in sorted(set(_MARKER.findall(split.chat_template or ""))):
        count = len(tokenizer(marker, add_special_tokens=False)["input_ids"])
        if count > 1:
            pieces[marker] = count
    if not pieces:
        return []
    names = ", ".join(f"{marker} ({count} tokens)" for marker, count in pieces.items())
    fix = "choose a template of this model's family, or alpaca, which needs no special tokens"
    return [
        Problem(f"the chat template's markers are ordinary text to this tokenizer: {names}", "data.chat_template", fix)
    ]


def _overlap(train: Rows, evaluation: Rows | None) -> tuple[int, int]:
    """Evaluation rows, and evaluation prompts, that occur in training; plain text has no prompt."""
    if evaluation is None:
        return 0, 0
    same_rows = np.isin(evaluation.column("ids"), train.column("ids"))
    prompts, asked = (rows.column("prompt_ids")[rows.column("text_length") != NONE] for rows in (train, evaluation))
    return int(same_rows.sum()), int(np.isin(asked, prompts).sum())
