"""How well a model predicts rows, row by row, and how far its predictions are from a reference's.

Of every token with a label: its negative log-likelihood, KL(reference ‖ model) over the vocabulary, both in nats, and
whether both put the same token first. Summed over each row, so that whoever reads them can weigh rows.

Shapes: B rows of a batch, T tokens, N labelled tokens of all rows, V vocabulary, R rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qlora.artifacts import require_disk
from qlora.data.rendering import IGNORED, RenderedRow
from qlora.errors import UserError
from qlora.models.placement import input_device

VOCABULARY_CHUNK = 2048  # labelled tokens whose fp32 log-probabilities are held at once


@dataclass(frozen=True)
class RowSums:
    """Sums over the labelled tokens of each row, fp64 [R] in the order of the rows; `tokens_R` is how many those are.

    kl_R and agreed_R are to the reference, which itself has zeros and all tokens.
    """

    nll_R: np.ndarray
    kl_R: np.ndarray
    agreed_R: np.ndarray
    tokens_R: np.ndarray

    @property
    def loss(self) -> float:
        return float(self.nll_R.sum() / self.tokens_R.sum())

    @property
    def kl(self) -> float:
        return float(self.kl_R.sum() / self.tokens_R.sum())

    @property
    def top1(self) -> float:
        return float(self.agreed_R.sum() / self.tokens_R.sum())


class Reference:
    """The trained model's log-probabilities on every labelled token, spooled to disk.

    fp16 keeps a log-probability to 1 part in 2048, which moves the KL by about 1e-6. The argmax is kept exactly.
    key: of the recipe, what makes the file as large as it is.
    """

    def __init__(self, path: Path, tokens: int, key: str = "evaluate.rows") -> None:
        self.path, self.tokens, self.key = path, tokens, key
        self._logp_NV: np.memmap | None = None
        self.top_N = np.zeros(tokens, dtype=np.int64)

    def store(self, start: int, logp_NV: torch.Tensor) -> None:
        if self._logp_NV is None:
            shape = (self.tokens, logp_NV.shape[1])
            require_disk(self.path.parent, 2 * math.prod(shape), f"the trained model's log-probabilities ({self.key})")
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


def labelled_tokens(rows: Sequence[RenderedRow]) -> int:
    """N of these rows."""
    return sum(row.supervised_tokens for row in rows)


@torch.inference_mode()
def score(
    model: Any,
    rows: Sequence[RenderedRow],
    batch_size: int,
    pad_token_id: int,
    reference: Reference,
    *,
    is_reference: bool,
) -> RowSums:
    """The sums of every row. `is_reference` fills the reference instead of comparing with it."""
    sums_3R = np.zeros((3, len(rows)))
    tokens_R = np.zeros(len(rows))
    start = first = 0
    device = input_device(model)
    for ids_BT, mask_BT, labels_BT in batches(rows, batch_size, pad_token_id, device):
        logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT).logits
        answer_BT = labels_BT[:, 1:] != IGNORED
        logits_NV, target_N = logits_BTV[:, :-1][answer_BT], labels_BT[:, 1:][answer_BT]
        del logits_BTV
        tokens_R[first : first + len(answer_BT)] = answer_BT.sum(1).cpu().numpy()
        row_N = first + answer_BT.nonzero()[:, 0].cpu().numpy()
        for place in range(0, len(target_N), VOCABULARY_CHUNK):
            part = slice(place, place + VOCABULARY_CHUNK)
            found_3n = _compare(logits_NV[part], target_N[part], start, reference, is_reference)
            for sums_R, found_n in zip(sums_3R, found_3n, strict=True):
                sums_R += np.bincount(row_N[part], found_n, minlength=len(rows))
            start += found_3n.shape[1]
        first += len(ids_BT)
    if not np.isfinite(sums_3R[0]).all():
        raise UserError("the model's loss is not a finite number", "data.eval", "a stage before this one diverged")
    nll_R, kl_R, agreed_R = sums_3R
    return RowSums(nll_R, kl_R, agreed_R, tokens_R)


def _compare(
    logits_nV: torch.Tensor, target_n: torch.Tensor, start: int, reference: Reference, is_reference: bool
) -> np.ndarray:
    """[3, n]: negative log-likelihood, KL and agreement of labelled tokens; the first is the `start`-th of all."""
    logp_nV = logits_nV.float().log_softmax(-1)
    nll_n = -logp_nV.gather(1, target_n[:, None])[:, 0]
    if is_reference:
        reference.store(start, logp_nV)
        kl_n, agreed_n = torch.zeros_like(nll_n), np.ones(len(nll_n))
    else:
        stop = start + len(target_n)
        ref_nV = reference.read(start, stop, logp_nV.device)
        kl_n = (ref_nV.exp() * (ref_nV - logp_nV)).sum(-1)
        agreed_n = logp_nV.argmax(-1).cpu().numpy() == reference.top_N[start:stop]
    return np.stack([nll_n.cpu().numpy(), kl_n.cpu().numpy(), agreed_n]).astype(np.float64)


def batches(
    rows: Sequence[RenderedRow], size: int, pad_token_id: int, device: torch.device | str
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Right-padded (input_ids, attention_mask, labels), each int64 [B, T]; pads are masked and unlabelled."""
    for first in range(0, len(rows), size):
        chunk = rows[first : first + size]
        width = max(len(row.input_ids) for row in chunk)
        ids_BT = torch.full((len(chunk), width), pad_token_id)
        mask_BT = torch.zeros_like(ids_BT)
        labels_BT = torch.full_like(ids_BT, IGNORED)
        for index, row in enumerate(chunk):
            length = len(row.input_ids)
            ids_BT[index, :length] = torch.tensor(row.input_ids)
            mask_BT[index, :length] = 1
            labels_BT[index, :length] = torch.tensor(row.labels)
        yield ids_BT.to(device), mask_BT.to(device), labels_BT.to(device)
