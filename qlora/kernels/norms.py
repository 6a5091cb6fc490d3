"""RMS norms on a GPU in one kernel, where a model's own code takes seven, each of which goes through memory.

y = w · x / √(mean(x²) + ε) (Zhang and Sennrich 2019, arXiv:1910.07467). With x̂ = x / √(…) and g = w·dy, backwards
dx = (g − x̂ · mean(x̂·g)) / √(…). `add_norm` also does the addition before the norm, and adds the gradient that arrives
beside the norm's: what a decoder layer does with its residual stream.

Shapes: T tokens, D width.
"""

from __future__ import annotations

import types
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import rms_norm

from qlora.kernels.lora_linears import Source

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch come without Triton
    triton = None

SOURCE = "qlora_source"
"""Attribute of a norm's output: what it was made of (`lora_linears.Source`)."""


@dataclass(frozen=True)
class RmsNorm:
    """How a module is an RMS norm."""

    epsilon: float
    shift: int
    """What is added to its weight to make the gain: 1 in Gemma."""

    def gain_D(self, norm: Any) -> torch.Tensor:
        weight: torch.Tensor = norm.weight
        return self.shift + weight if self.shift else weight

    def forward(self, norm: Any, x: torch.Tensor) -> torch.Tensor:
        """What the module does, in PyTorch's kernel."""
        return rms_norm(x, (x.shape[-1],), self.gain_D(norm), self.epsilon)

    def noting_source(self, norm: Any, x: torch.Tensor) -> torch.Tensor:
        """The same, and on the output what it can be made of again."""
        output = self.forward(norm, x)
        setattr(output, SOURCE, Source(x, partial(self.forward, norm)))
        return output

    def after_adding(
        self, norm: Any, x: torch.Tensor, delta: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(x + delta, its norm with what that can be made of again), x itself without a delta."""
        total, normed = add_norm(x, delta, self.gain_D(norm), self.epsilon)
        setattr(normed, SOURCE, Source(total, partial(self.forward, norm)))
        return total, normed


def recognized(norm: nn.Module, device: str) -> RmsNorm | None:
    """How a module that is filled and on this type of device is an RMS norm.

    It counts as one if on random inputs PyTorch's kernel gives what its own forward gives, with its weight as the gain,
    or, as in Gemma, 1 + its weight.
    """
    weight = getattr(norm, "weight", None)
    epsilon = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if "RMSNorm" not in type(norm).__name__ or not isinstance(weight, nn.Parameter) or not isinstance(epsilon, float):
        return None
    if weight.device.type != device or weight.ndim != 1:
        return None
    # Models round twice to their dtype, the kernel once.
    tolerance = max(2 * torch.finfo(weight.dtype).eps, 1e-5)
    x = torch.randn(8, len(weight), generator=torch.Generator().manual_seed(0)).to(weight)
    with torch.no_grad():
        expected = type(norm).forward(norm, x).float()
        for found in (RmsNorm(epsilon, 0), RmsNorm(epsilon, 1)):
            if torch.allclose(found.forward(norm, x).float(), expected, rtol=tolerance, atol=tolerance / 64):
                return found
    return None


def fuse_rms_norms(module: nn.Module, *, device: str = "cuda", note_source: bool = False) -> int:
    """Give the RMS norms inside PyTorch's kernel for a forward; returns how many.

    Whatever else a module does, it keeps its own forward. note_source: outputs say what they can be made of again.
    """
    fused = 0
    for norm in module.modules():
        found = recognized(norm, device)
        if found is not None:
            # A bound method, so that a deep copy of the module has one of its own.
            forward = found.noting_source if note_source else found.forward
            norm.forward = types.MethodType(forward, norm)
            fused += 1
    return fused


def add_norm(
    x: torch.Tensor, delta: torch.Tensor | None, gain_D: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x + delta, the norm of that), [..., D] in the dtype of x; the gain must not require a gradient."""
    assert not gain_D.requires_grad, "a gain that learns has a gradient of its own"
    return _AddNorm.apply(x, delta, gain_D, epsilon)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, delta: torch.Tensor | None, gain_D: torch.Tensor, epsilon: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.set_materialize_grads(False)
        ctx.adds, ctx.epsilon = delta is not None, epsilon
        if x.is_cuda and triton is not None:
            total, normed = _add_norm_with_triton(x, delta, gain_D, epsilon)
        else:
            total = x if delta is None else x + delta
            normed = rms_norm(total, (total.shape[-1],), gain_D, epsilon)
        ctx.save_for_backward(total, gain_D)
        return total, normed

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        total, gain_D = ctx.saved_tensors
        beside, of_normed = grads
        if of_normed is None:
            found = beside
        elif total.is_cuda and triton is not None:
            found = _norm_gradient_with_triton(total, gain_D, of_normed, beside, ctx.epsilon)
        else:
            found = norm_gradient(total, gain_D, of_normed, ctx.epsilon)
            found = found if beside is None else beside + found
        return found, found if ctx.adds else None, None, None


def norm_gradient(x: torch.Tensor, gain_D: torch.Tensor, grad: torch.Tensor, epsilon: float) -> torch.Tensor:
    """dx of a norm, computed in fp32 or better, in the dtype of x."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    share = torch.rsqrt(x.to(wide).square().mean(-1, keepdim=True) + epsilon)
    unit, g = x.to(wide) * share, grad.to(wide) * gain_D.to(wide)
    return (share * (g - unit * (unit * g).mean(-1, keepdim=True))).to(x.dtype)


def _add_norm_with_triton(
    x: torch.Tensor, delta: torch.Tensor | None, gain_D: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.contiguous()
    total, normed = x if delta is None else torch.empty_like(x), torch.empty_like(x)
    width = x.shape[-1]
    _add_norm_kernel[(x.numel() // width,)](
        x, x if delta is None else delta.contiguous(), gain_D, total, normed, epsilon,
        ADDS=delta is not None, WIDTH=width, ROOM=triton.next_power_of_2(width), num_warps=_warps(width),
    )  # fmt: skip
    return total, normed


def _norm_gradient_with_triton(
    x: torch.Tensor, gain_D: torch.Tensor, grad: torch.Tensor, beside: torch.Tensor | None, epsilon: float
) -> torch.Tensor:
    out, width = torch.empty_like(x), x.shape[-1]
    _norm_gradient_kernel[(x.numel() // width,)](
        x, gain_D, grad.contiguous(), grad if beside is None else beside.contiguous(), out, epsilon,
        ADDS=beside is not None, WIDTH=width, ROOM=triton.next_power_of_2(width), num_warps=_warps(width),
    )  # fmt: skip
    return out


def _warps(width: int) -> int:
    """Sixteen numbers a thread, or nearly so."""
    return min(16, max(1, triton.next_power_of_2(width) // 512))


if triton is not None:

    @triton.jit
    def _add_norm_kernel(
        x_ptr, delta_ptr, gain_ptr, total_ptr, normed_ptr, epsilon,
        ADDS: tl.constexpr, WIDTH: tl.constexpr, ROOM: tl.constexpr,
    ):  # fmt: skip
        """One program per token."""
        column = tl.arange(0, ROOM)
        at = tl.program_id(0).to(tl.int64) * WIDTH + column
        inside = column < WIDTH
        x = tl.load(x_ptr + at, mask=inside, other=0.0)
        if ADDS:
            delta = tl.load(delta_ptr + at, mask=inside, other=0.0)
            x = (x.to(tl.float32) + delta.to(tl.float32)).to(total_ptr.dtype.element_ty)
            tl.store(total_ptr + at, x, mask=inside)
        x = x.to(tl.float32)
        share = tl.rsqrt(tl.sum(x * x, axis=0) / WIDTH + epsilon)
        gain = tl.load(gain_ptr + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(normed_ptr + at, (x * share * gain).to(normed_ptr.dtype.element_ty), mask=inside)

    @triton.jit
    def _norm_gradient_kernel(
        x_ptr, gain_ptr, grad_ptr, beside_ptr, out_ptr, epsilon,
        ADDS: tl.constexpr, WIDTH: tl.constexpr, ROOM: tl.constexpr,
    ):  # fmt: skip
        """One program per token."""
        column = tl.arange(0, ROOM)
        at = tl.program_id(0).to(tl.int64) * WIDTH + column
        inside = column < WIDTH
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        gain = tl.load(gain_ptr + column, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32) * gain
        share = tl.rsqrt(tl.sum(x * x, axis=0) / WIDTH + epsilon)
        unit = x * share
        found = share * (g - unit * (tl.sum(unit * g, axis=0) / WIDTH))
        if ADDS:
            found += tl.load(beside_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + at, found.to(out_ptr.dtype.element_ty), mask=inside)
