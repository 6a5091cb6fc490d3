"""Load models for training and for measuring: the 4-bit base, the adapter on it, and merged or GPTQ directories.

Nothing is upcast to fp32: embeddings, head and norms stay in the compute dtype (peft's prepare_model_for_kbit_training
is not called; it costs gigabytes).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from qlora.errors import UserError
from qlora.models.checkpoint import CheckpointReader
from qlora.models.gptq_format import GPTQTensors, dequantize, read_quantization_config
from qlora.recipe import Lora, Model

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def pick_device(name: str) -> str:
    """`auto`, `cpu` or `cuda` to the device of this process (its local rank under a launcher)."""
    import os

    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda, but torch sees no GPU", "device", "`qlora doctor` shows what was found")
    if name == "cpu" or not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"


def load_tokenizer(directory: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a directory, with a pad token (the EOS token if it has none of its own)."""
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(directory: Path, model: Model, device: str, *, quantized: bool) -> PreTrainedModel:
    """The frozen base in `model.compute_dtype`, its linear layers in bitsandbytes 4-bit if `quantized`."""
    options: dict[str, Any] = {
        "dtype": DTYPES[model.compute_dtype],
        "device_map": {"": device},
        "attn_implementation": model.attn_implementation,
        "trust_remote_code": model.trust_remote_code,
    }
    if quantized and model.quantization != "none":
        options["quantization_config"] = bitsandbytes_config(model)
    loaded = AutoModelForCausalLM.from_pretrained(directory, **options)
    disable_cpu_repacking(loaded)
    loaded.config.use_cache = False
    return loaded


def bitsandbytes_config(model: Model) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=model.quantization,
        bnb_4bit_use_double_quant=model.double_quant,
        bnb_4bit_compute_dtype=DTYPES[model.compute_dtype],
    )


def disable_cpu_repacking(model: torch.nn.Module) -> None:
    """Keep 4-bit weights in their own layout on CPUs with AVX-512 bf16.

    There, bitsandbytes 0.50 repacks a Linear4bit on its first forward in eval mode and from then on takes a path
    without autograd: one evaluation before or during training and LoRA gradients are wrong, in silence.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def lora_config(lora: Lora) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT divides by it; a float is as good
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern=dict(lora.alpha_pattern),
        bias=lora.bias,
        modules_to_save=list(lora.modules_to_save) or None,
        task_type="CAUSAL_LM",
    )


def attach_adapter(base: PreTrainedModel, lora: Lora) -> Any:
    """A fresh LoRA adapter on the base (a `PeftModel`), trainable parameters in `lora.dtype`."""
    from peft import get_peft_model

    try:
        return get_peft_model(base, lora_config(lora))
    except ValueError as error:
        raise UserError(
            str(error).splitlines()[0], "lora.target_modules", "all-linear fits every architecture"
        ) from None


def load_trained(base: PreTrainedModel, adapter: Path) -> Any:
    """The trained adapter on its base, for measuring (a `PeftModel` in eval mode)."""
    from peft import PeftModel

    return PeftModel.from_pretrained(base, adapter).eval()


def load_plain(
    directory: Path,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    *,
    attn_implementation: str = "sdpa",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A 16-bit directory (base or merged)."""
    return AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=dtype,
        device_map={"": device},
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
    ).eval()


def load_gptq(
    directory: Path,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    *,
    attn_implementation: str = "sdpa",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A GPTQ directory as a plain model: every packed weight dequantized to `dtype`, no GPTQ kernel involved.

    Evaluation measures what the checkpoint says, not what one kernel makes of it.
    Raises `UserError` if the directory is not a GPTQ v1 checkpoint or tensors are missing.
    """
    settings = read_quantization_config(directory)
    config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    del config.quantization_config
    state = dict(_dequantized_state(directory, settings.bits, dtype, device))
    with torch.device("meta"):
        architecture = type(AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code))
    return architecture.from_pretrained(
        None,
        config=config,
        state_dict=state,
        dtype=dtype,
        device_map={"": device},
        attn_implementation=attn_implementation,
    ).eval()


def _dequantized_state(
    directory: Path, bits: int, dtype: torch.dtype, device: str
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor on `device`) of a GPTQ checkpoint, packed linears as one `weight` each."""
    reader = CheckpointReader(directory)
    for name in reader.names():
        prefix, _, kind = name.rpartition(".")
        if kind == "qweight":
            parts = {
                part: reader.read(f"{prefix}.{part}").to(device) for part in ("qweight", "qzeros", "scales", "g_idx")
            }
            yield f"{prefix}.weight", dequantize(GPTQTensors(**parts), bits, dtype)
        elif kind not in {"qzeros", "scales", "g_idx"}:
            tensor = reader.read(name).to(device)
            yield name, tensor.to(dtype) if tensor.is_floating_point() else tensor
