"""What each chat template that ships here was seen to do, as a Markdown table: recipes/templates.md.

    python scripts/templates_table.py > recipes/templates.md

For each template, with a small tokenizer that has the markers of its family, conversations are rendered with a system
message, with tools (definitions, a call and its result) and with thoughts, for each `data.loss_on`. A cell says `exact`
where the labels are what `expected` says, token for token, behind the very prompts that a server would send; where a
conversation is refused, it says why. Anything else ends with an error. The test suite runs this for arbitrary texts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from qlora.data.formats import Chat, Message
from qlora.data.rendering import IGNORED, RenderedRow, Renderer
from qlora.data.templates import resolve_chat_template
from qlora.errors import UserError

CORPUS = [
    "The quick brown fox: what is 2 + 3? user assistant system tool\n\nAnd so on.",
    '{"name": "f", "arguments": {}}',
]
LOSS_ON = ("completion", "assistant", "all")
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}
HEAD = """# Chat templates

What was seen of every template that `data.chat_template` names; `python scripts/templates_table.py` writes this file,
and the test suite compares it. *exact*: tokens that carry loss are the answers and their ends of turn, each behind the
very tokens that a server would send, and nothing else. A template that knows no tools refuses them. Thoughts are what
stands in `<think>`: all templates learn them as part of an answer, and Qwen3's leaves those of earlier answers out.
"""


def plain(message: Message) -> str:
    content: str = message["content"]
    return content


def qwen_3(message: Message) -> str:
    """A thought, if only an empty one, what is said, and calls of tools: on a line of their own if something is."""
    said, thought = message.get("content", ""), message.get("reasoning_content")
    if not thought:
        before, _, after = said.rpartition("</think>")
        thought = before.rpartition("<think>")[2]
        said = after.lstrip("\n") if thought else said
    calls = [
        f"<tool_call>\n{json.dumps(call['function'], ensure_ascii=False)}\n</tool_call>"
        for call in message.get("tool_calls", ())
    ]
    answer = "\n".join([*([said.lstrip("\n")] if said else []), *calls])
    return f"<think>\n{thought.strip(chr(10))}\n</think>\n\n{answer}"


@dataclass(frozen=True)
class Family:
    """models: whose layout it is. special: marker tokens. answer: the text that a model is to give for a message."""

    models: str
    special: tuple[str, ...]
    end: str
    eos: str
    bos: str | None = None
    answer: Callable[[Message], str] = plain


FAMILIES = {
    "alpaca": Family("any base model", ("<s>", "</s>"), "</s>", "</s>", "<s>"),
    "chatml": Family("SmolLM, Qwen 2, Yi, …", ("<|im_start|>", "<|im_end|>"), "<|im_end|>", "<|im_end|>"),
    "gemma": Family(
        "Gemma 1 to 3", ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), "<end_of_turn>", "<eos>", "<bos>"
    ),
    "llama-3": Family(
        "Llama 3",
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|eot_id|>",
        "<|end_of_text|>",
        "<|begin_of_text|>",
    ),
    "mistral": Family(
        "Mistral 7B", ("<s>", "</s>", "[INST]", "[/INST]"), "</s>", "</s>", "<s>", lambda m: " " + plain(m)
    ),
    "phi-3.5": Family(
        "Phi 3, 3.5",
        ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        "<|end|>",
        "<|endoftext|>",
    ),
    "phi-4": Family("Phi 4", ("<|im_start|>", "<|im_sep|>", "<|im_end|>"), "<|im_end|>", "<|im_end|>"),
    "qwen-3": Family("Qwen 3", ("<|im_start|>", "<|im_end|>"), "<|im_end|>", "<|im_end|>", answer=qwen_3),
}


def tokenizer_of(family: Family) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with the family's markers, that begins texts as its tokenizers do."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=[*family.special], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    if family.bos:
        number = backend.token_to_id(family.bos)
        backend.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A", special_tokens=[(family.bos, number)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=family.eos, bos_token=family.bos)


def conversation(texts: Sequence[str], *, system: bool = False, tools: bool = False, thinking: bool = False) -> Chat:
    """Questions and answers from five texts: the last one is the system's, or what answers are thought over."""
    first, answer, second, last, more = texts
    messages: list[Message] = [{"role": "system", "content": more}] if system else []
    thought = f"<think>\n{more.strip()}!\n</think>\n\n" if thinking else ""
    messages += [{"role": "user", "content": first}, {"role": "assistant", "content": thought + answer}]
    messages += [{"role": "user", "content": second}]
    if tools:
        call = {"type": "function", "function": {"name": "add", "arguments": {"to": more}}}
        messages += [{"role": "assistant", "content": answer, "tool_calls": [call]}, {"role": "tool", "content": more}]
    return Chat((*messages, {"role": "assistant", "content": thought + last}), (TOOL,) if tools else None)


def check(name: str, tokenizer: PreTrainedTokenizerFast, loss_on: str, chat: Chat, **options: Any) -> str:
    """`exact`, or why it is refused. Raises AssertionError where labels are others than they should be."""
    family, template = FAMILIES[name], resolve_chat_template(tokenizer, name)
    try:
        rows = Renderer(tokenizer, loss_on, 10**6, template, options).render(chat)
    except UserError as error:
        return f"refused: {error.problems[0].what.rpartition(': ')[2]}"
    answers = [index for index, message in enumerate(chat.messages) if message["role"] == "assistant"]
    learned = [0] * len(rows)
    for index in answers if loss_on == "assistant" else answers[-1:]:
        prompt = tokenizer.apply_chat_template(
            list(chat.messages[:index]), tools=list(chat.tools) if chat.tools else None, chat_template=template,
            add_generation_prompt=True, return_dict=True, **options,
        )["input_ids"]  # fmt: skip
        wanted = family.answer(chat.messages[index]) + family.end
        teaching = [number for number, row in enumerate(rows) if _teaches(row, prompt, wanted, tokenizer)]
        assert len(teaching) == 1, f"{name}, {loss_on}: message {index} is learned {len(teaching)} times: {wanted!r}"
        learned[teaching[0]] += _supervised(rows[teaching[0]], prompt, wanted, tokenizer)
    if loss_on == "all":
        assert all(row.labels == row.input_ids for row in rows), f"{name}: not every token is learned"
    else:
        assert learned == [sum(label != IGNORED for label in row.labels) for row in rows], f"{name}: more is learned"
    return "exact"


def _teaches(row: RenderedRow, prompt: list[int], wanted: str, tokenizer: PreTrainedTokenizerFast) -> bool:
    return row.input_ids[: len(prompt)] == prompt and _supervised(row, prompt, wanted, tokenizer) > 0


def _supervised(row: RenderedRow, prompt: list[int], wanted: str, tokenizer: PreTrainedTokenizerFast) -> int:
    """How many tokens behind the prompt, all with loss, spell what is wanted; 0 if none do."""
    tokens: list[int] = []
    for token, label in zip(row.input_ids[len(prompt) :], row.labels[len(prompt) :], strict=True):
        if label != token:
            break
        tokens.append(token)
    for count, token in enumerate(tokens, start=1):
        if token in tokenizer.added_tokens_decoder and tokenizer.decode(tokens[:count]) == wanted:
            return count
    return 0


def table() -> str:
    texts = ("What is 2 + 3?", "It is 5.", "And 4 more?", "That is 9.", "Add the numbers.")
    cases = {"system message": {"system": True}, "tools": {"tools": True}, "thoughts": {"thinking": True}}
    lines = ["| template | layout of | end of turn | loss on | system message | tools | thoughts |", "| --- " * 7 + "|"]
    for name, family in FAMILIES.items():
        tokenizer = tokenizer_of(family)
        found: dict[tuple[str, ...], list[str]] = {}
        for loss_on in LOSS_ON:
            cells = tuple(check(name, tokenizer, loss_on, conversation(texts, **case)) for case in cases.values())
            found.setdefault(cells, []).append(loss_on)
        for cells, same in found.items():
            end = family.end.replace("|", "\\|")  # a bar would end the cell, in code too
            lines.append(f"| {name} | {family.models} | `{end}` | {', '.join(same)} | {' | '.join(cells)} |")
    return "\n".join([HEAD, *lines, ""])


if __name__ == "__main__":
    print(table(), end="")
