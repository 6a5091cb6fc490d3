"""Tokens and templates that stages disagree on, where it changes what a server does; and which prompts are golden."""

import shutil
from dataclasses import replace

from qlora.artifacts import read_json, write_json
from qlora.data.rendering import RenderedRow
from qlora.evaluation.golden import OF_PLAIN_TEXT, choose, prompt_of
from qlora.evaluation.tokens import TokenFacts, mismatches, token_facts

SAME = TokenFacts(bos=0, eos=2, pad=2, chat_template_sha256="a", generation_eos=(2,))


def stages(**changed: TokenFacts) -> dict[str, TokenFacts]:
    return {name: changed.get(name, SAME) for name in ("base", "adapter", "merged", "gptq")}


def test_stages_that_say_the_same_are_fine():
    assert mismatches(stages(), ends=[2]) == []


def test_what_a_checkpoint_says_otherwise_is_named():
    found = mismatches(stages(gptq=replace(SAME, eos=1, generation_eos=(1,)), merged=replace(SAME, bos=None)), ends=[2])
    assert any("the EOS token of gptq/ is 1, training used 2" in text for text in found)
    assert any("the BOS token of merged/ is None" in text for text in found)
    assert any("taught to end with token 2, and gptq/ ends with 1" in text for text in found)


def test_what_the_product_changes_by_intent_is_no_mismatch():
    bare = replace(SAME, pad=None, chat_template_sha256=None)
    assert mismatches(stages(base=bare), ends=[2]) == []
    other = stages(base=replace(SAME, chat_template_sha256="b"))
    assert mismatches(other, template_named=True) == []
    assert "the template of the base is b, training used a" in mismatches(other)[0]


def test_ends_that_only_generation_config_knows_are_known():
    ends = replace(SAME, eos=1, generation_eos=(1, 2))
    assert mismatches({name: ends for name in ("base", "adapter", "gptq")}, ends=[1, 2]) == []


def test_facts_are_read_from_files(tiny_model, tmp_path):
    found = token_facts(tiny_model)
    assert (found.bos, found.eos, found.generation_eos) == (0, 2, (2,)) and len(found.chat_template_sha256 or "") == 64
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    (other / "generation_config.json").unlink()
    config = read_json(other / "config.json")
    write_json(other / "config.json", config | {"eos_token_id": [1, 2]})
    assert token_facts(other).generation_eos == (1, 2)
    template = other / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    assert token_facts(other).chat_template_sha256 != found.chat_template_sha256


def row(*ids: int, answer: str | None = "x") -> RenderedRow:
    return RenderedRow([*ids, 9, 2], [-100] * len(ids) + [9, 2], len(ids), False, answer)


def test_golden_prompts_are_different_short_and_spread():
    rows = [row(*range(10, 10 + 1 + number % 20), number) for number in range(100)] + [row(10, 0)]
    chosen = choose(rows, 8, seed=0)
    assert len(chosen) == 8 == len({prompt_of(rows[number]) for number in chosen}) and chosen == choose(rows, 8, 0)
    assert max(len(prompt_of(rows[number])) for number in chosen) <= 12
    assert min(chosen) < 25 and max(chosen) > 75
    assert choose(rows, 0, 0) == [] and choose([row(5), row(5)], 8, 0) == [0]


def test_of_plain_text_the_beginning_is_the_prompt():
    text = RenderedRow(list(range(200)), list(range(200)), 0, False, None)
    assert prompt_of(text) == tuple(range(OF_PLAIN_TEXT))
    assert choose([RenderedRow([1], [1], 0, False, None)], 8, 0) == []
