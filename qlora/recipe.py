"""The schema of a recipe: a section per stage; every key has a type, a default and a sentence on what it does.

Reading a file, `extends`, overrides and error positions live in `qlora.recipe_file`. Unknown keys are errors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from qlora.recipe_learning import Data, Lora, Model, Source, Train, Weighted
from qlora.recipe_section import PositiveInt, Section, Share
from qlora.recipe_shipping import CALIBRATION_NAMES, Calibration, Merge, Mix, ModuleSettings, Quantize, Refine

__all__ = [
    "CALIBRATION_NAMES", "Calibration", "Data", "Evaluate", "Gates", "Lora", "Merge", "Mix", "Model",
    "ModuleSettings", "Quantize", "Recipe", "Refine", "Section", "Source", "Track", "Train", "Weighted",
]  # fmt: skip


class Gates(Section):
    kl: Annotated[float, Field(gt=0)] | None = None
    """Highest KL divergence per answer token from the trained to the GPTQ model."""
    top1: Share | None = None
    """Lowest share of answer tokens on which both pick the same token."""
    gain_retained: Annotated[float, Field(gt=0, le=1)] | None = None
    """Lowest share of the fine-tune's loss improvement that the GPTQ model keeps."""
    exact_match: Annotated[float, Field(gt=0, le=1)] | None = None
    """Lowest share of generated answers that equal the reference (needs evaluate.generate)."""
    preferred: Annotated[float, Field(gt=0, le=1)] | None = None
    """Lowest share of comparisons that the better answer wins (needs rows of format preference or kto)."""
    merge_kl: Annotated[float, Field(gt=0)] | None = 0.01
    """Highest KL divergence from the trained to the merged model; more means the merge is not exact. Does not apply
    where the merged model is not measured (merge.write: false) or differs by intent (merge.base: original, and
    model.quantization: int8, which quantizes inputs on a GPU too)."""


class Evaluate(Section):
    rows: PositiveInt | None = 200
    """Rows of data.eval to use; null for all."""
    batch_size: PositiveInt = 8
    """Rows per forward pass."""
    generate: bool = False
    """Also generate answers and count exact matches."""
    max_new_tokens: PositiveInt = 256
    """Longest generated answer."""
    device: Literal["auto", "cpu", "cuda"] | None = None
    """Where this stage computes; null: as `device` says."""
    memory: Literal["auto"] | Annotated[float, Field(gt=0)] = "auto"
    """GiB that evaluation may take of each GPU; auto: what is free, but for a tenth. Models in 16 bits that are larger
    lie on all GPUs that are visible and in host memory."""
    gates: Gates = Gates()
    """Thresholds; a run that misses one ends with exit code 3 and keeps its artefacts."""


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
