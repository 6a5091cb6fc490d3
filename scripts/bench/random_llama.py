"""Random-weight Llama checkpoints of real sizes, for speed and memory where weights do not matter.

A shard holds one decoder layer, so that a checkpoint of fewer layers is a folder of links to the same files. Weights
are normal with the deviations of a trained model (0.02, residual outputs by 1/√(2·layers) of it), and norm weights are
log-normal, so that input channels differ in power as they do in real models. They are drawn on the device of the run.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "llama-2-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    },
    "llama-3.2-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "llama-3.2-3b": {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "llama-2-13b": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "vocab_size": 32000,
    },
    "llama-2-70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
    },
}
SHARED_SHARD = "model-shared.safetensors"
INDEX = "model.safetensors.index.json"
STD = 0.02


def write_checkpoint(shape: str, layers: int, directory: Path, device: str) -> Path:
    """Write `directory` (bf16, with a byte-level tokenizer) unless it is complete already; returns it."""
    if (directory / INDEX).is_file():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    sizes = SHAPES[shape]
    generator = torch.Generator(device).manual_seed(0)
    weight_map: dict[str, str] = {}
    for name, tensors in shards(sizes, layers, generator):
        save_file({key: tensor.cpu() for key, tensor in tensors.items()}, directory / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    write_side_files(sizes, layers, directory)
    write_index(directory, weight_map)  # last: its presence says that the rest is there
    return directory


def shards(sizes: dict[str, Any], layers: int, generator: torch.Generator):
    """(file, its tensors) for the shared tensors and for each layer, drawn one after the other."""
    hidden, inner, vocabulary = (sizes[key] for key in ("hidden_size", "intermediate_size", "vocab_size"))
    keys = hidden // sizes["num_attention_heads"] * sizes["num_key_value_heads"]
    residual_std = STD / math.sqrt(2 * sizes["num_hidden_layers"])

    def normal(*shape: int, std: float = STD) -> torch.Tensor:
        drawn = torch.randn(*shape, generator=generator, device=generator.device, dtype=torch.bfloat16)
        return drawn.mul_(std)

    def norm() -> torch.Tensor:
        return normal(hidden, std=0.5).exp_()

    yield (
        SHARED_SHARD,
        {
            "model.embed_tokens.weight": normal(vocabulary, hidden),
            "model.norm.weight": norm(),
            **({} if sizes.get("tie_word_embeddings") else {"lm_head.weight": normal(vocabulary, hidden)}),
        },
    )
    for index in range(layers):
        prefix = f"model.layers.{index}."
        yield (
            layer_shard(index),
            {
                f"{prefix}input_layernorm.weight": norm(),
                f"{prefix}self_attn.q_proj.weight": normal(hidden, hidden),
                f"{prefix}self_attn.k_proj.weight": normal(keys, hidden),
                f"{prefix}self_attn.v_proj.weight": normal(keys, hidden),
                f"{prefix}self_attn.o_proj.weight": normal(hidden, hidden, std=residual_std),
                f"{prefix}post_attention_layernorm.weight": norm(),
                f"{prefix}mlp.gate_proj.weight": normal(inner, hidden),
                f"{prefix}mlp.up_proj.weight": normal(inner, hidden),
                f"{prefix}mlp.down_proj.weight": normal(hidden, inner, std=residual_std),
            },
        )


def first_layers(source: Path, shape: str, layers: int, directory: Path) -> Path:
    """The first `layers` of a checkpoint as a checkpoint of its own: links to its shards, no weight written."""
    if (directory / INDEX).is_file():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    files = {SHARED_SHARD, *(layer_shard(index) for index in range(layers))}
    whole: dict[str, str] = json.loads((source / INDEX).read_text())["weight_map"]
    for name in files:
        if not (directory / name).exists():
            os.link(source / name, directory / name)
    write_side_files(SHAPES[shape], layers, directory)
    write_index(directory, {name: file for name, file in whole.items() if file in files})
    return directory


def layer_shard(index: int) -> str:
    return f"model-layer-{index:03d}.safetensors"


def write_index(directory: Path, weight_map: dict[str, str]) -> None:
    size = sum((directory / name).stat().st_size for name in set(weight_map.values()))
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def write_side_files(sizes: dict[str, Any], layers: int, directory: Path) -> None:
    """config.json and a tokenizer whose tokens are bytes, since some engines want one."""
    from transformers import LlamaConfig

    sizes = sizes | {"num_hidden_layers": layers, "max_position_embeddings": 4096}
    sizes.setdefault("tie_word_embeddings", False)
    config = LlamaConfig(**sizes, bos_token_id=0, eos_token_id=1, pad_token_id=1, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(directory)
    write_byte_tokenizer(directory)


def write_byte_tokenizer(directory: Path) -> None:
    """A tokenizer whose tokens are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>", model_max_length=4096
    )
    tokenizer.save_pretrained(directory)
