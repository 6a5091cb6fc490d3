"""What metrics of a run's stages say in words: a line per stage, the label of the result, notes below the ladder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlora.recipe import Quantize, Recipe


def summary(stage: str, metrics: Mapping[str, Any]) -> str:
    """A few words about a stage's metrics."""
    if stage == "train" and "combined" in metrics:
        return f"{metrics['combined']} adapters combined, {metrics['parameters'] / 1e6:,.2f} M parameters"
    if stage == "train":
        loss = metrics["final_loss"] if metrics["final_loss"] is not None else metrics["mean_loss"]
        rate = f", {metrics['tokens_per_second']:,.0f} tok/s" if metrics["tokens_per_second"] else ""
        best = f", the best at step {metrics['best']['step']}" if metrics.get("best") else ""
        return f"{metrics['steps']} steps, loss {loss:.3f}{best}{rate}"
    if stage == "merge":
        done = "merged in fp32" if metrics["weights_written"] else "checked, no weights written"
        return f"{metrics['merged_modules']} layers {done}, base as trained"
    if stage == "quantize":
        refined = metrics.get("refine")
        gained = f", KL on held-back rows {_change(refined)}" if refined else ""
        undone = ", not kept" if refined and not refined["kept"] else ""
        return f"{len(metrics['modules'])} layers, {metrics['calibration_tokens']:,} calibration tokens{gained}{undone}"
    merged = f"of merged {metrics['merged_kl']:.4f}" if "merged_kl" in metrics else "merged not measured"
    return f"KL of GPTQ to trained {metrics['gptq_kl']:.4f}, {merged}"


def quantized_label(section: Quantize, metrics: Mapping[str, Any]) -> str:
    """The quantized model's name in the ladder. `metrics` of the quantize stage say whether refinement was kept."""
    by = "" if section.engine == "native" else f" by {section.engine}"
    mixed = ", some modules otherwise" if section.modules or section.skip else ""
    refined = ", refined" if (metrics.get("refine") or {}).get("kept") else ""
    return f"{section.method.upper()}{by}, {section.bits} bits, group {section.group_size}{mixed}{refined}"


def ladder_notes(recipe: Recipe) -> list[str]:
    """What the ladder of this recipe does not show, and why."""
    quantization = recipe.model.quantization
    if not recipe.merge.write:
        note = "merged: not measured, because merge.write is false and it is not on disk; merge_kl did not apply"
        kinds = {"none": None, "checkpoint": "every weight", "int8": "every 8-bit code"}
        compared = kinds.get(quantization, "every 4-bit code")
        return [note + (f"; {compared} of the base was compared with that of training" if compared else "")]
    if quantization == "int8":
        return [
            "merged: on a GPU, int8 quantizes inputs of layers in training and not after the merge, which is part of "
            "this KL; the gate merge_kl did not apply"
        ]
    return []


def survival_notes(survival: Mapping[str, Any] | None) -> list[str]:
    """What is left of the update in the checkpoint, and which module is furthest off."""
    energy = survival["overall"]["energy"] if survival is not None else None
    if survival is None or energy is None:
        return []
    outputs = {module["name"]: module["output_error"] for module in survival["modules"]}
    error, worst = survival["overall"]["output_error"], survival["worst"][0]
    off = f"; outputs of modules are {error:.1%} off, most in {worst}: {outputs[worst]:.1%}" if error else ""
    return [f"survival: {energy:.0%} of the update is left after quantization, along itself{off}"]


def merges_notes(merges: Mapping[str, Any] | None) -> list[str]:
    """Which of two merges to ship."""
    if merges is None:
        return []
    if merges["ship"] == "either":
        return [f"Both merges do; {merges['why']}"]
    return [f"Ship the merge into the {merges['ship']} base: {merges['why']}"]


def quantize_notes(metrics: Mapping[str, Any]) -> list[str]:
    """A line for every way in which the quantized model got less than it was to get, from the stage's metrics."""
    notes = [*metrics["warnings"], *_dead_columns(metrics["modules"])]
    refined = metrics.get("refine")
    if refined and not refined["kept"]:
        notes.append(
            f"refinement was not kept, and scales are those of GPTQ: KL on {refined['held_out_rows']} held-back rows "
            f"{_change(refined)}"
        )
    return [f"quantized: {note}" for note in notes]


def _dead_columns(modules: list[Mapping[str, Any]]) -> list[str]:
    dead = [module for module in modules if module["dead_columns"]]
    if not dead:
        return []
    total = sum(module["dead_columns"] for module in dead)
    return [
        f"{total} inputs of {len(dead)} modules were zero on every calibration token ({dead[0]['name']}: "
        f"{dead[0]['dead_columns']} of {dead[0]['inputs']}); their weights were rounded to nearest"
    ]


def _change(refined: Mapping[str, Any]) -> str:
    return f"{refined['kl_before']:.4f} → {refined['kl_after']:.4f}"
