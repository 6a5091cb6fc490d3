"""A GPTQ checkpoint as a model whose scales and norms can be trained: codes stay packed, everything else is frozen.

Every quantized linear becomes a `QuantizedLinear`, which dequantizes its weight for the one product that needs it, in
the forward and again in the backward. What has no gradient has no fp32 copy and no optimizer state.

Shapes: T tokens, B rows, D width of the hidden states, K inputs, N outputs, G groups, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers.utils import ModelOutput

from qlora.errors import UserError
from qlora.kernels.norms import fuse_rms_norms
from qlora.kernels.packed_linear import PackedWeight, dequantize, log_scale_gradient
from qlora.models.checkpoint import CheckpointReader
from qlora.models.gptq_format import WORD_BITS, unpack_zeros
from qlora.quantization.skeleton import Skeleton

# Share of the memory that is free before the first step that may hold what the backward needs; beyond it, layers are
# computed again in the backward.
ACTIVATIONS_SHARE = 0.6


class QuantizedLinear(nn.Module):
    """y = x·W + b with W of packed codes, computed in the dtype of x. Trainable: `log_scale`, fp32 [G, N], from 0."""

    def __init__(self, weight: PackedWeight, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.log_scale = nn.Parameter(torch.zeros_like(weight.scales_GN, dtype=torch.float32))
        self.in_features, self.out_features = weight.inputs, weight.scales_GN.shape[1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., K] → [..., N]."""
        y_TN = _PackedProduct.apply(x.reshape(-1, self.in_features), self.log_scale, self.weight, self.bias)
        return y_TN.reshape(*x.shape[:-1], self.out_features)

    @torch.no_grad()
    def stored_scales(self) -> torch.Tensor:
        """The trained scales as a checkpoint holds them: fp16 [G, N], finite, of the sign they had, none new at 0."""
        scales_GN = self.weight.scales_GN.float()
        limits = torch.finfo(torch.float16)
        # 2⁻²⁴, the smallest fp16 above zero.
        size_GN = (scales_GN.abs() * self.log_scale.exp()).clamp(limits.smallest_normal * limits.eps, limits.max)
        return torch.where(scales_GN == 0, scales_GN, size_GN.copysign(scales_GN)).to(torch.float16)

    @torch.no_grad()
    def round_scales(self) -> None:
        """Go on with the scales as they would be stored."""
        self.weight.scales_GN.copy_(self.stored_scales())
        self.log_scale.zero_()


class _PackedProduct(torch.autograd.Function):
    """x·W + b; the gradient of W is reduced to that of the scales at once, so that it lives for one layer only."""

    @staticmethod
    def forward(
        ctx: Any, x_TK: torch.Tensor, log_scale_GN: torch.Tensor, weight: PackedWeight, bias_N: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(x_TK, log_scale_GN)
        ctx.weight = weight
        w_KN = dequantize(weight, log_scale_GN, x_TK.dtype)
        return x_TK @ w_KN if bias_N is None else torch.addmm(bias_N, x_TK, w_KN)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor, None, None]:
        x_TK, log_scale_GN = ctx.saved_tensors
        grad_TN = grads[0]
        grad_x_TK = None
        if ctx.needs_input_grad[0]:
            grad_x_TK = grad_TN @ dequantize(ctx.weight, log_scale_GN, grad_TN.dtype).T
        return grad_x_TK, log_scale_gradient(ctx.weight, log_scale_GN, x_TK.T @ grad_TN), None, None


class Student:
    """The model of a GPTQ checkpoint, on one device.

    skeleton: of the model that was quantized, without weights yet; it is filled and changed. Raises UserError when the
    checkpoint is not this model's, or assigns inputs to groups out of order.
    """

    def __init__(self, skeleton: Skeleton, gptq_dir: Path, device: str) -> None:
        self.model = skeleton.model
        self.decoder = skeleton.model.get_decoder()
        self.layers = skeleton.layers
        self.device = device
        self.linears: dict[str, QuantizedLinear] = {}
        """By what the names of their tensors in the checkpoint start with."""
        self._reader = CheckpointReader(gptq_dir)
        self._dtype = skeleton.dtype
        self._place_quantized_linears(skeleton)
        self._fill(skeleton)
        norms = {name: (weight, self._reader.read(name)) for name, weight in self._find_norms(skeleton)}
        self.norms = NormGains(norms, device)
        self._recompute = False
        self._output_type: type[ModelOutput] = ModelOutput
        for layer in self.layers:
            layer.forward = self._saving_memory(layer.forward)

    def hidden(self, input_ids_BT: torch.Tensor) -> torch.Tensor:
        """[B, T, D]: what the output head gets."""
        output = self.decoder(input_ids=input_ids_BT.to(self.device), use_cache=False)
        self._output_type = type(output)
        return output.last_hidden_state

    def logits(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        """[T, V] of hidden states of any tokens: the model's own head, with whatever it does to logits.

        Only after `hidden`, from which it knows what the head expects of the decoder.
        """
        output = self._output_type(last_hidden_state=hidden_TD.unsqueeze(1))
        with forward_replaced(self.decoder, lambda *args, **kwargs: output):
            input_ids = torch.zeros(hidden_TD.shape[0], 1, dtype=torch.int64, device=self.device)
            return self.model(input_ids=input_ids, use_cache=False).logits.squeeze(1)

    def plan_memory(self, largest_BT: torch.Tensor) -> None:
        """Decide whether layers are computed again in the backward, from what one keeps for it in the largest batch."""
        kept: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        last = self.layers[-1].forward

        def watched(*args: Any, **kwargs: Any) -> Any:
            with saved_tensors_hooks(note, lambda tensor: tensor):
                return last(*args, **kwargs)

        with ExitStack() as stack:
            # All but two, so that the last layer's input has gradients as in training.
            for layer in self.layers[:-2]:
                stack.enter_context(forward_replaced(layer, torch.no_grad()(layer.forward)))
            stack.enter_context(forward_replaced(self.layers[-1], watched))
            self.hidden(largest_BT)
        self._recompute = sum(kept.values()) * len(self.layers) > ACTIVATIONS_SHARE * _free_memory(self.device)

    def _saving_memory(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._recompute and torch.is_grad_enabled():
                return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
            return forward(*args, **kwargs)

        return call

    def _place_quantized_linears(self, skeleton: Skeleton) -> None:
        present = set(self._reader.names())
        for index, layer in enumerate(self.layers):
            for local in [local for local, _ in layer.named_modules()]:
                prefix = skeleton.checkpoint_name(f"{skeleton.layers_name}.{index}.{local}.")
                if f"{prefix}qweight" in present:
                    self.linears[prefix] = self._read_linear(prefix, has_bias=f"{prefix}bias" in present)
                    parent, _, name = local.rpartition(".")
                    setattr(layer.get_submodule(parent), name, self.linears[prefix])
        packed = sum(name.endswith(".qweight") for name in present)
        if packed != len(self.linears) or not packed:
            raise UserError(
                f"{packed} packed linears, of which this model has {len(self.linears)}",
                where=str(self._reader.directory),
                fix="name the GPTQ checkpoint that was made of this model",
            )

    def _read_linear(self, prefix: str, *, has_bias: bool) -> QuantizedLinear:
        qweight, qzeros, scales, g_idx = (
            self._reader.read(prefix + kind) for kind in ("qweight", "qzeros", "scales", "g_idx")
        )
        inputs, groups = g_idx.shape[0], scales.shape[0]
        if inputs % groups or not torch.equal(g_idx.long(), torch.arange(inputs) // (inputs // groups)):
            raise UserError(
                "groups are not runs of neighbouring inputs, all of one size (desc_act)",
                where=prefix.removesuffix("."),
                fix="quantize the 16-bit model again with `qlora quantize`",
            )
        bits = qweight.shape[0] * WORD_BITS // inputs
        zeros = unpack_zeros(qzeros, bits).contiguous()
        weight = PackedWeight(qweight.to(self.device), zeros.to(self.device), scales.to(self.device), bits)
        return QuantizedLinear(weight, self._read(f"{prefix}bias") if has_bias else None)

    def _fill(self, skeleton: Skeleton) -> None:
        """Read all that is not quantized; nothing of it has gradients."""
        names = {id(module): name for name, module in self.model.named_modules()}
        prefix = names[id(self.decoder)]
        state = {
            local: self._read(skeleton.checkpoint_name(f"{prefix}.{local}" if prefix else local))
            for local in self.decoder.state_dict()
            if not local.endswith(".log_scale")
        }
        self.decoder.load_state_dict(state, strict=False, assign=True)
        self.decoder.to(self.device)
        head = self.model.get_output_embeddings()
        ending = f"{names[id(head)]}.weight"
        stored = [name for name in self._reader.names() if f".{name}".endswith(f".{ending}")]
        if stored:
            state = {key: self._read(stored[0].removesuffix("weight") + key) for key in head.state_dict()}
            head.load_state_dict(state, assign=True)
        else:
            head.weight = self.model.get_input_embeddings().weight
        self.model.requires_grad_(False)
        fuse_rms_norms(self.model)
        for linear in self.linears.values():
            linear.log_scale.requires_grad_(True)

    def _find_norms(self, skeleton: Skeleton) -> Iterator[tuple[str, nn.Parameter]]:
        """(name in the checkpoint, weight) of every norm of the decoder."""
        for name, module in self.model.named_modules():
            weight = getattr(module, "weight", None)
            if "norm" in type(module).__name__.lower() and isinstance(weight, nn.Parameter) and weight.ndim == 1:
                yield skeleton.checkpoint_name(f"{name}.weight"), weight

    def _read(self, name: str) -> torch.Tensor:
        tensor = self._reader.read(name)
        return tensor.to(self.device, self._dtype if tensor.is_floating_point() else None)


class NormGains:
    """Weights of norms as w·(1 + ε), ε fp32 and trainable, from 0.

    The model computes with the product in its own dtype; steps too small for that dtype add up in ε.
    """

    def __init__(self, weights: Mapping[str, tuple[nn.Parameter, torch.Tensor]], device: str) -> None:
        """weights: name → (parameter of the model, the same as the checkpoint holds it); none in some models."""
        self._parameters = {name: parameter for name, (parameter, _) in weights.items()}
        self._dtypes = {name: stored.dtype for name, (_, stored) in weights.items()}
        # Of no elements, for models without norms; in fp32, and cat promotes.
        self._nothing = torch.zeros(0, device=device)
        self._initial = torch.cat([self._nothing, *(stored.to(device) for _, stored in weights.values())])
        self.epsilon = nn.Parameter(torch.zeros_like(self._initial))

    def train(self) -> None:
        """Let gradients reach the weights."""
        for parameter in self._parameters.values():
            parameter.requires_grad_(True)

    def take_gradients(self) -> None:
        """Turn the gradients of the weights into that of ε, and forget them."""
        # Without one: a norm that no token of this step went through.
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters.values()]
        self.epsilon.grad = torch.cat([self._nothing, *grads]).mul_(self._initial)
        for parameter in self._parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def apply(self) -> None:
        """Put w·(1 + ε) into the model."""
        for parameter, value in zip(self._parameters.values(), self._values(), strict=True):
            parameter.copy_(value)

    @torch.no_grad()
    def stored(self) -> dict[str, torch.Tensor]:
        """Name → weight, in the checkpoint's dtype."""
        return {
            name: value.to(dtype) for (name, dtype), value in zip(self._dtypes.items(), self._values(), strict=True)
        }

    def _values(self) -> tuple[torch.Tensor, ...]:
        sizes = [parameter.numel() for parameter in self._parameters.values()]
        return (self._initial * (1 + self.epsilon)).split(sizes)


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let `forward` be what this one module does; what it is, and its hooks and attributes, stay."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def _free_memory(device: str) -> int:
    """Bytes that can still be allocated."""
    if torch.device(device).type == "cpu":
        return psutil.virtual_memory().available
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
