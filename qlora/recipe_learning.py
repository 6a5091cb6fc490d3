"""The sections of a recipe up to the adapter: base, data, adapter, training."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from qlora.recipe_section import PositiveInt, Section, Share
from qlora.refused_args import REFUSED_MODEL_KEYS, REFUSED_TRAIN_ARGS


class Model(Section):
    base: str
    """Hub id, local directory with safetensors, or a .gguf file (converted once to safetensors in the cache)."""
    revision: str | None = None
    """Branch, tag or commit of a hub id. The commit found is written into the adapter's base.json."""
    quantization: Literal["nf4", "fp4", "int8", "checkpoint", "none"] = "nf4"
    """How the frozen base is held during training: bitsandbytes 4-bit or LLM.int8, `checkpoint` for the packed codes
    that a GPTQ or AWQ base has, or `none` for 16-bit LoRA."""
    double_quant: bool = True
    """Quantize the block scales of 4-bit weights too (0.37 bits per parameter less)."""
    int8_threshold: Annotated[float, Field(ge=0)] = 6.0
    """Of int8, on a GPU: inputs that reach this magnitude anywhere are multiplied in 16 bits; 0: all in 8 bits."""
    skip_modules: list[str] = []
    """Names or regular expressions, searched in full module names, of linears that nf4, fp4 and int8 leave in 16
    bits in training."""
    compute_dtype: Literal["bfloat16", "float8", "float32"] = "bfloat16"
    """Dtype of activations, dequantized weights and all that is not 4-bit. float8: bfloat16, but training multiplies
    with frozen weights in 8 bits, which is faster and rounds more. float32 is for tests on small models."""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention of transformers. flash_attention_2 needs its own package."""
    trust_remote_code: bool = False
    """Run model code that comes with a checkpoint. Off unless you read that code."""

    @model_validator(mode="before")
    @classmethod
    def _no_offload(cls, section: Any) -> Any:
        refused = [key for key in section if key in REFUSED_MODEL_KEYS] if isinstance(section, dict) else []
        if refused:
            raise ValueError("; ".join(f"{key}: {REFUSED_MODEL_KEYS[key]}" for key in refused))
        return section

    @model_validator(mode="after")
    def _keys_fit(self) -> Model:
        if self.quantization != "int8" and self.int8_threshold != 6.0:
            raise ValueError(f"int8_threshold is of quantization: int8, and this is {self.quantization}")
        if self.skip_modules and not self.requantizes:
            raise ValueError(
                f"skip_modules is of nf4, fp4 and int8; quantization: {self.quantization} quantizes nothing"
            )
        return self

    @property
    def requantizes(self) -> bool:
        """Whether training quantizes the base by itself."""
        return self.quantization in ("nf4", "fp4", "int8")

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
    stream: bool = False
    """Read a hub data set over the network, twice, instead of downloading it. Needs a commit as `revision`."""
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

    @model_validator(mode="after")
    def _streams_of_a_commit(self) -> Source:
        if self.stream and not re.fullmatch("[0-9a-f]{40}", self.revision or ""):
            raise ValueError("stream reads rows more than once: set revision to a commit, so that they are the same")
        return self


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
    template_options: dict[str, bool | int | float | str] = {}
    """What else the template is given, as a server will: `{enable_thinking: false}` of Qwen3."""


class Weighted(Section):
    path: str
    """Directory of an adapter, such as another run's `adapter`."""
    weight: float = 1.0
    """What its update is multiplied by."""


class NewToken(Section):
    text: Annotated[str, Field(min_length=1)]
    """What the token stands for in rows and prompts."""
    special: bool = False
    """Leave it out of decoded text, as control tokens are."""


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
    new_tokens: list[NewToken] = []
    """Tokens to add to the vocabulary, as text or as `{text, special}`; of embeddings and head, only their rows are
    trained. They begin as the mean of what their text was cut into before."""
    train_tokens: list[str] = []
    """Tokens of the vocabulary whose rows are trained too, such as chat markers that the base has never seen."""
    init: Literal["default", "gaussian", "loftq", "pissa"] = "default"
    """What A and B begin as. B is zero, and A random; loftq: together what of rank r makes up for most of what 4 bits
    took from the weights (Li et al. 2023); pissa: the principal part of the weights, of which the base is what is left
    (Meng et al. 2024). The merge is exact for all of them."""
    start_from: str | None = None
    """Directory of an adapter to go on from, such as another run's `adapter`, with this section's settings."""
    combine: list[Weighted] = []
    """Train nothing, and take the weighted sum of these adapters of the base; their ranks and settings count."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the trained parameters (products run in compute_dtype). float32 keeps small updates alive."""

    @field_validator("new_tokens", mode="before")
    @classmethod
    def _text_alone(cls, tokens: Any) -> Any:
        return (
            [{"text": each} if isinstance(each, str) else each for each in tokens] if type(tokens) is list else tokens
        )

    @model_validator(mode="after")
    def _each_token_once(self) -> Lora:
        texts = [token.text for token in self.new_tokens] + self.train_tokens
        if any(not text.strip() for text in texts):
            raise ValueError("new_tokens and train_tokens: a token has text that is more than white space")
        if twice := sorted({text for text in texts if texts.count(text) > 1}):
            raise ValueError(f"new_tokens and train_tokens: {twice[0]!r} is there twice")
        if texts and self.combine:
            raise ValueError("combine trains nothing, new_tokens and train_tokens neither")
        return self

    @model_validator(mode="after")
    def _one_beginning(self) -> Lora:
        if self.combine and self.start_from is not None:
            raise ValueError("combine makes an adapter without training, so there is nothing to start_from")
        if self.init != "default" and (self.start_from is not None or self.combine):
            raise ValueError(f"init: {self.init} is how a new adapter begins; start_from and combine have theirs")
        if self.init in ("loftq", "pissa") and self.dora:
            raise ValueError(f"init: {self.init} changes what DoRA's magnitudes were taken from; use one of them")
        return self


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
    shard: bool = False
    """Processes share one copy of the 4-bit base: each holds a part of every layer, and gathers a layer to run it."""
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
