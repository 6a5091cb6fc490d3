"""How far a figure may be off because other rows could have been held out: the percentile bootstrap.

Rows are drawn with replacement, as many as there are, a few thousand times, and a figure is computed of every draw; the
middle 95 % of what comes out is its interval (Efron and Tibshirani, *An Introduction to the Bootstrap*, 1993, §13.3).
Tokens of a row are not independent of each other, so whole rows are drawn. Figures of two models are of the same draws,
so that what makes rows easy or hard falls out of their difference.

Everything here is computed from sums over rows: a *figure* is an array [1 + S] whose first entry is of the rows as they
are, and whose others are of the draws.

Shapes: R rows, S draws, C columns of sums.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from typing import TypeVar

import numpy as np

DRAWS = 2000
CONFIDENCE = 0.95
TAIL = (1 - CONFIDENCE) / 2
BLOCK = 1 << 21  # row counts that are held at once

Key = TypeVar("Key", bound=Hashable)


def counts(rows: int, seed: int = 0, draws: int = DRAWS) -> Iterator[np.ndarray]:
    """[s, R] how often every row is in each draw, some draws at a time; the first of all has every row once."""
    yield np.ones((1, rows))
    rng = np.random.default_rng(seed)
    step = max(1, BLOCK // max(1, rows))
    for first in range(0, draws, step):
        many = min(step, draws - first)
        drawn_sR = rng.integers(rows, size=(many, rows)) + rows * np.arange(many)[:, None]
        yield np.bincount(drawn_sR.ravel(), minlength=many * rows).reshape(many, rows).astype(np.float64)


def sums(columns: Mapping[Key, np.ndarray], seed: int = 0, draws: int = DRAWS) -> dict[Key, np.ndarray]:
    """Of every column [R] its sum over the rows as they are and over each draw, [1 + S]; all of the same draws."""
    values_RC = np.stack([np.asarray(values, dtype=np.float64) for values in columns.values()], axis=1)
    found_SC = np.concatenate([counts_sR @ values_RC for counts_sR in counts(len(values_RC), seed, draws)])
    return dict(zip(columns, found_SC.T, strict=True))


def ratio(above_S: np.ndarray, below_S: np.ndarray) -> np.ndarray:
    """A quotient of sums; NaN where it is not defined: where the divisor is not above zero."""
    return np.divide(above_S, below_S, out=np.full_like(above_S, np.nan), where=below_S > 0)


def interval(figure_S: np.ndarray) -> list[float] | None:
    """[low, high] of a figure; None where it is not defined for more of the draws than lie outside an interval."""
    defined_S = figure_S[1:][np.isfinite(figure_S[1:])]
    if len(defined_S) < (1 - TAIL) * (len(figure_S) - 1):
        return None
    low, high = np.quantile(defined_S, [TAIL, 1 - TAIL])
    return [float(low), float(high)]


def share_interval(share_S: np.ndarray, rows: int) -> list[float] | None:
    """As `interval`, of a share of rows. Draws from rows that are all right, or all wrong, have no spread; the bound is
    that of Clopper and Pearson then (1934), on the side where there is room."""
    if share_S[0] in (0.0, 1.0) and rows:
        room = 1 - TAIL ** (1 / rows)
        return [0.0, room] if share_S[0] == 0.0 else [1 - room, 1.0]
    return interval(share_S)


def inside_noise(figure_S: np.ndarray, other_S: np.ndarray) -> bool | None:
    """Whether two figures of the same draws may as well be equal: the interval of their difference has zero in it."""
    found = interval(figure_S - other_S)
    rounding = 1e-9 * abs(other_S[0])
    return None if found is None else bool(found[0] <= rounding and found[1] >= -rounding)
