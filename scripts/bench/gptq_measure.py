"""What a quantized model lost: task loss and KL to the trained model on answer tokens, and perplexity on general text.

The trained model's log-probabilities are computed once per seed and kept on disk in fp16, so that every variant is held
against the same reference, whichever process measures it.

Shapes: N answer tokens of all rows, n of a chunk, V vocabulary, C chunks of T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from qlora.artifacts import require_disk
from qlora.errors import UserError

OVERLAP_WINDOW = 64  # tokens: longer than what a chat template says before every question
ROWS_PER_FORWARD = 4  # chunks of general text per forward pass


class KeptReference:
    """Log-probabilities of the trained model, [N, V] fp16 in a file, with their argmax, for the ladder's `score`.

    Same methods as the ladder's own reference, but what was stored outlives the process; `complete` says whether all of
    it is there. Raises UserError if what is there is of other rows.
    """

    def __init__(self, directory: Path, tokens: int, vocabulary: int) -> None:
        self.directory, self.shape = directory, (tokens, vocabulary)
        self._top_file = directory / "top.npy"
        self._logp_file = directory / "logp.f16"
        self.complete = self._top_file.is_file()
        self.top_N = np.load(self._top_file) if self.complete else np.zeros(tokens, dtype=np.int64)
        if len(self.top_N) != tokens:
            raise UserError(
                "the kept reference has other rows", str(directory), "delete the folder, or use another --out"
            )
        self._logp_NV = self._open("r") if self.complete else None

    def _open(self, mode: Literal["r", "w+"]) -> np.memmap:
        return np.memmap(self._logp_file, dtype=np.float16, mode=mode, shape=self.shape)

    def store(self, start: int, logp_nV: torch.Tensor) -> None:
        if self._logp_NV is None:
            self.directory.mkdir(parents=True, exist_ok=True)
            needed = 2 * math.prod(self.shape)
            require_disk(self.directory, needed, "the trained model's log-probabilities (--test-rows)")
            self._logp_NV = self._open("w+")
        stop = start + len(logp_nV)
        self._logp_NV[start:stop] = logp_nV.clamp(min=-6e4).half().cpu().numpy()
        self.top_N[start:stop] = logp_nV.argmax(-1).cpu().numpy()

    def finish(self) -> None:
        """Say that every token is stored."""
        assert self._logp_NV is not None, "nothing was stored"
        self._logp_NV.flush()
        np.save(self._top_file, self.top_N)
        self.complete = True

    def read(self, start: int, stop: int, device: torch.device) -> torch.Tensor:
        assert self._logp_NV is not None, "the trained model is measured first"
        stored_nV = torch.from_numpy(np.array(self._logp_NV[start:stop])).to(device)
        return stored_nV.float().log_softmax(-1)  # sums to one again, so that the KL is never negative


def text_chunks(tokenizer: Any, path: Path, length: int, chunks: int) -> torch.Tensor:
    """The first tokens of a text file, int64 [C, T] with C at most `chunks`; what fills no chunk is left out."""
    ids = tokenizer(path.read_text(encoding="utf-8"), return_tensors="pt", verbose=False)["input_ids"][0]
    count = min(chunks, len(ids) // length)
    if not count:
        raise UserError(f"{len(ids)} tokens do not fill a chunk of {length}", str(path), "lower --chunk-length")
    return ids[: count * length].reshape(count, length)


@torch.inference_mode()
def perplexity(model: Any, ids_CT: torch.Tensor) -> float:
    """exp of the mean negative log-likelihood of all tokens but the first of each chunk."""
    device = next(model.parameters()).device
    total = 0.0
    for ids_BT in ids_CT.to(device).split(ROWS_PER_FORWARD):
        logits_BTV = model(input_ids=ids_BT).logits
        for logits_TV, ids_T in zip(logits_BTV, ids_BT, strict=True):
            total += F.cross_entropy(logits_TV[:-1].float(), ids_T[1:], reduction="sum").item()
    chunks, length = ids_CT.shape
    return math.exp(total / (chunks * (length - 1)))


def shared_windows(
    rows: Sequence[Sequence[int]], held_out: Sequence[Sequence[int]], width: int = OVERLAP_WINDOW
) -> int:
    """How many windows of `width` tokens of `rows` also occur in `held_out`; a row shorter than a window has none.

    Windows are compared by a 64-bit hash, the same for both sides.
    """
    factors = np.random.default_rng(0).integers(1, 2**63, size=width, dtype=np.int64) | 1

    def hashes(sequences: Sequence[Sequence[int]]) -> np.ndarray:
        long = [np.asarray(row, dtype=np.int64) for row in sequences if len(row) >= width]
        if not long:
            return np.empty(0, dtype=np.int64)
        return np.concatenate([np.lib.stride_tricks.sliding_window_view(row, width) @ factors for row in long])

    return int(np.isin(hashes(rows), hashes(held_out)).sum())
