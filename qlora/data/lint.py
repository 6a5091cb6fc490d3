"""Looks at rendered rows before any GPU time is spent: what is learned, what is cut, and what is likely a mistake.

A problem makes training wrong or pointless; a warning is something a person should have seen.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from transformers import PreTrainedTokenizerBase

from qlora.data.preparation import PreparedData, unsupervised_rows
from qlora.data.rendering import IGNORED, RenderedRow
from qlora.data.sources import SHOWN
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
    """Checks the splits of `render_examples`, where rows without labels are still there to be counted."""
    splits = [train] if evaluation is None else [train, evaluation]
    reports = [_split_report(split, tokenizer) for split in splits]
    problems: list[Problem] = []
    warnings: list[Problem] = []
    for split, report in zip(splits, reports, strict=True):
        problems += _problems(split, report, tokenizer)
        warnings += _warnings(split, report)
    warnings += _end_of_turn_warnings(train, tokenizer) + _marker_warnings(train, tokenizer)
    overlap_rows, overlap_prompts = _overlap(train.rows, evaluation.rows if evaluation else [])
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
    lengths = sorted(len(row.input_ids) for row in rows)
    end_ids = _end_ids(tokenizer)
    return SplitReport(
        name=split.split_name,
        rows=len(rows),
        tokens=statistics.tokens,
        supervised_tokens=statistics.supervised_tokens,
        supervised_share=statistics.supervised_tokens / max(1, statistics.tokens),
        truncated=statistics.truncated,
        dropped=statistics.dropped,
        unsupervised_rows=sum(row.supervised_tokens == 0 for row in rows),
        empty_answers=sum(row.answer_text is not None and not row.answer_text.strip() for row in rows),
        double_bos=sum(_has_double_bos(row, tokenizer) for row in rows),
        missing_end=sum(not row.truncated and row.labels[-1] not in end_ids for row in rows),
        duplicates=len(rows) - len({tuple(row.input_ids) for row in rows}),
        lengths={f"p{share}": _percentile(lengths, share) for share in (0, 50, 90, 95, 99, 100)} if lengths else {},
        histogram=_histogram(lengths),
    )


def _percentile(ordered: Sequence[int], share: int) -> int:
    """The nearest-rank percentile: the smallest value that at least `share` percent of the values do not exceed."""
    return ordered[max(0, math.ceil(len(ordered) * share / 100) - 1)]


def _histogram(ordered: Sequence[int]) -> list[int]:
    if not ordered:
        return []
    counts = [0] * min(HISTOGRAM_PARTS, ordered[-1] - ordered[0] + 1)
    for length in ordered:
        counts[(length - ordered[0]) * len(counts) // (ordered[-1] - ordered[0] + 1)] += 1
    return counts


def _has_double_bos(row: RenderedRow, tokenizer: PreTrainedTokenizerBase) -> bool:
    # Where BOS is also the marker that opens a turn (SmolLM2's <|im_start|>), two in a row are still never right.
    return tokenizer.bos_token_id is not None and row.input_ids[:2] == [tokenizer.bos_token_id] * 2


def _end_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def _problems(split: PreparedData, report: SplitReport, tokenizer: PreTrainedTokenizerBase) -> Iterator[Problem]:
    if report.rows == 0:
        yield Problem("no row is left", f"data, {split.split_name} split", "raise data.max_length or use more data")
    without_labels = unsupervised_rows(split, tokenizer)
    yield from without_labels[:SHOWN]
    if len(without_labels) > SHOWN:
        yield Problem(f"and {len(without_labels) - SHOWN} more rows of the {split.split_name} split without a label")
    if report.double_bos:
        where = next(at for at, row in zip(split.locations, split.rows, strict=True) if _has_double_bos(row, tokenizer))
        yield Problem(
            f"{report.double_bos} rows of the {split.split_name} split begin with two BOS tokens",
            where,
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
    ends = Counter(row.labels[-1] for row in split.rows if not row.truncated and row.labels[-1] != IGNORED)
    ends.pop(tokenizer.eos_token_id, None)
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


def _overlap(train: Sequence[RenderedRow], evaluation: Sequence[RenderedRow]) -> tuple[int, int]:
    """Evaluation rows, and evaluation prompts, that occur in training; plain text has no prompt."""
    seen_rows = {tuple(row.input_ids) for row in train}
    seen_prompts = {_prompt(row) for row in train if row.answer_text is not None}
    same_rows = sum(tuple(row.input_ids) in seen_rows for row in evaluation)
    same_prompts = sum(row.answer_text is not None and _prompt(row) in seen_prompts for row in evaluation)
    return same_rows, same_prompts


def _prompt(row: RenderedRow) -> tuple[int, ...]:
    return tuple(row.input_ids[: row.prompt_length])
