"""Models that recipes name, as configurations: sizes as their config.json on the hub states them, without any weight.

`PARAMETERS` are the counts that their publishers and the hub state; a test builds each model and counts. Sizes alone
matter here: token ids of special tokens and the like are left at their defaults.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, PretrainedConfig


@dataclass(frozen=True)
class Shape:
    """A model's architecture and sizes."""

    model_type: str
    parameters: int
    """Tied ones once."""
    sizes: dict[str, Any]

    def config(self, **changes: Any) -> PretrainedConfig:
        """The configuration of transformers; `changes` replace sizes."""
        return AutoConfig.for_model(self.model_type, **self.sizes | changes)


LLAMA_3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip

SHAPES: dict[str, Shape] = {
    "meta-llama/Llama-3.2-1B-Instruct": Shape("llama", 1_235_814_400, dict(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
        head_dim=64, vocab_size=128256, tie_word_embeddings=True, max_position_embeddings=131072,
        rope_parameters=LLAMA_3_ROPE | {"factor": 32.0},
    )),
    "meta-llama/Llama-3.1-8B": Shape("llama", 8_030_261_248, dict(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, tie_word_embeddings=False, max_position_embeddings=131072, rope_parameters=LLAMA_3_ROPE,
    )),
    "meta-llama/Llama-3.3-70B-Instruct": Shape("llama", 70_553_706_496, dict(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
        vocab_size=128256, tie_word_embeddings=False, max_position_embeddings=131072, rope_parameters=LLAMA_3_ROPE,
    )),
    "Qwen/Qwen3-0.6B": Shape("qwen3", 596_049_920, dict(
        hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
        head_dim=128, vocab_size=151936, tie_word_embeddings=True, max_position_embeddings=40960,
    )),
    "Qwen/Qwen3-8B": Shape("qwen3", 8_190_735_360, dict(
        hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
        head_dim=128, vocab_size=151936, tie_word_embeddings=False, max_position_embeddings=40960,
    )),
    "Qwen/Qwen3-14B": Shape("qwen3", 14_768_307_200, dict(
        hidden_size=5120, intermediate_size=17408, num_hidden_layers=40, num_attention_heads=40, num_key_value_heads=8,
        head_dim=128, vocab_size=151936, tie_word_embeddings=False, max_position_embeddings=40960,
    )),
    "Qwen/Qwen3-32B": Shape("qwen3", 32_762_123_264, dict(
        hidden_size=5120, intermediate_size=25600, num_hidden_layers=64, num_attention_heads=64, num_key_value_heads=8,
        head_dim=128, vocab_size=151936, tie_word_embeddings=False, max_position_embeddings=40960,
    )),
    "Qwen/Qwen3-30B-A3B": Shape("qwen3_moe", 30_532_122_624, dict(
        hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8,
        norm_topk_prob=True, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
        vocab_size=151936, tie_word_embeddings=False, max_position_embeddings=40960,
    )),
    "mistralai/Mistral-7B-Instruct-v0.3": Shape("mistral", 7_248_023_552, dict(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        head_dim=128, vocab_size=32768, tie_word_embeddings=False, max_position_embeddings=32768, sliding_window=None,
    )),
    "google/gemma-3-1b-it": Shape("gemma3_text", 999_885_952, dict(
        hidden_size=1152, intermediate_size=6912, num_hidden_layers=26, num_attention_heads=4, num_key_value_heads=1,
        head_dim=256, vocab_size=262144, tie_word_embeddings=True, max_position_embeddings=32768, sliding_window=512,
    )),
    "microsoft/Phi-4-mini-instruct": Shape("phi3", 3_836_021_760, dict(
        hidden_size=3072, intermediate_size=8192, num_hidden_layers=32, num_attention_heads=24, num_key_value_heads=8,
        vocab_size=200064, tie_word_embeddings=True, max_position_embeddings=131072, sliding_window=262144,
        pad_token_id=0,
    )),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": Shape("llama", 1_711_376_384, dict(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, num_attention_heads=32, num_key_value_heads=32,
        vocab_size=49152, tie_word_embeddings=True, max_position_embeddings=8192,
    )),
    "HuggingFaceTB/SmolLM3-3B": Shape("smollm3", 3_075_098_624, dict(
        hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=4,
        vocab_size=128256, tie_word_embeddings=True, max_position_embeddings=65536, pad_token_id=0,
    )),
    "SmolLM2-135M-Instruct.Q4_1.gguf": Shape("llama", 134_515_008, dict(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152, tie_word_embeddings=True, max_position_embeddings=8192,
    )),
}  # fmt: skip
SHAPES["meta-llama/Llama-3.1-8B-Instruct"] = SHAPES["meta-llama/Llama-3.1-8B"]
