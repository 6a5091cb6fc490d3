"""Which answers a model prefers, against what it preferred before it was trained.

The reward of an answer is how much likelier it has become: r = log p(answer | prompt) − log p₀(answer | prompt), in
nats, with p₀ the base that was trained on (Rafailov et al. 2023, arXiv:2305.18290, §4, without their β). Of pairs,
*preferred* is the share in which the better answer has the larger reward, *margin* the mean difference. Of judged
answers, it is the share of all pairs of a good and a bad one (ties count half), and the difference of the means.

Shapes: A answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from qlora.data.rendering import IGNORED, RenderedRow


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


def preferred(answers: Sequence[RenderedRow], logps_A: torch.Tensor, before_A: torch.Tensor) -> tuple[float, float]:
    """(share of comparisons that the better answer wins, mean margin in nats); see the module's docstring."""
    rewards_A = logps_A - before_A
    if answers[0].good is None:
        better_P, worse_P = rewards_A[0::2], rewards_A[1::2]
        return (better_P > worse_P).double().mean().item(), (better_P - worse_P).mean().item()
    good_A = torch.tensor([row.good for row in answers])
    good_G, bad_B = rewards_A[good_A], rewards_A[~good_A]
    if not len(good_G) or not len(bad_B):
        return float("nan"), float("nan")
    difference_GB = good_G[:, None] - bad_B[None]
    wins = (difference_GB > 0).double().mean() + (difference_GB == 0).double().mean() / 2
    return wins.item(), (good_G.mean() - bad_B.mean()).item()
