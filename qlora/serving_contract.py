"""evaluation/contract.json: which engines load the checkpoint, tokens at every stage, and golden prompts to replay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from qlora.data.formats import Examples
from qlora.data.store import Rows
from qlora.evaluation.contract import EngineVerdict, engine_support
from qlora.evaluation.generation import ends_of
from qlora.evaluation.golden import Golden, choose, conversations_of, prompts
from qlora.evaluation.tokens import mismatches, token_facts
from qlora.models.gptq_format import quantization_method, read_quantization_config
from qlora.models.held import training_shapes
from qlora.models.shapes import read_config, skeleton
from qlora.quantization.settings import GPTQSettings

if TYPE_CHECKING:
    from qlora.stages import Run


def golden_prompts(run: Run, rows: Rows) -> Golden:
    """Prompts of the held-out rows, for the ladder to observe how models answer them."""
    recipe = run.recipe
    numbers = choose(rows, recipe.evaluate.golden, recipe.seed)
    chosen = [rows[number] for number in numbers]
    sources = [source for source, _ in run.splits.evaluation.parts]
    conversations = conversations_of(
        [rows.origin(number) for number in numbers], lambda place: iter(Examples(sources[place]))
    )
    found = prompts(chosen, run.tokenizer, conversations, recipe.data.template_options)
    return Golden(found, run.tokenizer, ends_of(rows), recipe.evaluate.golden_tokens, recipe.evaluate.batch_size)


def serving_contract(run: Run, rows: Rows, golden: Golden) -> dict[str, Any]:
    """The content of contract.json, once golden prompts are answered."""
    recipe, dirs = run.recipe, run.dirs
    trust = recipe.model.trust_remote_code
    folders = {"base": run.base.directory, "adapter": dirs.adapter, "merged": dirs.merged, "gptq": dirs.gptq}
    if not recipe.merge.write:
        del folders["merged"]
    stages = {name: token_facts(folder, trust) for name, folder in folders.items()}
    whole = rows.select(~rows.column("truncated"))
    ends = [int(end) for end in np.unique(whole.column("end")) if end >= 0] if len(whole) else []
    return {
        "engines": [asdict(each) for each in _engines(run)],
        "tokens": asdict(stages["gptq"]),
        "stages": {name: asdict(facts) for name, facts in stages.items()},
        "mismatches": mismatches(stages, ends=ends, template_named=recipe.data.chat_template is not None),
        "golden": golden.to_json(),
        "max_new_tokens": golden.max_new_tokens,
        "template_options": recipe.data.template_options,
    }


def _engines(run: Run) -> Sequence[EngineVerdict]:
    """Of the checkpoint as it was written."""
    recipe, directory = run.recipe, run.dirs.gptq
    trust = recipe.model.trust_remote_code
    config = read_config(directory, trust_remote_code=trust)
    del config.quantization_config
    shapes = training_shapes(
        skeleton(config, trust_remote_code=trust), recipe.model, run.base.packed or run.base.directory
    )
    method = quantization_method(directory)
    # No reader of AWQ knows settings by module, and the recipe allows none.
    written = read_quantization_config(directory) if method == "gptq" else None
    return engine_support(
        written or GPTQSettings.from_recipe(recipe.quantize).format,
        shapes.linears,
        method=method,
        attention_heads=shapes.attention_heads,
        model_type=config.model_type,
    )
