"""Golden prompts replayed on an OpenAI-compatible server, and how far it answers as the checkpoint does.

Greedy answers are compared up to the first token that differs. Where the checkpoint itself hardly preferred one token
to another (a margin below NEAR_TIE), rounding may decide, and what follows is not judged; where it was sure, the rest
of the answer counts as missed. agreement = agreed / judged tokens, over all prompts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qlora.errors import QloraError

NEAR_TIE = 0.5
"""Nats between the two best tokens below which kernels may differ: at logits of 16 to 32, bf16 steps are 0.125."""
ENOUGH_JUDGED = 0.25
"""Share of the golden tokens that must be left to judge."""
NOT_THIS_WAY = (400, 404, 405, 415, 422, 501)
"""Status codes of a server that does not take a request of this form."""
RUNGS = ("gptq", "trained")
"""Whose answers a server's are compared with."""
NO_SUCH_API = "name the address of an OpenAI-compatible API"


@dataclass(frozen=True)
class Reply:
    """What a server answered, and its token ids where it says them."""

    text: str
    ids: list[int] | None = None
    strips: bool = False
    """Whether white space at the ends may be gone."""


@dataclass(frozen=True)
class Match:
    """An answer beside a golden one. `at`: the first token that differs, None if none does; `margin` is its margin."""

    agreed: int
    judged: int
    tokens: int
    at: int | None = None
    margin: float | None = None

    @property
    def exact(self) -> bool:
        return self.at is None

    @property
    def tied(self) -> bool:
        return self.margin is not None and self.margin < NEAR_TIE


@dataclass(frozen=True)
class Replayed:
    """One golden prompt: what was asked, the server's answer, and how it compares with those of models, by rung."""

    asked: str
    reply: Reply
    matches: Mapping[str, Match]


@dataclass(frozen=True)
class Agreement:
    """Of all prompts with the answers of rungs. form: how they were asked (token ids, text, or messages)."""

    model: str
    form: str
    prompts: Sequence[Replayed]

    def share(self, rung: str) -> float | None:
        """Of judged tokens on which the server agrees with a rung's answers; None if too few are left to judge."""
        found = [each.matches[rung] for each in self.prompts]
        judged, tokens = sum(each.judged for each in found), sum(each.tokens for each in found)
        if judged == 0 or judged < ENOUGH_JUDGED * tokens:
            return None
        return sum(each.agreed for each in found) / judged

    def exact(self, rung: str) -> int:
        return sum(each.matches[rung].exact for each in self.prompts)


def replay(contract: Mapping[str, Any], server: Server) -> Agreement:
    """Ask a server every golden prompt of a contract. Raises QloraError where it cannot be asked."""
    found = []
    for entry in contract["golden"]:
        reply = server.answer(entry, contract["max_new_tokens"], contract.get("template_options") or {})
        asked = entry["messages"][-1]["content"] if entry.get("messages") else entry["prompt"]
        found.append(Replayed(asked, reply, {rung: match(entry[rung], reply) for rung in RUNGS if rung in entry}))
    return Agreement(server.model, server.form, found)


def match(golden: Mapping[str, Any], reply: Reply) -> Match:
    """How far a reply is the golden answer, by token ids where the server says them, else by text."""
    tokens = len(golden["ids"])
    if reply.ids is not None:
        agreed, whole = _same_ids(golden, reply.ids)
    else:
        agreed, whole = _same_text(golden, reply)
    if whole:
        return Match(tokens, tokens, tokens)
    at = min(agreed, tokens - 1)
    margin = golden["margins"][at]
    return Match(at, at if margin < NEAR_TIE else tokens, tokens, at, margin)


def _same_ids(golden: Mapping[str, Any], ids: Sequence[int]) -> tuple[int, bool]:
    """(equal leading tokens, whether that is all). Servers differ in whether they say the token that stopped them."""
    expected = golden["ids"]
    spoken = expected[:-1] if golden["finished"] else expected
    said = list(ids[:-1] if golden["finished"] and ids and ids[-1] == expected[-1] else ids)
    same = next((i for i, (a, b) in enumerate(zip(spoken, said, strict=False)) if a != b), min(len(spoken), len(said)))
    return same, same == len(spoken) and (len(said) == same or not golden["finished"])


def _same_text(golden: Mapping[str, Any], reply: Reply) -> tuple[int, bool]:
    text, said, shift = golden["text"], reply.text, 0
    if reply.strips:
        shift = len(text) - len(text.lstrip())
        text, said = text.strip(), said.strip()
    if not golden["finished"]:  # a character of several tokens may have been cut
        text, said = text.rstrip("\ufffd"), said.rstrip("\ufffd")
    same = next((i for i, (a, b) in enumerate(zip(text, said, strict=False)) if a != b), min(len(text), len(said)))
    whole = same == len(text) and (len(said) == same or not golden["finished"])
    return sum(end <= same + shift for end in golden["ends"][: len(golden["ids"]) - golden["finished"]]), whole


@dataclass
class Server:
    """An OpenAI-compatible server. model: its name there; found by itself where the server has one.

    key: sent as a bearer token, and never shown.
    """

    url: str
    model: str = ""
    key: str | None = field(default=None, repr=False)
    timeout: float = 120.0
    form: str = ""
    """In which prompts were asked last."""
    _refused: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        import httpx

        base = self.url.rstrip("/")
        self.url = base if base.endswith("/v1") else f"{base}/v1"
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        self._client = httpx.Client(base_url=self.url, headers=headers, timeout=self.timeout)
        if not self.model:
            self.model = self._only_model()

    def answer(self, entry: Mapping[str, Any], max_tokens: int, template_options: Mapping[str, Any]) -> Reply:
        """The greedy answer to a golden prompt, asked in the first form that the server takes."""
        refusals = []
        for form, path, body in _requests(entry, template_options):
            if form in self._refused:
                continue
            asked = {"model": self.model, "temperature": 0, "max_tokens": max_tokens} | body
            status, content = self._send("POST", path, asked)
            if status in NOT_THIS_WAY:
                self._refused.add(form)
                refusals.append(f"{form}: {status} {_said(content)}")
                continue
            self.form = form
            return _reply(self._checked(status, content), self.url)
        why = "; ".join(refusals) or "this prompt can only be asked as messages of the checkpoint's own chat template"
        raise QloraError(
            f"the server takes the golden prompts in no form that it was offered ({why})",
            self.url,
            "name another of its models with --model, or serve the checkpoint with /v1/completions",
        )

    def _only_model(self) -> str:
        status, content = self._send("GET", "models", None)
        if status in NOT_THIS_WAY:
            raise QloraError("the server does not list its models", f"{self.url}/models", "name one with --model")
        listed = self._checked(status, content).get("data")
        names = [each["id"] for each in listed] if isinstance(listed, list) else []
        if len(names) != 1:
            what = f"the server has {len(names)} models" + (f": {', '.join(names[:10])}" if names else "")
            raise QloraError(what, f"{self.url}/models", "name the one to ask with --model")
        return str(names[0])

    def _send(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        import httpx

        where = f"{self.url}/{path}"
        try:
            response = self._client.request(method, path, json=body)
        except httpx.TimeoutException:
            fix = "wait until it has loaded the model, or raise --timeout"
            raise QloraError(f"no answer within {self.timeout:g} s", where, fix) from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            what = f"the server cannot be reached ({str(error) or type(error).__name__})"
            raise QloraError(what, where, "start it, and check the address and port") from None
        try:
            return response.status_code, response.json()
        except json.JSONDecodeError:
            if response.status_code < 400:
                raise QloraError(
                    "the answer is not JSON", where, "name the address of an OpenAI-compatible API"
                ) from None
            return response.status_code, response.text

    def _checked(self, status: int, content: Any) -> dict[str, Any]:
        if status in (401, 403):
            raise QloraError(f"the server wants a key ({status})", self.url, "put it in OPENAI_API_KEY")
        if status >= 300 or not isinstance(content, dict):
            raise QloraError(f"the server answered {status}: {_said(content)}", self.url, "look at its log")
        return content


def _requests(
    entry: Mapping[str, Any], template_options: Mapping[str, Any]
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(form, path, body) of every way to ask a golden prompt, the most exact first."""
    ids = {"prompt": entry["prompt_ids"]}
    yield "token ids", "completions", ids | {"return_token_ids": True}
    yield "token ids alone", "completions", ids
    if entry.get("prompt_is_exact", True):
        yield "text", "completions", {"prompt": entry["prompt"]}
    if entry.get("messages"):
        body: dict[str, Any] = {"messages": entry["messages"]}
        body |= {"tools": entry["tools"]} if entry.get("tools") else {}
        body |= {"chat_template_kwargs": dict(template_options)} if template_options else {}
        yield "messages", "chat/completions", body


def _reply(content: Mapping[str, Any], url: str) -> Reply:
    try:
        (choice,) = content["choices"]
        if "message" in choice:
            return Reply(str(choice["message"].get("content") or ""), strips=True)
        ids = choice.get("token_ids")
        return Reply(str(choice["text"]), list(map(int, ids)) if ids else None)
    except (KeyError, TypeError, ValueError) as error:
        what = f"the answer is not one of a completion ({error!r})"
        raise QloraError(what, url, NO_SUCH_API) from None


def _said(content: Any) -> str:
    """What a server says is wrong, in a line."""
    if isinstance(content, dict):
        content = content.get("error", content.get("detail", content))
    if isinstance(content, dict):
        content = content.get("message", content)
    text = " ".join(str(content).split())
    return text if len(text) <= 200 else f"{text[:200]} …"
