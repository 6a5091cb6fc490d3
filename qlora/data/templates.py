"""Which chat template turns messages into text: the tokenizer's own, one that ships here, or a Jinja file.

A template decides what the model sees in training and in serving alike, so the resolved text is also what has to be
saved with the adapter's tokenizer.
"""

from __future__ import annotations

import difflib
from pathlib import Path

import jinja2
from transformers import PreTrainedTokenizerBase

from qlora.data.qwen_template import QWEN_3
from qlora.errors import UserError

# Every template leaves out the beginning-of-sequence token: `resolve_chat_template` adds it for tokenizers that do.
# Templates of models without a system role put the system text before the first user message.
# Those that know no tools refuse them, instead of leaving them out or giving them a role that the model never saw.
_NO_TOOLS = """\
{%- if tools %}
{{- raise_exception('it knows no tools') }}
{%- endif %}
{%- for message in messages %}
{%- if message['role'] not in ('system', 'user', 'assistant') %}
{{- raise_exception('it has no role ' + message['role']) }}
{%- elif message['tool_calls'] %}
{{- raise_exception('it knows no tool calls') }}
{%- endif %}
{%- endfor %}
"""

_CHATML = (
    _NO_TOOLS
    + """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
)

_LLAMA_3 = (
    _NO_TOOLS
    + """\
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
)

_PHI_3_5 = (
    _NO_TOOLS
    + """\
{%- for message in messages %}
{{- '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|assistant|>\\n' }}
{%- endif %}
"""
)

_PHI_4 = (
    _NO_TOOLS
    + """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '<|im_sep|>' + message['content'] + '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant<|im_sep|>' }}
{%- endif %}
"""
)

_SYSTEM_INTO_USER = (
    _NO_TOOLS
    + """\
{%- set lead = namespace(text='') %}
{%- if messages[0]['role'] == 'system' %}
{%- set lead.text = messages[0]['content'] + '\\n\\n' %}
{%- set messages = messages[1:] %}
{%- endif %}
{%- if messages | selectattr('role', 'equalto', 'system') | list %}
{{- raise_exception('it has a place for a system message at the beginning only') }}
{%- endif %}
"""
)

_MISTRAL = (
    _SYSTEM_INTO_USER
    + """\
{%- for message in messages %}
{%- if message['role'] == 'user' %}
{{- '[INST] ' + lead.text + message['content'] + '[/INST]' }}
{%- set lead.text = '' %}
{%- else %}
{{- ' ' + message['content'] + eos_token }}
{%- endif %}
{%- endfor %}
"""
)

_GEMMA = (
    _SYSTEM_INTO_USER
    + """\
{%- for message in messages %}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{- '<start_of_turn>' + role + '\\n' + lead.text + message['content'] + '<end_of_turn>\\n' }}
{%- set lead.text = '' %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<start_of_turn>model\\n' }}
{%- endif %}
"""
)

# Needs no special token but the tokenizer's EOS: the choice for a base model without chat markers in its vocabulary.
_ALPACA = (
    _SYSTEM_INTO_USER
    + """\
{%- for message in messages %}
{%- if message['role'] == 'user' %}
{{- lead.text + '### Instruction:\\n' + message['content'] + '\\n\\n' }}
{%- set lead.text = '' %}
{%- else %}
{{- '### Response:\\n' + message['content'] + eos_token + '\\n\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '### Response:\\n' }}
{%- endif %}
"""
)

NAMED_TEMPLATES = {
    "alpaca": _ALPACA,
    "chatml": _CHATML,
    "gemma": _GEMMA,
    "llama-3": _LLAMA_3,
    "mistral": _MISTRAL,
    "phi-3.5": _PHI_3_5,
    "phi-4": _PHI_4,
    "qwen-3": QWEN_3,
}


def resolve_chat_template(tokenizer: PreTrainedTokenizerBase, name: str | None) -> str:
    """The Jinja text of the chat template that `name` (the recipe's `data.chat_template`) stands for.

    None is the tokenizer's own template, otherwise a name in `NAMED_TEMPLATES` or the path of a Jinja file. A shipped
    template begins with the BOS token exactly when the tokenizer puts one before plain text, as in pre-training.

    Raises `UserError` when there is no such template, or none at all, and when a file is not valid Jinja.
    """
    if name is None:
        return _own_template(tokenizer)
    if name in NAMED_TEMPLATES:
        return ("{{- bos_token }}" if adds_bos(tokenizer) else "") + NAMED_TEMPLATES[name]
    file = Path(name)
    if not file.is_file():
        close = difflib.get_close_matches(name, NAMED_TEMPLATES, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(
            f"there is no chat template or Jinja file {name!r}",
            where="data.chat_template",
            fix=f"{hint}Names that ship: {', '.join(NAMED_TEMPLATES)}",
        )
    template = file.read_text(encoding="utf-8")
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": ""}], chat_template=template, tokenize=False)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"not a valid Jinja template: {error.message}", where=f"{file}:{error.lineno}") from error
    except jinja2.TemplateError:
        pass  # a template may refuse this trivial conversation and still be right for the data
    return template


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts its BOS token before plain text."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


def _own_template(tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.chat_template:
        raise UserError(
            "the data are conversations, and this model's tokenizer has no chat template",
            where="data.chat_template",
            fix=f"choose one by name ({', '.join(NAMED_TEMPLATES)}) or give a Jinja file",
        )
    return tokenizer.get_chat_template()
