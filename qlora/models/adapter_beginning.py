"""What an adapter is before the first step: nothing, another adapter, or a part of the weights or of their error.

LoftQ (Li et al. 2023, arXiv:2310.08659, Algorithm 1 with one iteration): s·B·A begins as the best approximation of rank
r of the error of quantization,

    s·B·A = Σ_{i ≤ r} σ_i·u_i·v_iᵀ   of   W − dequant(Q(W)) = Σ_i σ_i·u_i·v_iᵀ

so that training begins nearer to the 16-bit model. The quantized base stays what it was, so the merge is what it was.

PiSSA (`qlora.models.principal`) takes the same of W itself, and what is left is quantized in its place.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast
from bitsandbytes.nn import Linear4bit, Params4bit
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from qlora.artifacts import file_digest
from qlora.errors import Problem, UserError
from qlora.kernels.four_bit import FourBitWeight, dequantize
from qlora.merging.names import tensor_names
from qlora.models.checkpoint import CheckpointReader
from qlora.models.principal import FILE, KeptParts, PrincipalPart, principal, principal_part, write_parts
from qlora.models.starting_adapter import start_from
from qlora.models.stored_names import renamed_tensors
from qlora.recipe import Lora

log = logging.getLogger(__name__)
Parts = Mapping[str, PrincipalPart]
"""By the name of the layer."""


def begin(model: Any, lora: Lora, base: Path, parts: Parts | None = None) -> None:
    """Give the fresh adapter of a PEFT model its first numbers, where they are not PEFT's.

    base: directory of the 16-bit weights. parts: what `take_parts` took from them. Raises UserError as `start_from`
    does, and as `require_layers` does for LoftQ.
    """
    if lora.start_from is not None:
        start_from(model, lora)
    elif lora.init == "loftq":
        require_layers(model, lora)
        share = _loftq(model, base)
        log.info("the adapter begins with %.1f %% of what quantization took from its layers", 100 * share)
    for name, part in (parts or {}).items():
        layer = model.get_base_model().get_submodule(name)
        (adapter,) = layer.active_adapters
        with torch.no_grad():
            layer.lora_A[adapter].weight.copy_(part.down_RK)
            layer.lora_B[adapter].weight.copy_(part.up_NR)


def require_layers(model: Any, lora: Lora) -> None:
    """Raise UserError for adapted layers that `lora.init` does not know how to take apart.

    model: with the adapter on it; its weights are not looked at, and may be on the meta device.
    """
    if lora.init not in ("loftq", "pissa"):
        return
    problems = []
    for name, layer in _adapted_layers(model.get_base_model()):
        base = layer.get_base_layer()
        if Conv1D in (type(base), getattr(base, "source_cls", None)):
            reason = "holds its weight transposed"
        elif lora.init == "loftq":
            continue  # of layers in 16 bits nothing was taken
        elif not isinstance(base, nn.Linear):
            reason = f"is not a linear layer but a {type(base).__name__}"
        else:
            continue
        problems.append(Problem(f"{name} {reason}", f"lora.init: {lora.init}", "use default, or other target_modules"))
    if problems:
        raise UserError(problems[:3])


def take_parts(model: Any, lora: Lora, base: Path, checkpoints: Path) -> Parts:
    """For lora.init: pissa, put in the place of every adapted weight what its principal part leaves of it.

    model: with the fresh adapter on it. base: directory of the 16-bit weights. checkpoints: where the first process
    keeps the parts, so that a run that goes on has the same; the other processes get them from it. Returns the parts,
    for `begin`; none for other beginnings. Raises UserError as `require_layers` does.
    """
    if lora.init != "pissa":
        return {}
    require_layers(model, lora)
    state, whole = PartialState(), model.get_base_model()
    layers = dict(_adapted_layers(whole))
    stored = _StoredWeights(whole, layers, base)
    kept = checkpoints / FILE
    before = KeptParts(checkpoints, file_digest(kept)) if state.is_main_process and kept.is_file() else None
    parts = {}
    for name, layer in layers.items():
        (adapter,) = layer.active_adapters
        down_RK, up_NR, scaling = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, layer.scaling[adapter]
        weight_NK = stored[name]
        part = PrincipalPart(down_RK.detach(), up_NR.detach(), scaling)
        if before is not None:
            part = before[name]
        elif state.is_main_process:
            dtype = torch.bfloat16 if lora.dtype == "bfloat16" else torch.float32
            fresh = down_RK.to(dtype), up_NR.to(dtype)
            part = principal_part(weight_NK.to(down_RK.device, torch.float32), *fresh, scaling)
        down_RK, up_NR = (broadcast(each.float().to(down_RK.device)) for each in (part.down_RK, part.up_NR))
        parts[name] = PrincipalPart(down_RK.cpu(), up_NR.cpu(), scaling)
        put_rest(layer.get_base_layer(), weight_NK, parts[name])
    if state.is_main_process and before is None:
        write_parts(parts, kept)
    log.info("the adapter begins as the principal parts of %d weights, the base as what they leave", len(parts))
    return parts


def put_rests(model: Any, adapter: Path, digest: str | None, base: Path) -> None:
    """The same on a base without an adapter, of the parts that are kept beside a trained one.

    Raises UserError as `KeptParts` does.
    """
    parts = KeptParts(adapter, digest)
    if parts.names:
        stored = _StoredWeights(model, parts.names, base)
        for name in sorted(parts.names):
            put_rest(model.get_submodule(name), stored[name], parts[name])


@torch.no_grad()
def put_rest(layer: Any, weight_NK: torch.Tensor, part: PrincipalPart) -> None:
    """Have a linear layer hold what the part leaves of its 16-bit weight, quantized as it was."""
    old = layer.weight
    if not isinstance(layer, Linear4bit):
        layer.weight.copy_(part.rest(weight_NK, old.dtype, old.device))
        return
    fresh: Any = Params4bit(
        part.rest(weight_NK, old.quant_state.dtype, old.device),
        requires_grad=False,
        blocksize=old.blocksize,
        compress_statistics=old.compress_statistics,
        quant_type=old.quant_type,
        quant_storage=old.quant_storage,
        module=layer,
    )
    layer.weight = fresh.to(old.device)


class _StoredWeights:
    """The 16-bit weights [N, K] of layers of a model, by the layer's name, from the directory it was loaded from."""

    def __init__(self, model: Any, layers: Any, directory: Path) -> None:
        self._reader = CheckpointReader(directory)
        names, renamed = set(self._reader.names()), renamed_tensors(model)
        parameters = {layer: f"{layer}.weight" for layer in layers}
        wanted = {name: p if p in names else renamed.get(p, p) for name, p in parameters.items()}
        found = tensor_names(wanted.values(), names, directory)
        self._tensors = {name: found[stored] for name, stored in wanted.items()}

    def __getitem__(self, layer: str) -> torch.Tensor:
        return self._reader.read(self._tensors[layer])


@torch.no_grad()
def _loftq(model: Any, base: Path) -> float:
    """Returns the share of the squared error of all layers that the adapter makes up for."""
    whole: Any = model.get_base_model()
    layers = {name: layer for name, layer in _adapted_layers(whole) if isinstance(layer.get_base_layer(), Linear4bit)}
    stored = _StoredWeights(whole, layers, base)
    error = left = 0.0
    for name, layer in layers.items():
        weight = layer.get_base_layer().weight
        (adapter,) = layer.active_adapters
        down_RK, up_NR = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        found_NK = stored[name].to(weight.device, torch.float32)
        lost_NK = found_NK - dequantize(FourBitWeight.of(weight), weight.quant_state.dtype).float()
        u_NQ, sizes_Q, v_KQ = principal(lost_NK, down_RK.shape[0])
        root_Q = sizes_Q.sqrt()
        down_RK[: len(root_Q)] = (v_KQ * root_Q).T
        up_NR[:, : len(root_Q)] = u_NQ * root_Q / layer.scaling[adapter]
        error += float(lost_NK.square().sum())
        left += float((lost_NK - layer.scaling[adapter] * (up_NR.float() @ down_RK.float())).square().sum())
    return 1 - left / error


def _adapted_layers(model: Any) -> Iterator[tuple[str, Any]]:
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            yield name, layer
