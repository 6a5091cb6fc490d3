"""Turns a row of any supported layout into one of three normal forms, which are all that rendering knows.

| format | columns | normal form |
| --- | --- | --- |
| messages | `messages` (and `tools`) | `Chat` |
| prompt_completion | `prompt`, `completion`: both texts, or both lists of messages | `Completion`, `Chat` |
| instruction | `instruction`, `input` (may be empty or absent), `output`; or `question`, `answer` | `Chat` |
| text | `text` | `Text` |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qlora.data.sources import RawRows, load_rows, malformed
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


Example = Chat | Completion | Text

# Column sets in the order in which they are looked for: a row that has several is read as the richest one
# (the original Alpaca file has `instruction`, `input`, `output` and `text`).
_INSTRUCTION_COLUMNS = (("instruction", "input", "output"), ("question", None, "answer"))
_COLUMNS: dict[str, tuple[tuple[str, ...], ...]] = {
    "messages": (("messages",),),
    "prompt_completion": (("prompt", "completion"),),
    "instruction": tuple((question, answer) for question, _, answer in _INSTRUCTION_COLUMNS),
    "text": (("text",),),
}


def read_examples(source: Source) -> list[tuple[Example, str]]:
    """Every row of a source in its normal form, with where it stands (file and line, or index).

    Raises `UserError` for a source that cannot be read, and for rows that do not fit the format: all counted, the first
    ones shown.
    """
    rows = load_rows(source)
    format = detect_format(rows) if source.format == "auto" else source.format
    examples: list[tuple[Example, str]] = []
    problems: list[Problem] = []
    for index, row in enumerate(rows):
        where = rows.where(index)
        try:
            examples.append((to_example(row, format, where), where))
        except UserError as error:
            problems.extend(error.problems)
    if problems:
        raise malformed(problems, len(rows))
    return examples


def detect_format(rows: RawRows) -> str:
    """The format of a source, from the columns of its first row. Raises `UserError` when they fit none."""
    columns = rows.rows[0].keys()
    for name, alternatives in _COLUMNS.items():
        if any(set(needed) <= set(columns) for needed in alternatives):
            return name
    raise UserError(
        f"the columns {_listed(columns)} fit no known format",
        where=rows.where(0),
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
    if format == "prompt_completion":
        return _prompt_completion(row, where)
    if format == "instruction":
        return _instruction(row, needed, where)
    return Text(_text(row, "text", where))


def needs_template(example: Example) -> bool:
    """Whether an example is rendered through a chat template."""
    return isinstance(example, Chat)


def _prompt_completion(row: Mapping[str, Any], where: str) -> Example:
    if not isinstance(row["prompt"], list):
        return Completion(_text(row, "prompt", where), _text(row, "completion", where))
    if not isinstance(row["completion"], list) or len(row["completion"]) != 1:
        raise UserError("a `prompt` of messages needs a `completion` that is a list of one assistant message", where)
    return Chat(_messages(row["prompt"] + row["completion"], "prompt + completion", where), _tools(row, where))


def _instruction(row: Mapping[str, Any], columns: tuple[str, ...], where: str) -> Chat:
    question, answer = columns
    context_column = next(context for name, context, _ in _INSTRUCTION_COLUMNS if name == question)
    request = _text(row, question, where)
    if context_column and row.get(context_column):
        request = f"{request}\n\n{_text(row, context_column, where)}"
    return Chat(({"role": "user", "content": request}, {"role": "assistant", "content": _text(row, answer, where)}))


def _messages(value: Any, column: str, where: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise UserError(f"`{column}` must be a list of messages, not {_described(value)}", where)
    messages = []
    for index, message in enumerate(value):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise UserError(f"message {index} of `{column}` must be an object with a `role` and a `content`", where)
        # Columnar files give every message every key; an absent one comes as None.
        message = {key: item for key, item in message.items() if item is not None}
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
    tools = row.get("tools")
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise UserError(f"`tools` must be a list of tool definitions, not {_described(tools)}", where)
    return tuple(dict(tool) for tool in tools)


def _text(row: Mapping[str, Any], column: str, where: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise UserError(f"column `{column}` must hold text, not {_described(value)}", where)
    return value


def _described(value: Any) -> str:
    if value is None:
        return "nothing (null)"
    return "an empty list" if value == [] else f"{type(value).__name__} {str(value)[:40]!r}"


def _listed(columns: Any) -> str:
    return ", ".join(f"`{column}`" for column in columns) or "(none)"


def _alternatives(format: str) -> str:
    return " or ".join(_listed(names) for names in _COLUMNS[format])
