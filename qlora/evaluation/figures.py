"""The ladder's figures from sums over rows, each with how far it may be off, and whether it differs from the trained
model's by more than that.

A figure is an array [1 + S]: of the rows as they are, and of every draw (`qlora.evaluation.bootstrap`). All models'
figures are of the same draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from qlora.data.rendering import RenderedRow
from qlora.evaluation.bootstrap import inside_noise, interval, ratio, share_interval, sums
from qlora.evaluation.preferences import comparisons
from qlora.evaluation.scoring import RowSums

TRAINED = "trained"
BASE = "base"
START = "nf4"
"""What is trained on, where that is not the base itself."""
COMPARED = ("loss", "exact_match", "metrics.", "general.loss")
"""Figures of which it is said whether the difference to the trained model is noise."""


@dataclass(frozen=True)
class Measured:
    """What was measured of one model.

    answers: by metric of generated answers, bool [A] of the rows that were asked.
    logps_A: log p of every answer that is compared (`qlora.evaluation.preferences`), fp64.
    """

    rows: RowSums
    answers: Mapping[str, np.ndarray] = field(default_factory=dict)
    general: RowSums | None = None
    logps_A: np.ndarray | None = None


@dataclass(frozen=True)
class Figures:
    """Figures [1 + S] of one model by key, as `intervals` of ladder.json has them; `shares` says of how many rows those
    are that are shares of rows."""

    figures: dict[str, np.ndarray]
    shares: dict[str, int]

    def value(self, key: str) -> float | None:
        """The figure of the rows as they are; None where not measured or not defined."""
        found = self.figures.get(key)
        return float(found[0]) if found is not None and np.isfinite(found[0]) else None

    def below(self, prefix: str) -> dict[str, float]:
        """Values of keys that begin with `prefix.`, by the rest of their names."""
        found = {key.partition(".")[2]: self.value(key) for key in self.figures if key.startswith(f"{prefix}.")}
        return {key: value for key, value in found.items() if value is not None}

    def intervals(self) -> dict[str, list[float]]:
        found = {
            key: share_interval(figure_S, self.shares[key]) if key in self.shares else interval(figure_S)
            for key, figure_S in self.figures.items()
            if np.isfinite(figure_S[0])
        }
        return {key: each for key, each in found.items() if each is not None}

    def noise(self, trained: Figures) -> dict[str, bool]:
        """Of what is compared, whether the difference to the trained model is inside the noise."""
        found = {key: differs(self, trained, key) for key in self.figures if key.startswith(COMPARED)}
        return {key: not each for key, each in found.items() if each is not None}


def differs(one: Figures, other: Figures, key: str) -> bool | None:
    """Whether two models differ in a figure by more than drawing other rows would change their difference, at 95 %.

    None where that cannot be said.
    """
    if key not in one.figures or key not in other.figures:
        return None
    noise = inside_noise(one.figures[key], other.figures[key])
    return None if noise is None else not noise


def figures_of(
    measured: Mapping[str, Measured], asked_R: np.ndarray, compared: Sequence[RenderedRow], seed: int = 0
) -> dict[str, Figures]:
    """By model. asked_R: bool, which rows an answer was generated for. compared: the answers that `logps_A` are of."""
    found: dict[str, dict[str, np.ndarray]] = {name: {} for name in measured}
    shares: dict[str, int] = {}
    _predictions(measured, found, seed)
    _answers(measured, asked_R, found, shares, seed)
    _general(measured, found, seed)
    if compared:
        _preferences(measured, compared, found, shares, seed)
    return {name: Figures(figures, shares) for name, figures in found.items()}


def _predictions(measured: Mapping[str, Measured], found: dict[str, dict[str, np.ndarray]], seed: int) -> None:
    columns = {(name, key): value for name, each in measured.items() for key, value in vars(each.rows).items()}
    total = sums(columns, seed)
    losses = {name: ratio(total[name, "nll_R"], total[name, "tokens_R"]) for name in measured}
    gain = losses[BASE] - losses[TRAINED] if BASE in losses else None
    for name, loss in losses.items():
        tokens = total[name, "tokens_R"]
        found[name] |= {
            "loss": loss,
            "perplexity": _exp(loss),
            "kl": ratio(total[name, "kl_R"], tokens),
            "top1": ratio(total[name, "agreed_R"], tokens),
        }
        if gain is not None:
            found[name]["gain_retained"] = ratio(losses[BASE] - loss, gain)


def _answers(
    measured: Mapping[str, Measured],
    asked_R: np.ndarray,
    found: dict[str, dict[str, np.ndarray]],
    shares: dict[str, int],
    seed: int,
) -> None:
    """Draws are of all rows, as those of losses are, though some may not have been asked."""
    columns: dict[tuple[str, str], np.ndarray] = {("", "asked"): asked_R}
    for name, each in measured.items():
        for metric, right_A in each.answers.items():
            right_R = np.zeros(len(asked_R))
            right_R[asked_R] = right_A
            columns[name, metric] = right_R
    if len(columns) == 1 or not asked_R.any():
        return
    total = sums(columns, seed)
    asked = total.pop(("", "asked"))
    for (name, metric), right in total.items():
        key = metric if metric == "exact_match" else f"metrics.{metric}"
        found[name][key] = ratio(right, asked)
        shares[key] = int(asked[0])


def _general(measured: Mapping[str, Measured], found: dict[str, dict[str, np.ndarray]], seed: int) -> None:
    texts = {name: each.general for name, each in measured.items() if each.general is not None}
    if not texts:
        return
    total = sums({(name, key): value for name, each in texts.items() for key, value in vars(each).items()}, seed)
    for name in texts:
        loss = ratio(total[name, "nll_R"], total[name, "tokens_R"])
        kl = ratio(total[name, "kl_R"], total[name, "tokens_R"])
        found[name] |= {"general.loss": loss, "general.perplexity": _exp(loss), "general.kl": kl}


def _preferences(
    measured: Mapping[str, Measured],
    compared: Sequence[RenderedRow],
    found: dict[str, dict[str, np.ndarray]],
    shares: dict[str, int],
    seed: int,
) -> None:
    """Rewards are against the model that training began from, which has none itself."""
    logps = {name: each.logps_A for name, each in measured.items() if each.logps_A is not None}
    before = next((name for name in (START, BASE) if name in logps), None)
    if before is None:
        return
    for name, logps_A in logps.items():
        if name in (before, BASE):
            continue
        rewarded = comparisons(compared, logps_A - logps[before])
        share, margin = rewarded.figures(seed)
        if np.isfinite(share[0]):
            found[name] |= {"preferred": share, "margin": margin}
            shares["preferred"] = rewarded.independent


def _exp(loss: np.ndarray) -> np.ndarray:
    return np.exp(np.minimum(loss, 700.0))
