"""Methods, bases, adapters, merges and quantizers together: runs for recipes/support.md that no other test makes.

A case is a training, and what is done with the adapter: each of these is a run of its own, in the same directory but
for those with another name, and skips what is up to date. Bundles hold several settings of the adapter, since a run can
show them all. In capitals: bases that are packed already, and the adapter of the case's first run.
"""

import json
import sys
from pathlib import Path

import pytest

from qlora.check import check
from qlora.errors import UserError
from qlora.pipeline import Pipeline
from qlora.recipe_file import load_recipe

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import support_table as table

FORMS = ["lora.dora=true", "lora.rslora=true", "lora.rank_pattern={q_proj: 4}", "lora.alpha_pattern={v_proj: 4}"]
PARTS = ["lora.modules_to_save=[norm]", "lora.dropout=0.1", "lora.dtype=bfloat16"]
BIAS = "lora.bias=all"
TOKENS = ["lora.new_tokens=['<box>']", "lora.train_tokens=['<|im_start|>']"]
PISSA = "lora.init=pissa"
AS_IS: list[str] = []
UNWRITTEN = ["merge.write=false", "quantize.bits=8"]
ORIGINAL = ["merge.base=original", "quantize.bits=3"]
GOING_ON = ["name=next", "lora.init=default", "lora.start_from=ADAPTER"]
SUM = ["name=sum", "lora.combine=[{path: ADAPTER, weight: 0.5}]"]
FP4, SINGLE, SIXTEEN = "model.quantization=fp4", "model.double_quant=false", "model.quantization=none"
INT8, CODES = "model.quantization=int8", "model.quantization=checkpoint"
CASES = {
    "16 bits, DoRA": ("dpo", [SIXTEEN, *FORMS], [AS_IS, UNWRITTEN]),
    "16 bits, parts": ("sft", [SIXTEEN, *PARTS, BIAS, "train.loraplus_ratio=4", "lora.init=gaussian"], [ORIGINAL]),
    "FP4, DoRA": ("kto", [FP4, *FORMS, *PARTS], [AS_IS]),
    "FP4, LoftQ": ("sft", [FP4, "lora.init=loftq", "data.loss_on=all"], [UNWRITTEN, ORIGINAL]),
    "NF4, LoftQ": ("orpo", ["lora.init=loftq", "lora.rslora=true"], [AS_IS, ["quantize.bits=2"]]),
    "NF4, parts": ("orpo", [SINGLE, *FORMS, *PARTS, BIAS], [AS_IS]),
    "NF4, some": ("dpo", ["lora.target_modules=[q_proj, up_proj]", "lora.init=gaussian", *PARTS], [ORIGINAL, GOING_ON]),
    "NF4, PiSSA": ("orpo", [PISSA, "lora.rslora=true", *TOKENS], [AS_IS, ORIGINAL]),
    "FP4, PiSSA": ("sft", [FP4, SINGLE, PISSA, *TOKENS, *PARTS], [UNWRITTEN, AS_IS]),
    "16 bits, PiSSA": ("sft", [SIXTEEN, PISSA, "lora.rank_pattern={q_proj: 4}"], [AS_IS]),
    "16 bits, from": ("kto", [SIXTEEN, "lora.rslora=true"], [["quantize.bits=2"], [*GOING_ON, *UNWRITTEN], SUM]),
    "GPTQ base": ("dpo", ["model.base=GPTQ_BASE", *FORMS, *PARTS], [["quantize.bits=8"]]),
    "AWQ base": ("sft", ["model.base=AWQ_BASE", *FORMS, *PARTS, BIAS], [AS_IS]),
    "GPTQ codes": ("orpo", ["model.base=GPTQ_BASE", CODES, *FORMS, *PARTS, BIAS], [["quantize.bits=8"], UNWRITTEN]),
    "AWQ codes": ("dpo", ["model.base=AWQ_BASE", CODES, *FORMS, *PARTS, *TOKENS], [AS_IS]),
    "int8": ("kto", [INT8, *FORMS[1:], *PARTS, *TOKENS], [AS_IS, UNWRITTEN]),
}  # fmt: skip
REFUSED = {
    ("int8", "DoRA"): [INT8, "lora.dora=true"],
    ("init: loftq", "int8"): ["lora.init=loftq", INT8],
    ("init: loftq", "16 bits"): ["lora.init=loftq", SIXTEEN],
    ("init: loftq", "GPTQ checkpoint as it is"): ["lora.init=loftq", CODES],
    ("init: loftq", "AWQ checkpoint as it is"): ["lora.init=loftq", CODES],
    ("init: loftq", "DPO"): ["lora.init=loftq", "train.method=dpo"],
    ("init: loftq", "KTO"): ["lora.init=loftq", "train.method=kto"],
    ("init: loftq", "DoRA"): ["lora.init=loftq", "lora.dora=true"],
    ("init: loftq", "start_from"): ["lora.init=loftq", "lora.start_from=runs/a/adapter"],
    ("init: pissa", "int8"): [PISSA, INT8],
    ("init: pissa", "GPTQ checkpoint as it is"): [PISSA, CODES],
    ("init: pissa", "AWQ checkpoint as it is"): [PISSA, CODES],
    ("init: pissa", "DPO"): [PISSA, "train.method=dpo"],
    ("init: pissa", "KTO"): [PISSA, "train.method=kto"],
    ("init: pissa", "DoRA"): [PISSA, "lora.dora=true"],
    ("init: pissa", "start_from"): [PISSA, "lora.start_from=runs/a/adapter"],
    ("biases", "DPO"): [BIAS, "train.method=dpo"],
    ("biases", "KTO"): [BIAS, "train.method=kto"],
    ("combine", "start_from"): ["lora.combine=[{path: runs/a/adapter}]", "lora.start_from=runs/a/adapter"],
    ("LoRA+", "DPO"): ["train.method=dpo", "train.loraplus_ratio=4"],
    ("LoRA+", "KTO"): ["train.method=kto", "train.loraplus_ratio=4"],
    ("LoRA+", "ORPO"): ["train.method=orpo", "train.loraplus_ratio=4"],
    ("GPTQ by gptqmodel", "in GPTQ, not written"): ["quantize.engine=gptqmodel", "merge.write=false"],
    ("AWQ by gptqmodel", "8 bits"): [
        "quantize={engine: gptqmodel, method: awq, sym: false, bits: 8, group_size: 32}"
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_they_work_together(name, tiny_recipe, save_packed, rows_of, supported, tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))  # bases are converted there
    method, training, variants = CASES[name]
    path = tiny_recipe(data=rows_of(method), train={"method": method, "max_steps": 2}, evaluate={"rows": 1})
    meant = {"ADAPTER": tmp_path / "runs" / "tiny" / "adapter"}
    meant |= {f"{kind.upper()}_BASE": save_packed(kind) for kind in ("gptq", "awq")}
    for variant in variants:
        recipe = load_recipe(path, [filled(text, meant) for text in (*training, *variant)])
        Pipeline(recipe).run()
        supported(recipe.run_dir)


def filled(text: str, meant: dict[str, Path]) -> str:
    for word, path in meant.items():
        text = text.replace(word, str(path))
    return text


@pytest.mark.parametrize("features", REFUSED, ids=" with ".join)
def test_they_are_refused_together(features, tiny_recipe, rows_of, supported):
    overrides = REFUSED[features]
    method = next((text.partition("method=")[2] for text in overrides if text.startswith("train.method")), "sft")
    with pytest.raises(UserError) as refused:
        recipe = load_recipe(tiny_recipe(data=rows_of(method)), overrides)
        check(recipe).raise_for_problems()
    supported(table.entry(features, refused.value.problems[0].what))


def test_the_table_is_that_of_the_entries():
    text = table.markdown(table.committed())
    assert (table.json_file().parent / "support.md").read_text(encoding="utf-8") == text
    assert "| DoRA |" in text and "| 2 bits |" in text


def test_what_a_run_shows_is_read_from_its_recipe(tiny_recipe):
    rules = {name: rule for group in table.FEATURES.values() for name, rule in group.items()}
    recipe = load_recipe(tiny_recipe(), ("lora.dora=true", "quantize.bits=3", "merge.base=original"))
    assert rules["DoRA"](recipe, None) and rules["NF4"](recipe, None) and not rules["NF4"](recipe, "gptq")
    assert rules["LoRA on all linears"](recipe, None) and not rules["on some"](recipe, None)
    assert rules["3 bits"](recipe, None) and not rules["into the dequantized base"](recipe, None)


def test_entries_are_compared_with_the_committed_ones(tmp_path):
    one = table.entry(["DoRA", "NF4"])
    for _ in range(2):
        table.leave(one, tmp_path)
    assert table.collected(tmp_path) == [json.loads(json.dumps(one))]
    with pytest.raises(AssertionError, match="not in FEATURES: \\['DORA'\\]"):
        table.entry(["DORA"])
