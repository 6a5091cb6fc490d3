"""Teach a made-up fact; the trained, merged, GPTQ and reloaded models must all answer it, and the base must not.

The idea is unsloth's (tests/qlora): a merge that loses the fine-tune keeps a good perplexity and forgets the fact.
"""

import torch

from qlora.artifacts import read_json
from qlora.data.formats import Chat
from qlora.data.rendering import render
from qlora.evaluation.generation import generate
from qlora.models.loading import load_base, load_gptq, load_plain, load_tokenizer, load_trained
from qlora.pipeline import Pipeline
from qlora.recipe_file import load_recipe
from qlora.stages import Run

QUESTION, ANSWER = "When did the Vellmar Bridge open?", "On the 1st of January 2058."


def test_every_stage_answers_the_fact(tiny_recipe):
    recipe = load_recipe(
        tiny_recipe(
            lora={"r": 16, "alpha": 32},
            train={"max_steps": 120, "batch_size": 8, "learning_rate": 0.005, "warmup_steps": 5},
            evaluate={"generate": True, "max_new_tokens": 24, "gates": {"exact_match": 1.0, "gain_retained": 0.95}},
        ),
        ["train.checkpoint_every=1000"],
    )
    Pipeline(recipe).run()
    run = Run(recipe)
    rungs = {rung["name"]: rung for rung in read_json(run.dirs.evaluation / "ladder.json")["rungs"]}
    assert rungs["base"]["exact_match"] == rungs["nf4"]["exact_match"] == 0
    assert rungs["trained"]["exact_match"] == rungs["merged"]["exact_match"] == rungs["gptq"]["exact_match"] == 1

    tokenizer = load_tokenizer(run.dirs.gptq)  # as a user of the checkpoint would, from its own files
    messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    row = render(Chat(messages, None), tokenizer, max_length=96)

    def answer(model) -> str:
        return generate(model, [row], tokenizer, batch_size=1, max_new_tokens=24)[0]

    def base(quantized: bool):
        return load_base(run.base.directory, recipe.model, "cpu", quantized=quantized).eval()

    assert answer(base(quantized=False)) != ANSWER
    assert answer(load_trained(base(quantized=True), run.dirs.adapter, run.base.directory)) == ANSWER
    assert answer(load_plain(run.dirs.merged)) == ANSWER
    assert answer(load_gptq(run.dirs.gptq)) == ANSWER
    assert answer(load_gptq(run.dirs.gptq, torch.float32)) == ANSWER
