"""The table of what works with what: recipes/support.md, from the runs that the tests made.

    QLORA_SUPPORT_RESULTS=DIR bash scripts/test.sh      every run leaves an entry in DIR
    python scripts/support_table.py DIR                 writes recipes/support.json and recipes/support.md
    python scripts/support_table.py --check DIR         says what differs from them (scripts/test.sh does)

An entry is a run through all stages whose merged model was measured to be the trained one, or a combination that was
refused before any work. What a run shows is read from its recipe, by the rules in FEATURES: a new base or adapter is a
line there, and a case in tests/support/test_support.py or a call of the fixture `supported` in a test that runs it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from qlora.artifacts import read_json
from qlora.models.preview import preview_base
from qlora.paths import packaged_recipes
from qlora.recipe import Recipe
from qlora.recipe_file import load_recipe

Rule = Callable[[Recipe, str | None], bool]
"""Of a recipe, and what its base is packed as: gptq, awq or None."""


def _base(quantization: str, packed: str | None = None, double_quant: bool = True) -> Rule:
    def holds(recipe: Recipe, found: str | None) -> bool:
        double = recipe.model.double_quant is double_quant or quantization not in ("nf4", "fp4")
        return recipe.model.quantization == quantization and found == packed and double

    return holds


def _method(name: str, everything: bool | None = None) -> Rule:
    """everything: whether every token is learned; None: no matter."""

    def holds(recipe: Recipe, _: str | None) -> bool:
        tokens = everything is None or (recipe.data.loss_on == "all") is everything
        return recipe.train.method == name and tokens and not recipe.lora.combine

    return holds


def _lora(key: str, *values: Any) -> Rule:
    """That a key of the lora section has one of the values; without values: anything but its default."""

    def holds(recipe: Recipe, _: str | None) -> bool:
        found = getattr(recipe.lora, key)
        return found in values if values else found != type(recipe.lora).model_fields[key].get_default()

    return holds


FEATURES: dict[str, dict[str, Rule]] = {
    "base": {
        "NF4": _base("nf4"),
        "NF4, single quantization": _base("nf4", double_quant=False),
        "FP4": _base("fp4"),
        "FP4, single quantization": _base("fp4", double_quant=False),
        "int8": _base("int8"),
        "16 bits": _base("none"),
        "GPTQ checkpoint in NF4": _base("nf4", "gptq"),
        "GPTQ checkpoint in 16 bits": _base("none", "gptq"),
        "GPTQ checkpoint as it is": _base("checkpoint", "gptq"),
        "AWQ checkpoint in NF4": _base("nf4", "awq"),
        "AWQ checkpoint as it is": _base("checkpoint", "awq"),
    },
    "method": {
        "SFT": _method("sft", everything=False),
        "continued pre-training": _method("sft", everything=True),
        "DPO": _method("dpo"),
        "KTO": _method("kto"),
        "ORPO": _method("orpo"),
        "no training": _lora("combine"),
    },
    "adapter": {
        "LoRA on all linears": _lora("target_modules", "all-linear"),
        "on some": _lora("target_modules"),
        "dropout": _lora("dropout"),
        "rsLoRA": _lora("rslora"),
        "DoRA": _lora("dora"),
        "rank pattern": _lora("rank_pattern"),
        "alpha pattern": _lora("alpha_pattern"),
        "biases": _lora("bias"),
        "modules trained in full": _lora("modules_to_save"),
        "LoRA+": lambda recipe, _: recipe.train.loraplus_ratio != 1,
        "init: gaussian": _lora("init", "gaussian"),
        "init: loftq": _lora("init", "loftq"),
        "init: pissa": _lora("init", "pissa"),
        "new tokens": _lora("new_tokens"),
        "known tokens": _lora("train_tokens"),
        "start_from": _lora("start_from"),
        "combine": _lora("combine"),
        "adapter in bf16": _lora("dtype", "bfloat16"),
    },
    "merge": {
        "into the dequantized base": lambda recipe, _: recipe.merge.base == "dequantized" and recipe.merge.write,
        "into the original base": lambda recipe, _: recipe.merge.base == "original",
        "in GPTQ, not written": lambda recipe, _: not recipe.merge.write,
        "in fp32": lambda recipe, _: recipe.merge.dtype == "float32",
    },
    "quantize": {
        "4 bits": lambda recipe, _: recipe.quantize.bits == 4 and recipe.quantize.engine == "native",
        "8 bits": lambda recipe, _: recipe.quantize.bits == 8,
        "3 bits": lambda recipe, _: recipe.quantize.bits == 3,
        "2 bits": lambda recipe, _: recipe.quantize.bits == 2,
        "with zero points": lambda recipe, _: not recipe.quantize.sym and recipe.quantize.method == "gptq",
        "a scale per channel": lambda recipe, _: recipe.quantize.group_size == -1,
        "refined": lambda recipe, _: recipe.quantize.refine is not None,
        "GPTQ by gptqmodel": lambda recipe, _: _by_gptqmodel(recipe, "gptq"),
        "AWQ by gptqmodel": lambda recipe, _: _by_gptqmodel(recipe, "awq"),
    },
}
NAMES = {"base": "base", "method": "method", "adapter": "adapter", "merge": "merge", "quantize": "GPTQ"}
# Tables: which features stand in the rows, and which in the columns.
TABLES = [(("method", "adapter", "merge", "quantize"), "base"), (("adapter",), "method"), (("quantize",), "merge")]
# KL per token up to which a merged model in bf16 is the trained one; rounding alone makes 1e-4 of it.
SAME = 2e-3

Entry = dict[str, Any]
"""`features`: sorted names; `refused`: why, or None where they went through all stages together."""


def _by_gptqmodel(recipe: Recipe, method: str) -> bool:
    return recipe.quantize.engine == "gptqmodel" and recipe.quantize.method == method


def entry_of(run_dir: Path) -> Entry:
    """Of a finished run. Raises AssertionError where it does not show that its combination works."""
    recipe = load_recipe(run_dir / "recipe.yaml")
    rungs = {rung["name"]: rung for rung in read_json(run_dir / "evaluation" / "ladder.json")["rungs"]}
    exact = recipe.merge.write and recipe.merge.base == "dequantized"
    assert not exact or rungs["merged"]["kl"] < SAME, "the merged model is not the trained one"
    assert recipe.quantize.bits == 2 or rungs["gptq"]["kl"] < rungs["base"]["kl"], "quantization took what was learned"
    packed = preview_base(recipe.model.base).quantized
    found = {group: [name for name, rule in rules.items() if rule(recipe, packed)] for group, rules in FEATURES.items()}
    missing = [NAMES[group] for group, names in found.items() if not names]
    assert not missing, f"no rule of FEATURES in scripts/support_table.py fits the {', '.join(missing)} of this recipe"
    return entry(sum(found.values(), []))


def entry(features: Iterable[str], refused: str | None = None) -> Entry:
    known = {name for rules in FEATURES.values() for name in rules}
    unknown = sorted(set(features) - known)
    assert not unknown, f"not in FEATURES: {unknown}"
    return {"features": sorted(features), "refused": refused}


def committed() -> list[Entry]:
    """The entries of recipes/support.json."""
    found: list[Entry] = json.loads(json_file().read_text(encoding="utf-8"))
    return found


def json_file() -> Path:
    return packaged_recipes() / "support.json"


def leave(found: Entry, folder: Path) -> None:
    """Write an entry into a folder of such; equal ones are one file."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found)
    (folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json").write_text(text, encoding="utf-8")


def collected(folder: Path) -> list[Entry]:
    """All entries of a folder, in an order of their own."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    return sorted(found, key=lambda each: (each["refused"] or "", each["features"]))


def markdown(entries: list[Entry]) -> str:
    """recipes/support.md."""
    runs = [set(each["features"]) for each in entries if each["refused"] is None]
    refused = [(set(each["features"]), each["refused"]) for each in entries if each["refused"] is not None]
    seen = set().union(*runs, *(features for features, _ in refused))
    text = (
        f"Written by `scripts/support_table.py` from {len(runs)} runs that the tests make on a tiny model, and "
        f"{len(refused)} refusals. ✓: together in a run through training, merge, quantization and measurement, whose "
        f"merged model is the trained one (KL below {SAME:g} per token, but for merges into the original base). ✗: "
        "refused before any work, for the reason below. Empty: not run together; each was with others. gptqmodel was "
        "run on a 16-bit checkpoint, which is what a merge writes."
    )
    lines = ["# What works with what", "", *textwrap.wrap(text, 120)]
    for row_groups, column_group in TABLES:
        columns = [name for name in FEATURES[column_group] if name in seen]
        lines += ["", f"| {' | '.join(['', *columns])} |", f"|{' --- |' * (len(columns) + 1)}"]
        for group in row_groups:
            lines += [f"| **{NAMES[group]}** |{' |' * len(columns)}"] if len(row_groups) > 1 else []
            for name in (name for name in FEATURES[group] if name in seen):
                cells = [_cell({name, column}, runs, [features for features, _ in refused]) for column in columns]
                lines += [f"| {' | '.join([name, *cells])} |"] if "".join(cells).strip() else []
    lines += ["", "Refused:", ""]
    lines += [f"- {' with '.join(sorted(features))}: {reason}" for features, reason in refused]
    return "\n".join(lines) + "\n"


def _cell(pair: set[str], runs: list[set[str]], refused: list[set[str]]) -> str:
    if any(pair <= run for run in runs):
        return "✓"
    return "✗" if any(pair == features for features in refused) else " "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="folder that QLORA_SUPPORT_RESULTS named")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if anything differs")
    arguments = parser.parse_args()
    entries = collected(arguments.results)
    if not arguments.check:
        json_file().write_text("[\n" + ",\n".join(map(json.dumps, entries)) + "\n]\n", encoding="utf-8")
        (packaged_recipes() / "support.md").write_text(markdown(entries), encoding="utf-8")
        return
    differences = [f"new: {each}" for each in entries if each not in committed()]
    differences += [f"no test runs it any more: {each}" for each in committed() if each not in entries]
    if differences:
        sys.exit("recipes/support.json is not what the tests ran:\n  " + "\n  ".join(differences))


if __name__ == "__main__":
    main()
