"""The sections of a recipe from the adapter to the checkpoint that is deployed: merge and quantization."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from qlora.recipe_section import PositiveInt, Section

CALIBRATION_NAMES = ("train", "wikitext2", "c4")
"""What quantize.calibration.from takes besides hub ids, files and lists of strings."""
CalibrationSource = str | Annotated[list[str], Field(min_length=1)]


class Merge(Section):
    base: Literal["dequantized", "original"] = "dequantized"
    """What the adapter is added to: the dequantized base it was trained on (exact), or the 16-bit base."""
    write: bool = True
    """Write the merged weights. false: GPTQ reads base and adapter and merges in float32, layer by layer; no merged
    model is ever on disk, so it is not a rung of the ladder."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Dtype of the merged model; the sum is rounded to it once (weights that go straight to GPTQ are not rounded)."""
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    """Of the sum to 16 bits. To nearest, updates of less than half a step are gone, most of a short training's."""
    max_shard_gb: Annotated[float, Field(gt=0)] = 5.0
    """Largest safetensors file, in GB."""
    device: Literal["auto", "cpu", "cuda"] | None = None
    """Where this stage computes; null: as `device` says."""


class Mix(Section):
    from_: CalibrationSource = Field(alias="from")
    """Where the other rows come from; the same kinds as calibration.from."""
    share: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """Share of calibration tokens that come from it."""


class Calibration(Section):
    from_: CalibrationSource = Field(default="train", alias="from")
    """`train` (training rows, rendered as in training), `wikitext2`, `c4`, the hub id of a data set with a column
    `text`, a file (.txt: paragraphs separated by blank lines; or rows with a column `text`), or a list of strings. Text
    of a data set or file is joined and cut into rows of max_length tokens; strings of a list stay as they are."""
    samples: PositiveInt = 256
    """Rows, drawn with the recipe's seed; all of them where there are fewer. What is mixed in comes on top."""
    max_length: PositiveInt = 2048
    """Tokens per calibration row: general text fills them, training rows and strings are cut there."""
    mix: Mix | None = None
    """Rows of another kind mixed in, such as general text against forgetting what the fine-tune does not use."""


class Refine(Section):
    """Tuning of what the checkpoint holds beside its codes, after GPTQ, towards the merged model's predictions."""

    steps: PositiveInt = 50
    """Optimizer steps."""
    tokens_per_step: PositiveInt = 8192
    """Tokens of a step, padding included."""
    learning_rate: Annotated[float, Field(gt=0)] = 5e-4
    """Of the relative change of the scales of 4-bit weights, at its peak; twice that for every bit less."""
    norms: bool = True
    """Tune the weights of norms too."""
    norm_learning_rate: Annotated[float, Field(gt=0)] = 3e-4
    """Of the relative change of norms, at its peak."""
    samples: PositiveInt | None = None
    """Rows to learn from, drawn as calibration rows are; null: as many as hold the tokens of all steps."""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Rows that decide whether the result is kept, as a share of those learnt from: other training rows where some are
    left, else so many of these, which are then not learnt from."""


class ModuleSettings(Section):
    """Settings of some modules, where they differ from those of the whole model."""

    bits: Literal[2, 3, 4, 8] | None = None
    """Bits per weight."""
    group_size: Literal[-1, 32, 64, 128] | None = None
    """Input channels that share a scale."""
    sym: bool | None = None
    """Symmetric codes."""


class Quantize(Section):
    engine: Literal["native", "gptqmodel"] = "native"
    """What quantizes: qlora's own engine, or gptqmodel in the same process (needs qlora[gptq])."""
    method: Literal["gptq", "awq"] = "gptq"
    """GPTQ, or AWQ through gptqmodel (4 bits, sym: false)."""
    bits: Literal[2, 3, 4, 8] = 4
    """Bits per weight. Serving engines take 4 and 8."""
    group_size: Literal[-1, 32, 64, 128] = 128
    """Input channels that share a scale; must divide every layer's inputs. -1: one scale per output channel."""
    sym: bool = True
    """Symmetric codes (zero point in the middle). Serving engines want true."""
    act_order: bool = True
    """Visit columns by activation size, with static groups: better at no cost, and desc_act stays false."""
    true_sequential: bool = True
    """Inside a layer, calibrate each group of linears on the already quantized ones before it."""
    damp: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Share of the Hessian's mean diagonal added for stability; raised by itself where the Cholesky fails."""
    asymmetric_calibration: Annotated[float, Field(ge=0, le=1)] = 0.5
    """How far weights also make up for what quantization before them did to their inputs, so that outputs come close to
    the full model's: 0 not at all, 1 fully. Experts of mixtures do not: they see other tokens in the full model."""
    prompt_weight: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Weight of positions that carried no loss in training, in GPTQ and in refinement; those that did weigh 1."""
    refine: Refine | None = Refine()
    """Tune scales and norms after GPTQ, the native engine's; null: leave them as GPTQ chose them."""
    modules: dict[str, ModuleSettings] = {}
    """Regular expression, searched in full module names → settings that differ there. The first that matches counts."""
    skip: list[str] = []
    """Regular expressions, searched in full module names, of what stays in 16 bits. They come before `modules`."""
    calibration: Calibration = Calibration()
    """Where the calibration rows come from."""
    device: Literal["auto", "cpu", "cuda"] | None = None
    """Where this stage computes; null: as `device` says."""

    @model_validator(mode="before")
    @classmethod
    def _other_engines_do_not_refine(cls, section: Any) -> Any:
        if isinstance(section, dict) and section.get("engine", "native") != "native":
            if section.get("refine") is not None:
                raise ValueError("refine tunes what engine: native wrote; leave it out, or set it to null")
            return section | {"refine": None}
        return section

    @model_validator(mode="after")
    def _method_fits(self) -> Quantize:
        if self.method == "awq":
            wrong = [
                text
                for text, holds in (
                    ("engine: gptqmodel", self.engine == "gptqmodel"),
                    ("bits: 4", self.bits == 4),
                    ("sym: false (AWQ stores a zero point for every group, and engines expect it)", not self.sym),
                    (
                        "no modules and no skip (no reader of AWQ knows settings per module)",
                        not (self.modules or self.skip),
                    ),
                )
                if not holds
            ]
            if wrong:
                raise ValueError(f"method: awq needs {'; '.join(wrong)}")
        return self
