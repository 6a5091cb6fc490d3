"""What an adapter is before the first step: nothing, another adapter, or a part of what quantization took.

LoftQ (Li et al. 2023, arXiv:2310.08659, Algorithm 1 with one iteration): s·B·A begins as the best approximation of rank
r of the error of quantization,

    s·B·A = Σ_{i ≤ r} σ_i·u_i·v_iᵀ   of   W − dequant(Q(W)) = Σ_i σ_i·u_i·v_iᵀ

so that training begins nearer to the 16-bit model. The quantized base stays what it was, so the merge is what it was.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora import LoraLayer
from transformers.pytorch_utils import Conv1D

from qlora.errors import UserError
from qlora.kernels.four_bit import FourBitWeight, dequantize
from qlora.models.checkpoint import CheckpointReader
from qlora.models.starting_adapter import start_from
from qlora.models.stored_names import renamed_tensors
from qlora.recipe import Lora

log = logging.getLogger(__name__)
# Columns and rounds of the randomized decomposition (Halko et al. 2011, arXiv:0909.4061, §4.3), beyond the rank.
MORE_COLUMNS = 16
ROUNDS = 4


def begin(model: Any, lora: Lora, base: Path) -> None:
    """Give the fresh adapter of a PEFT model its first numbers, where they are not PEFT's.

    base: directory of the 16-bit weights. Raises UserError as `start_from` does, and for layers that LoftQ cannot take.
    """
    if lora.start_from is not None:
        start_from(model, lora)
    elif lora.init == "loftq":
        share = _loftq(model, base)
        log.info("the adapter begins with %.1f %% of what quantization took from its layers", 100 * share)


@torch.no_grad()
def _loftq(model: Any, base: Path) -> float:
    """Returns the share of the squared error of all layers that the adapter makes up for."""
    whole: Any = model.get_base_model()
    reader, stored = CheckpointReader(base), renamed_tensors(whole)
    error = left = 0.0
    for name, layer in _quantized_layers(whole):
        weight, parameter = layer.get_base_layer().weight, f"{name}.weight"
        (adapter,) = layer.active_adapters
        down_RK, up_NR = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        found_NK = reader.read(stored.get(parameter, parameter)).to(weight.device, torch.float32)
        lost_NK = found_NK - dequantize(FourBitWeight.of(weight), weight.quant_state.dtype).float()
        rank = down_RK.shape[0]
        with torch.random.fork_rng([weight.device] if weight.is_cuda else []):
            torch.manual_seed(0)  # the same for every process, and again
            u_NQ, sizes_Q, v_KQ = torch.svd_lowrank(lost_NK, min(rank + MORE_COLUMNS, *lost_NK.shape), ROUNDS)
        root_R = sizes_Q[:rank].sqrt()
        down_RK[: len(root_R)] = (v_KQ[:, :rank] * root_R).T
        up_NR[:, : len(root_R)] = u_NQ[:, :rank] * root_R / layer.scaling[adapter]
        error += float(lost_NK.square().sum())
        left += float((lost_NK - layer.scaling[adapter] * (up_NR.float() @ down_RK.float())).square().sum())
    return 1 - left / error


def _quantized_layers(model: Any) -> Iterator[tuple[str, Any]]:
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and isinstance(base := layer.get_base_layer(), Linear4bit):
            if getattr(base, "source_cls", None) is Conv1D:
                raise UserError(f"{name} holds its weight transposed", "lora.init: loftq", "use default")
            yield name, layer
