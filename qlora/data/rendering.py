"""Renders a row to tokens and labels: the one place that decides what the model reads and what it learns.

Training, calibration, evaluation and `qlora check` all render here, so they cannot disagree. A rendered row is

    [BOS] prompt … | answer … end-of-turn
    labels: -100   | the same tokens            (loss_on: completion)

The boundary comes from rendering the prompt alone, exactly as a server does before the model answers, and never from
searching for a marker in the finished text.

With `loss_on: assistant` every answer of a conversation is rendered that way, as the last one of what it has seen.
Where the tokens up to an answer's end begin those of a later one, as with most templates, both are learned in one row;
a template that shows earlier answers otherwise than they were given (without their thinking) gets a row for each.

A pair of answers is the row of the better one, with the tokens of the other one beside it: behind the same prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from qlora.data.formats import (
    Chat,
    Completion,
    Example,
    Judged,
    Message,
    Pair,
    Text,
    needs_template,
)
from qlora.data.templates import adds_bos, resolve_chat_template
from qlora.errors import UserError

IGNORED = -100  # the label of a token that carries no loss
_SEAMS = ("\n", "0", ".")


@dataclass(frozen=True)
class RenderedRow:
    """A row as the model sees it.

    input_ids: token ids, BOS and end of turn included, no padding.
    labels: as long as `input_ids`; the token itself where it is supervised, -100 elsewhere. Not shifted.
    prompt_length: tokens before the last answer; `input_ids[:prompt_length]` is what a server would generate from.
    truncated: whether the row was longer than `max_length`; then its right end is missing, end of turn included.
    answer_text: the whole expected answer without its end of turn, even when truncated; None for plain text.
    rejected_ids: of a pair the tokens of the worse answer, that could stand behind the prompt too.
    good: whether the answer is a good one, where rows say so.
    """

    input_ids: list[int]
    labels: list[int]
    prompt_length: int
    truncated: bool
    answer_text: str | None
    rejected_ids: list[int] | None = None
    good: bool | None = None

    @property
    def tokens(self) -> int:
        """Of all that is computed for it once: a pair has its prompt twice."""
        rejected = 0 if self.rejected_ids is None else self.prompt_length + len(self.rejected_ids)
        return len(self.input_ids) + rejected

    @property
    def supervised_tokens(self) -> int:
        """Tokens that carry loss; the first token of a row never does, as nothing predicts it."""
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass(frozen=True)
class _Parts:
    """The text of a row: what comes before the answer, the answer, and what ends the turn."""

    prompt: str
    answer: str
    end: str
    has_answer: bool  # False for plain text, which is learned as a whole

    @property
    def text(self) -> str:
        return self.prompt + self.answer + self.end


@dataclass
class Renderer:
    """Renders examples for one tokenizer and one set of settings. `chat_template` is Jinja text, needed for chats."""

    tokenizer: PreTrainedTokenizerBase
    loss_on: str
    max_length: int
    chat_template: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    """What the template is given beside the conversation."""
    _bos: str = field(init=False)
    _eos: str = field(init=False)
    _special: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        if self.tokenizer.eos_token is None:
            raise UserError("the tokenizer has no EOS token, so no answer could be taught to end", where="model.base")
        self._eos = str(self.tokenizer.eos_token)
        self._bos = str(self.tokenizer.bos_token) if adds_bos(self.tokenizer) else ""
        added = [str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        self._special = tuple({*self.tokenizer.all_special_tokens, *added})

    def render(self, example: Example) -> list[RenderedRow]:
        """Tokens and labels of one example; raises what `render_batch` returns as an error."""
        rows = self.render_batch([example])[0]
        if isinstance(rows, UserError):
            raise rows
        return rows

    def render_batch(self, examples: Sequence[Example]) -> list[list[RenderedRow] | UserError]:
        """The rows of every example, tokenized together, which uses all cores.

        An example is one row, or several where every answer of a conversation is learned and the template does not
        keep earlier ones as they were. A row longer than `max_length` loses tokens on the right: the prompt stays whole
        as long as it fits, and the model is not taught to stop where the row was cut. An example has a `UserError` in
        its place when the template cannot render its conversation, or renders it so that a prompt is not its beginning.
        """
        parts = [[self._parts(turn) for turn in self._turns(example)] for example in examples]
        good = [part for turns in parts for part in turns if isinstance(part, _Parts)]
        encoded = iter(
            zip(self._encode([part.prompt for part in good]), self._encode([p.text for p in good]), strict=True)
        )
        found: list[list[RenderedRow] | UserError] = []
        for example, turns in zip(examples, parts, strict=True):
            rows = [self._label(part, *next(encoded)) for part in turns if isinstance(part, _Parts)]
            error = next((part for part in turns if isinstance(part, UserError)), None)
            found.append(error or self._finished(example, rows))
        return found

    def _finished(self, example: Example, rows: list[RenderedRow]) -> list[RenderedRow]:
        """The rows of an example from those of its turns."""
        if isinstance(example, Pair):
            better, worse = (self._cut(row) for row in rows)
            # A cut one is a cut pair. Prompts are the same text, and the same tokens.
            rejected_ids = worse.input_ids[worse.prompt_length :]
            return [replace(better, truncated=better.truncated or worse.truncated, rejected_ids=rejected_ids)]
        if isinstance(example, Judged):
            return [replace(self._cut(row), good=example.good) for row in rows]
        return [self._cut(row) for row in _together(rows)]

    def _turns(self, example: Example) -> list[Chat | Completion | Text]:
        """What is rendered of an example, each with an answer at its end: itself, or up to every assistant message."""
        if isinstance(example, Pair):
            return [example.chosen, example.rejected]
        if isinstance(example, Judged):
            return [example.example]
        if self.loss_on != "assistant" or not isinstance(example, Chat):
            return [example]
        answers = [i for i, message in enumerate(example.messages) if i and message["role"] == "assistant"]
        return [replace(example, messages=example.messages[: i + 1]) for i in answers]

    def _label(self, parts: _Parts, prompt_ids: list[int], joint_ids: list[int]) -> RenderedRow:
        completion_ids = self._completion_ids(parts, prompt_ids, joint_ids)
        input_ids = prompt_ids + completion_ids
        mask_prompt = parts.has_answer and self.loss_on != "all"
        labels = [IGNORED] * len(prompt_ids) + completion_ids if mask_prompt else input_ids
        return RenderedRow(input_ids, labels, len(prompt_ids), False, parts.answer if parts.has_answer else None)

    def _cut(self, row: RenderedRow) -> RenderedRow:
        return replace(
            row,
            input_ids=row.input_ids[: self.max_length],
            labels=row.labels[: self.max_length],
            prompt_length=min(row.prompt_length, self.max_length),
            truncated=len(row.input_ids) > self.max_length,
        )

    def _parts(self, example: Chat | Completion | Text) -> _Parts | UserError:
        try:
            prompt, completion = self._texts(example)
        except UserError as error:
            return error
        answer, end = self._split_end(completion, templated=isinstance(example, Chat))
        if isinstance(example, Chat) and (missing := self._left_out(example, prompt + completion, answer)):
            fix = "a template that shows all of a conversation is needed: set data.chat_template"
            return UserError(f"the chat template leaves {missing} out", fix=fix)
        return _Parts(prompt, answer, end, has_answer=not isinstance(example, Text))

    def _texts(self, example: Chat | Completion | Text) -> tuple[str, str]:
        """The text that a server would send to the model, and the text that follows it."""
        if isinstance(example, Chat):
            return self._chat_texts(example)
        if isinstance(example, Completion):
            prompt, completion = example.prompt, example.completion
        else:
            prompt, completion = "", example.text
        # Text that was put through a template beforehand carries its own BOS; a second one would degrade the model.
        return prompt if (prompt + completion).startswith(self._bos) else self._bos + prompt, completion

    def _left_out(self, example: Chat, text: str, answer: str) -> str | None:
        """What of a conversation its rendered text does not show: the model would learn from less than it seems."""
        messages, last = example.messages, example.messages[-1]
        if not answer.strip() and last.get("content", "").strip():
            return "the answer"
        if "</think>" in last.get("content", "") and "</think>" not in answer:
            return "the thought before the answer"
        if example.tools and self._same(replace(example, tools=None), text):
            return "the tools"
        for index, message in enumerate(messages):
            for key in ("tool_calls", "reasoning_content") if message is last else ("tool_calls",):
                if message.get(key) and self._same(_with(example, index, {"content": "", **message, key: None}), text):
                    return f"the {key} of message {index}"
            content = message.get("content", "")
            told = message["role"] in ("user", "assistant") or content.strip() in text
            if not told and self._same(_with(example, index, {**message, "content": content + "."}), text):
                return f"message {index}, of the role {message['role']},"
        return None

    def _same(self, example: Chat, text: str) -> bool:
        """Whether a conversation is rendered to this text too."""
        try:
            return self._apply_template(example, example.messages, add_generation_prompt=False) == text
        except jinja2.TemplateError:
            return False

    def _chat_texts(self, example: Chat) -> tuple[str, str]:
        try:
            prompt = self._apply_template(example, example.messages[:-1], add_generation_prompt=True)
            full = self._apply_template(example, example.messages, add_generation_prompt=False)
        except jinja2.TemplateError as error:
            tools = example.tools or any(m["role"] == "tool" or m.get("tool_calls") for m in example.messages)
            fix = "its tools need a template that knows tools: set data.chat_template" if tools else ""
            raise UserError(f"the chat template refuses this conversation: {error}", fix=fix) from error
        if not full.startswith(prompt):
            agree = next((i for i, (a, b) in enumerate(zip(prompt, full, strict=False)) if a != b), len(full))
            raise UserError(
                f"the chat template renders the prompt to …{prompt[max(0, agree - 20) :]!r} but the conversation to "
                f"…{full[max(0, agree - 20) : agree + 20]!r}…: trained that way the model would see another prompt "
                "than in serving",
                fix="set data.chat_template to a template whose generation prompt begins the answer it renders",
            )
        return prompt, full[len(prompt) :]

    def _apply_template(self, example: Chat, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        return self.tokenizer.apply_chat_template(  # type: ignore[return-value]
            list(messages),
            tools=list(example.tools) if example.tools else None,
            chat_template=self.chat_template,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            **self.options,
        )

    def _split_end(self, completion: str, *, templated: bool) -> tuple[str, str]:
        """Splits a completion into the answer and its end of turn, which is never empty.

        The end is the special tokens that close the turn; white space after them (a newline, in most templates) is
        dropped, as a server stops before it. Where there are none, EOS is the end.
        """
        answer = completion
        while (stripped := answer.rstrip()).endswith(self._special):
            answer = stripped.removesuffix(max(filter(stripped.endswith, self._special), key=len))
        end = completion[len(answer) :].rstrip()
        if end:
            return answer, end
        return answer.rstrip() if templated else answer, self._eos

    def _completion_ids(self, parts: _Parts, prompt_ids: list[int], joint_ids: list[int]) -> list[int]:
        """Tokens of answer and end, given those of the prompt, which stay what a server computes, and of the whole."""
        if joint_ids[: len(prompt_ids)] == prompt_ids:
            return joint_ids[len(prompt_ids) :]
        # A token straddles the boundary ("\n" + "\n" is one token in many vocabularies): tokenize the parts apart, the
        # second behind a seam that it does not merge with, as some tokenizers put a space before the first word.
        completion = parts.answer + parts.end
        for seam in _SEAMS:
            seam_ids, seamed_ids = self._encode([seam, seam + completion])
            if seamed_ids[: len(seam_ids)] == seam_ids:
                return seamed_ids[len(seam_ids) :]
        return self._encode([completion])[0]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        # verbose=False: rows longer than the model's window are ours to cut, and no reason for a warning.
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []  # type: ignore[return-value]


def _with(example: Chat, index: int, message: Message) -> Chat:
    """A conversation with another message in this place; keys that are None are left out."""
    changed = {key: value for key, value in message.items() if value is not None}
    return replace(example, messages=(*example.messages[:index], changed, *example.messages[index + 1 :]))


def _together(rows: Sequence[RenderedRow]) -> list[RenderedRow]:
    """The answers of a conversation, one after the other, in as few rows as have each of them as it is given."""
    found: list[RenderedRow] = []
    for row in reversed(rows):
        later = found[-1] if found else None
        length = len(row.input_ids)
        if later is None or later.input_ids[:length] != row.input_ids:
            found.append(row)
        else:
            # What the later row says of these tokens is that they are not its answer.
            found[-1] = replace(later, labels=row.labels + later.labels[length:])
    return found[::-1]


def render(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    *,
    loss_on: str = "completion",
    max_length: int,
    chat_template: str | None = None,
) -> RenderedRow:
    """The row of a single example that ends with its last answer; `chat_template` is Jinja text, by default its own."""
    if chat_template is None and needs_template(example):
        chat_template = resolve_chat_template(tokenizer, None)
    return Renderer(tokenizer, loss_on, max_length, chat_template).render(example)[-1]
