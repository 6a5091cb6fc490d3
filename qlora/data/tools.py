"""Tools and their calls in a conversation, in the one form that chat templates are written for.

A call is `{"type": "function", "function": {"name": …, "arguments": {…}}}`, its arguments an object. Files have them
otherwise too: arguments as JSON text (as OpenAI's API gives them, and as columnar files must), the function without
what is around it, or the whole list as JSON text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from qlora.errors import UserError


def calls_of(calls: Any, what: str, where: str) -> dict[str, Any]:
    """The `tool_calls` of a message, as its key; nothing if there are none.

    Raises `UserError` for a call without a name, and for arguments that are no JSON object.
    """
    if isinstance(calls, str):
        calls = _parsed(calls)
    calls = calls if isinstance(calls, list) else [calls]
    found = [_call(call, what, where) for call in calls]
    return {"tool_calls": found} if found else {}


def _call(call: Any, what: str, where: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise UserError(
            f"a tool call of {what} must be JSON with a `name` and `arguments`, not {described(call)}", where
        )
    given = function.get("arguments")
    arguments = _parsed(given) if isinstance(given, str) else given
    if arguments is None and given in (None, "", "null"):
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise UserError(
            f"the `arguments` of {function['name']} in {what} must be a JSON object, not {described(given)}", where
        )
    about = {"id": call["id"]} if call.get("id") is not None else {}
    return about | {"type": "function", "function": {"name": function["name"], "arguments": dict(arguments)}}


def tools_of(tools: Any, where: str) -> tuple[dict[str, Any], ...] | None:
    """The definitions of a row's column `tools`. Raises `UserError` if they are none."""
    if isinstance(tools, str) and tools.strip():  # columnar files have no better place for definitions that differ
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise UserError(f"`tools` is not valid JSON: {error.msg}", where) from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise UserError(f"`tools` must be a list of tool definitions, not {described(tools)}", where)
    return tuple(dict(tool) for tool in tools)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None


def described(value: Any) -> str:
    """What a value is, for messages."""
    if value is None:
        return "nothing (null)"
    return "an empty list" if value == [] else f"{type(value).__name__} {str(value)[:40]!r}"
