"""Every named template: its masks are exact for any text, its text is that of the models it is named after."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import trl
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qlora.data.formats import Chat, to_example
from qlora.data.preparation import prepare
from qlora.data.rendering import IGNORED, Renderer
from qlora.data.splits import all_rows
from qlora.data.templates import NAMED_TEMPLATES, resolve_chat_template
from qlora.errors import UserError

REPOSITORY = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("templates_table", REPOSITORY / "scripts" / "templates_table.py")
assert spec is not None and spec.loader is not None
templates_table = importlib.util.module_from_spec(spec)
sys.modules["templates_table"] = templates_table
spec.loader.exec_module(templates_table)

FAMILIES, check, conversation = templates_table.FAMILIES, templates_table.check, templates_table.conversation
texts = st.text(alphabet=st.sampled_from(list("abcxyz  \n\n\t.,:é漢🙂{}\"'<|>[]")), max_size=20)
THEIRS = Path(trl.__file__).parent / "chat_templates"
QUESTION = {"role": "user", "content": "What is 2 + 3?"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": "ü"}}}
ASKS = {"role": "assistant", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": '{"sum": 5}'}
ANSWER = {"role": "assistant", "content": "Five."}
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture(scope="module")
def tokenizers():
    return {name: templates_table.tokenizer_of(family) for name, family in FAMILIES.items()}


def test_the_table_is_what_the_templates_do():
    assert FAMILIES.keys() == NAMED_TEMPLATES.keys()
    assert (REPOSITORY / "recipes" / "templates.md").read_text(encoding="utf-8") == templates_table.table()


@pytest.mark.parametrize("name", FAMILIES)
def test_masks_are_exact_for_any_text(tokenizers, name):
    @settings(max_examples=20, deadline=None)
    @given(st.tuples(*[texts] * 5), st.booleans(), st.booleans(), st.booleans())
    @example(("", "\n", "", "", ""), False, True, False)  # an answer of an empty line and a call
    def property(given_texts, system, tools, thinking):
        chat = conversation(given_texts, system=system, tools=tools, thinking=thinking)
        found = {check(name, tokenizers[name], loss_on, chat) for loss_on in templates_table.LOSS_ON}
        assert found == {"exact" if name == "qwen-3" or not tools else "refused: it knows no tools"}

    property()


def rendered(tokenizer, template: str, messages, *, prompt: bool, **options) -> str:
    return tokenizer.apply_chat_template(
        messages, chat_template=template, add_generation_prompt=prompt, tokenize=False, **options
    )


# What theirs writes behind a conversation that is no prompt.
ENDS = {"phi-3.5": "<|endoftext|>"}


@pytest.mark.parametrize(
    "name, file", [("qwen-3", "qwen3"), ("phi-3.5", "phi3_5"), ("llama-3", "llama3"), ("gemma", "gemma3")]
)
def test_conversations_read_as_in_the_templates_that_trl_knows_of_these_models(tokenizers, name, file):
    tokenizer = tokenizers[name]
    ours, theirs = resolve_chat_template(tokenizer, name), (THEIRS / f"{file}.jinja").read_text(encoding="utf-8")
    thought = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nFive."}
    apart = {"role": "assistant", "content": "Five.", "reasoning_content": "hm"}
    conversations = [[QUESTION], [SYSTEM, QUESTION], [QUESTION, ANSWER, QUESTION], [SYSTEM, QUESTION, ANSWER]]
    if name == "qwen-3":
        said = {**ASKS, "content": "I add."}
        conversations += [[QUESTION, each, QUESTION, each] for each in (thought, apart)]
        for asks in (
            ASKS,
            said,
            {**ASKS, "content": "\n"},
            {**said, "reasoning_content": "hm"},
            {**ASKS, "tool_calls": [CALL, CALL]},
        ):
            conversations += [[SYSTEM, QUESTION, asks], [QUESTION, asks, RESULT, RESULT, ANSWER, QUESTION, ANSWER]]
            conversations += [[QUESTION, asks, RESULT], [QUESTION, ANSWER, QUESTION, asks, RESULT, apart]]
        conversations += [[QUESTION, SYSTEM, ANSWER], [SYSTEM, QUESTION, {**ASKS, "tool_calls": [CALL["function"]]}]]
        as_text = {**CALL, "function": {"name": "add", "arguments": '{"a":2}'}}
        conversations += [[QUESTION, {**ASKS, "tool_calls": [as_text]}, RESULT, ANSWER]]
    options = [{}] if name != "qwen-3" else [{}, {"tools": [templates_table.TOOL] * 2}, {"enable_thinking": False}]
    for messages in conversations:
        for option in options:
            for prompt in (True, False):
                wanted = rendered(tokenizer, theirs, messages, prompt=prompt, **option)
                found = rendered(tokenizer, ours, messages, prompt=prompt, **option)
                assert found + ("" if prompt else ENDS.get(name, "")) == wanted, messages


def chat(*messages, tools=(templates_table.TOOL,)) -> Chat:
    return to_example({"messages": list(messages), "tools": list(tools)}, "messages")


def test_an_empty_thought_can_be_the_prompt_s(tokenizers, jsonl_source, data_settings):
    source = jsonl_source([{"messages": [QUESTION, ANSWER]}])
    for options, learned in (
        ({}, "<think>\n\n</think>\n\nFive.<|im_end|>"),
        ({"enable_thinking": False}, "Five.<|im_end|>"),
    ):
        settings = data_settings(chat_template="qwen-3", template_options=options)
        (row,) = prepare(all_rows(source), tokenizers["qwen-3"], settings, split_name="train").rows
        assert tokenizers["qwen-3"].decode([label for label in row.labels if label != IGNORED]) == learned
    thinking = jsonl_source([{"messages": [QUESTION, {**ANSWER, "reasoning_content": "hm"}]}])
    with pytest.raises(UserError, match="another prompt than in serving"):
        prepare(all_rows(thinking), tokenizers["qwen-3"], settings, split_name="train")


def test_calls_are_learned_in_whatever_form_they_come(tokenizers):
    renderer = Renderer(tokenizers["qwen-3"], "assistant", 10**6, resolve_chat_template(tokenizers["qwen-3"], "qwen-3"))
    expected = renderer.render(chat(QUESTION, ASKS, RESULT, ANSWER))
    learned = [tokenizers["qwen-3"].decode([label for label in row.labels if label != IGNORED]) for row in expected]
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": "ü"}}\n</tool_call><|im_end|>'
    assert learned == [f"<think>\n\n</think>\n\n{call}", "<think>\n\n</think>\n\nFive.<|im_end|>"]
    as_text = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": "\\u00fc"}'}}
    for calls in ([as_text], [CALL["function"]], '[{"name": "add", "arguments": {"a": 2, "b": "ü"}}]'):
        asks = {"role": "assistant", "content": None, "tool_calls": calls}
        assert renderer.render(chat(QUESTION, asks, RESULT, ANSWER)) == expected
    turns = [
        ("human", QUESTION["content"]),
        ("function_call", '{"name": "add", "arguments": {"a": 2, "b": "ü"}}'),
        ("observation", RESULT["content"]),
        ("gpt", "Five."),
    ]
    row = {"conversations": [{"from": who, "value": text} for who, text in turns], "tools": [templates_table.TOOL]}
    assert renderer.render(to_example(row, "conversations")) == expected


@pytest.mark.parametrize(
    "name, file, call",
    [
        ("llama-3", "llama3_1", '{"name": "add", "parameters": {"a": 2, "b": "ü"}}<|eot_id|>'),
        ("chatml", "qwen2_5", '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": "ü"}}\n</tool_call><|im_end|>'),
    ],
)
def test_tools_in_templates_that_models_bring(tokenizers, name, file, call):
    tokenizer, end = tokenizers[name], FAMILIES[name].end
    renderer = Renderer(tokenizer, "assistant", 10**6, (THEIRS / f"{file}.jinja").read_text(encoding="utf-8"))
    rows = renderer.render(chat(SYSTEM, QUESTION, ASKS, RESULT, ANSWER))
    assert sum(row.supervised_tokens for row in rows) == sum(
        len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (call, f"Five.{end}")
    )
    learned = "".join(tokenizer.decode([label for label in row.labels if label != IGNORED]) for row in rows)
    assert learned == f"{call}Five.{end}"


@pytest.mark.parametrize(
    "template, messages, reason",
    [
        # Templates of the wild: one that leaves out what it does not know, and one that strips thoughts.
        ("{{ m.content }}", (QUESTION, {**ASKS, "content": "I add."}, RESULT, ANSWER), "the tools"),
        (
            "{{ tools or '' }}{{ m.content }}",
            (QUESTION, {**ASKS, "content": "I add."}, RESULT, ANSWER),
            "the tool_calls of message 1",
        ),
        (
            "{{ tools or '' }}{{ m.content if m.role != 'tool' else '' }}{{ m.tool_calls }}",
            (QUESTION, ASKS, RESULT, ANSWER),
            "message 2, of the role tool,",
        ),
        ("{{ m.content if m.role != 'system' else '' }}", (SYSTEM, QUESTION, ANSWER), "message 0, of the role system,"),
        ("{{ m.content }}", (QUESTION, {**ANSWER, "reasoning_content": "hm"}), "the reasoning_content of message 1"),
        (
            "{{ m.content.split('</think>')[-1] }}",
            (QUESTION, {**ANSWER, "content": "<think>hm</think>Five."}),
            "the thought before the answer",
        ),
    ],
)
def test_what_a_template_leaves_out_is_not_left_out_in_silence(tokenizers, template, messages, reason):
    template = "{% for m in messages %}{{ '<' + m.role + '>' }}" + template + "{{ eos_token }}{% endfor %}"
    template += "{% if add_generation_prompt %}<assistant>{% endif %}"
    tools = (templates_table.TOOL,) if any("tool_calls" in message for message in messages) else ()
    with pytest.raises(UserError, match=f"the chat template leaves {reason} out"):
        Renderer(tokenizers["chatml"], "completion", 10**6, template).render(chat(*messages, tools=tools))


def test_named_templates_say_what_they_have_no_place_for(tokenizers):
    tokenizer = tokenizers["mistral"]
    renderer = Renderer(tokenizer, "completion", 10**6, resolve_chat_template(tokenizer, "mistral"))
    for messages, tools, reason in (
        ((QUESTION, ASKS, RESULT, ANSWER), (), "it knows no tool calls[\\s\\S]*a template that knows tools"),
        ((QUESTION, RESULT, ANSWER), (), "it has no role tool"),
        ((QUESTION, ANSWER), (templates_table.TOOL,), "it knows no tools"),
        ((QUESTION, SYSTEM, ANSWER), (), "a system message at the beginning only"),
    ):
        with pytest.raises(UserError, match=reason):
            renderer.render(chat(*messages, tools=tools))
