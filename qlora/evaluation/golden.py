"""Golden prompts: held-out prompts with the greedy answers of the trained and of the GPTQ model, token by token.

A server that loads the checkpoint is compared with them (`qlora.evaluation.replay`). Beside every token stands the
margin, by how many nats it was likelier than the second best: kernels round differently, so where the margin is small
another implementation may rightly choose the other token, and all that follows is then another text.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from qlora.data.rendering import RenderedRow
from qlora.evaluation.generation import continuations, stop_tokens
from qlora.evaluation.ladder import TRAINED, Rung

ANSWERED_BY = (TRAINED, "gptq")
OF_PLAIN_TEXT = 32  # first tokens of a row without an answer, which are the prompt
LARGEST_MARGIN = 99.0  # in nats; a token that alone was possible


@dataclass(frozen=True)
class Prompt:
    """A prompt as a server is given it.

    text: what its tokenizer makes these ids of, special tokens added as it does, if `exact`.
    messages, tools: the conversation whose rendering the prompt is, where the checkpoint's own template says so.
    """

    ids: tuple[int, ...]
    text: str
    exact: bool
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Answer:
    """A greedy answer. `ids` ends with the token that stopped it, if `finished`; `text` is without special tokens.

    ends: for every token the length of the text up to it. margins: in nats, of every token to the second best.
    """

    ids: list[int]
    text: str
    finished: bool
    ends: list[int]
    margins: list[float]


@dataclass
class Golden:
    """Prompts, and the answers that were observed, by rung and prompt.

    ends: tokens that end the answers of the rows that prompts were taken from.
    """

    prompts: Sequence[Prompt]
    tokenizer: Any
    ends: set[int]
    max_new_tokens: int
    batch_size: int
    answers: dict[str, list[Answer]] = field(default_factory=dict)

    def observe(self, rung: Rung, model: Any) -> None:
        """Have a rung's model answer, if it is one whose answers are kept."""
        if rung.name not in ANSWERED_BY or not self.prompts:
            return
        stops = stop_tokens(model, self.tokenizer) | self.ends
        recorder = Margins()
        found = []
        for first in range(0, len(self.prompts), self.batch_size):
            batch = [list(prompt.ids) for prompt in self.prompts[first : first + self.batch_size]]
            recorder.steps_TB.clear()
            pad = self.tokenizer.pad_token_id
            ids = continuations(model, batch, stops, pad, len(batch), self.max_new_tokens, [recorder])
            found += [self._answer(own, recorder.of(row)[: len(own)], stops) for row, own in enumerate(ids)]
        self.answers[rung.name] = found

    def _answer(self, ids: list[int], margins: list[float], stops: set[int]) -> Answer:
        finished = ids[-1] in stops
        spoken = ids[:-1] if finished else ids
        ends = [len(self._text(spoken[: count + 1])) for count in range(len(ids))]
        return Answer(ids, self._text(spoken), finished, ends, margins)

    def _text(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def to_json(self) -> list[dict[str, Any]]:
        """A dictionary for each prompt, with the answers of every rung that was observed."""
        return [
            {
                "prompt": prompt.text,
                "prompt_is_exact": prompt.exact,
                "prompt_ids": list(prompt.ids),
                "messages": prompt.messages,
                "tools": prompt.tools,
            }
            | {rung: asdict(answers[number]) for rung, answers in self.answers.items()}
            for number, prompt in enumerate(self.prompts)
        ]


class Margins:
    """A `LogitsProcessor` that changes nothing, and remembers by how much the best token of every step was ahead."""

    def __init__(self) -> None:
        self.steps_TB: list[list[float]] = []

    def __call__(self, input_ids: torch.Tensor, scores_BV: torch.Tensor) -> torch.Tensor:
        best_B2 = scores_BV.float().topk(2).values
        self.steps_TB.append((best_B2[:, 0] - best_B2[:, 1]).clamp(max=LARGEST_MARGIN).tolist())
        return scores_BV

    def of(self, row: int) -> list[float]:
        """Margins of a row of the batch, a step each."""
        return [round(step_B[row], 4) for step_B in self.steps_TB]


def choose(rows: Sequence[RenderedRow], count: int, seed: int) -> list[int]:
    """Numbers of rows with different prompts, from the shorter half of them, spread evenly over the rows."""
    if not count:
        return []
    distinct = list({prompt_of(rows[number]): number for number in reversed(range(len(rows)))}.items())
    distinct = [(ids, number) for ids, number in distinct if ids]
    shorter = sorted(distinct, key=lambda each: len(each[0]))[: max(count, (len(distinct) + 1) // 2)]
    numbers = sorted(number for _, number in shorter)
    if len(numbers) <= count:
        return numbers
    step = len(numbers) / count
    begin = random.Random(seed).random() * step
    return [numbers[min(len(numbers) - 1, int(begin + step * place))] for place in range(count)]


def prompt_of(row: RenderedRow) -> tuple[int, ...]:
    """What a row asks; of plain text its beginning."""
    if row.answer_text is not None:
        return tuple(row.input_ids[: row.prompt_length])
    return tuple(row.input_ids[: min(OF_PLAIN_TEXT, len(row.input_ids) // 2)])


def prompts(
    rows: Sequence[RenderedRow], tokenizer: Any, conversations: Sequence[Any], options: dict[str, Any]
) -> list[Prompt]:
    """The prompts of rows. conversations: of each the (messages, tools) before its answer, or None."""
    found = []
    for row, conversation in zip(rows, conversations, strict=True):
        ids = prompt_of(row)
        text, exact = _text_of(ids, tokenizer)
        messages, tools = conversation if _renders_to(conversation, ids, tokenizer, options) else (None, None)
        found.append(Prompt(ids, text, exact, messages, tools))
    return found


def _text_of(ids: tuple[int, ...], tokenizer: Any) -> tuple[str, bool]:
    """Text that a server makes these ids of. Servers add a BOS to it where the tokenizer does."""
    whole = tokenizer.decode(ids, skip_special_tokens=False)
    bos = tokenizer.bos_token
    for text in (whole, whole.removeprefix(bos) if bos else whole):
        if tuple(tokenizer(text, verbose=False)["input_ids"]) == ids:
            return text, True
    return whole, False


def _renders_to(conversation: Any, ids: tuple[int, ...], tokenizer: Any, options: dict[str, Any]) -> bool:
    if conversation is None or tokenizer.chat_template is None:
        return False
    messages, tools = conversation
    try:
        rendered = tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=True, tokenize=False, **options
        )
    except Exception:  # a template may refuse a conversation in whatever way it likes
        return False
    return tuple(tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"]) == ids


def conversations_of(
    origins: Sequence[tuple[int, int]], examples: Callable[[int], Iterator[Any]]
) -> list[tuple[list[dict[str, Any]], list[dict[str, Any]] | None] | None]:
    """For every (source, number of an example) the messages before the answer and the tools; None if it is no chat.

    examples: of a source, in order, what `qlora.data.formats.Examples` yields.
    """
    wanted: dict[int, set[int]] = {}
    for source, number in origins:
        wanted.setdefault(source, set()).add(number)
    found: dict[tuple[int, int], Any] = {}
    for source, numbers in wanted.items():
        for number, read in enumerate(examples(source)):
            if number in numbers:
                found[source, number] = _conversation(read.example)
            if number >= max(numbers):
                break
    return [found.get(origin) for origin in origins]


def _conversation(example: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None] | None:
    from qlora.data.formats import Chat, Judged, Pair

    inner = example.chosen if isinstance(example, Pair) else example.example if isinstance(example, Judged) else example
    if not isinstance(inner, Chat):
        return None
    return list(inner.messages[:-1]), list(inner.tools) if inner.tools else None
