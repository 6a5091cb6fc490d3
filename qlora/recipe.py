"""The schema of a recipe: a section per stage; every key has a type, a default and a sentence on what it does.

Reading a file, `extends`, overrides and error positions live in `qlora.recipe_file`. Unknown keys are errors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from qlora.refused_args import REFUSED_TRAIN_ARGS

PositiveInt = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
CALIBRATION_NAMES = ("train", "wikitext2", "c4")
"""What quantize.calibration.from takes besides hub ids, files and lists of strings."""
CalibrationSource = str | Annotated[list[str], Field(min_length=1)]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        serialize_by_alias=True,
        validate_by_name=True,
        validate_by_alias=True,
    )


class Model(Section):
    base: str
    """Hub id, local directory with safetensors, or a .gguf file (converted once to safetensors in the cache)."""
    revision: str | None = None
    """Branch, tag or commit of a hub id. The commit found is written into the adapter's base.json."""
    quantization: Literal["nf4", "fp4", "none"] = "nf4"
    """How the frozen base is held during training: bitsandbytes 4-bit, or `none` for 16-bit LoRA."""
    double_quant: bool = True
    """Quantize the block scales too (0.37 bits per parameter less)."""
    compute_dtype: Literal["bfloat16", "float8", "float32"] = "bfloat16"
    """Dtype of activations, dequantized weights and all that is not 4-bit. float8: bfloat16, but training multiplies
    with frozen weights in 8 bits, which is faster and rounds more. float32 is for tests on small models."""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention of transformers. flash_attention_2 needs its own package."""
    trust_remote_code: bool = False
    """Run model code that comes with a checkpoint. Off unless you read that code."""

    @property
    def dtype(self) -> Literal["bfloat16", "float32"]:
        """What tensors are kept in; the merge and the ladder compute in it too."""
        return "bfloat16" if self.compute_dtype == "float8" else self.compute_dtype


class Source(Section):
    path: str
    """Local .json, .jsonl, .csv or .parquet file, folder of such, or saved data set, from the recipe; or a hub id."""
    config: str | None = None
    """Configuration of a hub data set."""
    split: str = "train"
    """Split of a hub data set."""
    revision: str | None = None
    """Revision of a hub data set."""
    format: Literal[
        "auto", "messages", "conversations", "prompt_completion", "instruction", "text", "preference", "kto"
    ] = "auto"
    """Shape of a row; auto recognises it by its columns."""
    columns: dict[str, str] = {}
    """What a format's columns are called here, such as `{question: problem, answer: solution}`."""
    max_rows: PositiveInt | None = None
    """Use only the first rows."""
    weight: Annotated[float, Field(gt=0, le=100)] = 1.0
    """How often each row comes in an epoch: 2 twice, 0.25 a quarter of the rows, always the same ones."""


class Data(Section):
    train: list[Source] = Field(min_length=1)
    """Rows to train on; calibration of GPTQ draws from them too."""
    eval: Source | None = None
    """Held-out rows for the ladder; never trained on, never used for calibration."""
    eval_share: Annotated[float, Field(ge=0, lt=1)] = 0.02
    """Of the training rows, held out where there is no `eval`, 500 at most: always the same ones. 0: none."""
    overlap: Literal["remove", "keep"] = "remove"
    """Training rows that are rows of `eval` too: leave them out of training, or keep them."""
    loss_on: Literal["completion", "assistant", "all"] = "completion"
    """Learn the last answer and its end-of-turn token only, those of every assistant turn, or every token."""
    max_length: PositiveInt = 2048
    """Tokens per row; what lies beyond is handled by `overlong`."""
    overlong: Literal["truncate", "drop"] = "truncate"
    """Cut rows that are too long on the right, or leave them out. Either is counted and reported."""
    chat_template: str | None = None
    """A named template (chatml, llama-3, …) or a .jinja file. Default: the tokenizer's own."""


class Lora(Section):
    r: PositiveInt = 16
    """Rank. Higher fits more and costs memory: r·(in+out) parameters per layer."""
    alpha: Annotated[float, Field(gt=0)] = 32
    """Scale: the update is alpha/r · B·A (alpha/√r with rslora)."""
    dropout: Share = 0.0
    """Dropout on the adapter's input."""
    target_modules: str | list[str] = "all-linear"
    """Which layers get an adapter: `all-linear`, names, or a regular expression."""
    rslora: bool = False
    """Rank-stabilised scale alpha/√r (Kalajdzievski 2023)."""
    dora: bool = False
    """Weight-decomposed update with a trained magnitude (Liu et al. 2024). Slower in training, free after the merge."""
    rank_pattern: dict[str, PositiveInt] = {}
    """Rank per layer name or pattern, where it differs from r."""
    alpha_pattern: dict[str, float] = {}
    """Alpha per layer name or pattern, where it differs from alpha."""
    bias: Literal["none", "lora_only", "all"] = "none"
    """Train the biases of the base too: none, those of adapted layers, or all."""
    modules_to_save: list[str] = []
    """Modules trained in full and stored with the adapter, such as a new head."""
    start_from: str | None = None
    """Directory of an adapter to go on from, such as another run's `adapter`, with this section's settings."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the trained parameters (products run in compute_dtype). float32 keeps small updates alive."""


class Train(Section):
    method: Literal["sft", "dpo", "kto", "orpo"] = "sft"
    """Supervised fine-tuning, or learning from pairs of answers (dpo, orpo) or from judged ones (kto), through TRL;
    their own settings, such as beta, are in args."""
    epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the training rows."""
    max_steps: PositiveInt | None = None
    """Stop after this many optimizer steps, whatever epochs says."""
    batch_size: PositiveInt | None = None
    """Rows per optimizer step, over all processes. Default 16, unless tokens_per_step is given."""
    tokens_per_step: PositiveInt | None = None
    """Instead of batch_size: tokens per optimizer step; rows per step follow from the mean row length."""
    micro_batch_tokens: PositiveInt | None = None
    """Tokens per forward pass and process, into which whole rows are packed; null: as fast as `memory` allows."""
    memory: Literal["auto"] | Annotated[float, Field(gt=0)] = "auto"
    """GiB that training may take of a device; auto: what is free, but for a tenth."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    """Peak learning rate."""
    loraplus_ratio: Annotated[float, Field(ge=1)] = 1.0
    """Learning rate of B relative to A's (LoRA+, Hayou et al. 2024, who suggest 16)."""
    scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "cosine"
    """Learning rate schedule after the warm-up."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of linear warm-up."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's weight decay on the adapter."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradient norm above which gradients are scaled down."""
    gradient_checkpointing: bool | None = None
    """Compute activations again in the backward pass: a third slower, several times less memory. null: of as few
    layers as `memory` allows."""
    kernels: Literal["auto", "plain"] = "auto"
    """auto: on a GPU, the fused path for layers that it covers. plain: PEFT's and transformers' own code."""
    profile: bool = False
    """Write a trace of one step, and a table of where its time went, to `profile/` in the run directory."""
    checkpoint_every: PositiveInt = 100
    """Steps between checkpoints to resume from; the last two are kept."""
    evaluate_every: PositiveInt | None = None
    """Steps between evaluations of the loss on held-out rows during training."""
    keep_best: bool = False
    """Merge the adapter of the evaluation with the lowest loss, not that of the last step."""
    patience: PositiveInt | None = None
    """End training after so many evaluations without a lower loss."""
    neftune_alpha: Annotated[float, Field(gt=0)] | None = None
    """Noise on token embeddings while training (NEFTune), scaled by each row's own length."""
    log_every: PositiveInt | None = None
    """Steps between log entries. null: 10 on a GPU, which waits for each, and 1 on a CPU."""
    processes: PositiveInt = 1
    """Processes that `qlora run` starts through accelerate (one per GPU)."""
    args: dict[str, Any] = {}
    """Any other field of TRL's SFTConfig; what would break a promise of the pipeline is refused with the reason."""

    @model_validator(mode="after")
    def _one_batch_size(self) -> Train:
        if self.batch_size is not None and self.tokens_per_step is not None:
            raise ValueError("give batch_size or tokens_per_step, not both")
        return self

    @model_validator(mode="after")
    def _best_of_evaluations(self) -> Train:
        if (self.keep_best or self.patience) and self.evaluate_every is None:
            raise ValueError("keep_best and patience go by evaluations: set evaluate_every")
        return self

    @field_validator("args")
    @classmethod
    def _refuse_args(cls, args: dict[str, Any]) -> dict[str, Any]:
        refused = [f"{key} ({REFUSED_TRAIN_ARGS[key]})" for key in args if key in REFUSED_TRAIN_ARGS]
        if refused:
            raise ValueError(f"cannot set {', '.join(refused)}")
        return args


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
    where the merged model is not measured (merge.write: false) or not meant to be exact (merge.base: original)."""


class Evaluate(Section):
    rows: PositiveInt | None = 200
    """Rows of data.eval to use; null for all."""
    batch_size: PositiveInt = 8
    """Rows per forward pass."""
    generate: bool = False
    """Also generate answers and count exact matches."""
    max_new_tokens: PositiveInt = 256
    """Longest generated answer."""
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
            self.model.quantization == "none" or self.train.kernels == "plain"
        ):
            raise ValueError(
                "model.compute_dtype: float8 is how the fused path multiplies with a 4-bit base: it needs "
                "model.quantization: nf4 or fp4, and train.kernels: auto"
            )
        return self

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir) / self.name
