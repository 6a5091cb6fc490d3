"""base.json: what an adapter was trained on, precisely enough to rebuild it or to refuse a base that differs.

Training writes it beside the adapter; the merge quantizes the base again and compares. The 4-bit codes of the same
16-bit weights are equal on CPU and GPU, so they are compared by digest. Block scales (absmax) that were quantized to
8 bits a second time differ between the two in about one of a thousand by one step, so of them only statistics are
compared, within ABSMAX_TOLERANCE. The codes do not change when all weights are scaled by a factor; the absmax does.
Of LLM.int8 the codes and the scales of rows are compared alike. Of a checkpoint's own packed codes (GPTQ, AWQ) it is
the bf16 weights that they stand for, and that the merge reads: equal to the bit, by whatever kernel dequantized them.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from qlora.errors import UserError
from qlora.kernels.four_bit import be_there
from qlora.models.stored_names import renamed_tensors

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Linear4bit

    from qlora.recipe import Model

FILE_NAME = "base.json"
ABSMAX_TOLERANCE = 1e-3
"""Largest relative difference of a module's absmax mean and rms that still counts as the same weights."""


@dataclass(frozen=True)
class QuantizationSettings:
    """How bitsandbytes holds the frozen base during training."""

    quant_type: Literal["nf4", "fp4", "int8", "checkpoint", "none"]
    double_quant: bool
    compute_dtype: torch.dtype
    blocksize: int = 64
    quant_storage: torch.dtype = torch.uint8
    int8_threshold: float | None = None
    """Of int8: inputs from which magnitude on are multiplied in 16 bits."""

    @classmethod
    def of(cls, model: Model, compute_dtype: torch.dtype) -> QuantizationSettings:
        """Those of a recipe."""
        threshold = model.int8_threshold if model.quantization == "int8" else None
        return cls(model.quantization, model.double_quant, compute_dtype, int8_threshold=threshold)

    @property
    def compared(self) -> str:
        """What of each layer the digests are of."""
        return {"int8": "8-bit codes", "checkpoint": "weights"}.get(self.quant_type, "4-bit codes")


@dataclass(frozen=True)
class ModuleCodes:
    """Fingerprint of one quantized linear layer: its shape [out, in], the sha256 of its codes as they lie in memory
    (4 bits: two per byte), and mean and root mean square of its block scales.

    Of a checkpoint's own codes: of the bf16 weights, and of the largest magnitude of each row."""

    shape: tuple[int, ...]
    sha256: str
    absmax_mean: float
    absmax_rms: float

    def absmax_deviation(self, other: ModuleCodes) -> float:
        """Largest relative difference of the two absmax statistics."""
        pairs = ((self.absmax_mean, other.absmax_mean), (self.absmax_rms, other.absmax_rms))
        return max(abs(mine - theirs) / max(abs(theirs), torch.finfo(torch.float32).tiny) for mine, theirs in pairs)


@dataclass(frozen=True)
class Provenance:
    """The contents of base.json."""

    base_id: str
    revision: str | None
    settings: QuantizationSettings
    load_dtype: torch.dtype
    """Dtype the base was loaded in, and quantized from."""
    device: str
    """Kind of device that quantized: cpu or cuda."""
    bitsandbytes: str
    """Version of bitsandbytes that quantized."""
    quantized: dict[str, ModuleCodes]
    """Quantized linear layers by module name."""
    unquantized: list[str]
    """Names of linear layers that were left alone, sorted."""
    tied: list[list[str]]
    """Groups of parameter names that share one tensor."""
    transposed: list[str] = field(default_factory=list)
    """Names of linear layers whose stored weight is [in, out] (GPT-2's Conv1D), sorted."""
    renamed: dict[str, str] = field(default_factory=dict)
    """Parameter name → name of the stored tensor, where transformers renames on loading."""
    beginning: str | None = None
    """sha256 of the file that says what the adapter began as, where that was taken from the weights before they were
    quantized (`principal`): `quantized` is then of what is left."""

    @property
    def digest(self) -> str:
        """sha256 over names and digests of all quantized layers."""
        lines = "\n".join(f"{name} {codes.sha256}" for name, codes in sorted(self.quantized.items()))
        return hashlib.sha256(lines.encode()).hexdigest()


def write_provenance(
    model: nn.Module,
    path: Path,
    *,
    base_id: str,
    revision: str | None,
    settings: QuantizationSettings,
    beginning: str | None = None,
) -> Provenance:
    """Describe the base inside a model that is loaded for training, with or without a PEFT adapter on it, as base.json.

    Raises UserError for layers that bitsandbytes dequantizes wrongly on this device; ValueError when the weights
    disagree with the settings, or lie in bitsandbytes' repacked layout for CPU inference, which has other bytes.
    """
    import bitsandbytes
    from bitsandbytes.nn import Linear4bit, Linear8bitLt
    from peft import PeftModel
    from transformers.pytorch_utils import Conv1D

    from qlora.models.packed_module import PackedLinear

    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    quantized: dict[str, ModuleCodes] = {}
    unquantized: list[str] = []
    transposed: list[str] = []
    load_dtypes: set[torch.dtype] = set()
    for name, module in _base_items(base.named_modules()):
        if isinstance(module, Linear8bitLt):
            quantized[name] = _eight_bit_codes(name, module, settings)
            load_dtypes.add(settings.compute_dtype)  # transformers casts to it before anything is quantized
        elif isinstance(module, PackedLinear):
            quantized[name] = weight_fingerprint(module.stored_weight())
            load_dtypes.add(settings.compute_dtype)
        elif isinstance(module, Linear4bit):
            quantized[name] = _module_codes(name, module, settings)
            weight: Any = module.weight
            load_dtypes.add(weight.quant_state.dtype)
        elif isinstance(module, (nn.Linear, Conv1D)):
            unquantized.append(name)
        # bitsandbytes puts a layer of its own in the place of a Conv1D, and holds its weight as [out, in].
        if issubclass(getattr(module, "source_cls", type(module)), Conv1D):
            transposed.append(name)
    if bool(quantized) != (settings.quant_type != "none"):
        raise ValueError(f"{len(quantized)} quantized layers in a model with quant_type {settings.quant_type}")
    if len(load_dtypes) > 1:
        raise ValueError(f"layers were quantized from different dtypes: {load_dtypes}")
    first = next(base.parameters())
    provenance = Provenance(
        base_id=base_id,
        revision=revision,
        settings=settings,
        load_dtype=load_dtypes.pop() if load_dtypes else first.dtype,
        device=first.device.type,
        bitsandbytes=bitsandbytes.__version__,
        quantized=dict(sorted(quantized.items())),
        unquantized=sorted(unquantized),
        tied=_tied_parameters(base),
        transposed=sorted(transposed),
        renamed=renamed_tensors(base),
        beginning=beginning,
    )
    path.write_text(json.dumps(provenance_to_json(provenance), indent=1) + "\n", encoding="utf-8")
    return provenance


def read_provenance(path: Path) -> Provenance:
    """Read base.json. Raises UserError if it is missing or is not one of ours."""
    if not path.is_file():
        raise UserError(
            "missing: without it nobody knows which base the adapter was trained on",
            where=str(path),
            fix="use an adapter that `qlora train` wrote, or train it again",
        )
    try:
        return provenance_from_json(json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"not a provenance file ({error!r})", where=str(path), fix="run `qlora train` again to write it"
        ) from error


def provenance_to_json(provenance: Provenance) -> dict[str, Any]:
    """base.json as a JSON-serialisable dictionary."""
    settings = asdict(provenance.settings)
    for key in ("compute_dtype", "quant_storage"):
        settings[key] = dtype_name(settings[key])
    return asdict(provenance) | {
        "settings": settings,
        "load_dtype": dtype_name(provenance.load_dtype),
        "digest": provenance.digest,
    }


def provenance_from_json(data: dict[str, Any]) -> Provenance:
    """The inverse of `provenance_to_json`. Raises KeyError, TypeError or AttributeError for anything else."""
    settings = dict(data.pop("settings"))
    for key in ("compute_dtype", "quant_storage"):
        settings[key] = getattr(torch, settings[key])
    quantized = {
        name: ModuleCodes(**codes | {"shape": tuple(codes["shape"])}) for name, codes in data.pop("quantized").items()
    }
    load_dtype = getattr(torch, data.pop("load_dtype"))
    data.pop("digest")
    return Provenance(**data, settings=QuantizationSettings(**settings), load_dtype=load_dtype, quantized=quantized)


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def codes_fingerprint(shape: tuple[int, ...], sha256: str, absmax: torch.Tensor) -> ModuleCodes:
    """Fingerprint from the digest of the codes and the decompressed block scales (fp32, any shape)."""
    scales = absmax.double()
    return ModuleCodes(tuple(shape), sha256, scales.mean().item(), scales.square().mean().sqrt().item())


def weight_fingerprint(weight_NK: torch.Tensor) -> ModuleCodes:
    """Fingerprint of a weight that training holds as it is, bit for bit."""
    content = weight_NK.detach().cpu().contiguous().view(torch.uint8).numpy().data
    return codes_fingerprint(tuple(weight_NK.shape), hashlib.sha256(content).hexdigest(), weight_NK.abs().amax(1))


def decompressed_absmax(state: QuantState) -> torch.Tensor:
    """Block scales of a bitsandbytes quantization state in fp32, double quantization undone, one per block."""
    from bitsandbytes.functional import dequantize_blockwise

    if not state.nested:
        return state.absmax.float()
    return (dequantize_blockwise(state.absmax, state.state2) + state.offset).float()


def one_block_per_row(elements: int, blocksize: int) -> torch.Size:
    """The shape to dequantize so many elements in: bitsandbytes 0.50 on CPUs with AVX-512 scales with the wrong block
    where a row ends inside one (seen with rows of 32, 96 and 160), on GPUs the shape makes no difference."""
    return torch.Size((1, elements) if elements % blocksize else (elements // blocksize, blocksize))


def _check_dequantization(name: str, weight: Any) -> None:
    """Raise UserError if this device computes with other weights than those quantized (see `one_block_per_row`)."""
    from bitsandbytes.functional import dequantize_4bit

    state = weight.quant_state
    if state.shape[1] % state.blocksize == 0:
        return
    flat = copy.copy(state)
    flat.shape = one_block_per_row(state.shape.numel(), state.blocksize)
    if not torch.equal(dequantize_4bit(weight.data, state).flatten(), dequantize_4bit(weight.data, flat).flatten()):
        raise UserError(
            f"bitsandbytes dequantizes rows of {state.shape[1]} wrongly on this {weight.device.type}: training would "
            f"use them (multiples of {state.blocksize} are right)",
            where=name,
            fix="train on a GPU, or set model.quantization: none",
        )


def _eight_bit_codes(name: str, module: Any, settings: QuantizationSettings) -> ModuleCodes:
    from qlora.models.frozen import eight_bit_codes

    found = ("int8", module.state.threshold)
    if found != (settings.quant_type, settings.int8_threshold):
        raise ValueError(f"{name} is quantized as {found}, the settings say {settings}")
    codes_NK, scales_N = eight_bit_codes(module)
    codes = codes_NK.detach().cpu().contiguous()
    return codes_fingerprint(tuple(codes.shape), hashlib.sha256(codes.numpy().data).hexdigest(), scales_N)


def _module_codes(name: str, module: Linear4bit, settings: QuantizationSettings) -> ModuleCodes:
    weight: Any = module.weight
    be_there(weight)
    state = weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        raise ValueError(
            f"{name} was repacked for CPU inference by a forward in eval mode: write the provenance before, "
            "or set support_avx512bf16_for_cpu = False on every Linear4bit"
        )
    found = (state.quant_type, state.nested, state.blocksize, weight.quant_storage)
    expected = (settings.quant_type, settings.double_quant, settings.blocksize, settings.quant_storage)
    if found != expected:
        raise ValueError(f"{name} is quantized as {found}, the settings say {expected}")
    _check_dequantization(name, weight)
    codes = weight.data.detach().cpu().contiguous().view(torch.uint8)
    return codes_fingerprint(state.shape, hashlib.sha256(codes.numpy().data).hexdigest(), decompressed_absmax(state))


def _base_items(items: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Modules or parameters of the base under the names they had before PEFT wrapped them, without those PEFT added.

    PEFT holds the original of an adapted layer as `base_layer`, that of a fully trained one as `original_module`, and
    that of one with trained rows as `token_adapter.base_layer`.
    """
    wrappers = ("base_layer", "original_module", "token_adapter")
    for name, item in items:
        parts = name.split(".")
        if not any(part.startswith(("lora_", "trainable_tokens_")) or part == "modules_to_save" for part in parts):
            yield ".".join(part for part in parts if part not in wrappers), item


def _tied_parameters(base: nn.Module) -> list[list[str]]:
    names: dict[int, list[str]] = {}
    for name, parameter in _base_items(base.named_parameters(remove_duplicate=False)):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]
