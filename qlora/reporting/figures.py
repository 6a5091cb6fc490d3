"""The figures that a run is described by: what each is called, how it is written, and what it means in plain words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Figure:
    """A number of a rung or a module. `form`: a format specification. `higher`: whether more is better.

    plain: the title for who does not know it. ideal: what is best, where more than that is as bad as less. span: how
    far the worst must be from the best before it looks bad.
    """

    key: str
    title: str
    form: str
    higher: bool
    meaning: str
    plain: str = ""
    ideal: float | None = None
    span: float = 0.0

    def badness(self, value: float) -> float:
        """A number that is larger where the figure is worse."""
        return abs(value - self.ideal) if self.ideal is not None else -value if self.higher else value

    def show(self, value: float | None) -> str:
        """A dash for what was not measured or is not defined."""
        if value is None:
            return "–"
        if self.form == ".4f" and 0 < abs(value) < 1e-4:
            return f"{value:.5f}" if abs(value) >= 1e-5 else "< 0.00001"
        return format(value, self.form)

    def brief(self, value: float | None) -> str:
        """As `show`, in a sentence: without zeros behind the point."""
        number, percent, _ = self.show(value).partition("%")
        return (number.rstrip("0").rstrip(".") if "." in number else number) + percent


LADDER = (
    Figure(
        "loss",
        "Loss",
        ".4f",
        False,
        "How surprised the model is by the right answer, per token. Lower is better; 0 would be certainty.",
        plain="Loss on the held-out answers",
    ),
    Figure(
        "perplexity",
        "Perplexity",
        ".3f",
        False,
        "The same as a count: among how many equally likely tokens the model seems to choose. 1 is the best there is.",
    ),
    Figure(
        "kl",
        "KL",
        ".4f",
        False,
        "How far the predictions are from the trained model's, in nats per token. 0 is the same model; below 0.01 "
        "nobody will notice; from about 0.1 on answers begin to differ.",
        plain="Distance to the trained model (KL)",
    ),
    Figure(
        "top1",
        "Same token",
        ".2%",
        True,
        "How often the token that the model finds most likely to come next is the trained model's too.",
        plain="Same next token as the trained model",
    ),
    Figure(
        "gain_retained",
        "Gain kept",
        ".1%",
        True,
        "Of what fine-tuning gained in loss over the base in 16 bits, the share that is left.",
        plain="Kept of what fine-tuning gained",
    ),
    Figure(
        "exact_match",
        "Exact",
        ".1%",
        True,
        "The share of written answers that are the expected ones, letter by letter.",
        plain="Answers right to the letter",
    ),
    Figure(
        "preferred",
        "Preferred",
        ".1%",
        True,
        "How often the better of two answers is the one that the model favours.",
        plain="The better of two answers favoured",
    ),
    Figure(
        "margin", "Margin", ".2f", True, "By how much the better answer is favoured over the other, in nats of reward."
    ),
)

SURVIVAL = (
    Figure(
        "output_error",
        "Output error",
        ".4f",
        False,
        "How far what the module puts out is from what it puts out in the trained model, given the same inputs from "
        "held-out rows, relative to their size: 0.05 is 5 % off, 0 no loss. This is what rounding costs here.",
        ideal=0.0,
        span=0.1,
    ),
    Figure(
        "energy",
        "Update kept",
        ".3f",
        True,
        "How much of what training changed is found in the compressed weights, along its own direction. 1 is all of "
        "it, 0 none; slightly above 1 is rounding that happens to push the same way. It is near 1 whatever rounding "
        "costs, and near 0 where the weights are not of this training.",
        ideal=1.0,
        span=0.25,
    ),
    Figure(
        "cosine",
        "Direction kept",
        ".3f",
        True,
        "Of all that sets the compressed weights apart from the base, how much is the training's update (cosine); the "
        "rest is rounding. Small where the update is smaller than a step of the 4-bit grid, which alone is no loss.",
    ),
    Figure(
        "expected_error",
        "Expected error",
        ".4f",
        False,
        "The output error that the quantizer itself reckoned with, on its calibration rows.",
        ideal=0.0,
        span=0.1,
    ),
    Figure(
        "weight_error",
        "Weight error",
        ".4f",
        False,
        "How far the compressed weights are from the merged ones, relative to their size. Only the part of it that "
        "inputs meet reaches the outputs.",
        span=0.2,
    ),
    Figure(
        "codes_changed",
        "Codes changed",
        ".2%",
        False,
        "The share of the stored codes that are others than without the update. Neither good nor bad: it shows where "
        "training made itself felt.",
    ),
)
"""Of every module, in the order in which they are shown: what rounding costs, then what is left of the update."""
UPDATE_KEPT = next(figure for figure in SURVIVAL if figure.key == "energy")

RUNGS = {
    "base": "the model before any fine-tuning",
    "nf4": "the same, compressed for training: where training began",
    "trained": "with what was learned (LoRA adapter): what every other model is compared with",
    "merged": "what was learned is written into the weights, in 16 bits",
    "gptq": "compressed again: the checkpoint to ship",
}

STAGES = {
    "train": "learns the adapter on the compressed base",
    "merge": "writes the adapter into the weights, exactly",
    "quantize": "compresses the merged model for serving",
    "evaluate": "measures every model on held-out rows",
}


def value(rung: Mapping[str, Any], key: str) -> float | None:
    """A figure of a rung; `metrics.NAME` and `general.NAME` are nested. None if it was not measured."""
    found: Any = rung
    for part in key.split(".", 1):
        found = (found or {}).get(part)
    return found


def interval(rung: Mapping[str, Any], key: str) -> tuple[float, float] | None:
    """Where the figure lies with the ladder's confidence; None if that is not known."""
    found = (rung.get("intervals") or {}).get(key)
    if not found or None in found:
        return None
    return found[0], found[1]


def measured_figures(rungs: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """Figures that any rung has, metrics of answers included; perplexity and gain say nothing about preferences."""
    compared = any(rung.get("preferred") is not None for rung in rungs)
    found = [figure for figure in LADDER if any(rung.get(figure.key) is not None for rung in rungs)]
    if compared:
        found = [figure for figure in found if figure.key not in ("perplexity", "gain_retained")]
    names = dict.fromkeys(name for rung in rungs for name in rung.get("metrics") or {})
    return found + [figure_of(f"metrics.{name}") for name in names]


def figure_of(key: str) -> Figure:
    """The figure of a key, also of one that a recipe names."""
    known = {figure.key: figure for figure in LADDER}
    if key in known:
        return known[key]
    if key == "survival":
        return replace(UPDATE_KEPT, key=key, form=".1%", plain="Kept of the training's update, over all layers")
    kind, _, name = key.partition(".")
    name = name or key
    if kind == "general" and name in known:
        figure = known[name]
        return replace(figure, key=key, title=f"{figure.title}, general text", plain="")
    return Figure(key, name, ".1%", True, f"The share of written answers that pass the check {name}.")


def is_noise(rung: Mapping[str, Any], key: str) -> bool:
    """Whether the ladder says that the figure cannot be told from the trained model's."""
    return bool((rung.get("noise") or {}).get(key))


def inside_noise(ladder: Mapping[str, Any]) -> bool | None:
    """Whether the quantized model's loss cannot be told from the trained one's; None if no interval says so."""
    rungs = {rung["name"]: rung for rung in ladder["rungs"]}
    quantized, trained = rungs.get("gptq", {}), rungs.get("trained", {})
    if "loss" in (quantized.get("noise") or {}):
        return is_noise(quantized, "loss")
    if found := interval(quantized, "gain_retained"):
        return found[0] <= 1 <= found[1]
    found, loss = interval(quantized, "loss"), value(trained, "loss")
    return None if found is None or loss is None else found[0] <= loss <= found[1]


def size(count: float) -> str:
    """Bytes as `1.2 GiB` or `86 MiB`."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**29 else f"{count / 2**20:.0f} MiB"
