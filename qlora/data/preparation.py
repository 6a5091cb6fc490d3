"""A split from its rows: each rendered once, what cannot be learned from refused by file and line."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from qlora.artifacts import read_json, write_json
from qlora.data.cache import cached, key_of
from qlora.data.formats import Example, Examples, needs_template
from qlora.data.index import Index, ProgressCallback, content_key, read_index
from qlora.data.rendering import RenderedRow, Renderer
from qlora.data.sources import BadRows, located
from qlora.data.splits import Selection
from qlora.data.store import FILES, Rows, Store, Writer
from qlora.data.templates import resolve_chat_template
from qlora.errors import Problem, UserError
from qlora.recipe import Data, Source

_BATCH = 256  # rows tokenized together: enough for every core, few enough for a smooth progress bar
_ABOUT = "about.json"


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

    chat_template: the Jinja text used, to be saved with the tokenizer; None when no row needed one.
    """

    split_name: str
    rows: Rows
    statistics: Statistics
    chat_template: str | None


@dataclass(frozen=True)
class _Rendered:
    """A source's rows, and the chat template that they went through."""

    store: Store
    chat_template: str | None


def render_rows(
    selection: Selection,
    tokenizer: PreTrainedTokenizerBase,
    settings: Data,
    *,
    split_name: str,
    progress: ProgressCallback | None = None,
) -> PreparedData:
    """The rows of a selection, in order; rows without a supervised token are kept, for `lint` to report.

    Rows longer than `max_length` are cut, or left out where `overlong` is "drop". Raises `UserError` for sources that
    cannot be read and rows that cannot be rendered: all of them counted, the first ones shown.
    """
    key = _rendering_key(tokenizer, settings)
    found = [_rendered(source, tokenizer, settings, key, progress) for source, _ in selection.parts]
    firsts = accumulate((len(each.store.rows) for each in found), initial=0)
    numbers = [
        first + _rows_of(each.store, examples)
        for first, each, (_, examples) in zip(firsts, found, selection.parts, strict=False)
    ]
    rows = Rows([each.store for each in found], np.concatenate(numbers))
    every = len(rows)
    if settings.overlong == "drop":
        rows = rows.select(~rows.column("truncated"))
    template = next((each.chat_template for each in found if each.chat_template is not None), None)
    return PreparedData(split_name, rows, _statistics(rows, len(selection), every - len(rows)), template)


def prepare(
    selection: Selection,
    tokenizer: PreTrainedTokenizerBase,
    settings: Data,
    *,
    split_name: str,
    progress: ProgressCallback | None = None,
) -> PreparedData:
    """A split that can be trained on or evaluated: as `render_rows`, and every row has something to learn.

    Raises `UserError` also when rows have no supervised token, or when no row is left.
    """
    prepared = render_rows(selection, tokenizer, settings, split_name=split_name, progress=progress)
    if not prepared.rows:
        raise UserError(
            f"all {prepared.statistics.rows_read} rows of the {split_name} split are longer than "
            f"{settings.max_length} tokens and were dropped",
            where="data.max_length",
            fix="raise data.max_length, or set data.overlong: truncate",
        )
    unsupervised_rows(prepared, tokenizer).raise_any(len(prepared.rows))
    return prepared


def unsupervised_rows(prepared: PreparedData, tokenizer: PreTrainedTokenizerBase) -> BadRows:
    """The rows in which no token carries loss, with the text at their end, and pairs that are cut to one answer."""
    rows, bad = prepared.rows, BadRows()
    unsupervised_N = rows.column("supervised") == 0
    alike_N = rows.column("rejected") == rows.column("length") - rows.column("prompt_length")
    for index in np.flatnonzero(unsupervised_N | alike_N & rows.column("truncated")).tolist():
        row = rows[index]
        if row.supervised_tokens == 0:
            tail = tokenizer.decode(row.input_ids[-20:])
            reason, fix = "no token carries loss", "a row needs an answer, or text, to learn"
            if row.truncated:
                reason = f"no token carries loss: the prompt alone fills max_length ({len(row.input_ids)} tokens)"
                fix = "raise data.max_length, shorten the prompt, or set data.overlong: drop"
            bad.add(Problem(f"{reason}; it ends …{tail!r}", rows.where(index), fix))
        elif row.rejected_ids is not None and row.rejected_ids == row.input_ids[row.prompt_length :]:
            reason = f"within max_length ({len(row.input_ids)} tokens) both answers are the same"
            bad.add(Problem(reason, rows.where(index), "raise data.max_length, or set data.overlong: drop"))
    return bad


def _statistics(rows: Rows, rows_read: int, dropped: int) -> Statistics:
    return Statistics(
        rows_read=rows_read,
        rows=len(rows),
        truncated=int(rows.column("truncated").sum()),
        dropped=dropped,
        tokens=sum(rows.tokens),
        supervised_tokens=int(rows.column("supervised").sum()),
        longest=max(rows.lengths, default=0),
    )


def _rows_of(store: Store, examples: np.ndarray) -> np.ndarray:
    """Numbers of the rows that examples became, in the order of these."""
    of_row = store.rows["example"]
    first, last = np.searchsorted(of_row, examples, "left"), np.searchsorted(of_row, examples, "right")
    counts = last - first
    # Each row of an example stands where its first one does, and as many further as there are before it.
    before = np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(first, counts) + np.arange(counts.sum()) - before


# -- rendering a source -----------------------------------------------------------------------------------------------


def _rendering_key(tokenizer: PreTrainedTokenizerBase, settings: Data) -> list[Any] | None:
    """All that decides how rows are rendered; None where nothing says all that a tokenizer does."""
    if not tokenizer.is_fast:
        return None
    template = settings.chat_template
    if template is not None and Path(template).is_file():
        template = Path(template).read_text(encoding="utf-8")
    about = [settings.loss_on, settings.max_length, template, settings.template_options, tokenizer.chat_template]
    return [*about, str(tokenizer.special_tokens_map), tokenizer.backend_tokenizer.to_str()]


def _rendered(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    settings: Data,
    key: list[Any] | None,
    progress: ProgressCallback | None,
) -> _Rendered:
    """The rows of a source, of those alone that its weight chooses."""
    index, fraction = read_index(source), source.weight if source.weight < 1 else None
    examples = Examples(source)

    def write(folder: Path) -> None:
        template = _write(folder, examples, index, fraction, tokenizer, settings, progress)
        write_json(folder / _ABOUT, {"chat_template": template})

    def read(folder: Path) -> _Rendered:
        return _Rendered(Store.mapped(folder, examples.where), read_json(folder / _ABOUT)["chat_template"])

    return cached(key_of("rows", *content_key(source), fraction, *key) if key else None, write, read)


def _write(
    folder: Path,
    examples: Examples,
    index: Index,
    fraction: float | None,
    tokenizer: PreTrainedTokenizerBase,
    settings: Data,
    progress: ProgressCallback | None,
) -> str | None:
    """Renders rows into the files of a store; the chat template, if one was needed."""
    chosen = np.ones(len(index), dtype=bool)
    if fraction is not None:
        chosen[:] = False
        chosen[index.weighted(fraction)] = True
    renderer = Renderer(tokenizer, settings.loss_on, settings.max_length, options=settings.template_options)
    template, bad = None, BadRows()
    tokens, texts, rows = ((folder / name).open("wb") for name, _ in FILES)
    with tokens, texts, rows:
        writer = Writer(tokens, texts, rows)
        for batch in _batches(examples, chosen):
            if template is None and any(needs_template(each.example) for each in batch):
                template = resolve_chat_template(tokenizer, settings.chat_template)
                renderer.chat_template = template
            found = renderer.render_batch([each.example for each in batch])
            writer.add(_good(found, batch, examples, bad))
            if progress is not None:
                progress(batch[-1].number + 1, len(index))
    bad.raise_any(len(index))
    return template


@dataclass(frozen=True)
class _Numbered:
    """An example with its number in the source, and the file and place in it."""

    example: Example
    number: int
    file: int
    place: int


def _batches(examples: Examples, chosen: np.ndarray) -> Iterator[list[_Numbered]]:
    """Of the examples those that are chosen."""
    batch: list[_Numbered] = []
    for number, read in enumerate(examples):
        if number >= len(chosen) or isinstance(read.example, Problem):
            raise UserError("the rows are others than a moment ago", examples.where(read.file, read.place), "run again")
        if chosen[number]:
            batch.append(_Numbered(read.example, number, read.file, read.place))
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _good(
    found: list[list[RenderedRow] | UserError], batch: list[_Numbered], examples: Examples, bad: BadRows
) -> Iterator[tuple[RenderedRow, int, int, int]]:
    for rows, each in zip(found, batch, strict=True):
        if isinstance(rows, UserError):
            bad.add(located(rows.problems[0], examples.where(each.file, each.place)))
            continue
        for row in rows:
            yield row, each.number, each.file, each.place
