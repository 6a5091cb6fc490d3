"""Which rows are trained on, and which are held out to measure on.

Held out is what `data.eval` names. Where it names nothing, a share of the training rows is: those whose prompts have
the smallest digests, so that a row stays on its side whatever is added, removed or reordered, and rows with one prompt
stay together. Rows that are held out are not trained on: they are taken from the training rows where they occur, unless
the recipe has `overlap: keep`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from qlora.data.formats import Chat, Completion, Example, read_examples, single
from qlora.recipe import Data

MOST_HELD_OUT = 500  # rows
# Of the rows, distinct prompts; where there are fewer, rows are told apart by their answers too.
MANY_PROMPTS = 0.5

Located = tuple[Example, str]
"""An example, and where it stands."""


@dataclass(frozen=True)
class Splits:
    train: list[Located]
    evaluation: list[Located] | None
    """None if nothing is held out."""
    removed: int
    """Rows of data.train that are rows of data.eval too."""
    held_out: int
    """Rows of data.train that were held out, there being no data.eval."""
    digest: str
    """Of what data.train has and is not trained on."""


def read_splits(data: Data) -> Splits:
    """The rows of a recipe's data section. Raises `UserError` for sources that cannot be read."""
    every = [located for source in data.train for located in read_examples(source)]
    if data.eval is not None:
        evaluation = read_examples(data.eval)
        removes = data.overlap == "remove"
        out = {_digest(example, whole=True) for example, _ in evaluation} if removes else set()
        keys = [_digest(example, whole=True) for example, _ in every]
    else:
        prompts = [_digest(example, whole=False) for example, _ in every]
        many = len(set(prompts)) >= MANY_PROMPTS * len(every)
        keys = prompts if many else [_digest(example, whole=True) for example, _ in every]
        distinct = sorted(set(keys))
        count = min(MOST_HELD_OUT, max(1, round(data.eval_share * len(distinct))))
        out = set(distinct[:count]) if data.eval_share and len(distinct) > 1 else set()
        first = {key: located for key, located in reversed(list(zip(keys, every, strict=True))) if key in out}
        evaluation = [first[key] for key in dict.fromkeys(keys) if key in out]
    train = [located for key, located in zip(keys, every, strict=True) if key not in out]
    left_out = len(every) - len(train)
    digest = hashlib.sha256(b"".join(sorted(set(keys) & out))).hexdigest()
    removed, held_out = (left_out, 0) if data.eval is not None else (0, left_out)
    return Splits(train, evaluation or None, removed, held_out, digest)


def _digest(example: Example, *, whole: bool) -> bytes:
    """Of an example, or of what comes before its answer; plain text has no such part."""
    content: Any = example
    answered = single(example)
    if not whole and isinstance(answered, Chat):
        content = answered.messages[:-1], answered.tools
    elif not whole and isinstance(answered, Completion):
        content = answered.prompt
    return hashlib.sha256(repr(content).encode()).digest()
