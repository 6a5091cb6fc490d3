"""A gated feed-forward block with LoRA adapters as one differentiable operation: down(act(gate(x)) · up(x)).

Kept for the backward are x and the outputs g and u of gate and up; their product is made again. With h = act(g)·u and
dh its gradient, dg = dh·u·act'(g) and du = dh·act(g).

Shapes: T tokens, K inputs, F width of the block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

from qlora.kernels import lora_linears
from qlora.kernels.lora_linears import Copies, FrozenLinear, Source, made_again, unpacked

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch come without Triton
    triton = None

Activation = Literal["silu", "gelu_tanh"]
ELEMENTS = 2048
"""Per program."""


def gated_mlp(
    x_TK: torch.Tensor,
    linears: tuple[FrozenLinear, FrozenLinear, FrozenLinear],
    adapters: Sequence[tuple[torch.Tensor, torch.Tensor]],
    activation: Activation,
    source: Source | None = None,
    copies: tuple[Copies, Copies] | None = None,
) -> torch.Tensor:
    """[T, K] of gate, up and down, and their (A, B), as `lora_linears` takes them; copies of the first two, of down."""
    matrices = [matrix for pair in adapters for matrix in pair]
    if copies is None:
        plain = [matrix.detach() for matrix in matrices]
        first, last = Copies.of(plain[:4], linears[:2], x_TK.dtype), Copies.of(plain[4:], linears[2:], x_TK.dtype)
        copies = first, last
    return _GatedMlp.apply(x_TK, linears, activation, copies, *unpacked(source), *matrices)


class _GatedMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TK: torch.Tensor,
        linears: tuple[FrozenLinear, FrozenLinear, FrozenLinear],
        activation: Activation,
        copies: tuple[Copies, Copies],
        origin: torch.Tensor | None,
        make: Callable[[torch.Tensor], torch.Tensor] | None,
        *matrices: torch.Tensor,
    ) -> torch.Tensor:
        gate_TF, up_TF = lora_linears.forward(x_TK, linears[:2], copies[0])
        ctx.save_for_backward(x_TK if origin is None else origin, gate_TF, up_TF)
        ctx.linears, ctx.activation, ctx.copies = linears, activation, copies
        ctx.make, ctx.dtype = make, matrices[0].dtype
        (output_TK,) = lora_linears.forward(gated(gate_TF, up_TF, activation), linears[2:], copies[1])
        return output_TK

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        origin, gate_TF, up_TF = ctx.saved_tensors
        linears, activation, (first, last) = ctx.linears, ctx.activation, ctx.copies
        hidden_TF = gated(gate_TF, up_TF, activation)
        grad_TF, of_down = lora_linears.backward(hidden_TF, linears[2:], last, grads, ctx.dtype)
        del hidden_TF
        assert grad_TF is not None
        of_gate_and_up = gated_gradients(gate_TF, up_TF, grad_TF, activation)
        del grad_TF
        x_TK = made_again(origin, ctx.make, first)
        grad_x_TK, of_others = lora_linears.backward(
            x_TK, linears[:2], first, of_gate_and_up, ctx.dtype, of_input=ctx.needs_input_grad[0]
        )
        return grad_x_TK, None, None, None, None, None, *of_others, *of_down


def gated(gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """act(g)·u, computed in fp32 or better, in the dtype of g."""
    if gate.is_cuda and triton is not None:
        return _gated_with_triton(gate, up, activation)
    act, _ = _activation(gate, activation)
    return (act * up).to(gate.dtype)


def gated_gradients(
    gate: torch.Tensor, up: torch.Tensor, grad: torch.Tensor, activation: Activation
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dg, du) from dh."""
    if gate.is_cuda and triton is not None:
        return _gradients_with_triton(gate, up, grad, activation)
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


def _gated_with_triton(gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    grid = (triton.cdiv(gate.numel(), ELEMENTS),)
    _gated_kernel[grid](gate, up, out, gate.numel(), SILU=activation == "silu", ELEMENTS=ELEMENTS)
    return out


def _gradients_with_triton(
    gate: torch.Tensor, up: torch.Tensor, grad: torch.Tensor, activation: Activation
) -> tuple[torch.Tensor, torch.Tensor]:
    gate, up, grad = gate.contiguous(), up.contiguous(), grad.contiguous()
    of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
    grid = (triton.cdiv(gate.numel(), ELEMENTS),)
    _gradients_kernel[grid](gate, up, grad, of_gate, of_up, gate.numel(), SILU=activation == "silu", ELEMENTS=ELEMENTS)
    return of_gate, of_up


if triton is not None:

    @triton.jit
    def _act(x, SILU: tl.constexpr):
        """(act(x), act'(x)) of fp32."""
        if SILU:
            share = tl.sigmoid(x)
            return x * share, share * (1 + x * (1 - share))
        else:
            share = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
            slope = 1.5957691216057308 * (1 + 0.134145 * x * x)
            return x * share, share * (1 + x * (1 - share) * slope)

    @triton.jit(do_not_specialize=["numel"])
    def _gated_kernel(gate_ptr, up_ptr, out_ptr, numel, SILU: tl.constexpr, ELEMENTS: tl.constexpr):
        at = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
        inside = at < numel
        act, _ = _act(tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32), SILU)
        up = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + at, (act * up).to(out_ptr.dtype.element_ty), mask=inside)

    @triton.jit(do_not_specialize=["numel"])
    def _gradients_kernel(
        gate_ptr, up_ptr, grad_ptr, of_gate_ptr, of_up_ptr, numel, SILU: tl.constexpr, ELEMENTS: tl.constexpr
    ):
        at = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
        inside = at < numel
        act, slope = _act(tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32), SILU)
        up = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(of_gate_ptr + at, (grad * up * slope).to(of_gate_ptr.dtype.element_ty), mask=inside)
        tl.store(of_up_ptr + at, (grad * act).to(of_up_ptr.dtype.element_ty), mask=inside)
