"""One seed of the quality study inside a process: its rows, reference and models, and the measurement of a variant."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from gptq_engines import Job, dense, run_job
from gptq_measure import KeptReference, perplexity, shared_windows, text_chunks

from qlora import stages
from qlora.artifacts import write_json
from qlora.data.calibration import CalibrationRow, calibration_rows
from qlora.errors import UserError
from qlora.evaluation.ladder import release_memory
from qlora.evaluation.scoring import score
from qlora.models.loading import load_base, load_gptq, load_plain, load_trained
from qlora.recipe import Recipe
from qlora.stages import Run

_opened: dict[int, Seed] = {}


def open_seed(seed: int, settings: dict[str, Any], recipe: dict[str, Any]) -> Seed:
    """The seed, opened once per process: rows are rendered and texts tokenized once for all variants."""
    transformers.utils.logging.disable_progress_bar()
    if seed not in _opened:
        _opened[seed] = Seed(seed, settings, recipe)
    return _opened[seed]


class Seed:
    """The trained and merged model of one seed, and what variants of it are measured on."""

    def __init__(self, seed: int, settings: dict[str, Any], recipe: dict[str, Any]) -> None:
        self.seed, self.settings, self.document = seed, settings, recipe
        self.run = Run(Recipe.model_validate(recipe))
        self.device: str = settings["device"]

    @cached_property
    def rows(self) -> list[Any]:
        """The test rows, longest first."""
        return sorted(self.run.eval_rows.rows, key=lambda row: len(row.input_ids), reverse=True)

    @cached_property
    def general_test(self) -> torch.Tensor:
        path = Path(self.settings["general_test"])
        return text_chunks(self.run.tokenizer, path, self.settings["chunk_length"], self.settings["chunks"])

    def reference(self, vocabulary: int) -> KeptReference:
        tokens = sum(row.supervised_tokens for row in self.rows)
        return KeptReference(self.run.dirs.root / "reference", tokens, vocabulary)

    def references(self) -> list[dict[str, Any]]:
        """Records of the trained model, which is kept as the reference, of both bases and of the merged model."""
        base, adapter = self.run.base.directory, self.run.dirs.adapter

        def load(quantized: bool) -> Any:
            return load_base(base, self.run.recipe.model, self.device, quantized=quantized)

        loaders: dict[str, Callable[[], Any]] = {
            "trained": lambda: load_trained(load(quantized=True), adapter, base),
            "base": lambda: load(quantized=False).eval(),
            "nf4": lambda: load(quantized=True).eval(),
            "merged": lambda: load_plain(self.run.dirs.merged, device=self.device),
        }
        return [{"seed": self.seed, "name": name} | self.measure(load, name) for name, load in loaders.items()]

    def measure(self, load: Callable[[], Any], name: str) -> dict[str, float]:
        """Loss, KL, top-1 and perplexity of a model, which is let go of afterwards."""
        model = load()
        reference = self.reference(model.config.get_text_config().vocab_size)
        is_reference = name == "trained"
        if not (reference.complete or is_reference):
            raise UserError(
                "the trained model was not measured yet", str(reference.directory), "run the phase reference"
            )
        store = is_reference and not reference.complete
        size, pad = self.settings["batch_size"], self.run.tokenizer.pad_token_id
        found = score(model, self.rows, size, pad, reference, is_reference=store)
        if store:
            reference.finish()
        general = perplexity(model, self.general_test)
        figures = {"loss": found.loss, "kl": found.kl, "top1": found.top1, "perplexity": general}
        del model
        release_memory()
        return figures

    def variant(self, variant: dict[str, Any]) -> dict[str, Any]:
        """Quantize as the variant says, measure the result, and remove it."""
        run = self.with_quantize(variant["quantize"])
        rows = self.calibration(run)
        output = self.run.dirs.root / "variants" / variant["name"]
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir(parents=True)
        quantize = self.with_ours if variant["engine"] == "ours" else self.with_peer
        seconds, load = quantize(run, variant, rows, output)
        section = run.recipe.quantize
        record = {"seed": self.seed, "name": variant["name"], "engine": variant["engine"]}
        record |= {"bits": section.bits, "group_size": section.group_size, "quantize": variant["quantize"]}
        record |= {"calibration_rows": len(rows), "calibration_tokens": sum(len(row.input_ids) for row in rows)}
        record |= seconds | self.measure(load, variant["name"])
        for folder in (output, dense(output)):
            shutil.rmtree(folder, ignore_errors=True)
        return record

    def with_quantize(self, section: dict[str, Any]) -> Run:
        """The seed's run with another quantize section; what does not depend on it is shared, not read again."""
        run = Run(Recipe.model_validate(self.document | {"quantize": section}))
        run.base, run.tokenizer = self.run.base, self.run.tokenizer
        run.train_rows, run.eval_rows = self.run.train_rows, self.run.eval_rows
        return run

    def calibration(self, run: Run) -> list[CalibrationRow]:
        """The calibration rows of a variant. Raises UserError if any of them is in the test files."""
        rows = calibration_rows(
            run.recipe.quantize.calibration,
            run.train_rows.rows,
            run.tokenizer,
            seed=run.recipe.seed,
            exclude=run.eval_rows.rows,
        )
        tests = [row.input_ids for row in self.rows] + self.general_test.tolist()
        shared = shared_windows([row.input_ids for row in rows], tests)
        if shared:
            raise UserError(
                f"{shared} windows of the calibration rows are in the test files", "--train, --general-valid"
            )
        return rows

    def with_ours(
        self, run: Run, variant: dict[str, Any], rows: list[CalibrationRow], output: Path
    ) -> tuple[dict[str, Any], Callable[[], Any]]:
        """Through the stage of `qlora quantize`, which draws the same rows from the recipe."""
        metrics = stages.quantize(run, "", output, lambda done, total, text: None)
        refine = metrics.get("refine") or {}
        seconds = {"quantize_seconds": metrics["seconds"], "refine_seconds": refine.get("seconds")}
        seconds |= {f"refine_{key}": refine.get(key) for key in ("kept", "kl_before", "kl_after")}
        return seconds, lambda: load_gptq(output, device=self.device)

    def with_peer(
        self, run: Run, variant: dict[str, Any], rows: list[CalibrationRow], output: Path
    ) -> tuple[dict[str, Any], Callable[[], Any]]:
        """Through the peer's own process; llmcompressor's result is measured as its own library decompresses it."""
        name, engine = f"{variant['name']}-seed-{self.seed}", variant["engine"]
        jobs = Path(self.settings["out"]) / "jobs"
        jobs.mkdir(exist_ok=True)
        rows_file = jobs / f"{name}.rows.json"
        write_json(rows_file, [list(row.input_ids) for row in rows])
        job = Job(
            engine=engine,
            model=str(self.run.dirs.merged.resolve()),
            rows=str(rows_file),
            output=str(output.resolve()),
            bits=run.recipe.quantize.bits,
            group_size=run.recipe.quantize.group_size,
            device=self.device,
            batch_rows=8 if engine == "gptqmodel" else 1,
            dense=engine == "llmcompressor",
            options=variant["options"],
        )
        (jobs / f"{name}.json").unlink(missing_ok=True)  # its checkpoint was removed after it was measured
        result = run_job(job, jobs, name, self.settings["python"])
        if "error" in result:
            raise RuntimeError(f"{result['error']} (log: {result['log']})")
        parts = result["runs"][-1]
        seconds = {
            "quantize_seconds": sum(parts[part] for part in ("load", "quantize", "save")),
            "refine_seconds": None,
        }
        if engine == "llmcompressor":
            return seconds, lambda: load_plain(dense(output), device=self.device)
        return seconds, lambda: load_gptq(output, device=self.device)
