"""The ladder: what every stage did to the model, on the same held-out rows and the same answer tokens.

Rungs: base in 16 bits, base in 4 bits, trained, merged, GPTQ. For each: loss = mean negative log-likelihood per answer
token (nats), perplexity = exp(loss), KL = mean over answer tokens of KL(trained ‖ rung) over the vocabulary (nats),
top-1 = share of answer tokens where both pick the same token, gain retained = (base − rung) / (base − trained) of the
loss, exact match of greedy generations where asked for, and which answers are preferred where rows have some to compare
(`preferences`).

Shapes: B rows, T tokens, N answer tokens of all rows, V vocabulary.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from qlora.artifacts import require_disk
from qlora.data.rendering import RenderedRow
from qlora.errors import UserError
from qlora.evaluation.generation import exact_match
from qlora.evaluation.preferences import answer_logps, answers_of, preferred
from qlora.models.placement import input_device

TRAINED = "trained"
BASE = "base"
START = "nf4"
"""What is trained on, where that is not the base itself."""
VOCABULARY_CHUNK = 2048  # answer tokens whose fp32 log-probabilities are held at once


@dataclass(frozen=True)
class Rung:
    """One model of the ladder: its name, what it is, and how to load it (eval mode, on its device)."""

    name: str
    label: str
    load: Callable[[], Any]


@dataclass(frozen=True)
class Score:
    """Figures of one rung; see the module docstring. None where not measured or not defined."""

    name: str
    label: str
    loss: float
    perplexity: float
    kl: float
    top1: float
    gain_retained: float | None = None
    exact_match: float | None = None
    preferred: float | None = None
    margin: float | None = None


@dataclass(frozen=True)
class Settings:
    batch_size: int
    generate: bool
    max_new_tokens: int
    pad_token_id: int


class Reference:
    """The trained model's log-probabilities on every answer token, spooled to disk.

    fp16 keeps a log-probability to 1 part in 2048, which moves the KL by about 1e-6. The argmax is kept exactly.
    """

    def __init__(self, path: Path, tokens: int) -> None:
        self.path, self.tokens = path, tokens
        self._logp_NV: np.memmap | None = None
        self.top_N = np.zeros(tokens, dtype=np.int64)

    def store(self, start: int, logp_NV: torch.Tensor) -> None:
        if self._logp_NV is None:
            shape = (self.tokens, logp_NV.shape[1])
            require_disk(
                self.path.parent, 2 * math.prod(shape), "the trained model's log-probabilities (evaluate.rows)"
            )
            self._logp_NV = np.memmap(self.path, dtype=np.float16, mode="w+", shape=shape)
        stop = start + len(logp_NV)
        self._logp_NV[start:stop] = logp_NV.clamp(min=-6e4).half().cpu().numpy()
        self.top_N[start:stop] = logp_NV.argmax(-1).cpu().numpy()

    def read(self, start: int, stop: int, device: torch.device) -> torch.Tensor:
        assert self._logp_NV is not None, "the trained rung is scored first"
        stored_NV = torch.from_numpy(np.array(self._logp_NV[start:stop])).to(device)
        return stored_NV.float().log_softmax(-1)  # sums to one again, so that the KL is never negative

    def discard(self) -> None:
        self._logp_NV = None
        self.path.unlink(missing_ok=True)


def climb(
    rungs: Sequence[Rung],
    rows: Sequence[RenderedRow],
    tokenizer: Any,
    settings: Settings,
    scratch: Path,
    progress: Callable[[int, int, str], None],
    compared: Sequence[RenderedRow] = (),
    observe: Sequence[Callable[[Rung, Any], None]] = (),
) -> list[Score]:
    """Score every rung, the trained one first (it is the reference), and return them in the order given.

    compared: rows with answers of which one is better; rewards are against the rung that training began from.
    observe: each is called with every rung and its model, while that is loaded.
    """
    rows = sorted(rows, key=lambda row: len(row.input_ids), reverse=True)
    tokens = sum(label != -100 for row in rows for label in row.labels[1:])
    if not tokens:
        raise UserError("no answer token in data.eval", "data.eval", "`qlora check` shows how its rows are rendered")
    reference = Reference(scratch / "reference.f16", tokens)
    raw: dict[str, tuple[float, float, float, float | None]] = {}
    answers, logps = answers_of(compared), {}
    try:
        order = sorted(rungs, key=lambda rung: rung.name != TRAINED)
        for index, rung in enumerate(order):
            progress(index, len(order), rung.label)
            model = rung.load()
            loss, kl, top1 = score(model, rows, settings, reference, is_reference=rung.name == TRAINED)
            matches = None
            if settings.generate:
                matches = exact_match(model, rows, tokenizer, settings.batch_size, settings.max_new_tokens)
            raw[rung.name] = (loss, kl, top1, matches)
            if answers:
                padded = partial(batches, size=settings.batch_size, pad_token_id=settings.pad_token_id)
                device = input_device(model)
                logps[rung.name] = answer_logps(model, answers, partial(padded, device=device))
            for look in observe:
                look(rung, model)
            del model
            release_memory()
        progress(len(order), len(order), "")
    finally:
        reference.discard()
    scores = [_score(rung, raw) for rung in rungs]
    before = next((name for name in (START, BASE) if name in logps), None)
    if before is None:
        return scores
    return [_with_preferences(each, answers, logps, before) for each in scores]


def _score(rung: Rung, raw: dict[str, tuple[float, float, float, float | None]]) -> Score:
    loss, kl, top1, matches = raw[rung.name]
    gain = raw[BASE][0] - raw[TRAINED][0] if BASE in raw else 0.0
    retained = (raw[BASE][0] - loss) / gain if gain > 0 else None
    return Score(rung.name, rung.label, loss, math.exp(min(loss, 700.0)), kl, top1, retained, matches)


def _with_preferences(
    found: Score, answers: Sequence[RenderedRow], logps: dict[str, torch.Tensor], before: str
) -> Score:
    if found.name in (before, BASE):
        return found
    share, margin = preferred(answers, logps[found.name], logps[before])
    return found if math.isnan(share) else replace(found, preferred=share, margin=margin)


@torch.inference_mode()
def score(
    model: Any, rows: Sequence[RenderedRow], settings: Settings, reference: Reference, *, is_reference: bool
) -> tuple[float, float, float]:
    """(loss, KL to the reference, top-1 agreement) over the answer tokens of `rows`."""
    loss = kl = agreed = 0.0
    start = 0
    device = input_device(model)
    for ids_BT, mask_BT, labels_BT in batches(rows, settings.batch_size, settings.pad_token_id, device):
        logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT).logits
        answer_BT = labels_BT[:, 1:] != -100
        logits_NV, target_N = logits_BTV[:, :-1][answer_BT], labels_BT[:, 1:][answer_BT]
        del logits_BTV
        for logits_nV, target_n in zip(
            logits_NV.split(VOCABULARY_CHUNK), target_N.split(VOCABULARY_CHUNK), strict=True
        ):
            logp_nV = logits_nV.float().log_softmax(-1)
            loss += F.nll_loss(logp_nV, target_n, reduction="sum").item()
            stop = start + len(target_n)
            if is_reference:
                reference.store(start, logp_nV)
                agreed += len(target_n)
            else:
                ref_nV = reference.read(start, stop, device)
                kl += (ref_nV.exp() * (ref_nV - logp_nV)).sum().item()
                agreed += (logp_nV.argmax(-1).cpu().numpy() == reference.top_N[start:stop]).sum().item()
            start = stop
    if not math.isfinite(loss):
        raise UserError("the model's loss is not a finite number", "data.eval", "a stage before this one diverged")
    return loss / start, kl / start, agreed / start


def batches(
    rows: Sequence[RenderedRow], size: int, pad_token_id: int, device: torch.device | str
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Right-padded (input_ids, attention_mask, labels), each int64 [B, T]; pads are masked and unlabelled."""
    for first in range(0, len(rows), size):
        chunk = rows[first : first + size]
        width = max(len(row.input_ids) for row in chunk)
        ids_BT = torch.full((len(chunk), width), pad_token_id)
        mask_BT = torch.zeros_like(ids_BT)
        labels_BT = torch.full_like(ids_BT, -100)
        for index, row in enumerate(chunk):
            length = len(row.input_ids)
            ids_BT[index, :length] = torch.tensor(row.input_ids)
            mask_BT[index, :length] = 1
            labels_BT[index, :length] = torch.tensor(row.labels)
        yield ids_BT.to(device), mask_BT.to(device), labels_BT.to(device)


def release_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
