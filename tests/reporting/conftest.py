"""A run as its directory tells of it, with everything measured that can be: made of numbers, without a model."""

import json
import random
from pathlib import Path

import pytest
import yaml

from qlora.artifacts import digest
from qlora.paths import RunDir
from qlora.recipe_file import dump_recipe, load_recipe

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
HOSTILE = '</script><script>window.hurt = 1</script><img src=x onerror="window.hurt=2"> & \'" ${x} \u202e'


@pytest.fixture(scope="session")
def write_run():
    """`write_run(folder, name, layers=…, without=(…), loss=…, hostile=…)` writes a run directory; returns it."""
    return _write_run


def _write_run(
    folder: Path,
    name: str = "shown",
    *,
    layers: int = 4,
    without: tuple[str, ...] = (),
    quantized_loss: float = 0.612,
    overrides: tuple[str, ...] = (),
    hostile: bool = False,
    failed: bool = False,
) -> Path:
    dirs = RunDir(folder / name)
    odd = HOSTILE if hostile else ""
    recipe = {
        "name": name,
        "output_dir": str(folder),
        "model": {"base": "org/base"},
        "data": {"train": [{"path": f"rows{odd}.jsonl"}], "eval": {"path": "held-out.jsonl"}},
        "evaluate": {"gates": {"kl": 0.001 if failed else 0.05, "gain_retained": 0.9}},
    }
    dirs.root.mkdir(parents=True)
    draft = dirs.root / "draft.yaml"
    draft.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    dirs.recipe.write_text(dump_recipe(load_recipe(draft, overrides)), encoding="utf-8")
    draft.unlink()
    dirs.lineage.write_text(json.dumps({"stages": _stages(odd)}), encoding="utf-8")
    parts = {
        "ladder": _ladder(quantized_loss, odd),
        "survival": _survival(layers, odd, odd and failed),
        "generations": _generations(odd),
        "contract": _contract(odd, odd and failed),
        "merges": _merges(_ladder(quantized_loss, odd)["rungs"][-1], odd),
    }
    dirs.evaluation.mkdir()
    for part, content in parts.items():
        if part not in without:
            (dirs.evaluation / f"{part}.json").write_text(json.dumps(content), encoding="utf-8")
    return dirs.root


def _stages(odd: str) -> dict:
    versions = {"qlora": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"}
    curve = [{"step": step, "loss": 2.5 / step + 0.5, "grad_norm": 1.0} for step in range(1, 41)]
    curve += [{"step": step, "eval_loss": 2.6 / step + 0.6} for step in (10, 20, 30, 40)]
    data = {"rows_read": 640, "rows": 639, "truncated": 2, "dropped": 1, "tokens": 39_793, "supervised_tokens": 17_473}
    metrics = {
        "train": {
            "final_loss": 0.56, "mean_loss": 0.8, "steps": 40, "tokens_per_second": 340.0, "processes": 1,
            "plan": f"1 forward of up to 516 tokens{odd}", "curve": curve,
            "data": data | {"longest": 73, "held_out": 0, "removed": 0},
        },
        "merge": {"merged_modules": 28},
        "quantize": {
            "calibration_rows": 64, "calibration_tokens": 4015, "modules": [], "warnings": [odd] if odd else [],
        },
        "evaluate": {},
    }  # fmt: skip
    weights = {"merge": 269_030_016, "quantize": 98_000_000}
    found = {}
    for number, (name, each) in enumerate(metrics.items()):
        file = "model.safetensors" if name in weights else f"some{odd}.json"
        size = weights.get(name, 2048)
        seconds = 20.0 * (number + 1)
        found[name] = {
            "status": "complete",
            "fingerprint": digest(name),
            "started": "2026-11-28T12:00:00+0000",
            "inputs": {"base": digest("base")},
            "versions": versions,
            "seconds": seconds,
            "expected": {"seconds": 1.3 * seconds, "host_gib": 3.0, "gpu_gib": None},
            "metrics": each | {"seconds": seconds, "host_peak_gib": 2.4, "gpu_peak_gib": None},
            "outputs": {file: {"bytes": size, "sha256": digest(file)}},
        }
    return found


def _ladder(quantized_loss: float, odd: str) -> dict:
    def rung(name: str, label: str, loss: float, kl: float, exact: float) -> dict:
        gain = (2.4 - loss) / (2.4 - 0.6)
        return {
            "name": name, "label": label + odd, "loss": loss, "perplexity": 2.718**loss, "kl": kl,
            "top1": max(0.5, 1 - kl / 4), "gain_retained": gain, "exact_match": exact, "preferred": None,
            "intervals": {
                "loss": [loss - 0.05, loss + 0.06], "kl": [kl * 0.8, kl * 1.3],
                "gain_retained": [gain - 0.02, gain + 0.02], "top1": [max(0.4, 1 - kl / 3), 1 - kl / 5],
                "exact_match": [exact * 0.9, min(1, exact * 1.05)],
            },
            "noise": {"loss": name in ("merged", "gptq")},
            "metrics": {f"json{odd}": exact}, "general": {"loss": 3 + kl / 9, "perplexity": 20.0, "kl": kl / 9},
            "tasks": {"arc_easy": {"acc": {"value": 0.5 + exact / 9, "stderr": 0.011}}},
        }  # fmt: skip

    rungs = [
        rung("base", "base, 16 bits", 2.4, 1.9, 0.0),
        rung("nf4", "base, NF4", 2.6, 2.1, 0.0),
        rung("trained", "trained, NF4 + LoRA", 0.6, 0.0, 0.96),
        rung("merged", "merged", 0.6001, 0.0002, 0.96),
        rung("gptq", "GPTQ, 4 bits, group 128", quantized_loss, 0.0093, 0.94),
    ]
    return {"rows": 50, "tokens": 1362, "confidence": 0.95, "rungs": rungs}


def _merges(rung: dict, odd: str) -> dict:
    return {"dequantized": rung, "original": rung | {"loss": 0.66}, "ship": "dequantized", "why": f"loss 0.6120{odd}"}


def _survival(layers: int, odd: str, differs: bool) -> dict:
    draw = random.Random(0)
    modules = []
    for layer in range(layers):
        for kind in KINDS:
            block = "self_attn" if kind in KINDS[:4] else "mlp"
            modules.append(
                {
                    "name": f"model.layers.{layer}.{block}.{kind}{odd}",
                    "layer": layer,
                    "kind": kind + odd,
                    "cosine": draw.uniform(0.5, 0.8),
                    "energy": draw.gauss(0.97, 0.015),
                    "codes_changed": draw.uniform(0.02, 0.1),
                    "weight_error": draw.uniform(0.05, 0.09),
                    "output_error": draw.uniform(0.02, 0.06) + 0.05 * (kind == "down_proj" and layer == 1),
                    "expected_error": draw.uniform(0.02, 0.05),
                }
            )
    modules.append(
        dict.fromkeys(modules[0], None) | {"name": "lm_head", "layer": None, "kind": "lm_head", "weight_error": 0.04}
    )
    figures = ("cosine", "energy", "codes_changed", "weight_error", "output_error", "expected_error")
    overall = {key: sum(module[key] for module in modules[:-1]) / len(modules[:-1]) for key in figures}
    worst = [module["name"] for module in sorted(modules[:-1], key=lambda module: module["energy"])[:5]]
    damaged = (
        [{"name": modules[0]["name"], "why": f"its scales are twice what its weights ask for{odd}"}] if differs else []
    )
    return {"modules": modules, "overall": overall, "worst": worst, "damaged": damaged}


def _generations(odd: str) -> dict:
    rows = []
    for number in range(6):
        expected = json.dumps({"item": "metal trays", "quantity": 40 + number, "name": "James", "day": "tue"})
        prompt = f"Please arrange metal trays for our partner James, {40 + number} of them, by Tuesday.{odd}"
        answers = {
            "base": f"Sure! I will arrange the trays.\nAnything else?{odd}",
            "trained": expected,
            "gptq": expected,
        }
        rows.append({"prompt": prompt, "expected": expected, "answers": answers})
    rows.append({"prompt": "Something long", "expected": None, "answers": {"gptq": "na " * 2000}})
    return {"rows": rows}


def _contract(odd: str, differs: bool) -> dict:
    engines = [
        {
            "engine": engine,
            "version": "1.2",
            "tensor_parallel": degree,
            "accepts": degree < 8,
            "reason": "" if degree < 8 else f"groups would be split among GPUs{odd}",
        }
        for engine in ("vLLM", "SGLang (Marlin)", "transformers + gptqmodel")
        for degree in (1, 2, 4, 8)
    ]
    tokens = {"bos": None, "eos": 2, "pad": 2, "chat_template_sha256": digest("template")}
    ids = {"ids": [1, 2], "text": odd}
    golden = [{"prompt": f"Hello{odd}", "prompt_ids": [1], "trained": ids, "gptq": ids}]
    mismatches = [f"gptq has another pad token than trained{odd}"] if differs else []
    return {
        "engines": engines,
        "tokens": tokens,
        "stages": {},
        "mismatches": mismatches,
        "golden": golden,
        "max_new_tokens": 48,
    }
