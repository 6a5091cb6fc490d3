"""Which rows are trained on, and which are held out to measure on.

Held out is what `data.eval` names. Where it names nothing, a share of the training rows is: those whose prompts have
the smallest digests, so that a row stays on its side whatever is added, removed or reordered, and rows with one prompt
stay together. Rows that are held out are not trained on: they are taken from the training rows where they occur, unless
the recipe has `overlap: keep`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qlora.data.index import Index, ProgressCallback, read_index
from qlora.errors import Problem, UserError
from qlora.recipe import Data, Source

MOST_HELD_OUT = 500  # rows
# Of the rows, distinct prompts; where there are fewer, rows are told apart by their answers too.
MANY_PROMPTS = 0.5


@dataclass(frozen=True)
class Selection:
    """Rows of sources by their numbers, in the order in which they are used; a row may come several times."""

    parts: tuple[tuple[Source, np.ndarray], ...]

    def __len__(self) -> int:
        return sum(len(numbers) for _, numbers in self.parts)


@dataclass(frozen=True)
class Splits:
    train: Selection
    evaluation: Selection | None
    """None if nothing is held out."""
    removed: int
    """Rows of data.train that are rows of data.eval too."""
    held_out: int
    """Rows of data.train that were held out, there being no data.eval."""
    digest: str
    """Of what data.train has and is not trained on."""


def all_rows(source: Source, progress: ProgressCallback | None = None) -> Selection:
    """Every row of a source, as often as its weight says. Raises `UserError` if it cannot be read."""
    return Selection(((source, read_index(source, progress).weighted(source.weight)),))


def read_splits(data: Data, progress: ProgressCallback | None = None) -> Splits:
    """The rows of a recipe's data section. Raises `UserError` for all sources that cannot be read."""
    *indexes, asked = _indexes([*data.train, data.eval], progress)
    chosen = [index.weighted(source.weight) for source, index in zip(data.train, indexes, strict=True)]
    keys_N = np.concatenate([index.whole_N[numbers] for index, numbers in zip(indexes, chosen, strict=True)])
    if data.eval is not None:
        numbers = asked.weighted(data.eval.weight)
        evaluation = Selection(((data.eval, numbers),))
        out = np.unique(asked.whole_N[numbers]) if data.overlap == "remove" else keys_N[:0]
    else:
        prompts_N = np.concatenate([index.prompt_N[numbers] for index, numbers in zip(indexes, chosen, strict=True)])
        distinct = np.unique(prompts_N)
        if len(distinct) >= MANY_PROMPTS * len(keys_N):
            keys_N = prompts_N
        else:
            distinct = np.unique(keys_N)
        count = min(MOST_HELD_OUT, max(1, round(data.eval_share * len(distinct))))
        out = distinct[:count] if data.eval_share and len(distinct) > 1 else distinct[:0]
        _, first = np.unique(keys_N, return_index=True)
        apart_N = np.zeros(len(keys_N), dtype=bool)
        apart_N[first] = True
        evaluation = _selected(data.train, chosen, apart_N & np.isin(keys_N, out))
    left_out_N = np.isin(keys_N, out)
    train = _selected(data.train, chosen, ~left_out_N)
    digest = hashlib.sha256(np.unique(keys_N[left_out_N]).tobytes()).hexdigest()
    left_out = int(left_out_N.sum())
    removed, held_out = (left_out, 0) if data.eval is not None else (0, left_out)
    return Splits(train, evaluation if len(evaluation) else None, removed, held_out, digest)


def _indexes(sources: Sequence[Source | None], progress: ProgressCallback | None) -> list[Index]:
    found: list[Index] = []
    problems: list[Problem] = []
    empty = np.empty(0, dtype=np.uint64)
    for source in sources:
        try:
            found.append(read_index(source, progress) if source is not None else Index(empty, empty))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    return found


def _selected(sources: Sequence[Source], chosen: Sequence[np.ndarray], wanted_N: np.ndarray) -> Selection:
    """Of the rows of all sources, one after the other, the wanted ones."""
    ends = np.cumsum([len(numbers) for numbers in chosen])
    wanted = np.split(wanted_N, ends[:-1])
    return Selection(tuple((source, numbers[w]) for source, numbers, w in zip(sources, chosen, wanted, strict=True)))
