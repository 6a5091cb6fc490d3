"""The function by which models of transformers turn queries and keys, replaced by one kernel where that is the same."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import nn

from qlora.kernels.rotary import rotate


def replace_rotary(model: nn.Module, where: Callable[[torch.Tensor, torch.Tensor], bool]) -> int:
    """Have queries and keys turned in one pass; returns in how many of transformers' modules.

    Models find that function in their module, so it is replaced there, for all of them: for queries and keys that
    `where` holds for, on a GPU, and where the old one gives the same on random inputs. All else goes to the old one.
    """
    fused = 0
    for name in {type(module).__module__ for module in model.modules()}:
        plain = getattr(sys.modules[name], "apply_rotary_pos_emb", None)
        if plain is not None and not hasattr(plain, "plain") and _rotates(plain):
            setattr(sys.modules[name], "apply_rotary_pos_emb", _rotary(plain, where))  # noqa: B010
            fused += 1
    return fused


def _rotary(plain: Callable[..., Any], where: Callable[[torch.Tensor, torch.Tensor], bool]) -> Callable[..., Any]:
    @wraps(plain)
    def apply(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or not (where(q, k) and q.is_cuda and q.dtype == k.dtype == cos.dtype and cos.ndim == 3):
            return plain(q, k, cos, sin, *args, **kwargs)
        return rotate(q, k, cos, sin)

    apply.plain = plain  # type: ignore[attr-defined]
    return apply


def _rotates(plain: Callable[..., Any]) -> bool:
    generator = torch.Generator().manual_seed(0)
    shapes = (1, 2, 3, 8), (1, 1, 3, 8), (1, 3, 8), (1, 3, 8)
    query, key, cos, sin = (torch.randn(*shape, generator=generator) for shape in shapes)
    try:
        expected = plain(query, key, cos, sin)
    except (TypeError, ValueError, RuntimeError, IndexError):  # a function of other arguments
        return False
    return all(torch.allclose(*pair, atol=1e-5) for pair in zip(rotate(query, key, cos, sin), expected, strict=True))
