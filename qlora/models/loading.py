"""Load models for training and for measuring: the quantized base, the adapter on it, and merged or GPTQ directories.

Nothing is upcast to fp32: embeddings, head and norms stay in the compute dtype (peft's prepare_model_for_kbit_training
is not called; it costs gigabytes).
"""

from __future__ import annotations

import contextlib
import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora.errors import UserError
from qlora.models.packed_checkpoint import dequantized_tensors, transposed_linears
from qlora.models.patches import each_quantized_weight, leave_gptqmodel_alone, plain_falcon_linears
from qlora.models.placement import place
from qlora.models.tokens import (
    TrainedTokens,
    begin_rows,
    grow,
    read_rows_apart,
    require_rows,
    token_indices,
)
from qlora.recipe import Lora, Model

if TYPE_CHECKING:
    from qlora.models.base import Base
    from qlora.models.sharding import Sharding

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


def load_for_training(
    base: Base, model: Model, device: str, *, tokens: TrainedTokens | None = None, sharding: Sharding | None = None
) -> PreTrainedModel:
    """The frozen base as training holds it, in the recipe's dtype.

    tokens: that are to have rows, as training begins with them (`begin_rows`). sharding: how processes share a base in
    4 bits; a device holds no more of it than its part at any time. Raises UserError as `load_base` does, and where the
    recipe wants a checkpoint's own codes and it has none.
    """
    if model.quantization != "checkpoint":
        return load_base(base.directory, model, device, quantized=True, tokens=tokens, sharding=sharding)
    from qlora.models.packed_base import load_packed, require_packed

    require_packed(base.id, base.dequantized_from, model)
    assert base.packed is not None, "of GPTQ and AWQ it is known"
    loaded = load_packed(base.packed, model, DTYPES[model.dtype], device)
    loaded.config.use_cache = False
    if tokens is not None:
        begin_rows(loaded, tokens)
    return loaded


def load_base(
    directory: Path,
    model: Model,
    device: str,
    *,
    quantized: bool,
    tokens: TrainedTokens | None = None,
    most: int | None = None,
    sharding: Sharding | None = None,
) -> PreTrainedModel:
    """The frozen base in the recipe's dtype, its linear layers quantized by bitsandbytes if `quantized`.

    tokens, sharding: as `load_for_training` has them. most: bytes of each GPU that a base in 16 bits may take, as
    `place` has it. Raises UserError for `model.skip_modules` that name nothing.
    """
    options: dict[str, Any] = {
        "dtype": DTYPES[model.dtype],
        "device_map": {"": device if most is None else "cpu"},
        "attn_implementation": model.attn_implementation,
        "trust_remote_code": model.trust_remote_code,
    }
    config = AutoConfig.from_pretrained(directory, trust_remote_code=model.trust_remote_code)
    if quantized and model.quantization == "checkpoint":
        raise ValueError("a checkpoint's own codes are loaded by load_for_training")
    if quantized and model.requantizes:
        options["quantization_config"] = bitsandbytes_config(model, _left_in_16_bits(config, model))
    with contextlib.ExitStack() as patches:
        if config.model_type == "falcon":
            patches.enter_context(plain_falcon_linears())
        if sharding is not None:
            patches.enter_context(each_quantized_weight(sharding.take))
        loaded = AutoModelForCausalLM.from_pretrained(directory, **options)
    if sharding is not None:
        sharding.install(loaded)
    disable_cpu_repacking(loaded)
    train_as_measured(loaded)
    loaded.config.use_cache = False
    if tokens is not None:
        begin_rows(loaded, tokens)
    return loaded if most is None else place(loaded, device, most)


def bitsandbytes_config(model: Model, left_in_16_bits: list[str] | None = None) -> Any:
    """For nf4, fp4 or int8; of names of modules that are left, transformers' own choice if there are none."""
    from transformers import BitsAndBytesConfig

    if model.quantization == "int8":
        return BitsAndBytesConfig(
            load_in_8bit=True, llm_int8_threshold=model.int8_threshold, llm_int8_skip_modules=left_in_16_bits
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=model.quantization,
        bnb_4bit_use_double_quant=model.double_quant,
        bnb_4bit_compute_dtype=DTYPES[model.dtype],
        llm_int8_skip_modules=left_in_16_bits,  # whatever its name says
    )


def _left_in_16_bits(config: Any, model: Model) -> list[str] | None:
    from qlora.models.skipped import kept_in_16_bits

    if not model.skip_modules:
        return None
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, trust_remote_code=model.trust_remote_code)
    return kept_in_16_bits(empty, model.skip_modules)


def disable_cpu_repacking(model: torch.nn.Module) -> None:
    """Keep 4-bit weights in their own layout on CPUs with AVX-512 bf16.

    There, bitsandbytes 0.50 repacks a Linear4bit on its first forward in eval mode and from then on takes a path
    without autograd: one evaluation before or during training and LoRA gradients are wrong, in silence.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def train_as_measured(model: torch.nn.Module) -> None:
    """Have 8-bit layers compute on CPUs outside of training what they compute in it.

    There, bitsandbytes 0.50 multiplies with dequantized weights in training, and quantizes inputs too in eval mode; on
    GPUs it quantizes them in both. The layers drop nothing and keep no statistics: the mode means nothing else to them.
    """
    from bitsandbytes.nn import Linear8bitLt

    # One warning for each product in bf16, that it is cast to fp16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    for module in model.modules():
        if isinstance(module, Linear8bitLt) and module.weight.device.type == "cpu":
            module.train = partial(_stay_in_training, module)  # type: ignore[method-assign, assignment]
            module.train()


def _stay_in_training(module: torch.nn.Module, mode: bool = True) -> torch.nn.Module:
    module.training = True
    return module


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

    leave_gptqmodel_alone()
    config = lora_config(lora, token_indices(base, tokens, lora) if tokens is not None else None)
    if lora.target_modules == "all-linear" and fused_parameters(base):
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


def fused_parameters(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """(name, parameter) of experts that are held as 3-D tensors, which neither bitsandbytes nor all-linear take."""
    return [(name, each) for name, each in model.named_parameters() if each.ndim > 2 and "expert" in name]


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
    leave_gptqmodel_alone()
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
    most: int | None = None,
) -> PreTrainedModel:
    """A 16-bit directory (base or merged), beyond `most` bytes of each GPU elsewhere too, as `place` has it."""
    model = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=dtype,
        device_map={"": device if most is None else "cpu"},
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
    ).eval()
    return model if most is None else place(model, device, most)


def load_gptq(
    directory: Path,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    *,
    attn_implementation: str = "sdpa",
    trust_remote_code: bool = False,
    most: int | None = None,
) -> PreTrainedModel:
    """A GPTQ or AWQ directory as a plain model: every packed weight dequantized to `dtype`, no such kernel involved.

    Evaluation measures what the checkpoint says, not what one kernel makes of it. Beyond `most` bytes of each GPU it
    lies elsewhere too, as `place` has it.
    Raises `UserError` if the directory is not a GPTQ v1 or AWQ GEMM checkpoint, or tensors are missing.
    """
    config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    first = device if most is None else "cpu"
    tensors = dequantized_tensors(directory, transposed_linears(model), dtype, device)
    loaded = (
        type(model)
        .from_pretrained(
            None,
            config=config,
            state_dict={name: tensor.to(first) for name, tensor in tensors},
            dtype=dtype,
            device_map={"": first},
            attn_implementation=attn_implementation,
        )
        .eval()
    )
    return loaded if most is None else place(loaded, device, most)
