"""Talk to a model: a conversation in its own chat template, streamed, and continued with another rung at any time.

Answers are greedy unless a temperature is set. A conversation that outgrows the model's window loses its oldest turns,
and says so. Ctrl-C stops an answer, and what was said of it stays; at the prompt it leaves, as Ctrl-D and /exit do.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import jinja2
import torch
from transformers.generation.streamers import BaseStreamer

from qlora.data.formats import Chat
from qlora.data.rendering import render
from qlora.errors import UserError
from qlora.evaluation.generation import stop_tokens
from qlora.evaluation.ladder import release_memory
from qlora.models.placement import input_device
from qlora.reporting import console
from qlora.reporting.screen import Screen
from qlora.shelf import Loaded, Shelf, window_of

ROOM_TO_ANSWER = 4  # a fourth of the window is kept free for an answer, or max_tokens where that is less

DESCRIPTIONS = {
    "base": "the base, before training",
    "nf4": "the base as training held it",
    "trained": "the base with the trained adapter",
    "merged": "the adapter merged into the base",
    "gptq": "the quantized model, which is shipped",
}

HELP = {
    "rung": ("[NAME]", "go on with another model, or list those there are"),
    "again": ("", "answer the last message again, with the present model and settings"),
    "system": ("[TEXT]", "set the system text; without TEXT there is none"),
    "reset": ("", "forget the conversation; the system text stays"),
    "set": ("[KEY=VALUE]…", "temperature (0: always the likeliest token) and max_tokens of an answer"),
    "help": ("", "this list"),
    "exit": ("", "leave, as Ctrl-D does"),
}


@dataclass(frozen=True)
class Settings:
    """temperature: 0 is greedy. max_tokens: of an answer. system: text before the conversation."""

    temperature: float = 0.0
    max_tokens: int = 512
    system: str | None = None


@dataclass(frozen=True)
class Turn:
    question: str
    answer: str


class Stream(BaseStreamer):
    """Decodes tokens as they are generated, and writes each piece of text once no later token can change it.

    Pieces together are the text of all tokens: each is what a token adds to the text of those just before it, so that
    characters of several tokens come whole, and spaces at the beginning of a piece are not lost.
    """

    def __init__(self, tokenizer: Any, stops: set[int], write: Callable[[str], None]) -> None:
        self.tokenizer, self.stops, self.write = tokenizer, stops, write
        self.text = ""
        self.tokens = 0
        self.ended = False
        self._ids: list[int] = []
        self._known, self._written = 0, 0  # tokens from which the next piece is decoded; that were written already
        self._prompt_is_next = True

    def put(self, value: torch.Tensor) -> None:
        """Raises KeyboardInterrupt if one was asked for and got lost, as in a finaliser."""
        if self._prompt_is_next:
            self._prompt_is_next = False
            return
        if console.interrupted:
            raise KeyboardInterrupt
        new = value.flatten().tolist()
        self.tokens += len(new)
        self.ended = new[-1] in self.stops
        self._ids += [token for token in new if token not in self.stops]
        before, after = self._decode(self._ids[self._known : self._written]), self._decode(self._ids[self._known :])
        if after.endswith("\N{REPLACEMENT CHARACTER}"):  # a character of which tokens are still to come
            return
        self._known, self._written = self._written, len(self._ids)
        self._say(after[len(before) :])

    def end(self) -> None:
        """Write what waits for tokens that will not come."""
        before, after = self._decode(self._ids[self._known : self._written]), self._decode(self._ids[self._known :])
        self._written = len(self._ids)
        self._say(after[len(before) :])

    def _say(self, piece: str) -> None:
        self.text += piece
        if piece:
            self.write(piece)

    def _decode(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


class Session:
    """A conversation with the models of a shelf, one of which is in memory at a time."""

    def __init__(self, shelf: Shelf, settings: Settings, screen: Screen) -> None:
        self.shelf, self.settings, self.screen = shelf, settings, screen
        self.turns: list[Turn] = []
        self.rung = shelf.first
        self._loaded: Loaded | None = None
        self._stops: set[int] = set()
        self._dropped = 0
        self._said_no_template = False

    def run(self) -> None:
        """Until there are no more lines, or the user leaves. Raises UserError for what cannot even begin."""
        self._load(self.rung)
        if self.settings.system is not None:
            self._require_system(self.settings.system)
        if self.screen.is_terminal:
            others = f"/rung switches to {', '.join(name for name in self.shelf.rungs if name != self.rung)} · "
            self.screen.note(f"{others if len(self.shelf.rungs) > 1 else ''}/help lists commands · Ctrl-D leaves")
        while (line := self._next_line()) is not None:
            try:
                if line.strip() and not self._handle(line.strip()):
                    break
            except UserError as error:
                self.screen.problem("\n".join(map(str, error.problems)))
            except torch.OutOfMemoryError:
                release_memory()
                self.screen.problem("the device has no memory left for this: /reset forgets the conversation")
            except KeyboardInterrupt:
                console.interrupted = False
                self.screen.note("\nstopped")

    def _next_line(self) -> str | None:
        try:
            return self.screen.ask(self.rung)
        except KeyboardInterrupt:
            console.interrupted = False
            self.screen.write("\n")
            return None

    def _handle(self, line: str) -> bool:
        """Do what a line asks for; whether to go on."""
        if not line.startswith("/") or line.startswith("//"):
            self._ask(line[1:] if line.startswith("//") else line)
            return True
        name, _, rest = line[1:].partition(" ")
        if name == "exit":
            return False
        if name not in HELP:
            close = difflib.get_close_matches(name, HELP, n=1)
            meant = f"did you mean /{close[0]}? " if close else ""
            raise UserError(
                f"there is no command /{name}", fix=f"{meant}/help lists them; // begins a message with a slash"
            )
        getattr(self, f"_do_{name}")(rest.strip())
        return True

    # The commands.

    def _do_help(self, rest: str) -> None:
        usages = {f"/{name} {usage}": text for name, (usage, text) in HELP.items()}
        self.screen.note("\n".join(f"  {usage:22}{text}" for usage, text in usages.items()))

    def _do_rung(self, name: str) -> None:
        if not name:
            for each in self.shelf.rungs:
                mark = "*" if each == self.rung else " "
                stale = " (out of date)" if each in self.shelf.stale else ""
                self.screen.note(f"{mark} {each:10}{DESCRIPTIONS.get(each, '')}{stale}".rstrip())
        elif name not in self.shelf.rungs:
            raise UserError(f"there is no {name} here", fix=f"there is {', '.join(self.shelf.rungs)}")
        elif name != self.rung or self._loaded is None:
            self._load(name)

    def _do_again(self, rest: str) -> None:
        if not self.turns:
            raise UserError("nothing was answered yet")
        *earlier, last = self.turns
        answer = self._reply(earlier, last.question)
        if answer is not None:
            self.turns = [*earlier, Turn(last.question, answer)]

    def _do_system(self, text: str) -> None:
        if text:
            self._require_system(text)
        self.settings = replace(self.settings, system=text or None)
        self.screen.note("the system text is set, also for what was said before" if text else "no system text")

    def _do_reset(self, rest: str) -> None:
        self.turns, self._dropped = [], 0
        self.screen.note("a new conversation")

    def _do_set(self, rest: str) -> None:
        self.settings = with_values(self.settings, rest.split())
        values = {field.name: getattr(self.settings, field.name) for field in fields(self.settings)}
        self.screen.note(" · ".join(f"{key}={value}" for key, value in values.items() if value is not None))

    # Models.

    def _load(self, name: str) -> None:
        """Have another model in memory, in the place of the present one; on an error, that is loaded when needed."""
        self._loaded = None
        release_memory()
        with self.screen.waiting(f"loading {name}"):
            self._loaded = self.shelf.load(name)
        self.rung = name
        self._stops = stop_tokens(self._loaded.model, self._loaded.tokenizer) | _end_of_turn(self._loaded.tokenizer)
        label = self._loaded.label
        self.screen.note(label if label.lower().startswith(name) else f"{name}: {label}")
        if name in self.shelf.stale:
            self.screen.problem(self.shelf.stale[name])
        if not self._loaded.tokenizer.chat_template and not self._said_no_template:
            self._said_no_template = True
            self.screen.note("this model has no chat template: it continues your text instead of answering it")

    @property
    def _present(self) -> Loaded:
        if self._loaded is None:
            self._load(self.rung)
        assert self._loaded is not None
        return self._loaded

    # The conversation.

    def _ask(self, question: str) -> None:
        answer = self._reply(self.turns, question)
        if answer is not None:
            self.turns = [*self.turns, Turn(question, answer)]

    def _reply(self, earlier: Sequence[Turn], question: str) -> str | None:
        """Stream an answer; None where it was stopped before anything was said. Raises UserError for no room."""
        model, tokenizer = self._present.model, self._present.tokenizer
        ids, most = self._prompt(earlier, question)
        sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if self.settings.temperature:
            sampling = {"do_sample": True, "temperature": self.settings.temperature}
        stream = Stream(tokenizer, self._stops, self.screen.write)
        ids_BT = torch.tensor([ids], device=input_device(model))
        try:
            with torch.inference_mode():
                model.generate(
                    input_ids=ids_BT,
                    attention_mask=torch.ones_like(ids_BT),
                    max_new_tokens=most,
                    use_cache=True,
                    eos_token_id=sorted(self._stops),
                    pad_token_id=tokenizer.pad_token_id,
                    streamer=stream,
                    **sampling,
                )
        except KeyboardInterrupt:
            console.interrupted = False
            self.screen.write("\n")
            self.screen.note("stopped")
            return stream.text or None
        self.screen.write("\n")
        if not stream.ended:
            twice = 2 * self.settings.max_tokens
            full = most < self.settings.max_tokens
            why = "the model's window is full" if full else f"/set max_tokens={twice} allows more"
            self.screen.note(f"cut after {stream.tokens} tokens: {why}")
        elif not stream.text:
            self.screen.note("an empty answer")
        return stream.text

    def _prompt(self, earlier: Sequence[Turn], question: str) -> tuple[list[int], int]:
        """Token ids, of as many of the latest turns as fit beside an answer, and how many tokens that may have."""
        window = window_of(self._present.model.config)
        ids = self._encode(earlier, question)
        if window is None:
            return ids, self.settings.max_tokens
        room = window - min(self.settings.max_tokens, window // ROOM_TO_ANSWER)
        dropped = 0
        while len(ids) > room and dropped < len(earlier):
            dropped += 1
            ids = self._encode(earlier[dropped:], question)
        if len(ids) >= window:
            raise UserError(
                f"this message is {len(ids)} tokens with what must go with it, and the model's window is {window}",
                fix="send less at once" + (", or a shorter /system text" if self.settings.system else ""),
            )
        if dropped > self._dropped:
            turns = f"{dropped} oldest turns are" if dropped > 1 else "oldest turn is"
            self.screen.note(f"the conversation outgrew the model's window of {window} tokens: the {turns} left out")
        self._dropped = dropped
        return ids, min(self.settings.max_tokens, window - len(ids))

    def _encode(self, turns: Sequence[Turn], question: str) -> list[int]:
        """As a server does: by the chat template, or where there is none as lines of text."""
        tokenizer = self._present.tokenizer
        if not tokenizer.chat_template:
            said = [text for turn in turns for text in (turn.question, turn.answer)]
            ids: list[int] = tokenizer("\n".join([*said, question]), verbose=False)["input_ids"]
            return ids
        text = self._templated(self.settings.system, turns, question)
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _templated(self, system: str | None, turns: Sequence[Turn], question: str) -> str:
        messages = [{"role": "system", "content": system}] if system else []
        for turn in turns:
            messages.append({"role": "user", "content": turn.question})
            messages.append({"role": "assistant", "content": turn.answer})
        messages.append({"role": "user", "content": question})
        try:
            text: str = self._present.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False, **self.shelf.template_options
            )
        except jinja2.TemplateError as error:
            raise UserError(f"the model's chat template refuses this conversation: {error}") from None
        return text

    def _require_system(self, text: str) -> None:
        """Raise UserError where the model would not be shown it."""
        if not self._present.tokenizer.chat_template:
            raise UserError("this model has no chat template, so there is no place for a system text")
        if text not in self._templated(text, [], "?"):
            raise UserError("the model's chat template leaves a system text out")


def with_values(settings: Settings, assignments: Sequence[str]) -> Settings:
    """Settings with `temperature=0.7` or `max_tokens=256`; raises UserError for anything else."""
    kinds: dict[str, Callable[[str], Any]] = {"temperature": float, "max_tokens": int}
    for assignment in assignments:
        key, _, value = assignment.partition("=")
        if key not in kinds:
            raise UserError(f"there is no setting {key}", fix="/set temperature=0.7 max_tokens=256")
        least = {"temperature": 0, "max_tokens": 1}[key]
        try:
            number = kinds[key](value)
        except ValueError:
            number = -1
        if not least <= number < float("inf"):
            what = "a number from 0 on" if key == "temperature" else "a whole number from 1 on"
            raise UserError(f"{key} is {what}, not {value!r}")
        settings = replace(settings, **{key: number})
    return settings


def _end_of_turn(tokenizer: Any) -> set[int]:
    """The token that ends an answer in the chat template, which need not be EOS."""
    if not tokenizer.chat_template:
        return set()
    example = Chat(({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}))
    try:
        return {render(example, tokenizer, max_length=1 << 20).labels[-1]}
    except UserError:  # a template that shows an answer otherwise than it is asked for
        return set()
