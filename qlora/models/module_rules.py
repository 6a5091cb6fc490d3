"""Settings that differ between modules: the rules of a recipe, and the keys of a checkpoint that say so to engines.

A rule is a regular expression and what it changes; of several rules that match a module's full name the first one
counts. Recipes search for the expression anywhere in the name. Checkpoints hold it in `quantization_config.dynamic`,
`{"+:regex": changes, "-:regex": {}}` (plus: other settings, minus: not quantized), matched from the start of the name
by gptqmodel (`dynamic_get`), vLLM and SGLang (`get_dynamic_override`). The latter two ask for the name of the module
that they fuse several into (`qkv_proj`, `gate_up_proj`, `experts`) and give its settings to all parts: these must
agree. transformers knows no `dynamic`; it takes what is left out from `modules_in_block_to_quantize`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora.errors import Problem, UserError

# What engines fuse, by the last component of the name: the fused module, and its parts under the same parent.
FUSED_MODULES = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_EXPERT = re.compile(r"^(.*\.experts)\.\d+\.")  # all experts of a layer are one module to an engine
_IN_LAYER = re.compile(r"^.*?\.\d+\.")


@dataclass(frozen=True)
class ModuleRule:
    """What holds for modules whose full name `pattern` matches from its start (as `re.match` does)."""

    pattern: str
    changes: Mapping[str, Any] | None
    """Settings other than the checkpoint's own (`bits`, `group_size`, `sym`); None: not quantized."""
    key: str = ""
    """Where the recipe gives the rule; empty for a rule read from a checkpoint."""


def recipe_rules(modules: Mapping[str, Mapping[str, Any]], skip: Sequence[str]) -> tuple[ModuleRule, ...]:
    """The rules of `quantize.skip` and then of `quantize.modules`, each in the order given.

    Raises UserError for what is no regular expression, or has flags inside that only hold at its start.
    """
    given: list[tuple[str, Mapping[str, Any] | None, str]] = [(pattern, None, "quantize.skip") for pattern in skip]
    given += [(pattern, changes, "quantize.modules") for pattern, changes in modules.items()]
    rules, problems = [], []
    for pattern, changes, section in given:
        key = f"{section}: {pattern}"
        try:
            re.compile(f".*(?:{pattern})")
        except re.error as error:
            problems.append(Problem(f"not a regular expression ({error})", key, "dots of names are written \\."))
        rules.append(ModuleRule(f".*(?:{pattern})", changes, key))
    if problems:
        raise UserError(problems)
    return tuple(rules)


def first_match(rules: Sequence[ModuleRule], name: str) -> ModuleRule | None:
    """The rule that holds for the module of this full name, if there is one."""
    return next((rule for rule in rules if re.match(rule.pattern, name)), None)


def check_rules(rules: Sequence[ModuleRule], names: Sequence[str]) -> None:
    """Raise UserError for rules that have no effect on the modules of these full names, or that engines cannot follow.

    These are rules that match nothing, that earlier rules leave nothing to, and that part what engines fuse.
    """
    problems = []
    effective = {name: first_match(rules, name) for name in names}
    for rule in rules:
        matched = [name for name in names if re.match(rule.pattern, name)]
        if not matched:
            what, fix = "no module that is quantized has such a name", f"one of the names is {names[0]}"
            problems.append(Problem(what, rule.key, fix))
        elif rule not in effective.values():
            earlier = next(found.key for name in matched if (found := effective[name]))
            what = f"has no effect: {earlier} comes first and takes what it matches"
            problems.append(Problem(what, rule.key, "the first rule that matches counts; put the narrower one first"))
    problems += _parted(effective)
    if all(rule is not None and rule.changes is None for rule in effective.values()):
        problems.append(Problem("every module is skipped", "quantize.skip", "skip less"))
    if problems:
        raise UserError(problems)


def dynamic_config(rules: Sequence[ModuleRule], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The `dynamic` key that states rules for modules of these full names; empty when there is no rule.

    Where a rule matches the parts of a fused module but not its own name, or the reverse, a rule of its own is added.
    """
    if not rules:
        return {}
    corrected: dict[str, list[str]] = {}
    stated: dict[str, dict[str, Any]] = {}
    for fused, parts in fused_modules(names).items():
        wanted, found = first_match(rules, parts[0]), first_match(rules, fused)
        if _changes(wanted) != _changes(found):
            sign = "-:" if wanted is not None and wanted.changes is None else "+:"
            # No change at all is a rule without content: it keeps later rules away.
            content = {} if wanted is None or wanted.changes is None else dict(wanted.changes)
            corrected.setdefault(sign + repr(sorted(content.items())), []).append(re.escape(fused))
            stated[sign + repr(sorted(content.items()))] = content
    dynamic = {f"{kind[:2]}^(?:{'|'.join(fused)})$": stated[kind] for kind, fused in corrected.items()}
    for rule in rules:
        dynamic[("-:" if rule.changes is None else "+:") + rule.pattern] = dict(rule.changes or {})
    return dynamic


def read_dynamic(dynamic: Mapping[str, Mapping[str, Any]]) -> tuple[ModuleRule, ...]:
    """The rules of a checkpoint's `dynamic` key. A pattern without a sign means plus."""
    return tuple(
        ModuleRule(key.removeprefix("-:").removeprefix("+:"), None if key.startswith("-:") else dict(changes))
        for key, changes in dynamic.items()
    )


def modules_in_block(linears: Sequence[str], quantized: Sequence[str]) -> list[str] | None:
    """The `modules_in_block_to_quantize` of a checkpoint, from full names of all linears of the decoder layers.

    None when all are quantized; names inside a layer when every layer leaves out the same; else full names, which
    transformers and vLLM understand too.
    """
    if set(linears) == set(quantized):
        return None
    inside = {name: _IN_LAYER.sub("", name) for name in linears}
    chosen = {inside[name] for name in quantized}
    uniform = all(name in set(quantized) for name in linears if inside[name] in chosen)
    return list(dict.fromkeys(inside[name] for name in quantized)) if uniform else list(quantized)


def fused_modules(names: Sequence[str]) -> dict[str, list[str]]:
    """Full name of each module that engines fuse → the full names among `names` that it is made of."""
    fused: dict[str, list[str]] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        expert = _EXPERT.match(name)
        target = next((fused_leaf for fused_leaf, parts in FUSED_MODULES.items() if leaf in parts), None)
        if expert:
            fused.setdefault(expert[1], []).append(name)
        elif target:
            fused.setdefault(f"{parent}.{target}", []).append(name)
    return fused


def _parted(effective: Mapping[str, ModuleRule | None]) -> list[Problem]:
    """One problem per rule that treats some parts of a fused module differently from others."""
    problems: dict[str, Problem] = {}
    for fused, parts in fused_modules(list(effective)).items():
        rules = [effective[part] for part in parts]
        if all(_changes(rule) == _changes(rules[0]) for rule in rules):
            continue
        rule = next(rule for rule in rules if rule is not None)
        different = [part.rpartition(".")[2] for part in parts if effective[part] is rule]
        others = [part.rpartition(".")[2] for part in parts if effective[part] is not rule]
        what = (
            f"engines run {_listed(different + others)} of {fused.rpartition('.')[0]} as one module "
            f"({fused.rpartition('.')[2]}), so that all must have the same settings"
        )
        problems.setdefault(rule.key, Problem(what, rule.key, f"let the pattern match {_listed(others)} too"))
    return list(problems.values())


def _changes(rule: ModuleRule | None) -> Mapping[str, Any] | None:
    return {} if rule is None else rule.changes


def _listed(leaves: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(leaves))
