"""Rules for modules: which one counts, how engines are told, and what is refused before anything is computed."""

import re

import pytest

from qlora.errors import UserError
from qlora.models.gptq_format import GPTQFormat
from qlora.models.module_rules import (
    check_rules,
    dynamic_config,
    first_match,
    fused_modules,
    modules_in_block,
    read_dynamic,
    recipe_rules,
)
from qlora.quantization.settings import GPTQSettings

LOCAL = [*(f"self_attn.{kind}_proj" for kind in "qkvo"), *(f"mlp.{kind}_proj" for kind in ("gate", "up", "down"))]
NAMES = [f"model.layers.{index}.{local}" for index in range(12) for local in LOCAL]
EXPERTS = [f"model.layers.0.mlp.experts.{index}.{kind}_proj" for index in range(2) for kind in ("gate", "up", "down")]


def asked_by_vllm(dynamic, name):
    """What vLLM's `get_dynamic_override` finds: the first pattern that matches from the start of the name."""
    for pattern, changes in dynamic.items():
        if re.match(pattern[2:], name):
            return None if pattern.startswith("-:") else changes
    return {}


def test_the_first_rule_that_matches_anywhere_in_the_name_counts_and_skip_comes_first():
    settings = GPTQSettings(
        group_size=64,
        modules={r"layers\.1\.mlp": {"bits": 8, "group_size": 32}, r"mlp\.": {"bits": 3}},
        skip=[r"layers\.11\."],
    )
    assert settings.for_module("model.layers.1.mlp.up_proj") == GPTQSettings(bits=8, group_size=32)
    assert settings.for_module("model.layers.10.mlp.up_proj") == GPTQSettings(bits=3, group_size=64)
    assert settings.for_module("model.layers.10.self_attn.q_proj") == GPTQSettings(group_size=64)
    assert settings.for_module("model.layers.11.mlp.up_proj") is None
    settings.check_modules(NAMES)


def test_what_is_written_reads_back_to_the_same_settings():
    settings = GPTQSettings(group_size=64, modules={r"layers\.(0|11)\.": {"bits": 8}}, skip=["o_proj$"])
    rules = read_dynamic(dynamic_config(settings.rules, NAMES))
    read = GPTQFormat(4, 64, rules=rules)
    for name in NAMES:
        own, found = settings.for_module(name), read.for_module(name)
        assert (own and (own.bits, own.group_size)) == (found and (found.bits, found.group_size))
    assert dynamic_config(GPTQSettings().rules, NAMES) == {}


@pytest.mark.parametrize(
    ("modules", "skip"),
    [
        ({r"layers\.0\.": {"bits": 8}}, []),
        ({r"\.(q|k|v)_proj$": {"bits": 8}}, []),  # matches no name of the fused module
        ({r"(gate|up)_proj": {"bits": 8, "group_size": 32}}, [r"self_attn\.[qkv]_proj"]),
        ({r"q_proj|k_proj|v_proj": {"bits": 8}}, [r"layers\.3\."]),
    ],
)
def test_engines_that_fuse_modules_find_the_settings_of_their_parts(modules, skip):
    settings = GPTQSettings(modules=modules, skip=skip)
    settings.check_modules(NAMES)
    dynamic = dynamic_config(settings.rules, NAMES)
    for name in [*fused_modules(NAMES), *NAMES]:
        parts = fused_modules(NAMES).get(name, [name])
        rule = first_match(settings.rules, parts[0])
        assert asked_by_vllm(dynamic, name) == ({} if rule is None else rule.changes), name


def test_experts_are_one_module_to_engines():
    rules = recipe_rules({r"experts\.\d+\.": {"bits": 8}}, [])
    check_rules(rules, EXPERTS)
    assert asked_by_vllm(dynamic_config(rules, EXPERTS), "model.layers.0.mlp.experts") == {"bits": 8}
    with pytest.raises(UserError, match="as one module .experts."):
        check_rules(recipe_rules({r"experts\.1\.": {"bits": 8}}, []), EXPERTS)


@pytest.mark.parametrize(
    ("modules", "skip", "message"),
    [
        ({r"layers\.12\.": {"bits": 8}}, [], "no module that is quantized has such a name"),
        ({}, [r"lm_head"], "no module that is quantized has such a name"),
        ({"mlp": {"bits": 8}, "up_proj": {"bits": 3}}, [], "quantize.modules: mlp comes first"),
        ({"o_proj": {"bits": 8}}, ["self_attn"], "quantize.skip: self_attn comes first"),
        ({"q_proj": {"bits": 8}}, [], r"q_proj, k_proj, v_proj of model.layers.0.self_attn as one module"),
        ({}, ["gate_proj"], "let the pattern match up_proj too"),
        ({"layers.(": {"bits": 8}}, [], "not a regular expression"),
        ({"(?i)mlp": {"bits": 8}}, [], "not a regular expression"),
        ({}, ["layers"], "every module is skipped"),
    ],
)
def test_rules_without_effect_or_that_engines_cannot_follow_are_refused(modules, skip, message):
    with pytest.raises(UserError, match=message):
        GPTQSettings(modules=modules, skip=skip).check_modules(NAMES)


def test_group_sizes_are_checked_with_the_settings_of_each_module():
    shapes = {"model.layers.0.mlp.up_proj": (96, 64), "model.layers.0.mlp.down_proj": (64, 96)}
    GPTQSettings(group_size=64, modules={"down": {"group_size": 32}}).check_shapes(shapes)
    with pytest.raises(UserError, match="96 inputs are not divisible by the group size 64"):
        GPTQSettings(group_size=64).check_shapes(shapes)


def test_what_is_left_out_is_named_as_shortly_as_every_reader_understands():
    assert modules_in_block(NAMES, NAMES) is None
    without_output = [name for name in NAMES if "o_proj" not in name]
    assert modules_in_block(NAMES, without_output) == [local for local in LOCAL if "o_proj" not in local]
    without_first = [name for name in NAMES if ".0." not in name]
    assert modules_in_block(NAMES, without_first) == without_first
