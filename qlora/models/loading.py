"""Load models for training and for measuring: the 4-bit base, the adapter on it, and merged or GPTQ directories.

Nothing is upcast to fp32: embeddings, head and norms stay in the compute dtype (peft's prepare_model_for_kbit_training
is not called; it costs gigabytes).
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora.errors import UserError
from qlora.models.packed_checkpoint import dequantized_tensors, transposed_linears
from qlora.models.patches import plain_falcon_linears
from qlora.models.tokens import (
    TrainedTokens,
    begin_rows,
    grow,
    read_rows_apart,
    require_rows,
    token_indices,
)
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


def load_base(
    directory: Path, model: Model, device: str, *, quantized: bool, tokens: TrainedTokens | None = None
) -> PreTrainedModel:
    """The frozen base in the recipe's dtype, its linear layers in bitsandbytes 4-bit if `quantized`.

    tokens: that are to have rows, as training begins with them (`begin_rows`).
    """
    options: dict[str, Any] = {
        "dtype": DTYPES[model.dtype],
        "device_map": {"": device},
        "attn_implementation": model.attn_implementation,
        "trust_remote_code": model.trust_remote_code,
    }
    if quantized and model.quantization != "none":
        options["quantization_config"] = bitsandbytes_config(model)
    config = AutoConfig.from_pretrained(directory, trust_remote_code=model.trust_remote_code)
    with plain_falcon_linears() if config.model_type == "falcon" else contextlib.nullcontext():
        loaded = AutoModelForCausalLM.from_pretrained(directory, **options)
    disable_cpu_repacking(loaded)
    loaded.config.use_cache = False
    if tokens is not None:
        begin_rows(loaded, tokens)
    return loaded


def bitsandbytes_config(model: Model) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=model.quantization,
        bnb_4bit_use_double_quant=model.double_quant,
        bnb_4bit_compute_dtype=DTYPES[model.dtype],
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


def lora_config(lora: Lora, token_indices: dict[str, list[int]] | None = None) -> Any:
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
        trainable_token_indices=token_indices,
        init_lora_weights="gaussian" if lora.init == "gaussian" else True,
        task_type="CAUSAL_LM",
    )


def attach_adapter(base: PreTrainedModel, lora: Lora, tokens: TrainedTokens | None = None) -> Any:
    """A fresh LoRA adapter on the base (a `PeftModel`), trainable parameters in `lora.dtype`.

    tokens: whose rows it trains; the base has them (`begin_rows`). Raises UserError when `lora.target_modules` matches
    nothing, or the experts of a mixture or the output head, and as `token_indices` and `require_rows` do.
    """
    from peft import get_peft_model
    from peft.tuners.lora import LoraLayer

    config = lora_config(lora, token_indices(base, tokens, lora) if tokens is not None else None)
    if lora.target_modules == "all-linear" and _has_fused_experts(base):
        config.target_modules = _linears_beside_experts(base)
    try:
        adapted = get_peft_model(base, config)
    except ValueError as error:
        raise UserError(
            str(error).splitlines()[0], "lora.target_modules", "all-linear fits every architecture"
        ) from None
    except TypeError:
        if tokens is None:
            raise
        raise UserError(
            "token embeddings cannot have both trained rows and an adapter",
            "lora.target_modules",
            "leave them out, or new_tokens and train_tokens",
        ) from None
    if config.target_parameters:
        raise UserError(
            f"experts cannot have an adapter: {', '.join(sorted(config.target_parameters))}",
            "lora.target_modules",
            "use all-linear, which leaves them out, or name the linears of the attention",
        )
    if isinstance(adapted.get_base_model().get_output_embeddings(), LoraLayer):
        raise UserError(
            "the output head cannot have an adapter: TRL takes losses from its weight alone",
            "lora.target_modules",
            "leave it out; lora.modules_to_save trains it whole",
        )
    if tokens is not None:
        require_rows(adapted)
        read_rows_apart(adapted)
    return adapted


def _has_fused_experts(model: PreTrainedModel) -> bool:
    return any(parameter.ndim > 2 and "expert" in name for name, parameter in model.named_parameters())


def _linears_beside_experts(model: PreTrainedModel) -> set[str]:
    """Last names of the linears that can have an adapter where experts are 3-D tensors.

    PEFT 0.21 takes all-linear to mean those and the router too, and takes any name that experts' projections had in
    transformers 4 for those, also where it is that of an ordinary linear.
    """
    head = model.get_output_embeddings()
    linears = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not head
    }
    return linears - {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}


def load_trained(base: PreTrainedModel, adapter: Path, directory: Path) -> Any:
    """The trained adapter on its base, for measuring (a `PeftModel` in eval mode).

    base: as `load_base` loads it from the directory.
    """
    from peft import LoraConfig, PeftModel

    from qlora.models.adapter_beginning import put_rests
    from qlora.models.adapter_sums import round_once
    from qlora.models.provenance import FILE_NAME, read_provenance

    config = LoraConfig.from_pretrained(str(adapter))
    config.init_lora_weights, config.inference_mode = True, True  # the base is what it began from already
    if config.trainable_token_indices:
        grow(base, TrainedTokens.of_layers(config.trainable_token_indices))
    put_rests(base, adapter, read_provenance(adapter / FILE_NAME).beginning, directory)
    model = PeftModel.from_pretrained(base, adapter, config=config).eval()
    read_rows_apart(model)
    return round_once(model)


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
    """A GPTQ or AWQ directory as a plain model: every packed weight dequantized to `dtype`, no such kernel involved.

    Evaluation measures what the checkpoint says, not what one kernel makes of it.
    Raises `UserError` if the directory is not a GPTQ v1 or AWQ GEMM checkpoint, or tensors are missing.
    """
    config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    state = dict(dequantized_tensors(directory, transposed_linears(model), dtype, device))
    return (
        type(model)
        .from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=dtype,
            device_map={"": device},
            attn_implementation=attn_implementation,
        )
        .eval()
    )
