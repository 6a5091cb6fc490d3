"""Several adapters of one base as one: a sum of low-rank updates is a low-rank update.

    Σ_i w_i·s_i·B_i·A_i = [w_1·s_1·B_1 … w_n·s_n·B_n] · [A_1; …; A_n]

So the ranks add up, the scale of the sum is 1, and nothing is approximated but the rounding of s·B to fp32.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from qlora.artifacts import file_digest
from qlora.errors import Problem, UserError
from qlora.merging.adapter import KEY_PREFIX, WEIGHTS_NAME, Adapter
from qlora.models.principal import FILE as BEGINNING
from qlora.models.provenance import FILE_NAME, Provenance, read_provenance

if TYPE_CHECKING:
    from qlora.recipe import Weighted

WHERE = "lora.combine"


def combine(parts: Sequence[Weighted], output: Path, *, base_id: str) -> int:
    """Write the weighted sum of the adapters to `output`, as PEFT would; returns its number of parameters.

    Raises UserError as `read_parts` does, and where a module has other shapes in one of them than in another.
    """
    from peft import LoraConfig

    adapters = read_parts(parts)
    downs: dict[str, list[torch.Tensor]] = {}
    ups: dict[str, list[torch.Tensor]] = {}
    for part, adapter in zip(parts, adapters, strict=True):
        for module in adapter.lora:
            down_RK, up_NR = adapter.low_rank(module)
            downs.setdefault(module, []).append(down_RK.float())
            ups.setdefault(module, []).append(up_NR.float() * (part.weight * adapter.config.scaling_of(module)))
    tensors: dict[str, torch.Tensor] = {}
    for module in sorted(downs):
        if len({(down.shape[1], up.shape[0]) for down, up in zip(downs[module], ups[module], strict=True)}) > 1:
            raise UserError(f"{module} has other inputs and outputs in one adapter than in another", WHERE)
        tensors[f"{KEY_PREFIX}{module}.lora_A.weight"] = torch.cat(downs[module])
        tensors[f"{KEY_PREFIX}{module}.lora_B.weight"] = torch.cat(ups[module], 1)
    ranks = {module: sum(len(down) for down in downs[module]) for module in sorted(downs)}
    ((rank, _),) = Counter(ranks.values()).most_common(1)
    others = {module: own for module, own in ranks.items() if own != rank}
    LoraConfig(
        task_type="CAUSAL_LM", base_model_name_or_path=base_id, r=rank, lora_alpha=rank, rank_pattern=others,
        alpha_pattern=dict(others), target_modules=sorted(ranks), inference_mode=True,
    ).save_pretrained(str(output))  # fmt: skip
    save_file(tensors, output / WEIGHTS_NAME, {"format": "pt"})
    return sum(tensor.numel() for tensor in tensors.values())


def read_parts(parts: Sequence[Weighted]) -> list[Adapter]:
    """The adapters; raises UserError, with every problem, for what has no sum: anything but plain LoRA."""
    adapters, problems = [], []
    for part in parts:
        try:
            adapters.append(Adapter(Path(part.path)))
        except UserError as error:
            problems += error.problems
            continue
        config = adapters[-1].config
        kinds = {kind for tensors in adapters[-1].lora.values() for kind in tensors} - {"A", "B"}
        reasons = {
            "DoRA": config.dora,
            "a bias in the adapter": "bias" in kinds,
            "an adapter of an embedding": bool(kinds & {"embedding_A", "embedding_B"}),
            "modules trained in full": bool(adapters[-1].replacements),
            "trained tokens": bool(adapters[-1].rows),
            "a base of its own (lora.init: pissa)": (Path(part.path) / BEGINNING).is_file(),
        }
        found = [reason for reason, there in reasons.items() if there]
        if found:
            what = f"it has {', '.join(found)}, which no sum of adapters can carry"
            problems.append(Problem(what, f"{WHERE}: {part.path}", "merge it alone, or leave it out"))
    if problems:
        raise UserError(problems)
    return adapters


def combined_parameters(parts: Sequence[Weighted]) -> int:
    """Of the sum, without computing it. Raises UserError as `read_parts` does."""
    return sum(
        math.prod(adapter.spec(key).shape)
        for adapter in read_parts(parts)
        for tensors in adapter.lora.values()
        for key in tensors.values()
    )


def combined_digests(parts: Sequence[Weighted]) -> list[list[str | float]] | None:
    """What the sum depends on: content and weights, not paths. None where there is nothing to combine."""
    for part in parts:
        if not (Path(part.path) / WEIGHTS_NAME).is_file():
            raise UserError(
                f"there is no {WEIGHTS_NAME}", f"{WHERE}: {part.path}", "give the directory of a LoRA adapter"
            )
    return [[file_digest(Path(part.path) / WEIGHTS_NAME), part.weight] for part in parts] or None


def require_same_base(parts: Sequence[Weighted], provenance: Provenance) -> None:
    """Raise UserError where an adapter says that it was trained on other weights; PEFT's own do not say.

    As `read_parts` does before that: what has no sum has none on any base.
    """
    read_parts(parts)
    problems = []
    for part in parts:
        kept = Path(part.path) / FILE_NAME
        if kept.is_file() and (theirs := read_provenance(kept)).digest != provenance.digest:
            what = f"it was trained on other weights ({theirs.base_id}, {theirs.settings.quant_type})"
            problems.append(Problem(what, f"{WHERE}: {part.path}", "use its model.base, revision and quantization"))
    if problems:
        raise UserError(problems)
