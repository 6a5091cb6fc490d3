"""What a model is made of, from its config alone: parameters, linear layers, adapter, floating-point work per token.

The model is built on torch's meta device, so no weight is read or allocated and any architecture that transformers
knows works. Work per token follows from the parameters that take part in a matrix product (2 FLOPs each) and from
causal attention, with s the sequence length:

    forward              2N + 2H + A            A = 4 · layers · heads · head_dim · s/2
    training             4N + 4H + 6P + 3.5A    (dX only for frozen weights; flash attention's backward costs 2.5 A)
    … with checkpointing 6N + 4H + 8P + 4.5A    (the layers run forward twice, the head once)

N: parameters of the linears that a token passes through inside the layers, H: of the output head, P: of the adapter.
Source: the accounting of PaLM's appendix B (arXiv:2204.02311), with dW only where a weight is trained.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora.errors import UserError
from qlora.models.loading import attach_adapter, fused_parameters
from qlora.models.starting_adapter import require_fit
from qlora.models.stored_names import stored_names
from qlora.models.tokens import TrainedTokens, begin_rows
from qlora.quantization.experts import Experts, expert_pieces, take_experts_apart
from qlora.quantization.modules import decoder_layers, quantizable_modules, weight_shape
from qlora.recipe import Lora


@dataclass(frozen=True)
class LinearShape:
    """A linear layer inside a decoder layer, by the full name of its module in checkpoints."""

    name: str
    in_features: int
    out_features: int
    experts: int = 1
    """How many linears there are of this kind, of which a token passes through `chosen`."""
    chosen: int = 1

    @property
    def parameters(self) -> int:
        return self.in_features * self.out_features

    @property
    def tokens_share(self) -> float:
        """Share of all tokens that passes through this linear."""
        return self.chosen / self.experts


@dataclass(frozen=True)
class ModelShapes:
    """Dimensions and parameter counts of a causal language model. Tied parameters count once."""

    hidden_size: int
    layers: int
    attention_heads: int
    key_value_heads: int
    head_dim: int
    vocab_size: int
    total: int
    """All parameters."""
    quantized: int
    """Parameters of the linears that training holds quantized: all but output head, fused experts and skipped ones."""
    head: int
    """Parameters of the output head's matrix product, tied to the embeddings or not."""
    embeddings: int
    """Parameters of the token embeddings where they are not the head's too."""
    largest_tensor: int
    """Parameters of the largest single tensor."""
    largest_layer: int
    """Parameters of the largest decoder layer."""
    linears: tuple[LinearShape, ...]
    """The linears that GPTQ quantizes."""
    quantized_rows: int = 0
    """Outputs of the linears that count in `quantized`."""
    left_alone: int = 0
    """Parameters of linears that would be quantized, but for `model.skip_modules` or a checkpoint that does not."""
    packed_bytes: int | None = None
    """Of the linears that count in `quantized`, where training holds them as a checkpoint has packed them."""
    experts: int = 0
    """Parameters of fused experts, which stay in 16 bits in training."""

    @property
    def unquantized(self) -> int:
        """Embeddings, output head, norms, biases, fused experts, skipped linears."""
        return self.total - self.quantized

    @property
    def feed_forward_size(self) -> int:
        """Width of the widest activation in a decoder layer, per token."""
        return max(max(linear.in_features, linear.out_features) * linear.chosen for linear in self.linears)

    @property
    def active(self) -> int:
        """Parameters that a token is multiplied with, but those of the output head."""
        experts = [linear for linear in self.linears if linear.experts > 1]
        return (
            self.quantized + self.left_alone + round(sum(linear.parameters * linear.tokens_share for linear in experts))
        )

    @property
    def attention_flops(self) -> float:
        """Forward FLOPs of causal attention per token and per token of sequence length."""
        return 2.0 * self.layers * self.attention_heads * self.head_dim


@dataclass(frozen=True)
class AdapterShapes:
    """Parameters that training changes: LoRA factors, and biases or whole modules where the recipe says so."""

    trainable: int


def read_config(directory: Path, *, trust_remote_code: bool = False, gguf_file: str | None = None) -> Any:
    """The model's configuration, from a directory's config.json or from the metadata of a GGUF file in it.

    Raises `UserError` when there is none that transformers understands.
    """
    options = {"gguf_file": gguf_file} if gguf_file else {}
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code, **options)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"the model's configuration cannot be read: {str(error).splitlines()[0]}",
            str(directory / (gguf_file or "config.json")),
            "check model.base; a newer architecture may need a newer transformers",
        ) from None


def skeleton(config: Any, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model without storage: every parameter on the meta device. Raises `UserError` if it is no language model."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise UserError(
            f"{config.model_type} is not a causal language model: {str(error).splitlines()[0]}", "model.base"
        ) from None


def model_shapes(model: PreTrainedModel, skipped: Collection[str] = ()) -> ModelShapes:
    """Dimensions and counts of a model (a `skeleton` will do, before an adapter is attached).

    skipped: full names of linears that training does not quantize.

    Raises `UserError` when its layers hold nothing that GPTQ can quantize, or weights of an unknown kind.
    """
    text = model.config.get_text_config()
    head = model.get_output_embeddings()
    embeddings: Any = model.get_input_embeddings().weight
    linears = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not head}
    held = [module for name, module in linears.items() if name not in skipped]
    layers = decoder_layers(model)[1]
    return ModelShapes(
        hidden_size=text.hidden_size,
        layers=len(layers),
        attention_heads=text.num_attention_heads,
        key_value_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        vocab_size=text.vocab_size,
        total=model.num_parameters(),
        quantized=sum(module.weight.numel() for module in held),
        quantized_rows=sum(weight_shape(module)[0] for module in held),
        left_alone=sum(module.weight.numel() for name, module in linears.items() if name in skipped),
        experts=sum(each.numel() for _, each in fused_parameters(model)),
        head=head.weight.numel(),
        embeddings=0 if embeddings is head.weight else embeddings.numel(),
        largest_tensor=max(parameter.numel() for parameter in model.parameters()),
        largest_layer=max(sum(parameter.numel() for parameter in layer.parameters()) for layer in layers),
        linears=_linears(model),
    )


def _linears(model: PreTrainedModel) -> tuple[LinearShape, ...]:
    pieces = expert_pieces(model)
    stored = stored_names(model, pieces)
    if pieces:
        model = copy.deepcopy(model)
        take_experts_apart(model)
    routed = {
        f"{name}.{local}": len(module)
        for name, module in model.named_modules()
        if isinstance(module, Experts)
        for local, _ in module.named_modules()
    }
    linears = []
    for name, module in quantizable_modules(model).items():
        outputs, inputs = weight_shape(module)
        experts = routed.get(name, 1)
        # A configuration that does not say how many are chosen: as if all were.
        chosen = getattr(model.config.get_text_config(), "num_experts_per_tok", experts) if name in routed else 1
        linears.append(LinearShape(stored[f"{name}.weight"].removesuffix(".weight"), inputs, outputs, experts, chosen))
    return tuple(linears)


def adapter_shapes(model: PreTrainedModel, lora: Lora, tokens: TrainedTokens | None = None) -> AdapterShapes:
    """What the recipe's adapter trains. PEFT attaches it to `model` (a `skeleton`), so its own matching rules count.

    Raises `UserError` when `lora.target_modules` matches nothing, or is not what `lora.start_from` has, or has layers
    that `lora.init` does not know how to take apart.
    """
    from qlora.models.adapter_beginning import require_layers

    if tokens is not None:
        begin_rows(model, tokens)
    adapted = attach_adapter(model, lora, tokens)
    require_layers(adapted, lora)
    if lora.start_from is not None:
        require_fit(adapted, lora)
    return AdapterShapes(sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad))


def forward_flops(shapes: ModelShapes, sequence: float) -> float:
    """FLOPs per token of one forward pass over rows of `sequence` tokens, output head included."""
    return 2.0 * (shapes.active + shapes.head) + shapes.attention_flops * sequence


def training_flops(shapes: ModelShapes, adapter: AdapterShapes, sequence: float, *, recomputed: float) -> float:
    """FLOPs per token of a training step over rows of `sequence` tokens, as the hardware executes them.

    recomputed: share of the layers whose activations are computed again in the backward.
    """
    attention = shapes.attention_flops * sequence
    forward = 2.0 * shapes.active + 2.0 * adapter.trainable + attention
    once = 4.0 * shapes.active + 4.0 * shapes.head + 6.0 * adapter.trainable + 3.5 * attention
    return once + recomputed * forward
