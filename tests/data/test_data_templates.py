"""Named chat templates, the tokenizer's own, and files."""

import pytest

from qlora.data.templates import NAMED_TEMPLATES, resolve_chat_template
from qlora.errors import UserError

CONVERSATION = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "U1"},
    {"role": "assistant", "content": "A1"},
    {"role": "user", "content": "U2"},
]

EXPECTED = {
    "alpaca": "S\n\n### Instruction:\nU1\n\n### Response:\nA1</s>\n\n### Instruction:\nU2\n\n### Response:\n",
    "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n"
    "<|im_start|>user\nU2<|im_end|>\n<|im_start|>assistant\n",
    "gemma": "<start_of_turn>user\nS\n\nU1<end_of_turn>\n<start_of_turn>model\nA1<end_of_turn>\n"
    "<start_of_turn>user\nU2<end_of_turn>\n<start_of_turn>model\n",
    "llama-3": "<|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
    "U1<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA1<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nU2<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "phi-3.5": "<|system|>\nS<|end|>\n<|user|>\nU1<|end|>\n<|assistant|>\nA1<|end|>\n"
    "<|user|>\nU2<|end|>\n<|assistant|>\n",
    "phi-4": "<|im_start|>system<|im_sep|>S<|im_end|><|im_start|>user<|im_sep|>U1<|im_end|>"
    "<|im_start|>assistant<|im_sep|>A1<|im_end|><|im_start|>user<|im_sep|>U2<|im_end|><|im_start|>assistant<|im_sep|>",
    "mistral": "[INST] S\n\nU1[/INST] A1</s>[INST] U2[/INST]",
}

EXPECTED["qwen-3"] = EXPECTED["chatml"]  # without thoughts and tools


@pytest.mark.parametrize("name", NAMED_TEMPLATES)
def test_named_templates_render_their_layout_after_one_bos(spaced_tokenizer, name):
    template = resolve_chat_template(spaced_tokenizer, name)
    text = spaced_tokenizer.apply_chat_template(
        CONVERSATION, chat_template=template, add_generation_prompt=True, tokenize=False
    )
    assert text == "<s>" + EXPECTED[name]


def test_no_bos_for_a_tokenizer_that_adds_none(chatml_tokenizer):
    assert resolve_chat_template(chatml_tokenizer, "alpaca") == NAMED_TEMPLATES["alpaca"]


def test_own_template_and_its_absence(chatml_tokenizer, spaced_tokenizer):
    assert resolve_chat_template(chatml_tokenizer, None) == chatml_tokenizer.chat_template
    with pytest.raises(UserError, match=r"no chat template[\s\S]*alpaca, chatml"):
        resolve_chat_template(spaced_tokenizer, None)


def test_template_files(tmp_path, chatml_tokenizer):
    good, strict, bad = (tmp_path / f"{name}.jinja" for name in ("good", "strict", "bad"))
    good.write_text("{{ messages[0]['content'] }}")
    strict.write_text("{{ raise_exception('too few messages') }}")
    bad.write_text("line\n{% if %}")
    assert resolve_chat_template(chatml_tokenizer, str(good)) == good.read_text()
    assert resolve_chat_template(chatml_tokenizer, str(strict)) == strict.read_text()
    with pytest.raises(UserError, match=r"bad\.jinja:2: not a valid Jinja template"):
        resolve_chat_template(chatml_tokenizer, str(bad))
    with pytest.raises(UserError, match=r"did you mean chatml\?"):
        resolve_chat_template(chatml_tokenizer, "chat-ml")
