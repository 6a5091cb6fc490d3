"""Turns a row of any supported layout into one of a few normal forms, which are all that rendering knows.

| format | columns | normal form |
| --- | --- | --- |
| messages | `messages` (and `tools`) | `Chat` |
| conversations | `conversations` of `from` and `value` (and `system`, `tools`), as ShareGPT has them | `Chat` |
| prompt_completion | `prompt`, `completion`: both texts, or both lists of messages | `Completion`, `Chat` |
| instruction | `instruction`, `input` (may be empty or absent), `output`; or `question`, `answer` | `Chat` |
| preference | `prompt`, `chosen`, `rejected`: texts, or lists of messages | `Pair` |
| | `chosen`, `rejected`: conversations that differ in their last message | `Pair` |
| | `question` (and `system`), `chosen`, `rejected`: texts | `Pair` |
| kto | `prompt`, `completion` as in prompt_completion, and `label`: whether it is a good one | `Judged` |
| text | `text` | `Text` |

Preference columns are looked for last: what has `messages` too is read as conversations unless `format` says otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from qlora.data.sources import RawRows, located, open_rows
from qlora.data.tools import calls_of, described, tools_of
from qlora.errors import Problem, UserError
from qlora.recipe import Source

Message = dict[str, Any]
"""`role` and `content` (text); what else a chat template reads, such as `tool_calls`, is passed through."""


@dataclass(frozen=True)
class Chat:
    """A conversation that ends with the assistant's answer; goes through the chat template."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] | None = None


@dataclass(frozen=True)
class Completion:
    """A raw prompt and its continuation; no template is applied."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Text:
    """Plain text, learned as a whole."""

    text: str


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, of which the first is better."""

    chosen: Chat | Completion
    rejected: Chat | Completion


@dataclass(frozen=True)
class Judged:
    """An answer, and whether it is a good one."""

    example: Chat | Completion
    good: bool


Example = Chat | Completion | Text | Pair | Judged

# Who speaks in ShareGPT's rows and their relatives.
_SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}
# Column sets in the order in which they are looked for: a row that has several is read as the richest one
# (the original Alpaca file has `instruction`, `input`, `output` and `text`).
_INSTRUCTION_COLUMNS = (("instruction", "input", "output"), ("question", None, "answer"))
_COLUMNS: dict[str, tuple[tuple[str, ...], ...]] = {
    "messages": (("messages",),),
    "conversations": (("conversations",),),
    "kto": (("prompt", "completion", "label"),),
    "prompt_completion": (("prompt", "completion"),),
    "instruction": tuple((question, answer) for question, _, answer in _INSTRUCTION_COLUMNS),
    "text": (("text",),),
    "preference": (
        ("prompt", "chosen", "rejected"),
        ("question", "chosen", "rejected"),
        ("chosen", "rejected"),
    ),
}


# Columns that a format reads where they are there.
_OPTIONAL = {"input", "system", "tools"}


@dataclass(frozen=True)
class Read:
    """What became of a row: its normal form, or what is wrong with it; the rest as in `RawRow`."""

    example: Example | Problem
    file: int
    place: int
    share: float


@dataclass(frozen=True)
class Examples:
    """The rows of a source in their normal form, read anew in every iteration.

    Raises `UserError` for a source that cannot be read, or whose columns fit no format.
    """

    source: Source

    @cached_property
    def rows(self) -> RawRows:
        return open_rows(self.source)

    def where(self, file: int, place: int) -> str:
        return self.rows.where(file, place)

    def __iter__(self) -> Iterator[Read]:
        format: str | None = None if self.source.format == "auto" else self.source.format
        checked = not self.source.columns
        for row in self.rows:
            content, where = row.content, self.where(row.file, row.place)
            if isinstance(content, Problem):
                yield Read(located(content, where), row.file, row.place, row.share)
                continue
            if not checked:
                _check_columns(content, self.source.columns, where)
                checked = True
            if self.source.columns:
                content = _renamed(content, self.source.columns)
            format = format or detect_format(content, where)
            try:
                example: Example | Problem = to_example(content, format, where)
            except UserError as error:
                example = error.problems[0]
            yield Read(example, row.file, row.place, row.share)


def _check_columns(row: Mapping[str, Any], columns: Mapping[str, str], where: str) -> None:
    missing = [theirs for theirs in columns.values() if theirs not in row]
    if missing:
        raise UserError(
            f"there is no column {_listed(missing)}; the rows have {_listed(row)}",
            where=where,
            fix="`columns` maps a format's column to the one in the file",
        )
    unknown = set(columns) - {name for sets in _COLUMNS.values() for names in sets for name in names} - _OPTIONAL
    if unknown:
        raise UserError(f"no format has a column {_listed(sorted(unknown))}", where="columns")


def _renamed(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """A row with the columns that a recipe names under the names that formats have for them."""
    taken = set(columns.values())
    kept = {name: value for name, value in row.items() if name not in taken}
    return kept | {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}


def detect_format(row: Mapping[str, Any], where: str = "") -> str:
    """The format of a source, from the columns of its first row. Raises `UserError` when they fit none."""
    columns = row.keys()
    for name, alternatives in _COLUMNS.items():
        if name == "kto" and not isinstance(row.get("label"), bool):
            continue  # labels of another kind
        if any(set(needed) <= set(columns) for needed in alternatives):
            return name
    raise UserError(
        f"the columns {_listed(columns)} fit no known format",
        where=where,
        fix="name the columns " + ", or ".join(f"{_alternatives(name)} ({name})" for name in _COLUMNS),
    )


def to_example(row: Mapping[str, Any], format: str, where: str = "") -> Example:
    """The normal form of a row; `where` locates it in errors. Raises `UserError` for wrong or missing columns."""
    needed = next((names for names in _COLUMNS[format] if set(names) <= row.keys()), None)
    if needed is None:
        raise UserError(
            f"format {format} needs the columns {_alternatives(format)}; this row has {_listed(row)}", where=where
        )
    if format == "messages":
        return Chat(_messages(row["messages"], "messages", where), _tools(row, where))
    if format == "conversations":
        return Chat(_conversation(row, where), _tools(row, where))
    if format == "prompt_completion":
        return _prompt_completion(row, where)
    if format == "instruction":
        return _instruction(row, needed, where)
    if format == "preference":
        return _pair(row, needed, where)
    if format == "kto":
        return _judged(row, where)
    return Text(_text(row, "text", where))


def needs_template(example: Example) -> bool:
    """Whether an example is rendered through a chat template."""
    return isinstance(single(example), Chat)


def single(example: Example) -> Chat | Completion | Text:
    """What of an example supervised training would learn: of a pair the better answer."""
    if isinstance(example, Pair):
        return example.chosen
    return example.example if isinstance(example, Judged) else example


def _conversation(row: Mapping[str, Any], where: str) -> tuple[Message, ...]:
    """Messages of a ShareGPT row; a `system` column comes first."""
    turns = row["conversations"]
    if not isinstance(turns, list) or not turns:
        raise UserError(f"`conversations` must be a list of turns, not {described(turns)}", where)
    messages: list[Message] = []
    if row.get("system"):
        messages.append({"role": "system", "content": _text(row, "system", where)})
    for index, turn in enumerate(turns):
        if not isinstance(turn, Mapping) or not all(isinstance(turn.get(key), str) for key in ("from", "value")):
            raise UserError(f"turn {index} of `conversations` must be an object with texts `from` and `value`", where)
        speaker = turn["from"]
        if speaker not in _SPEAKERS:
            raise UserError(
                f"turn {index} of `conversations` is from {speaker!r}", where, f"known are {', '.join(_SPEAKERS)}"
            )
        message: Message = {"role": _SPEAKERS[speaker], "content": turn["value"]}
        if speaker == "function_call":
            message = {"role": "assistant", "content": "", "tool_calls": turn["value"]}
        messages.append(message)
    return _messages(messages, "conversations", where)


def _pair(row: Mapping[str, Any], columns: tuple[str, ...], where: str) -> Pair:
    if columns[0] == "question":
        system = {"system": _text(row, "system", where)} if row.get("system") else {}
        turns = [{"role": role, "content": text} for role, text in system.items()]
        row = {**row, "prompt": [*turns, {"role": "user", "content": _text(row, "question", where)}]}
        row |= {key: [{"role": "assistant", "content": _text(row, key, where)}] for key in ("chosen", "rejected")}
    if "prompt" in row:
        answers = [_prompt_completion({**row, "completion": row[key]}, where, key) for key in ("chosen", "rejected")]
    else:
        chats = [Chat(_messages(row[key], key, where), _tools(row, where)) for key in ("chosen", "rejected")]
        if chats[0].messages[:-1] != chats[1].messages[:-1]:
            raise UserError(
                "`chosen` and `rejected` differ before their last message", where, "they must be answers to one prompt"
            )
        answers = [*chats]
    if answers[0] == answers[1]:
        raise UserError("`chosen` and `rejected` are the same", where, "leave the row out: nothing is preferred")
    return Pair(*answers)


def _judged(row: Mapping[str, Any], where: str) -> Judged:
    label = row["label"]
    if label not in (True, False):  # 0 and 1 too
        raise UserError(f"column `label` must be true or false, not {described(label)}", where)
    return Judged(_prompt_completion(row, where), bool(label))


def _prompt_completion(row: Mapping[str, Any], where: str, column: str = "completion") -> Chat | Completion:
    if not isinstance(row["prompt"], list):
        if not isinstance(row["completion"], str):
            raise UserError(f"column `{column}` must hold text, not {described(row['completion'])}", where)
        return Completion(_text(row, "prompt", where), row["completion"])
    if not isinstance(row["completion"], list) or len(row["completion"]) != 1:
        raise UserError(f"a `prompt` of messages needs a `{column}` that is a list of one assistant message", where)
    return Chat(_messages(row["prompt"] + row["completion"], f"prompt + {column}", where), _tools(row, where))


def _instruction(row: Mapping[str, Any], columns: tuple[str, ...], where: str) -> Chat:
    question, answer = columns
    context_column = next(context for name, context, _ in _INSTRUCTION_COLUMNS if name == question)
    request = _text(row, question, where)
    if context_column and row.get(context_column):
        request = f"{request}\n\n{_text(row, context_column, where)}"
    return Chat(({"role": "user", "content": request}, {"role": "assistant", "content": _text(row, answer, where)}))


def _messages(value: Any, column: str, where: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise UserError(f"`{column}` must be a list of messages, not {described(value)}", where)
    messages = []
    for index, message in enumerate(value):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise UserError(f"message {index} of `{column}` must be an object with a `role` and a `content`", where)
        # Columnar files give every message every key; an absent one comes as None.
        message = {key: item for key, item in message.items() if item is not None}
        if "tool_calls" in message:
            message |= calls_of(message.pop("tool_calls"), f"message {index} of `{column}`", where)
        if not isinstance(message.get("content", "" if "tool_calls" in message else None), str):
            raise UserError(f"the `content` of message {index} ({message['role']}) must be text", where)
        messages.append(message)
    if messages[-1]["role"] != "assistant":
        raise UserError(
            f"the last message is from `{messages[-1]['role']}`: there is no answer to learn",
            where,
            "end every conversation with an assistant message",
        )
    if len(messages) == 1:
        raise UserError(
            f"`{column}` has no message before the answer", where, "use format text for text without a prompt"
        )
    return tuple(messages)


def _tools(row: Mapping[str, Any], where: str) -> tuple[dict[str, Any], ...] | None:
    return tools_of(row.get("tools"), where)


def _text(row: Mapping[str, Any], column: str, where: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise UserError(f"column `{column}` must hold text, not {described(value)}", where)
    return value


def _listed(columns: Any) -> str:
    return ", ".join(f"`{column}`" for column in columns) or "(none)"


def _alternatives(format: str) -> str:
    return " or ".join(_listed(names) for names in _COLUMNS[format])
