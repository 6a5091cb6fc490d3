"""Activation checkpointing: some decoder layers keep their input alone and run again in the backward pass.

What torch.utils.checkpoint does, with less to do: one input, one output, no dropout whose random numbers would have to
come again. The input can wait in host memory, and comes back while the layer behind it runs; the CPU is then a few
layers ahead of the GPU and no more, since memory that copies are under way in cannot be used again. What nothing in the
backward reads, the last product of a gated feed-forward block, is left out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from qlora.host_tensors import HostTensors
from qlora.kernels.gated_mlp import for_backward_alone
from qlora.kernels.rotary import again_with_gradients
from qlora.quantization.modules import decoder_layers

LAYERS_AHEAD = 2


def recompute_first(model: Any, layers: int, *, offload: bool = False) -> None:
    """Have the first `layers` decoder layers of a causal language model compute their activations again.

    offload: keep their inputs in pinned host memory. Layers with dropout go through torch.utils.checkpoint, which draws
    the same random numbers again, and keep theirs on the device.
    """
    device = next(model.parameters()).device
    kept = HostTensors(str(device), 0) if offload and device.type == "cuda" else None
    again_of = _Layers(kept)
    for index, layer in enumerate(decoder_layers(model)[1]):
        layer.gradient_checkpointing = index < layers  # type: ignore[assignment]
        if index < layers:
            again: Any = partial(_run, again_of, index)
            if _drops_out(layer):
                again = partial(checkpoint, use_reentrant=False)
            layer._gradient_checkpointing_func = again


def _drops_out(layer: nn.Module) -> bool:
    chances = [module.p for module in layer.modules() if isinstance(module, nn.Dropout)]
    chances += [getattr(module, "attention_dropout", 0.0) for module in layer.modules()]
    return any(isinstance(chance, float) and chance > 0 for chance in chances)


@dataclass
class _Layers:
    """What the layers of a model that run again share."""

    kept: HostTensors | None
    without_output: dict[int, bool] = field(default_factory=dict)
    """Whether the backward of a layer goes without the output of its feed-forward block; found at its first."""
    _computed: deque[torch.cuda.Event] = field(default_factory=deque)

    def stay_near(self) -> None:
        """Wait for the GPU if it is more than a few layers behind."""
        self._computed.append(torch.cuda.current_stream().record_event())
        if len(self._computed) > LAYERS_AHEAD:
            self._computed.popleft().synchronize()


def _run(layers: _Layers, index: int, layer: Callable[..., torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
    if not torch.is_grad_enabled():
        return layer(hidden)
    if not hidden.requires_grad:  # the embeddings are frozen; a node in the graph needs an input that is not
        hidden = hidden.detach().requires_grad_()
    return _Again.apply(hidden, layer, layers, index)


class _Again(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, layer: Callable[..., torch.Tensor], layers: _Layers, index: int
    ) -> torch.Tensor:
        device = hidden.device.type
        ctx.layer, ctx.layers, ctx.index = layer, layers, index
        ctx.autocast = {
            "device_type": device,
            "dtype": torch.get_autocast_dtype(device),
            "enabled": torch.is_autocast_enabled(device),
        }
        if layers.kept is None:
            ctx.save_for_backward(hidden)
        else:
            layers.kept.put(index, hidden)
            layers.stay_near()
        with torch.no_grad(), again_with_gradients():
            return layer(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        layers, index = ctx.layers, ctx.index
        if layers.kept is None:
            (hidden,) = ctx.saved_tensors
        else:
            layers.stay_near()
            hidden = layers.kept.get(index)
            if index:
                layers.kept.prefetch(index - 1)
        hidden = hidden.detach().requires_grad_()
        with torch.enable_grad(), torch.autocast(**ctx.autocast):
            if layers.without_output.get(index):
                with for_backward_alone():
                    output = ctx.layer(hidden)
            else:
                output = ctx.layer(hidden)
        torch.autograd.backward(output, grads)
        if index not in layers.without_output:
            layers.without_output[index] = _goes_without_output(ctx, hidden, grads)
        return hidden.grad, None, None, None


def _goes_without_output(ctx: Any, hidden: torch.Tensor, grads: Sequence[torch.Tensor]) -> bool:
    """Whether NaNs for the output of the layer's feed-forward block change nothing in its backward."""
    hidden = hidden.detach().requires_grad_()
    with torch.enable_grad(), torch.autocast(**ctx.autocast), for_backward_alone():
        output = ctx.layer(hidden)
    (gradient,) = torch.autograd.grad(output, hidden, grads)
    return bool(gradient.isfinite().all())
