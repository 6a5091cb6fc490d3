"""What each stage does with a recipe: hands the run's recipe, data and directories to the module that does the work.

Every stage function writes into the folder it is given and returns metrics for the lineage.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from qlora.artifacts import file_digest, read_json, write_json
from qlora.errors import Problem, UserError
from qlora.paths import RunDir
from qlora.recipe import Recipe

Progress = Callable[[int, int, str], None]


class Run:
    """A recipe being executed: its directories, device, base, tokenizer and rendered rows, each found once."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.dirs = RunDir(recipe.run_dir)
        self.log: Callable[[str, dict[str, Any], int | None], None] = lambda stage, metrics, step: None

    @cached_property
    def device(self) -> str:
        from qlora.models.loading import pick_device

        return pick_device(self.recipe.device)

    @cached_property
    def base(self) -> Any:
        from qlora.models.base import resolve_base

        return resolve_base(self.recipe.model.base, self.recipe.model.revision)

    @cached_property
    def tokenizer(self) -> Any:
        """The base's tokenizer with the chat template that the rows are rendered with."""
        from qlora.models.loading import load_tokenizer

        return load_tokenizer(self.base.directory, self.recipe.model.trust_remote_code)

    @cached_property
    def train_rows(self) -> Any:
        """`PreparedData` of the training split."""
        return self._prepare(self.recipe.data.train, "train")

    @cached_property
    def eval_rows(self) -> Any:
        """`PreparedData` of the held-out split; None if the recipe has none."""
        return self._prepare([self.recipe.data.eval], "eval") if self.recipe.data.eval is not None else None

    def _prepare(self, sources: list[Any], split: str) -> Any:
        from qlora.data.rendering import prepare

        prepared = prepare(sources, self.tokenizer, self.recipe.data, split_name=split)
        if prepared.chat_template is not None:
            self.tokenizer.chat_template = prepared.chat_template
        return prepared

    def digests(self) -> dict[str, Any]:
        """Digests of what the recipe reads besides the base, by key, for fingerprints: content, not paths."""
        from qlora.data.sources import source_digest

        data, mix = self.recipe.data, self.recipe.quantize.calibration.mix
        template = Path(data.chat_template) if data.chat_template else None
        return {
            "data.train": [source_digest(source) for source in data.train],
            "data.eval": source_digest(data.eval) if data.eval is not None else None,
            "data.chat_template": file_digest(template) if template and template.is_file() else data.chat_template,
            "quantize.calibration.mix.path": file_digest(Path(mix.path)) if mix and Path(mix.path).is_file() else None,
        }


def train(run: Run, fingerprint: str, output: Path | None, progress: Progress) -> dict[str, Any]:
    from qlora.training.callbacks import Reporter
    from qlora.training.sft import train_adapter

    rows = run.train_rows
    metrics = train_adapter(
        run.recipe,
        run.base,
        run.tokenizer,
        rows.rows,
        run.eval_rows.rows if run.eval_rows is not None else [],
        device=run.device,
        checkpoints=run.dirs.checkpoints,
        fingerprint=fingerprint,
        output=output,
        reporter=Reporter(progress, lambda values, step: run.log("train", values, step)),
    )
    _release_memory()
    return metrics | {"data": asdict(rows.statistics)}


def merge(run: Run, fingerprint: str, output: Path | None, progress: Progress) -> dict[str, Any]:
    from qlora.merging import merge_adapter
    from qlora.models.loading import DTYPES

    assert output is not None
    section = run.recipe.merge
    report = merge_adapter(
        run.base.directory,
        run.dirs.adapter,
        output,
        base=section.base,
        dtype=DTYPES[section.dtype],
        device=run.device,
        max_shard_bytes=int(section.max_shard_gb * 1e9),
        progress=progress,
    )
    return asdict(report)


def quantize(run: Run, fingerprint: str, output: Path | None, progress: Progress) -> dict[str, Any]:
    from qlora.data.calibration import calibration_rows
    from qlora.data.sources import load_texts
    from qlora.quantization import GPTQSettings, quantize_checkpoint

    assert output is not None
    section = run.recipe.quantize
    calibration, mix = section.calibration, section.calibration.mix
    rows = calibration_rows(
        run.train_rows.rows,
        samples=calibration.samples,
        max_length=calibration.max_length,
        seed=run.recipe.seed,
        exclude=run.eval_rows.rows if run.eval_rows is not None else (),
        mix=(load_texts(mix.path), mix.share) if mix is not None else None,
        tokenizer=run.tokenizer,
    )
    settings = GPTQSettings(**section.model_dump(exclude={"calibration"}))
    report = quantize_checkpoint(
        run.dirs.merged,
        output,
        rows,
        settings,
        device=run.device,
        progress=progress,
        attn_implementation=run.recipe.model.attn_implementation,
        trust_remote_code=run.recipe.model.trust_remote_code,
    )
    _release_memory()
    tokens = sum(map(len, rows))
    return asdict(report) | {"calibration_rows": len(rows), "calibration_tokens": tokens}


def evaluate(run: Run, fingerprint: str, output: Path | None, progress: Progress) -> dict[str, Any]:
    from qlora.evaluation.ladder import Settings, climb

    assert output is not None
    if run.eval_rows is None:
        raise UserError("there is nothing to measure on", "data.eval", "name a file of held-out rows in data.eval")
    section = run.recipe.evaluate
    rows = run.eval_rows.rows[: section.rows]
    settings = Settings(section.batch_size, section.generate, section.max_new_tokens, run.tokenizer.pad_token_id)
    scores = climb(_rungs(run), rows, run.tokenizer, settings, output, progress)
    tokens = sum(row.supervised_tokens for row in rows)
    write_json(
        output / "ladder.json", {"rows": len(rows), "tokens": tokens, "rungs": [asdict(score) for score in scores]}
    )
    return {f"{score.name}_{key}": value for score in scores for key, value in asdict(score).items() if key != "label"}


def _rungs(run: Run) -> list[Any]:
    from qlora.evaluation.ladder import BASE, TRAINED, Rung
    from qlora.models.loading import DTYPES, load_base, load_gptq, load_plain, load_trained

    model, device, quantized = run.recipe.model, run.device, run.recipe.model.quantization != "none"
    dtype = DTYPES[model.compute_dtype]
    load = partial(load_base, run.base.directory, model, device)
    kind = model.quantization.upper()
    options: dict[str, Any] = {
        "attn_implementation": model.attn_implementation,
        "trust_remote_code": model.trust_remote_code,
    }
    merged = partial(load_plain, run.dirs.merged, dtype, device, **options)
    rungs = [
        Rung(BASE, "base, 16 bits", lambda: load(quantized=False).eval()),
        Rung("nf4", f"base, {kind}", lambda: load(quantized=True).eval()),
        Rung(TRAINED, f"trained, {kind} + LoRA", lambda: load_trained(load(quantized=True), run.dirs.adapter)),
        Rung("merged", "merged" if run.recipe.merge.base == "dequantized" else "merged, original base", merged),
        Rung(
            "gptq",
            f"GPTQ, {run.recipe.quantize.bits} bits, group {run.recipe.quantize.group_size}",
            partial(load_gptq, run.dirs.gptq, dtype, device, **options),
        ),
    ]
    return [rung for rung in rungs if quantized or rung.name != "nf4"]


def failed_gates(recipe: Recipe, ladder: dict[str, Any]) -> list[Problem]:
    """The gates of the recipe that the ladder misses."""
    gates = recipe.evaluate.gates
    rungs = {rung["name"]: rung for rung in ladder["rungs"]}
    checks = [
        ("merge_kl", "KL to the trained model", "merged", "kl", gates.merge_kl, "at most"),
        ("kl", "KL to the trained model", "gptq", "kl", gates.kl, "at most"),
        ("top1", "top-1 agreement", "gptq", "top1", gates.top1, "at least"),
        ("gain_retained", "gain retained", "gptq", "gain_retained", gates.gain_retained, "at least"),
        ("exact_match", "exact match", "gptq", "exact_match", gates.exact_match, "at least"),
    ]
    problems = []
    for key, title, rung, figure, limit, relation in checks:
        value = rungs[rung][figure]
        if limit is None or (key == "merge_kl" and recipe.merge.base == "original"):
            continue
        shown = "not defined" if value is None else f"{value:.4f}"
        if value is None or (value > limit if relation == "at most" else value < limit):
            problems.append(
                Problem(
                    f"{title} of the {rung} model is {shown}, the gate wants {relation} {limit:g}",
                    f"evaluate.gates.{key}",
                    ADVICE[rung],
                )
            )
    return problems


ADVICE = {
    "merged": "the merge is not the trained model: report this with lineage.json",
    "gptq": "try a smaller group_size, more bits or more calibration samples, or relax the gate",
}


def read_ladder(dirs: RunDir) -> dict[str, Any]:
    return read_json(dirs.evaluation / "ladder.json")


def summary(stage: str, metrics: dict[str, Any]) -> str:
    """A few words about a stage's metrics."""
    if stage == "train":
        loss = metrics["final_loss"] if metrics["final_loss"] is not None else metrics["mean_loss"]
        rate = f", {metrics['tokens_per_second']:,.0f} tok/s" if metrics["tokens_per_second"] else ""
        return f"{metrics['steps']} steps, loss {loss:.3f}{rate}"
    if stage == "merge":
        return f"{metrics['merged_modules']} layers merged in fp32, base as trained"
    if stage == "quantize":
        return f"{len(metrics['modules'])} layers, {metrics['calibration_tokens']:,} calibration tokens"
    return f"KL of GPTQ to trained {metrics['gptq_kl']:.4f}, of merged {metrics['merged_kl']:.4f}"


def _release_memory() -> None:
    from qlora.evaluation.ladder import release_memory

    release_memory()
