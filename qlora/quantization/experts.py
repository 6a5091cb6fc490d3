"""Mixtures of experts taken apart: one linear per matrix of each expert, in place of transformers' fused 3-D tensors.

transformers holds the experts of a layer as `gate_up_proj` [E, 2I, D] and `down_proj` [E, D, I]; checkpoints and
engines have a gate, an up and a down projection for each expert. A quantizer must see the latter. Per expert e

    y_e = down_e · (act(gate_e · x) ⊙ (up_e · x)),   and for each token the sum of w_e · y_e over the experts it chose.

Only experts that compute exactly this are taken apart (`fused_experts` tries them); others, such as those of GPT-OSS
with biases and clamping, are refused by name.

Shapes: E experts, D width of the hidden states, I width inside an expert, T tokens, C experts chosen per token.
"""

from __future__ import annotations

import copy
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers import PreTrainedModel

from qlora.errors import Problem, UserError
from qlora.quantization.modules import decoder_layers

FUSED_NAMES = ("gate_up_proj", "down_proj")
FusedExperts: TypeAlias = Any
"""A module with these parameters and `act_fn`; every architecture of transformers has a class of its own."""


class _Linear(nn.Linear):
    """Without the drawing of first values, which takes most of the time for thousands of experts, even of no data."""

    def reset_parameters(self) -> None:
        pass


class Expert(nn.Module):
    """One expert: three linears without data on the meta device."""

    def __init__(self, width: int, inner: int, act_fn: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_proj = _Linear(width, inner, bias=False, dtype=dtype, device="meta")
        self.up_proj = _Linear(width, inner, bias=False, dtype=dtype, device="meta")
        self.down_proj = _Linear(inner, width, bias=False, dtype=dtype, device="meta")
        self.act_fn = act_fn

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x_TD)) * self.up_proj(x_TD))


class Experts(nn.ModuleList):
    """The experts of one layer, called as the fused module is. An expert that no token chose is not called."""

    def __init__(self, fused: FusedExperts) -> None:
        count, width, inner = fused.down_proj.shape
        super().__init__(Expert(width, inner, fused.act_fn, fused.down_proj.dtype) for _ in range(count))
        self.tokens: torch.Tensor | None = None
        """While an expert runs: int64, for each row of its input the position of its token among the T."""

    def forward(self, x_TD: torch.Tensor, chosen_TC: torch.Tensor, weights_TC: torch.Tensor) -> torch.Tensor:
        y_TD = torch.zeros_like(x_TD)
        # Sorted by expert, one copy to the host says where each begins; asking per expert would wait E times.
        chosen = chosen_TC.reshape(-1)
        order = torch.argsort(chosen, stable=True)
        # Expert-parallel models give tokens that belong elsewhere the number E, hence the extra bin.
        counts = torch.bincount(chosen, minlength=len(self) + 1)[: len(self)].tolist()
        start = 0
        for expert, count in zip(self, counts, strict=True):
            pairs = order[start : start + count]
            start += count
            if count:
                self.tokens = pairs // chosen_TC.shape[1]
                out = expert(x_TD[self.tokens]) * weights_TC.reshape(-1)[pairs, None]
                y_TD.index_add_(0, self.tokens, out.to(y_TD.dtype))
        self.tokens = None
        return y_TD


def fused_experts(model: PreTrainedModel) -> dict[str, FusedExperts]:
    """Name → module of all fused experts inside the decoder layers, in model order.

    Raises UserError, naming each class, for experts that compute something else than `Experts` would.
    """
    prefix, layers = decoder_layers(model)
    found = {
        f"{prefix}.{name}": module
        for name, module in layers.named_modules()
        if any(isinstance(getattr(module, key, None), nn.Parameter) for key in FUSED_NAMES)
    }
    kinds = {type(module): name for name, module in reversed(found.items())}
    problems = [
        Problem(
            f"the experts of {kind.__name__} compute something else than gate, up and down projections",
            name,
            "this architecture cannot be quantized yet",
        )
        for kind, name in kinds.items()
        if not _computes_as_experts_do(found[name])
    ]
    if problems:
        raise UserError(problems)
    return found


def take_experts_apart(model: PreTrainedModel) -> None:
    """Replace the fused experts of a model without data by `Experts` without data. Raises as `fused_experts` does."""
    for name, module in fused_experts(model).items():
        model.set_submodule(name, Experts(module))


def expert_pieces(model: PreTrainedModel) -> dict[str, list[str]]:
    """For each fused parameter, the names that the weights it is made of have after `take_experts_apart`.

    Expert by expert; in `gate_up_proj` gate and up of one expert stand side by side.
    """
    pieces = {}
    for name, fused in fused_experts(model).items():
        experts = [f"{name}.{index}" for index in range(len(fused.down_proj))]
        parts = ("gate_proj", "up_proj")
        pieces[f"{name}.gate_up_proj"] = [f"{expert}.{part}.weight" for expert in experts for part in parts]
        pieces[f"{name}.down_proj"] = [f"{expert}.down_proj.weight" for expert in experts]
    return pieces


def routed_tokens(layer: nn.Module) -> dict[str, Experts]:
    """Local name → owner of every linear of a layer that sees only some tokens; `owner.tokens` says which, in calls."""
    return {
        f"{name}.{local}": module
        for name, module in layer.named_modules()
        if isinstance(module, Experts)
        for local, child in module.named_modules()
        if isinstance(child, nn.Linear)
    }


def _computes_as_experts_do(fused: FusedExperts) -> bool:
    """Whether a small copy of these experts, with random weights, gives what `Experts` gives with the same ones."""
    shapes = {name: parameter.ndim for name, parameter in fused.named_parameters()}
    if shapes != dict.fromkeys(FUSED_NAMES, 3):
        return False
    count, width, inner = len(fused.down_proj), 8, 4
    random = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=random)

    small = copy.copy(fused)
    small._parameters = {
        "gate_up_proj": nn.Parameter(normal(count, 2 * inner, width), requires_grad=False),
        "down_proj": nn.Parameter(normal(count, width, inner), requires_grad=False),
    }
    apart = Experts(small)
    for expert, gate_up, down in zip(apart, small.gate_up_proj, small.down_proj, strict=True):
        state = {"gate_proj.weight": gate_up[:inner], "up_proj.weight": gate_up[inner:], "down_proj.weight": down}
        expert.load_state_dict(state, assign=True)
    tokens, choices = 16, min(2, count)
    # Some inputs are large: a clamp inside an expert shows only there.
    x_TD = normal(tokens, width) * torch.tensor([1.0, 100.0]).repeat(tokens // 2)[:, None]
    chosen_TC = normal(tokens, count).topk(choices).indices
    weights_TC = normal(tokens, choices).softmax(-1)
    # The class's own loop: transformers puts a choice of faster kernels, which cannot take such shapes, around it.
    eager = getattr(type(fused).forward, "__wrapped__", type(fused).forward)
    try:
        expected = eager(small, x_TD, chosen_TC, weights_TC)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        return False
    found = apart(x_TD, chosen_TC, weights_TC)
    return expected.shape == found.shape and torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
