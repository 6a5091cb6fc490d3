"""Rows packed end to end into one, each attending to itself alone, without a mask in memory.

`pack` lays rows end to end and says where each begins; `allow_packed` teaches a model's attention to go by that:
variable-length attention on a GPU, row by row on a CPU. Batches that are not packed go the way of `sdpa`.

Shapes: T tokens of a packed row, H heads, D width of a head, S rows in it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from inspect import signature
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "qlora_packed"
IGNORED = -100
# cuDNN's kernels are the fastest on a Hopper GPU, and want a plan for every length: only for such as full rows have.
FASTEST_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
LENGTHS_THAT_COME_AGAIN = 256
SHORT = 128
"""Positions of a row up to which, on a CPU, PyTorch's plain attention beats its flash attention, by the backward."""
# Of logits, where rows see each other; orders of rounding are far below it, in bf16 too.
LEAK = 0.1


Tokens = tuple[Sequence[int], Sequence[int]]
"""Token ids and labels of a row."""


def pack(rows: Sequence[Tokens]) -> dict[str, Any]:
    """Rows end to end, as a model's forward takes them: [1, T] tensors, where rows begin and end, and `_predicted`.

    The first label of a row is never predicted: the token before it is of another row.
    """
    starts = list(accumulate((len(ids) for ids, _ in rows), initial=0))
    longest = max(len(ids) for ids, _ in rows)
    ends = torch.tensor(starts, dtype=torch.int32)
    return {
        "input_ids": torch.tensor([token for ids, _ in rows for token in ids])[None],
        "position_ids": torch.cat([torch.arange(len(ids)) for ids, _ in rows])[None],
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": longest,
        "max_length_k": longest,
    } | _predicted([(IGNORED, *labels[1:]) for _, labels in rows])


def pad(rows: Sequence[Tokens]) -> dict[str, Any]:
    """Rows below each other, each filled up on the right: [rows, longest] tensors, and `_predicted`."""
    longest = max(len(ids) for ids, _ in rows)
    lengths = torch.tensor([len(ids) for ids, _ in rows])
    return {
        "input_ids": torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids, _ in rows]),
        "attention_mask": (torch.arange(longest) < lengths[:, None]).long(),
    } | _predicted([(*labels, *[IGNORED] * (longest - len(labels))) for _, labels in rows], rows=len(rows))


def _predicted(labels: Sequence[Sequence[int]], rows: int = 1) -> dict[str, torch.Tensor]:
    """Labels [rows, length], and the tokens that are predicted (`targets`) with where they are predicted from.

    `predicting` counts positions of all rows, one row after the other.
    """
    flat = torch.tensor([label for row in labels for label in row])
    starts = torch.zeros(len(flat), dtype=torch.bool)
    starts[:: len(flat) // rows] = True
    places = ((flat != IGNORED) & ~starts).nonzero()[:, 0]
    return {"labels": flat.view(rows, -1), "targets": flat[places], "predicting": places - 1}


def allow_packed(model: PreTrainedModel) -> str | None:
    """Have this model's attention understand packed batches, beside all others; why not, if it cannot.

    It can where packed rows come out as they do alone, on a trial.
    """
    if model.config._attn_implementation != "sdpa":
        return f"attention is {model.config._attn_implementation}, not sdpa"
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    # Whoever calls the model in whatever way goes through its decoder.
    decoder: nn.Module = getattr(model, model.base_model_prefix)
    hook = decoder.register_forward_pre_hook(_without_mask, with_kwargs=True)
    if _packs_exactly(model):
        return None
    hook.remove()
    model.set_attn_implementation("sdpa")
    return f"{type(model).__name__} does not keep packed rows apart"


def _packs_exactly(model: PreTrainedModel) -> bool:
    ids = torch.arange(24).mul(7).remainder(model.config.get_text_config().vocab_size).tolist()
    rows: list[Tokens] = [(ids[:5], ids[:5]), (ids[5:], ids[5:])]
    inputs = {key: value for key, value in pack(rows).items() if key not in ("labels", "targets", "predicting")}
    inputs = {
        key: value.to(model.device) if isinstance(value, torch.Tensor) else value for key, value in inputs.items()
    }
    trains = model.training
    model.eval()
    with torch.no_grad():
        try:
            together = model(**inputs, use_cache=False).logits[0].float()
        except (TypeError, ValueError, ImportError, RuntimeError):
            # A forward that does not hand these inputs on, or a GPU or head width without such attention.
            return False
        finally:
            model.train(trains)
        model.eval()
        alone = [model(input_ids=torch.tensor([ids], device=model.device)).logits[0].float() for ids, _ in rows]
        model.train(trains)
    difference = (together - torch.cat(alone)).norm() / together.norm()
    return bool(difference < LEAK)


def _without_mask(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Give a packed batch a mask that nobody reads: without one, transformers looks for rows, and waits for the GPU."""
    if kwargs.get("cu_seq_lens_q") is None or kwargs.get("attention_mask") is not None:
        return None
    return args, kwargs | {"attention_mask": torch.empty(1, 1, 1, 0, dtype=torch.bool)}


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """[1, H, T, D] → [1, T, H, D], grouped heads as they come."""
    if cu_seq_lens_q is None or max_length_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if dropout or kwargs.get("softcap") is not None:
        raise ValueError("packed attention has neither dropout nor a soft cap")
    rows, positions = len(cu_seq_lens_q) - 1, query.shape[2]
    short = sliding_window is None or max_length_q <= sliding_window
    if query.is_cuda and short and rows * max_length_q == positions and max_length_q % LENGTHS_THAT_COME_AGAIN == 0:
        return _like_rows(query, key, value, rows, scaling), None
    attend = _by_kernel if query.is_cuda and query.dtype != torch.float32 else _row_by_row
    output_THD = attend(
        query.squeeze(0).transpose(0, 1),
        key.squeeze(0).transpose(0, 1),
        value.squeeze(0).transpose(0, 1),
        cu_seq_lens_q,
        max_length_q,
        scaling,
        sliding_window,
    )
    return output_THD[None], None


def _like_rows(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: int, scaling: float | None
) -> torch.Tensor:
    """[1, H, T, D] → [1, T, H, D] of rows of one length: a batch of them, to the fastest kernel that takes it."""
    query, key, value = (x.squeeze(0).unflatten(1, (rows, -1)).transpose(0, 1) for x in (query, key, value))
    with sdpa_kernel(FASTEST_FIRST, set_priority=True):
        output = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    return output.transpose(1, 2).flatten(0, 1)[None]


def _by_kernel(
    query_THD: torch.Tensor,
    key_THD: torch.Tensor,
    value_THD: torch.Tensor,
    ends: torch.Tensor,
    longest: int,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    back = -1 if window is None else window - 1
    # torch 2.11 takes grouped heads as they are; later versions want to be told.
    grouped: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}
    output: Any = varlen_attn(
        query_THD, key_THD, value_THD, ends, ends, longest, longest, scale=scaling, window_size=(back, 0), **grouped
    )
    return output


def _row_by_row(
    query_THD: torch.Tensor,
    key_THD: torch.Tensor,
    value_THD: torch.Tensor,
    ends: torch.Tensor,
    longest: int,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    outputs = []
    for start, stop in zip(ends.tolist(), ends.tolist()[1:], strict=False):
        query, key, value = (x[start:stop].transpose(0, 1)[None] for x in (query_THD, key_THD, value_THD))
        mask = None
        if window is not None and stop - start > window:
            place = torch.arange(stop - start, device=query.device)
            back = place[:, None] - place[None, :]
            mask = (back >= 0) & (back < window)
        plainly = not query.is_cuda and stop - start <= SHORT
        with sdpa_kernel(SDPBackend.MATH) if plainly else contextlib.nullcontext():
            output = scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True
            )
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)
