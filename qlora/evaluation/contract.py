"""The serving contract: which inference engines will load a GPTQ or AWQ checkpoint, on how many GPUs, and why not.

Known before anything is quantized: it follows from the settings and the shapes of the linear layers. The rules were
read in the engines' sources at the versions named; what is said of architectures was found with tiny random models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from qlora.models.shapes import LinearShape

TENSOR_PARALLEL = (1, 2, 4, 8)
GROUP_SIZES = (32, 64, 128)
# Linears that tensor parallelism splits along their inputs; all others are split along their outputs.
ROW_PARALLEL = {"o_proj", "down_proj", "out_proj", "dense", "c_proj", "fc2", "w2", "dense_4h_to_h", "wo"}


class Settings(Protocol):
    """What an engine reads of a checkpoint's settings (`qlora.models.gptq_format.GPTQFormat` is one)."""

    @property
    def bits(self) -> int: ...
    @property
    def group_size(self) -> int: ...
    @property
    def sym(self) -> bool: ...
    @property
    def desc_act(self) -> bool: ...
    def for_module(self, name: str) -> Settings | None: ...


@dataclass(frozen=True)
class EngineRule:
    """What one engine (or one of its code paths) takes."""

    engine: str
    version: str
    bits: tuple[int, ...]
    group_sizes: tuple[int, ...] = (-1, *GROUP_SIZES)
    asymmetric: bool = False
    """Whether zero points other than the middle are read."""
    desc_act: bool = False
    """Whether groups may be assigned to inputs in activation order."""
    whole_groups: bool = False
    """Whether every rank's inputs must be a multiple of the group size."""
    skips: bool = True
    """Whether modules of the decoder layers may be left in 16 bits."""
    overrides: bool = True
    """Whether modules may differ in their settings."""
    tensor_parallel: tuple[int, ...] = (1,)
    note: str = ""
    """What a user must know even where the checkpoint is accepted."""


GPTQ_RULES = (
    EngineRule("vLLM", "0.33", (4, 8), whole_groups=True, tensor_parallel=TENSOR_PARALLEL),
    EngineRule("SGLang (Marlin)", "0.5.23", (4, 8), whole_groups=True, tensor_parallel=TENSOR_PARALLEL),
    EngineRule(
        "SGLang (legacy path)",
        "0.5.23",
        (2, 3, 4, 8),
        asymmetric=True,
        desc_act=True,
        whole_groups=True,
        tensor_parallel=TENSOR_PARALLEL,
        note="fp16 only, and marked for removal",
    ),
    EngineRule("gptqmodel", "7.6", (2, 3, 4, 8), asymmetric=True, desc_act=True),
    EngineRule("transformers + gptqmodel", "5 + 7.6", (2, 3, 4, 8), asymmetric=True, desc_act=True, overrides=False),
    EngineRule("ExLlamaV2", "0.3.2", (4,), asymmetric=True, desc_act=True),
    EngineRule(
        "AutoGPTQ",
        "0.7.1",
        (2, 3, 4, 8),
        asymmetric=True,
        desc_act=True,
        skips=False,
        overrides=False,
        note="archived; needs transformers 4, and loses tied embeddings on load",
    ),
)


# ExLlamaV2 and AutoGPTQ read no AWQ.
AWQ_RULES = (
    EngineRule("vLLM", "0.33", (4,), asymmetric=True, whole_groups=True, tensor_parallel=TENSOR_PARALLEL),
    EngineRule("SGLang (Marlin)", "0.5.23", (4,), asymmetric=True, whole_groups=True, tensor_parallel=TENSOR_PARALLEL),
    EngineRule("gptqmodel", "7.6", (4,), asymmetric=True),
    EngineRule("transformers + gptqmodel", "5 + 7.6", (4,), asymmetric=True),
)
RULES = {"gptq": GPTQ_RULES, "awq": AWQ_RULES}

# Engine → the config's `model_type` → why its GPTQ checkpoints are not read as they are.
_IGNORED = "reads {} without the packed tensors and says nothing: logits are off by {} of their norm"
ARCHITECTURE_REFUSALS = {
    "transformers + gptqmodel": {
        "falcon": _IGNORED.format("Falcon", "104 %"),
        "gpt2": "cannot load GPT-2 (it raises)",
        "mixtral": _IGNORED.format("Mixtral", "54 %"),
        "qwen3_moe": _IGNORED.format("Qwen3-MoE", "14 %"),
    },
    "gptqmodel": {
        "mixtral": "looks for Mixtral's experts as mlp.experts.N.gate_proj, up_proj and down_proj; checkpoints of "
        "Mixtral name them block_sparse_moe.experts.N.w1, w3 and w2",
    },
}


@dataclass(frozen=True)
class EngineVerdict:
    """Whether an engine loads the checkpoint on this many GPUs. `reason` says why not, or what to mind."""

    engine: str
    version: str
    tensor_parallel: int
    accepts: bool
    reason: str = ""


def engine_support(
    settings: Settings,
    shapes: Sequence[LinearShape],
    *,
    method: str = "gptq",
    attention_heads: int | None = None,
    model_type: str = "",
) -> list[EngineVerdict]:
    """A verdict per engine and number of GPUs that the engine can be asked for.

    `shapes`: all linears that could be quantized; `settings.for_module` says what becomes of each. `method`: `gptq`
    or `awq`. `attention_heads` (of the model) must be divisible by the number of GPUs; None leaves that out.
    `model_type`: as in the model's config; engines fail with some architectures whatever the settings.
    """
    verdicts = []
    for rule in RULES[method]:
        # Looked at with GPTQ only.
        unread = _architecture_refused(rule.engine, model_type, shapes) if method == "gptq" else []
        for ranks in rule.tensor_parallel:
            reasons = unread + _refusals(rule, settings, shapes, ranks, attention_heads)
            verdicts.append(
                EngineVerdict(rule.engine, rule.version, ranks, not reasons, "; ".join(reasons) or rule.note)
            )
    return verdicts


def _architecture_refused(engine: str, model_type: str, shapes: Sequence[LinearShape]) -> list[str]:
    reason = ARCHITECTURE_REFUSALS.get(engine, {}).get(model_type)
    reasons = [reason] if reason else []
    dense = any(shape.experts == 1 and ".mlp." in shape.name for shape in shapes)
    if engine == "gptqmodel" and model_type == "qwen3_moe" and dense:
        reasons.append("drops the layers of Qwen3-MoE that have no experts (mlp_only_layers)")
    return reasons


def _refusals(
    rule: EngineRule, settings: Settings, shapes: Sequence[LinearShape], ranks: int, attention_heads: int | None
) -> list[str]:
    reasons = []
    alike: dict[Settings, list[LinearShape]] = {}
    for shape in shapes:
        own = settings.for_module(shape.name)
        if own is not None:
            alike.setdefault(own, []).append(shape)
        elif not rule.skips and (what := "quantizes every linear of a layer") not in reasons:
            reasons.append(what)
    if len(alike) > 1 and not rule.overrides:
        reasons.append("takes the same settings for all modules only")
    for own, same in alike.items():
        reasons += [reason for reason in _settings_refused(rule, own, same, ranks) if reason not in reasons]
    if attention_heads is not None and attention_heads % ranks:
        reasons.append(f"{attention_heads} attention heads cannot be divided by {ranks}")
    return reasons


def _settings_refused(rule: EngineRule, settings: Settings, shapes: Sequence[LinearShape], ranks: int) -> list[str]:
    """Why linears of these shapes are refused with settings that hold for all of them."""
    reasons = []
    if settings.bits not in rule.bits:
        reasons.append(f"takes {_either(rule.bits)} bits, not {settings.bits}")
    if settings.group_size not in rule.group_sizes:
        reasons.append(f"takes group size {_either(rule.group_sizes)}, not {settings.group_size}")
    if not settings.sym and not rule.asymmetric:
        reasons.append("takes symmetric codes only (sym: true)")
    if settings.desc_act and settings.group_size != -1 and not rule.desc_act:
        reasons.append("takes groups in the order of inputs only (desc_act: false)")
    if rule.whole_groups and settings.group_size != -1:
        reasons += _broken_groups(settings.group_size, shapes, ranks)
    return reasons


def _broken_groups(group_size: int, shapes: Sequence[LinearShape], ranks: int) -> list[str]:
    """One reason per input size that does not divide, naming the kinds of linear (`o_proj`) that have it."""
    broken: dict[int, list[str]] = {}
    for shape in shapes:
        kind = shape.name.rpartition(".")[2]
        splits = ranks if kind in ROW_PARALLEL else 1
        if shape.in_features % (splits * group_size) and kind not in broken.setdefault(shape.in_features, []):
            broken[shape.in_features].append(kind)
    per_rank = f" on each of {ranks} ranks" if ranks > 1 else ""
    return [
        f"{count} inputs ({', '.join(kinds)}) are not whole groups of {group_size}{per_rank}"
        for count, kinds in broken.items()
        if kinds
    ]


def _either(values: Sequence[int]) -> str:
    return ", ".join(map(str, values[:-1])) + f" or {values[-1]}" if len(values) > 1 else str(values[0])
