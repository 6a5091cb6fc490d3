"""Intervals: that they hold the truth as often as they say, and what happens at the edges."""

import numpy as np
import pytest

from qlora.evaluation.bootstrap import BLOCK, DRAWS, counts, inside_noise, interval, ratio, share_interval, sums


def test_the_first_sum_is_of_the_rows_as_they_are_and_all_columns_are_of_the_same_draws():
    values = np.random.default_rng(0).normal(size=40)
    found = sums({"once": values, "twice": 2 * values, "rows": np.ones(40)})
    assert found["once"][0] == pytest.approx(values.sum()) and found["once"].shape == (1 + DRAWS,)
    np.testing.assert_allclose(found["twice"], 2 * found["once"])
    assert (found["rows"] == 40).all()
    again = sums({"once": values})
    np.testing.assert_allclose(again["once"], found["once"], rtol=1e-9)
    assert not np.allclose(sums({"once": values}, seed=1)["once"], found["once"])


def test_many_rows_are_drawn_some_draws_at_a_time():
    rows = BLOCK // 3
    parts = list(counts(rows, draws=5))
    assert [len(part) for part in parts] == [1, 3, 2] and all((part.sum(1) == rows).all() for part in parts)


def test_an_interval_of_95_percent_holds_the_truth_in_about_95_of_100_experiments():
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        tokens = rng.integers(5, 50, size=80)
        figure = sums({"nll": tokens * rng.gamma(4.0, 0.25, size=80), "tokens": tokens}, draws=400)
        low, high = interval(figure["nll"] / figure["tokens"])
        held += low <= 1.0 <= high
    assert 180 <= held <= 198


def test_shares_of_rows_that_are_all_alike_are_not_certain():
    assert share_interval(np.ones(1001), 50) == [pytest.approx(0.025 ** (1 / 50)), 1.0]
    assert share_interval(np.zeros(1001), 50) == [0.0, pytest.approx(1 - 0.025 ** (1 / 50))]
    right = sums({"right": np.arange(50) % 2})["right"] / 50
    low, high = share_interval(right, 50)
    assert 0.3 < low < 0.4 and 0.6 < high < 0.7


def test_noise_is_when_the_difference_may_be_zero():
    rng = np.random.default_rng(0)
    one = rng.normal(size=100)
    found = sums({"one": one, "same": one, "shifted": one + 0.5, "other": one + rng.normal(size=100)})
    assert inside_noise(found["one"], found["same"]) and not inside_noise(found["one"], found["shifted"])
    assert inside_noise(found["one"], found["other"])
    undefined = np.full(1001, np.nan)
    assert inside_noise(undefined, undefined) is None and interval(undefined) is None


def test_a_quotient_is_defined_above_zero():
    np.testing.assert_array_equal(ratio(np.array([1.0, 1.0, 1.0]), np.array([2.0, 0.0, -1.0])), [0.5, np.nan, np.nan])
