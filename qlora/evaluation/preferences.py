"""Which answers a model prefers, against what it preferred before it was trained.

The reward of an answer is how much likelier it has become: r = log p(answer | prompt) − log p₀(answer | prompt), in
nats, with p₀ the base that was trained on (Rafailov et al. 2023, arXiv:2305.18290, §4, without their β). Of pairs,
*preferred* is the share in which the better answer has the larger reward, *margin* the mean difference. Of judged
answers, it is the share of all pairs of a good and a bad one (ties count half), and the difference of the means.

Shapes: A answers, P pairs, G good and B bad answers, S draws of the bootstrap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from qlora.data.rendering import IGNORED, RenderedRow
from qlora.evaluation.bootstrap import counts, ratio, sums


def answers_of(rows: Sequence[RenderedRow]) -> list[RenderedRow]:
    """The answers of pairs, each better one before its worse one; of judged rows the rows. Empty if there are none."""
    found: list[RenderedRow] = []
    for row in rows:
        if row.good is None and row.rejected_ids is None:
            continue
        prompt, answer = row.input_ids[: row.prompt_length], row.input_ids[row.prompt_length :]
        for ids in (answer,) if row.rejected_ids is None else (answer, row.rejected_ids):
            labels = [IGNORED] * len(prompt) + ids
            found.append(replace(row, input_ids=prompt + ids, labels=labels, rejected_ids=None))
    return found


@torch.inference_mode()
def answer_logps(model: Any, answers: Sequence[RenderedRow], batches: Callable[..., Any]) -> torch.Tensor:
    """[A] log p of every answer, in fp64; `batches` gives padded (ids, mask, labels) of some rows."""
    order = sorted(range(len(answers)), key=lambda index: -len(answers[index].input_ids))
    found: list[torch.Tensor] = []
    for ids_BT, mask_BT, labels_BT in batches([answers[index] for index in order]):
        logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT).logits
        for logits_TV, labels_T in zip(logits_BTV[:, :-1], labels_BT[:, 1:], strict=True):
            asked_T = labels_T != IGNORED
            logp_nV = logits_TV[asked_T].float().log_softmax(-1)
            found.append(logp_nV.gather(1, labels_T[asked_T][:, None]).double().sum().cpu())
    logps_A = torch.empty(len(answers), dtype=torch.float64)
    logps_A[torch.tensor(order)] = torch.stack(found)
    return logps_A


@dataclass(frozen=True)
class Pairs:
    """Pairs of a better and a worse answer: whether the better one wins, and by how much."""

    wins_P: np.ndarray
    margins_P: np.ndarray

    @property
    def independent(self) -> int:
        """How many comparisons that have no answer in common there are."""
        return len(self.wins_P)

    def figures(self, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        total = sums({"wins": self.wins_P, "margins": self.margins_P}, seed)
        return total["wins"] / len(self.wins_P), total["margins"] / len(self.wins_P)


@dataclass(frozen=True)
class Judged:
    """Answers that are good or bad, and their rewards; all of a kind are compared with all of the other."""

    rewards_A: np.ndarray
    good_A: np.ndarray

    @property
    def independent(self) -> int:
        return int(min(self.good_A.sum(), (~self.good_A).sum()))

    def figures(self, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        found = [self._of(counts_sA) for counts_sA in counts(len(self.good_A), seed)]
        share_S, margin_S = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return share_S, margin_S

    def _of(self, counts_sA: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of some draws, each pair as often as the draw has both of its answers."""
        good_G, bad_B = self.rewards_A[self.good_A], self.rewards_A[~self.good_A]
        order_B = np.argsort(bad_B)
        good_sG, bad_sB = counts_sA[:, self.good_A], counts_sA[:, ~self.good_A][:, order_B]
        below_sB = np.concatenate([np.zeros((len(counts_sA), 1)), bad_sB.cumsum(1)], axis=1)  # bad answers up to each
        first_G, last_G = (np.searchsorted(bad_B[order_B], good_G, side) for side in ("left", "right"))
        wins_s = (good_sG * (below_sB[:, first_G] + below_sB[:, last_G]) / 2).sum(1)  # ties count half
        goods_s, bads_s = good_sG.sum(1), bad_sB.sum(1)
        margin_s = ratio(good_sG @ good_G, goods_s) - ratio(bad_sB @ bad_B[order_B], bads_s)
        return ratio(wins_s, goods_s * bads_s), margin_s


def comparisons(answers: Sequence[RenderedRow], rewards_A: np.ndarray) -> Pairs | Judged:
    """What rewards say of answers, as `answers_of` has them. Both have `figures`: (share of comparisons that the better
    answer wins, mean margin in nats), each [1 + S] as `qlora.evaluation.bootstrap` has figures, NaN of no comparison.
    """
    if answers[0].good is not None:
        return Judged(rewards_A, np.array([bool(row.good) for row in answers]))
    margins_P = rewards_A[0::2] - rewards_A[1::2]
    return Pairs((margins_P > 0).astype(np.float64), margins_P)
