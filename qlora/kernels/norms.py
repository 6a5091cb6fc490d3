"""RMS norms on a GPU in one kernel, where a model's own code takes seven, each of which goes through memory."""

from __future__ import annotations

import types
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import rms_norm

from qlora.kernels.lora_linears import Source

SOURCE = "qlora_source"
"""Attribute of a norm's output: what it was made of (`lora_linears.Source`)."""


def fuse_rms_norms(module: nn.Module, *, device: str = "cuda", note_source: bool = False) -> int:
    """Give the RMS norms inside that are filled and on the device PyTorch's kernel for a forward; returns how many.

    A norm counts as one if on random inputs that kernel gives what its own forward gives, with its weight as the gain,
    or, as in Gemma, 1 + its weight. Whatever else a module does, it keeps its own forward.
    note_source: put on every output what it can be made of again.
    """
    fused = 0
    for norm in module.modules():
        weight = getattr(norm, "weight", None)
        if "RMSNorm" in type(norm).__name__ and isinstance(weight, nn.Parameter):
            forward = _fused_forward(norm, weight, device)
            if forward is not None:
                # A bound method, so that a deep copy of the module has one of its own.
                norm.forward = types.MethodType(_noting_source(forward) if note_source else forward, norm)
                fused += 1
    return fused


def _noting_source(forward: Callable[[Any, torch.Tensor], torch.Tensor]) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    def noting(norm: Any, x: torch.Tensor) -> torch.Tensor:
        output = forward(norm, x)
        setattr(output, SOURCE, Source(x, partial(forward, norm)))
        return output

    return noting


def _fused_forward(norm: Any, weight: torch.Tensor, device: str) -> Callable[[Any, torch.Tensor], torch.Tensor] | None:
    """A function of (norm, x) that does what the norm does; None if there is none."""
    epsilon = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if weight.device.type != device or weight.ndim != 1 or not isinstance(epsilon, float):
        return None
    size = tuple(weight.shape)
    # Models round twice to their dtype, the kernel once.
    tolerance = max(2 * torch.finfo(weight.dtype).eps, 1e-5)

    def plain(norm: Any, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, size, norm.weight, epsilon)

    def shifted(norm: Any, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, size, 1 + norm.weight, epsilon)

    x = torch.randn(8, *size, generator=torch.Generator().manual_seed(0)).to(weight)
    with torch.no_grad():
        expected = type(norm).forward(norm, x)
        for forward in (plain, shifted):
            if torch.allclose(forward(norm, x).float(), expected.float(), rtol=tolerance, atol=tolerance / 64):
                return forward
    return None
