"""Rewards of answers against a model's own log-probabilities, one answer at a time."""

from functools import partial

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qlora.data.rendering import IGNORED, RenderedRow
from qlora.evaluation.bootstrap import counts
from qlora.evaluation.preferences import answer_logps, answers_of, comparisons
from qlora.evaluation.scoring import batches


def row(prompt: list[int], answer: list[int], rejected: list[int] | None = None, good: bool | None = None):
    labels = [IGNORED] * len(prompt) + answer
    return RenderedRow(prompt + answer, labels, len(prompt), False, "", rejected, good)


PAIRS = [row([1, 2, 3], [4, 5], [6]), row([7], [8, 9, 10, 11], [12, 13]), row([1, 5, 9, 13], [2], [3, 4, 5])]


def test_answers_are_the_better_and_the_worse_one_of_each_pair():
    answers = answers_of([*PAIRS, row([1], [2])])
    assert [answer.input_ids for answer in answers[:2]] == [[1, 2, 3, 4, 5], [1, 2, 3, 6]] and len(answers) == 6
    assert [label for label in answers[1].labels if label != IGNORED] == [6]
    assert answers_of([row([1], [2])]) == []
    assert len(answers_of([row([1], [2], good=False)])) == 1


@pytest.mark.parametrize("size", [1, 4])
def test_log_probabilities_are_those_of_each_answer_alone(size):
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                  num_attention_heads=2, vocab_size=32)  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).double().eval()
    answers = answers_of(PAIRS)
    found = answer_logps(model, answers, partial(batches, size=size, pad_token_id=0, device="cpu"))
    for answer, logp in zip(answers, found, strict=True):
        with torch.no_grad():
            every = model(torch.tensor([answer.input_ids])).logits[0].log_softmax(-1)
        places = range(answer.prompt_length, len(answer.input_ids))
        assert logp.item() == pytest.approx(sum(every[at - 1, answer.input_ids[at]].item() for at in places), rel=1e-5)


def figures(answers, after: list[float], before: list[float]) -> tuple[float, float]:
    share, margin = comparisons(answers, np.array(after) - np.array(before)).figures()
    return share[0], margin[0]


def test_shares_and_margins():
    answers, zeros = answers_of(PAIRS), [0.0] * 6
    assert figures(answers, [1.0, 0, 0, 2, 5, 1], zeros) == (pytest.approx(2 / 3), 1.0)
    assert figures(answers, zeros, [1.0, 0, 0, 2, 5, 1]) == (pytest.approx(1 / 3), -1.0)
    judged = [row([1], [2], good=good) for good in (True, False, True, False)]
    assert figures(judged, [3.0, 1, 1, 0], [0.0] * 4) == (0.875, 1.5)  # 3 > 1, 3 > 0, 1 = 1, 1 > 0
    only_good = [row([1], [2], good=True)] * 2
    assert np.isnan(figures(only_good, [1.0, 2.0], [0.0, 0.0])[0])


def test_draws_of_judged_answers_are_those_of_their_rows():
    """Each draw's figures against those of the rows that it has, one by one."""
    rng = np.random.default_rng(0)
    rewards, good = rng.integers(0, 4, size=9).astype(float), np.arange(9) % 3 > 0
    found, drawn = comparisons([row([1], [2], good=bool(each)) for each in good], rewards), 0
    counted = np.concatenate(list(counts(9, draws=30)))
    for share, margin, counts_A in zip(*found.figures(), counted, strict=False):
        pairs = [
            ((better > worse) + (better == worse) / 2, better - worse)
            for better in np.repeat(rewards[good], counts_A[good].astype(int))
            for worse in np.repeat(rewards[~good], counts_A[~good].astype(int))
        ]
        if pairs:
            assert (share, margin) == pytest.approx(tuple(np.mean(pairs, axis=0)))
            drawn += 1
    assert drawn > 20
