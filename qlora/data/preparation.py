"""A split from its examples: every row rendered, what cannot be learned from refused by file and line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from qlora.data.formats import Example, needs_template
from qlora.data.rendering import RenderedRow, Renderer
from qlora.data.sources import malformed
from qlora.data.templates import resolve_chat_template
from qlora.errors import Problem, UserError
from qlora.recipe import Data

_BATCH = 256  # rows tokenized together: enough for every core, few enough for a smooth progress bar

ProgressCallback = Callable[[int, int], None]
"""Called with the rows done and the rows in all."""


@dataclass(frozen=True)
class Statistics:
    """What became of the rows of a split. Tokens are counted after truncation; a row read may become several."""

    rows_read: int
    rows: int
    truncated: int
    dropped: int
    tokens: int
    supervised_tokens: int
    longest: int


@dataclass(frozen=True)
class PreparedData:
    """A rendered split.

    rows and locations go together: `locations[i]` is the file and line (or index) that `rows[i]` came from.
    chat_template: the Jinja text used, to be saved with the tokenizer; None when no row needed one.
    """

    split_name: str
    rows: list[RenderedRow]
    locations: list[str]
    statistics: Statistics
    chat_template: str | None


def render_examples(
    examples: Sequence[tuple[Example, str]],
    tokenizer: PreTrainedTokenizerBase,
    settings: Data,
    *,
    split_name: str,
    progress: ProgressCallback | None = None,
) -> PreparedData:
    """Renders located examples, in order; rows without a supervised token are kept, for `lint` to report.

    Rows longer than `max_length` are cut, or left out where `overlong` is "drop". Raises `UserError` for sources that
    cannot be read and rows that cannot be rendered: all of them counted, the first ones shown.
    """
    template = None
    if any(needs_template(example) for example, _ in examples):
        template = resolve_chat_template(tokenizer, settings.chat_template)
    renderer = Renderer(tokenizer, settings.loss_on, settings.max_length, template)
    rows: list[RenderedRow] = []
    locations: list[str] = []
    problems: list[Problem] = []
    dropped = 0
    for start in range(0, len(examples), _BATCH):
        batch = examples[start : start + _BATCH]
        for found, (_, where) in zip(renderer.render_batch([example for example, _ in batch]), batch, strict=True):
            if isinstance(found, UserError):
                problems.extend(Problem(problem.what, where, problem.fix) for problem in found.problems)
                continue
            kept = [row for row in found if not (row.truncated and settings.overlong == "drop")]
            dropped += len(found) - len(kept)
            rows.extend(kept)
            locations.extend([where] * len(kept))
        if progress is not None:
            progress(start + len(batch), len(examples))
    if problems:
        raise malformed(problems, len(examples))
    return PreparedData(split_name, rows, locations, _statistics(rows, len(examples), dropped), template)


def prepare(
    examples: Sequence[tuple[Example, str]],
    tokenizer: PreTrainedTokenizerBase,
    settings: Data,
    *,
    split_name: str,
    progress: ProgressCallback | None = None,
) -> PreparedData:
    """Renders a split that can be trained on or evaluated: as `render_examples`, and every row has something to learn.

    Raises `UserError` also when rows have no supervised token, or when no row is left.
    """
    prepared = render_examples(examples, tokenizer, settings, split_name=split_name, progress=progress)
    if not prepared.rows:
        raise UserError(
            f"all {prepared.statistics.rows_read} rows of the {split_name} split are longer than "
            f"{settings.max_length} tokens and were dropped",
            where="data.max_length",
            fix="raise data.max_length, or set data.overlong: truncate",
        )
    if problems := unsupervised_rows(prepared, tokenizer):
        raise malformed(problems, len(prepared.rows))
    return prepared


def unsupervised_rows(prepared: PreparedData, tokenizer: PreTrainedTokenizerBase) -> list[Problem]:
    """A problem for every row in which no token carries loss, with the text at its end."""
    problems = []
    for row, where in zip(prepared.rows, prepared.locations, strict=True):
        if row.supervised_tokens == 0:
            tail = tokenizer.decode(row.input_ids[-20:])
            reason, fix = "no token carries loss", "a row needs an answer, or text, to learn"
            if row.truncated:
                reason = f"no token carries loss: the prompt alone fills max_length ({len(row.input_ids)} tokens)"
                fix = "raise data.max_length, shorten the prompt, or set data.overlong: drop"
            problems.append(Problem(f"{reason}; it ends …{tail!r}", where, fix))
        elif row.rejected_ids is not None and row.rejected_ids == row.input_ids[row.prompt_length :]:
            reason = f"within max_length ({len(row.input_ids)} tokens) both answers are the same"
            problems.append(Problem(reason, where, "raise data.max_length, or set data.overlong: drop"))
    return problems


def _statistics(rows: Sequence[RenderedRow], rows_read: int, dropped: int) -> Statistics:
    return Statistics(
        rows_read=rows_read,
        rows=len(rows),
        truncated=sum(row.truncated for row in rows),
        dropped=dropped,
        tokens=sum(row.tokens for row in rows),
        supervised_tokens=sum(row.supervised_tokens for row in rows),
        longest=max((len(row.input_ids) for row in rows), default=0),
    )
