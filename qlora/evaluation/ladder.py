"""The ladder: what every stage did to the model, on the same held-out rows and the same answer tokens.

Rungs: base in 16 bits, base in 4 bits, trained, merged, GPTQ. For each: loss = mean negative log-likelihood per answer
token (nats), perplexity = exp(loss), KL = mean over answer tokens of KL(trained ‖ rung) over the vocabulary (nats),
top-1 = share of answer tokens where both pick the same token, gain retained = (base − rung) / (base − trained) of the
loss, and where asked for: metrics of greedy generations (`answers`), loss and KL on general text, tasks of lm-eval
(`tasks`), and which answers are preferred where rows have some to compare (`preferences`).

This module loads the models one after the other and keeps what is measured of each; `figures` makes figures of it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qlora.data.rendering import RenderedRow
from qlora.errors import UserError
from qlora.evaluation.answers import Metric, judged, spread
from qlora.evaluation.bootstrap import CONFIDENCE
from qlora.evaluation.figures import BASE, START, TRAINED, Figures, Measured, figures_of
from qlora.evaluation.generation import generate
from qlora.evaluation.preferences import answer_logps, answers_of
from qlora.evaluation.scoring import Reference, batches, labelled_tokens, score
from qlora.models.placement import input_device

__all__ = ["BASE", "START", "TRAINED", "Ladder", "Rung", "Score", "Settings", "climb", "release_memory"]


@dataclass(frozen=True)
class Rung:
    """One model of the ladder: its name, what it is, and how to load it (eval mode, on its device)."""

    name: str
    label: str
    load: Callable[[], Any]


@dataclass(frozen=True)
class Score:
    """Figures of one rung; see the module docstring. None or missing where not measured or not defined.

    intervals: [low, high] of figures by key, those of metrics and general text as `metrics.NAME` and `general.loss`.
    noise: by key, whether the difference to the trained model is inside the noise.
    """

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
    intervals: dict[str, list[float]] = field(default_factory=dict)
    noise: dict[str, bool] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    general: dict[str, float] | None = None
    tasks: dict[str, dict[str, dict[str, float | None]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Settings:
    """How rows are measured, and what of them.

    metrics: of generated answers; none where nothing is generated. examples: rows whose answers are kept.
    general_batch: rows of general text in a forward pass. tasks: measures lm-eval's tasks of a model.
    """

    batch_size: int
    max_new_tokens: int
    pad_token_id: int
    metrics: Sequence[Metric] = ()
    examples: int = 0
    general_batch: int = 8
    tasks: Callable[[Any], dict[str, Any]] | None = None


@dataclass(frozen=True)
class Ladder:
    """Scores in the order of the rungs, and the generated answers that were kept, as generations.json has them."""

    rows: int
    tokens: int
    scores: list[Score]
    generations: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """As ladder.json has it."""
        rungs = [asdict(each) for each in self.scores]
        return {"rows": self.rows, "tokens": self.tokens, "confidence": CONFIDENCE, "rungs": rungs}

    def metrics(self) -> dict[str, Any]:
        """Flat, for the lineage and trackers: `gptq_kl`, `gptq_metrics.json_valid`, `gptq_general.loss`."""
        return {f"{each.name}_{key}": value for each in self.scores for key, value in _flat(each).items()}


def climb(
    rungs: Sequence[Rung],
    rows: Sequence[RenderedRow],
    tokenizer: Any,
    settings: Settings,
    scratch: Path,
    progress: Callable[[int, int, str], None],
    compared: Sequence[RenderedRow] = (),
    observe: Sequence[Callable[[Rung, Any], None]] = (),
    general: Sequence[RenderedRow] = (),
) -> Ladder:
    """Score every rung, the trained one first (it is the reference).

    compared: rows with answers of which one is better; rewards are against the rung that training began from.
    general: rows of general text.
    observe: each is called with every rung and its model, while that is loaded.
    """
    listed = list(rows)  # stored rows are made anew every time they are asked for
    rows = sorted(listed, key=lambda row: len(row.input_ids), reverse=True)
    tokens = labelled_tokens(rows)
    if not tokens:
        raise UserError("no answer token in data.eval", "data.eval", "`qlora check` shows how its rows are rendered")
    reference = Reference(scratch / "reference.f16", tokens)
    about_general = Reference(scratch / "general.f16", labelled_tokens(general), "evaluate.general_tokens")
    measure = _Measure(rows, answers_of(compared), general, tokenizer, settings, reference, about_general)
    measured: dict[str, Measured] = {}
    texts: dict[str, dict[int, str]] = {}
    tasks: dict[str, dict[str, Any]] = {}
    try:
        order = sorted(rungs, key=lambda rung: rung.name != TRAINED)
        for index, rung in enumerate(order):
            progress(index, len(order), rung.label)
            model = rung.load()
            measured[rung.name], texts[rung.name] = measure(model, is_reference=rung.name == TRAINED)
            if settings.tasks is not None:
                tasks[rung.name] = settings.tasks(model)
            for look in observe:
                look(rung, model)
            del model
            release_memory()
        progress(len(order), len(order), "")
    finally:
        reference.discard()
        about_general.discard()
    found = figures_of(measured, np.array([row.answer_text is not None for row in rows]), measure.compared)
    scores = [_score(rung, found, tasks.get(rung.name, {})) for rung in rungs]
    asked = [row for row in listed if row.answer_text is not None] if settings.metrics else []
    kept = [asked[index] for index in spread(len(asked), settings.examples)]
    in_order = {rung.name: texts[rung.name] for rung in rungs}
    return Ladder(len(rows), tokens, scores, _side_by_side(kept, in_order, tokenizer))


@dataclass(frozen=True)
class _Measure:
    """Measures a model on everything that is asked for."""

    rows: Sequence[RenderedRow]
    compared: Sequence[RenderedRow]
    general: Sequence[RenderedRow]
    tokenizer: Any
    settings: Settings
    reference: Reference
    about_general: Reference

    def __call__(self, model: Any, *, is_reference: bool) -> tuple[Measured, dict[int, str]]:
        """What was measured, and the generated answers by the id of their row."""
        settings, pad = self.settings, self.settings.pad_token_id
        rows = score(model, self.rows, settings.batch_size, pad, self.reference, is_reference=is_reference)
        general = None
        if self.general:
            size = settings.general_batch
            general = score(model, self.general, size, pad, self.about_general, is_reference=is_reference)
        asked = [row for row in self.rows if row.answer_text is not None] if settings.metrics else []
        texts, right = [], {}
        if asked:
            texts = generate(model, asked, self.tokenizer, settings.batch_size, settings.max_new_tokens)
            right = judged(settings.metrics, asked, texts)
        logps_A = None
        if self.compared:
            padded = partial(batches, size=settings.batch_size, pad_token_id=pad, device=input_device(model))
            logps_A = answer_logps(model, self.compared, padded).numpy()
        by_row = {id(row): text for row, text in zip(asked, texts, strict=True)}
        return Measured(rows, right, general, logps_A), by_row


def _side_by_side(
    rows: Sequence[RenderedRow], texts: dict[str, dict[int, str]], tokenizer: Any
) -> list[dict[str, Any]]:
    """Rows of generations.json; `texts` has the answers by rung and by the id of their row."""
    return [
        {
            "prompt": tokenizer.decode(row.input_ids[: row.prompt_length]),
            "expected": row.answer_text,
            "answers": {name: answers[id(row)] for name, answers in texts.items()},
        }
        for row in rows
    ]


def _score(rung: Rung, found: dict[str, Figures], tasks: dict[str, Any]) -> Score:
    figures = found[rung.name]
    always = {key: float(figures.figures[key][0]) for key in ("loss", "perplexity", "kl", "top1")}
    optional = {key: figures.value(key) for key in ("gain_retained", "exact_match", "preferred", "margin")}
    return Score(
        rung.name,
        rung.label,
        **always,
        **optional,  # type: ignore[arg-type]
        intervals=figures.intervals(),
        noise=figures.noise(found[TRAINED]) if rung.name != TRAINED else {},
        metrics=figures.below("metrics"),
        general=figures.below("general") or None,
        tasks=tasks,
    )


def _flat(score: Score) -> dict[str, float | None]:
    plain: dict[str, float | None] = {
        key: value for key, value in asdict(score).items() if not isinstance(value, (dict, str))
    }
    below: dict[str, float | None] = {f"metrics.{key}": value for key, value in score.metrics.items()}
    below |= {f"general.{key}": value for key, value in (score.general or {}).items()}
    below |= {
        f"tasks.{task}.{name}": figure["value"] for task, found in score.tasks.items() for name, figure in found.items()
    }
    return plain | below


def release_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
