"""Greedy generation from the prompts of held-out rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from qlora.data.rendering import RenderedRow
from qlora.models.placement import input_device


def generate(
    model: Any, rows: Sequence[RenderedRow], tokenizer: Any, batch_size: int, max_new_tokens: int
) -> list[str]:
    """Greedy answers, one per row, without the end-of-turn token."""
    prompts = [row.input_ids[: row.prompt_length] for row in rows]
    stops = stop_tokens(model, tokenizer) | ends_of(rows)
    found = continuations(model, prompts, stops, tokenizer.pad_token_id, batch_size, max_new_tokens)
    answers: list[str] = tokenizer.batch_decode(found, skip_special_tokens=True)
    return answers


@torch.inference_mode()
def continuations(
    model: Any,
    prompts: Sequence[Sequence[int]],
    stops: set[int],
    pad_token_id: int,
    batch_size: int,
    max_new_tokens: int,
    processors: Sequence[Any] = (),
) -> list[list[int]]:
    """Greedy continuations of prompts as token ids, the token that stops one at its end.

    processors: transformers' `LogitsProcessor`s, which see every step.
    """
    device, found = input_device(model), []
    for first in range(0, len(prompts), batch_size):
        batch = prompts[first : first + batch_size]
        width = max(map(len, batch))
        ids_BT = torch.full((len(batch), width), pad_token_id)
        mask_BT = torch.zeros_like(ids_BT)
        for index, prompt in enumerate(batch):  # left-padded, so that every row continues at the same position
            ids_BT[index, width - len(prompt) :] = torch.tensor(prompt)
            mask_BT[index, width - len(prompt) :] = 1
        out_BT = model.generate(
            input_ids=ids_BT.to(device),
            attention_mask=mask_BT.to(device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            use_cache=True,
            eos_token_id=sorted(stops),
            pad_token_id=pad_token_id,
            logits_processor=list(processors),
        )
        for ids in out_BT[:, width:].tolist():
            end = next((place for place, token in enumerate(ids) if token in stops), len(ids))
            found.append(ids[: end + 1])
    return found


def ends_of(rows: Sequence[RenderedRow]) -> set[int]:
    """Tokens that end the answers of rows."""
    return {row.labels[-1] for row in rows if row.labels[-1] >= 0}


def stop_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Tokens that a model ends with, by its generation settings and its tokenizer."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return {token for token in (*listed, tokenizer.eos_token_id) if token is not None}
