"""The schema of a recipe: a section per stage; every key has a type, a default and a sentence on what it does.

Reading a file, `extends`, overrides and error positions live in `qlora.recipe_file`. Unknown keys are errors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from qlora.recipe_learning import Data, Lora, Model, Source, Train, Weighted
from qlora.recipe_measuring import Evaluate, Gates
from qlora.recipe_publishing import Publish
from qlora.recipe_section import Section
from qlora.recipe_shipping import CALIBRATION_NAMES, Calibration, Merge, Mix, ModuleSettings, Quantize, Refine

__all__ = [
    "CALIBRATION_NAMES", "Calibration", "Data", "Evaluate", "Gates", "Lora", "Merge", "Mix", "Model",
    "ModuleSettings", "Publish", "Quantize", "Recipe", "Refine", "Section", "Source", "Track", "Train", "Weighted",
]  # fmt: skip


class Track(Section):
    to: list[Literal["wandb", "tensorboard"]] = []
    """Trackers to write to. Without an API key wandb writes an offline run."""
    project: str = "qlora"
    """Project of wandb."""


class Recipe(Section):
    """A recipe: what to fine-tune, on what, how, and what the result must hold."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the run; its directory is <output_dir>/<name>."""
    output_dir: str = "runs"
    """Folder of run directories, relative to where the command is started."""
    seed: int = 0
    """Seed of adapter initialisation, data order and calibration draw."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes a GPU if there is one."""
    model: Model
    """The base model and how it is quantized for training."""
    data: Data
    """Rows, their shape, and what is learned from them."""
    lora: Lora = Lora()
    """The adapter."""
    train: Train = Train()
    """The training run."""
    merge: Merge = Merge()
    """The exact merge."""
    quantize: Quantize = Quantize()
    """GPTQ."""
    evaluate: Evaluate = Evaluate()
    """The ladder and its gates."""
    track: Track = Track()
    """Experiment trackers."""
    publish: Publish | None = None
    """Where `qlora publish` puts the results; changes no stage."""

    @model_validator(mode="after")
    def _gates_have_data(self) -> Recipe:
        if self.evaluate.gates.exact_match is not None and not self.evaluate.generate:
            raise ValueError("evaluate.gates.exact_match needs evaluate.generate: true")
        return self

    @model_validator(mode="after")
    def _engine_has_weights(self) -> Recipe:
        if self.quantize.engine == "gptqmodel" and not self.merge.write:
            raise ValueError(
                "quantize.engine: gptqmodel reads the merged weights from disk, so it needs merge.write: true"
            )
        return self

    @model_validator(mode="after")
    def _float8_is_of_the_fused_path(self) -> Recipe:
        if self.model.compute_dtype == "float8" and (
            self.model.quantization in ("none", "int8") or self.train.kernels == "plain"
        ):
            raise ValueError(
                "model.compute_dtype: float8 is how the fused path multiplies with a base of 4-bit or packed codes: it "
                "needs model.quantization: nf4, fp4 or checkpoint, and train.kernels: auto"
            )
        return self

    @model_validator(mode="after")
    def _dora_is_not_of_int8(self) -> Recipe:
        if self.lora.dora and self.model.quantization == "int8":
            raise ValueError(
                "lora.dora: PEFT (0.21) loses the scales of 8-bit layers in DoRA's forward on a CPU; use "
                "model.quantization: nf4, fp4, checkpoint or none"
            )
        return self

    @model_validator(mode="after")
    def _loftq_has_something_to_make_up_for(self) -> Recipe:
        init, held, method = self.lora.init, self.model.quantization, self.train.method
        if init == "loftq" and held not in ("nf4", "fp4"):
            raise ValueError(f"lora.init: loftq makes up for quantization to 4 bits, and model.quantization is {held}")
        if init == "pissa" and held in ("int8", "checkpoint"):
            raise ValueError(f"lora.init: pissa quantizes what it leaves of the weights, to nf4 or fp4 and not {held}")
        if init in ("loftq", "pissa") and method in ("dpo", "kto"):
            raise ValueError(f"{method} compares with the base, which an adapter of {init} does not begin as")
        return self

    @model_validator(mode="after")
    def _copied_adapters_have_no_rows(self) -> Recipe:
        lora, method = self.lora, self.train.method
        if lora.start_from is not None and (lora.new_tokens or lora.train_tokens) and method in ("dpo", "kto"):
            raise ValueError(
                f"{method} with lora.start_from compares with a copy of that adapter, which TRL makes without its "
                "trained tokens: merge it first, and take the merged model as model.base"
            )
        return self

    @model_validator(mode="after")
    def _shards_are_of_4_bits(self) -> Recipe:
        if self.train.shard and self.model.quantization not in ("nf4", "fp4"):
            held = self.model.quantization
            raise ValueError(f"train.shard: processes share a base in nf4 or fp4, and model.quantization is {held}")
        if self.train.shard and self.lora.init == "pissa":
            raise ValueError("lora.init: pissa takes a part of whole weights, which no process has with train.shard")
        if self.train.shard and self.lora.dora:
            raise ValueError("lora.dora begins with the norms of whole weights, which no process has with train.shard")
        return self

    @model_validator(mode="after")
    def _biases_are_of_no_reference(self) -> Recipe:
        if self.lora.bias != "none" and self.train.method in ("dpo", "kto"):
            method = self.train.method
            raise ValueError(f"lora.bias trains biases of the base in place, and {method} measures answers against it")
        return self

    @property
    def merges_exactly(self) -> bool:
        """Whether the merged model is there to be measured, and differs from the trained one by rounding alone."""
        return self.merge.write and self.merge.base == "dequantized" and self.model.quantization != "int8"

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir) / self.name
