"""How a published model is run: commands for the engines that accept it, as its serving contract says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qlora.facts import RunFacts

COMMANDS = {
    "vLLM": "vllm serve {}",
    "SGLang (Marlin)": "python -m sglang.launch_server --model-path {}",
}
INSIDE = "transformers + gptqmodel"
QUANTIZATIONS = {"nf4": 'bnb_4bit_quant_type="nf4"', "fp4": 'bnb_4bit_quant_type="fp4"'}


def commands(facts: RunFacts, kind: str, base: str, place: str) -> Iterator[str]:
    """Blocks of Markdown for `gptq`, `merged` or `adapter`. place: a repository or folder that has the files."""
    if kind == "adapter":
        yield from _adapter(facts, base, place)
        return
    if kind == "merged":
        yield _shell("vLLM", COMMANDS["vLLM"].format(place))
        yield _shell("SGLang", COMMANDS["SGLang (Marlin)"].format(place))
        yield _plain("transformers", facts, place)
        return
    yield from _gptq(facts, place)


def _gptq(facts: RunFacts, place: str) -> Iterator[str]:
    verdicts = (facts.contract or {}).get("engines", [])
    for engine, command in COMMANDS.items():
        taken = [each for each in verdicts if each["engine"] == engine and each["accepts"]]
        if taken:
            where = _gpus([each["tensor_parallel"] for each in taken])
            yield _shell(f"{engine} {taken[0]['version']}, on {where}", command.format(place))
    inside = next((each for each in verdicts if each["engine"] == INSIDE), None)
    if inside is not None and inside["accepts"]:
        yield _plain(f"{INSIDE} ({inside['version']}; `pip install gptqmodel optimum`)", facts, place)
    others = {
        f"{each['engine']} {each['version']}" + (f" ({each['reason']})" if each["reason"] else ""): None
        for each in verdicts
        if each["accepts"] and each["engine"] not in (*COMMANDS, INSIDE)
    }
    if others:
        yield f"These load it too: {', '.join(others)}."
    refused = _refusals(verdicts)
    if refused:
        yield "Engines that will not load it, or not on so many GPUs:\n\n" + "\n".join(f"- {line}" for line in refused)
    if prompts := len((facts.contract or {}).get("golden", [])):
        yield (
            "Whether a server answers as this checkpoint does: `qlora verify http://localhost:8000 FOLDER` replays the "
            f"{prompts} golden prompts of `contract.json` in that folder."
        )


def _refusals(verdicts: list[dict[str, Any]]) -> list[str]:
    """A line for every reason of an engine, with the numbers of GPUs that it is one of."""
    found: dict[tuple[str, str], list[int]] = {}
    for each in verdicts:
        if not each["accepts"]:
            engine, first = f"{each['engine']} {each['version']}", each["reason"].split("; ")[0]
            found.setdefault((engine, first), []).append(each["tensor_parallel"])
    return [f"{engine} on {_gpus(ranks)}: {reason}" for (engine, reason), ranks in found.items()]


def _gpus(ranks: list[int]) -> str:
    """`1 GPU`, `1, 2 or 4 GPUs`."""
    *before, last = map(str, ranks)
    named = f"{', '.join(before)} or {last}" if before else last
    return f"{named} GPU{'s' * (ranks != [1])}"


def _shell(title: str, line: str) -> str:
    return f"{title}:\n\n```bash\n{line}\n```"


def _plain(title: str, facts: RunFacts, place: str) -> str:
    trust = ", trust_remote_code=True" if facts.recipe.model.trust_remote_code else ""
    return f"""{title}:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{place}", device_map="auto"{trust})
tokenizer = AutoTokenizer.from_pretrained("{place}"{trust})
```"""


def _adapter(facts: RunFacts, base: str, place: str) -> Iterator[str]:
    model = facts.recipe.model
    kind = QUANTIZATIONS.get(model.quantization)
    lines = ["from peft import PeftModel", "from transformers import AutoModelForCausalLM, AutoTokenizer"]
    options = 'device_map="auto"'
    if kind:
        lines = ["import torch", *lines[:1], lines[1] + ", BitsAndBytesConfig", ""]
        double = f"bnb_4bit_use_double_quant={model.double_quant}"
        lines.append(
            f"held = BitsAndBytesConfig(load_in_4bit=True, {kind}, {double}, bnb_4bit_compute_dtype=torch.bfloat16)"
        )
        options += ", quantization_config=held, dtype=torch.bfloat16"
    else:
        lines.append("")
    revision = f', revision="{facts.base["revision"]}"' if facts.base.get("revision") and "/" in base else ""
    lines.append(f'base = AutoModelForCausalLM.from_pretrained("{base}"{revision}, {options})')
    lines += [
        f'model = PeftModel.from_pretrained(base, "{place}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{place}")',
    ]
    yield "peft, on the base as it was trained:\n\n```python\n" + "\n".join(lines) + "\n```"
    yield "`qlora merge` and `qlora quantize` make the checkpoints that servers load of it."
