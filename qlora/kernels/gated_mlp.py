"""A gated feed-forward block with LoRA adapters as one differentiable operation: down(act(gate(x)) · up(x)).

Kept for the backward are x and the outputs g and u of gate and up; their product is made again. With h = act(g)·u and
dh its gradient, dg = dh·u·act'(g) and du = dh·act(g).

On a GPU the passes over [T, F] are what costs, beside the products with frozen weights. There are two, and adapters
have none of their own: what they add to g, u and dh is added where these are read, never stored, and the gradients of
the adapters that are F wide are summed while their factors are at hand. dg and du take the place of g and u.

Shapes: T tokens, K inputs, F width of the block, R ranks of gate and up together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch

from qlora.kernels import gated_tiles, lora_linears
from qlora.kernels.lora_linears import Copies, FrozenLinear, Source, kept_input
from qlora.kernels.low_rank import add_low_rank_, in_registers

Activation = Literal["silu", "gelu_tanh"]

_for_backward_alone = False


@contextmanager
def for_backward_alone() -> Iterator[None]:
    """Blocks that run in here make and keep what their backward needs, and give NaNs instead of the product with down.

    For a forward that is computed again; whether anything needs the output then, its caller finds out by the NaNs.
    """
    global _for_backward_alone
    _for_backward_alone = True
    try:
        yield
    finally:
        _for_backward_alone = False


def gated_mlp(
    x_TK: torch.Tensor,
    linears: tuple[FrozenLinear, FrozenLinear, FrozenLinear],
    adapters: Sequence[tuple[torch.Tensor, torch.Tensor]],
    activation: Activation,
    source: Source | None = None,
    copies: tuple[Copies, Copies] | None = None,
    residual_TK: torch.Tensor | None = None,
) -> torch.Tensor:
    """[T, K] of gate, up and down, and their (A, B), as `lora_linears` takes them; copies of the first two, of down.

    residual_TK: what is added to it.
    """
    matrices = [matrix for pair in adapters for matrix in pair]
    if copies is None:
        plain = [matrix.detach() for matrix in matrices]
        first, last = Copies.of(plain[:4], linears[:2], x_TK.dtype), Copies.of(plain[4:], linears[2:], x_TK.dtype)
        copies = first, last
    return _GatedMlp.apply(x_TK, linears, activation, copies, source, residual_TK, *matrices)


class _GatedMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TK: torch.Tensor,
        linears: tuple[FrozenLinear, FrozenLinear, FrozenLinear],
        activation: Activation,
        copies: tuple[Copies, Copies],
        source: Source | None,
        residual_TK: torch.Tensor | None,
        *matrices: torch.Tensor,
    ) -> torch.Tensor:
        first, last = copies
        inner_TR = x_TK @ first.down_RK.T
        gate_TF, up_TF = lora_linears.products(x_TK, linears[:2])
        if _adds(gate_TF, copies):
            hidden_TF, inner_Tr = gated_tiles.gated(
                gate_TF, up_TF, activation == "silu", inner_TR, first, last, inner_alone=_for_backward_alone
            )
            assert inner_Tr is not None
        else:
            lora_linears.add_adapters_((gate_TF, up_TF), inner_TR, first)
            hidden_TF = gated(gate_TF, up_TF, activation)
            inner_Tr = hidden_TF @ last.down_RK.T
        ctx.save_for_backward(gate_TF, up_TF, inner_TR, inner_Tr, *kept_input(x_TK, source))
        ctx.linears, ctx.activation, ctx.copies = linears, activation, copies
        ctx.dtype, ctx.adds, ctx.spent = matrices[0].dtype, residual_TK is not None, False
        if _for_backward_alone or hidden_TF is None:
            return x_TK.new_full((1, 1), math.nan).expand(len(x_TK), linears[2].weight.shape[0])
        (output_TK,) = lora_linears.products(hidden_TF, linears[2:])
        return add_low_rank_(output_TK, inner_Tr, last.ups[0], residual_TK)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.spent:
            raise RuntimeError("a gated block goes backwards once: its gradients take the place of what was kept")
        ctx.spent = True
        gate_TF, up_TF, inner_TR, inner_Tr, *kept = ctx.saved_tensors
        linears, activation, (first, last), dtype = ctx.linears, ctx.activation, ctx.copies, ctx.dtype
        u_Tr = lora_linears.into_ranks(grads, last)
        of_last_up = lora_linears.gradients_of_ups(grads, inner_Tr, linears[2:], last, dtype)
        if _adds(gate_TF, ctx.copies):
            grad_TF = lora_linears.gradient_of_input(grads, None, linears[2:], last)
            grads_TF, of_ups, of_last_down = gated_tiles.all_gradients(
                gate_TF, up_TF, grad_TF, activation == "silu", inner_TR, first, u_Tr, last
            )
            of_ups = [of_up.mul_(linear.scaling).to(dtype) for of_up, linear in zip(of_ups, linears[:2], strict=True)]
            of_last_down = of_last_down.to(dtype)
        else:
            grad_TF = lora_linears.gradient_of_input(grads, u_Tr, linears[2:], last)
            hidden_TF = gated(gate_TF, up_TF, activation)
            (of_last_down,) = lora_linears.gradients_of_downs(u_Tr, [hidden_TF], last, dtype)
            del hidden_TF
            grads_TF = gated_gradients(gate_TF, up_TF, grad_TF, activation)
            of_ups = lora_linears.gradients_of_ups(grads_TF, inner_TR, linears[:2], first, dtype)
        del grad_TF
        u_TR = lora_linears.into_ranks(grads_TF, first)
        grad_x_TK = None
        if ctx.needs_input_grad[0]:
            grad_x_TK = lora_linears.gradient_of_input(grads_TF, u_TR, linears[:2], first)
        of_downs = lora_linears.gradients_of_downs(u_TR, kept, first, dtype)
        of_matrices = lora_linears.in_pairs([*of_downs, of_last_down], [*of_ups, *of_last_up])
        return grad_x_TK, None, None, None, None, grads[0] if ctx.adds else None, *of_matrices


def gated(gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """act(g)·u of [T, F], computed in fp32 or better, in the dtype of g."""
    if _on_gpu(gate):
        hidden, _ = gated_tiles.gated(gate, up, activation == "silu")
        assert hidden is not None
        return hidden
    act, _ = _activation(gate, activation)
    return (act * up).to(gate.dtype)


def gated_gradients(
    gate: torch.Tensor, up: torch.Tensor, grad: torch.Tensor, activation: Activation
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dg, du) from dh, all [T, F]."""
    if _on_gpu(gate):
        return gated_tiles.gated_gradients(gate, up, grad, activation == "silu")
    act, slope = _activation(gate, activation)
    return (grad * up * slope).to(gate.dtype), (grad * act).to(gate.dtype)


def _activation(x: torch.Tensor, activation: Activation) -> tuple[torch.Tensor, torch.Tensor]:
    """(act(x), act'(x)) in fp32 or better."""
    x = x if x.dtype == torch.float64 else x.float()
    if activation == "silu":
        share = torch.sigmoid(x)
        return x * share, share * (1 + x * (1 - share))
    # GELU in its tanh form: x·σ(2z), z = √(2/π)·(x + 0.044715·x³).
    share = torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    slope = 2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x**2)
    return x * share, share * (1 + x * (1 - share) * slope)


def _adds(x: torch.Tensor, copies: Sequence[Copies]) -> bool:
    """Whether the kernels add what adapters add."""
    return in_registers(x, [up.shape[1] for some in copies for up in some.ups])


def _on_gpu(x: torch.Tensor) -> bool:
    return x.is_cuda and gated_tiles.triton is not None
