"""A PEFT LoRA adapter as it lies on disk: every setting and every tensor of it understood, or refused by name.

The adapter is read as tensors, without building a model, so that nothing of it can be lost in silence: a tensor
that nobody understands is an error, and so is one that a merge did not take.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qlora.errors import Problem, UserError
from qlora.merging.delta import LowRankUpdate, lora_scaling, matching_pattern
from qlora.models.checkpoint import CheckpointReader, TensorSpec
from qlora.models.principal import FILE as BEGINNING

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
KEY_PREFIX = "base_model.model."

LORA_PARTS = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_B.bias": "bias",
    ".lora_magnitude_vector": "magnitude",
    ".lora_embedding_A": "embedding_A",
    ".lora_embedding_B": "embedding_B",
}

TOKENS = ".token_adapter.trainable_tokens_delta"
"""Ending of the key of trained rows, behind the name of embeddings or output head."""

HONOURED = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias", "bias"} | {
    "modules_to_save",
    "trainable_token_indices",
    "init_lora_weights",
    "peft_type",
}
# These say which modules have an adapter, how it began or how it was trained: the saved tensors already tell.
WITHOUT_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",  # base.json says which layers are stored transposed
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
}
# Other initialisations (olora, corda, loftq, …) replace the base weights before training; so does pissa, which is known
# where it was ours and left what it took from them.
BASE_PRESERVING_INITS = (True, False, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class LoraConfig:
    """The settings of an adapter that change what it computes."""

    rank: int
    alpha: float
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    rslora: bool = False
    dora: bool = False
    bias: str = "none"
    modules_to_save: tuple[str, ...] = ()
    tokens: list[int] | dict[str, list[int]] = field(default_factory=dict)
    """Ids of tokens whose rows are trained: of the embeddings, or by the name of the layer or its end."""

    def rank_of(self, module: str) -> int:
        key = matching_pattern(self.rank_pattern, module)
        return self.rank if key is None else self.rank_pattern[key]

    def scaling_of(self, module: str) -> float:
        key = matching_pattern(self.alpha_pattern, module)
        alpha = self.alpha if key is None else self.alpha_pattern[key]
        return lora_scaling(alpha, self.rank_of(module), rslora=self.rslora)


@dataclass(frozen=True)
class TrainedRows:
    """Rows of a matrix that training changed: the key of these rows [n, D], and the n tokens that they are of."""

    key: str
    tokens: tuple[int, ...]


class Adapter:
    """The tensors of an adapter directory, sorted by what they do to which parameter of the base.

    Raises UserError on construction, with all problems, for anything that the merge would not carry over.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        self.config = read_lora_config(self.directory / CONFIG_NAME)
        self._reader = CheckpointReader(self.directory, WEIGHTS_NAME)
        self._untaken = set(self._reader.names())
        self.lora: dict[str, dict[str, str]] = {}
        """Keys of the low-rank tensors by module name and part (a value of LORA_PARTS)."""
        self.replacements: dict[str, str] = {}
        """Keys of tensors that replace a parameter of the base, by parameter name."""
        self.rows: dict[str, TrainedRows] = {}
        """Of embeddings and output head, by parameter name. PEFT ties what the base ties, and keeps one of them."""
        self._sort_tensors()

    def changes(self, parameter: str) -> bool:
        """Whether the adapter gives this parameter of the base another value."""
        module, _, kind = parameter.rpartition(".")
        parts = self.lora.get(module, {})
        whole = parameter in self.replacements or parameter in self.rows
        return whole or (bool(parts) if kind == "weight" else "bias" in parts)

    def parameters(self) -> list[str]:
        """Names of all parameters of the base that the adapter changes, sorted."""
        changed = {*self.replacements, *self.rows, *(f"{module}.weight" for module in self.lora)}
        return sorted(changed | {f"{module}.bias" for module, parts in self.lora.items() if "bias" in parts})

    def replacement(self, parameter: str) -> torch.Tensor:
        """The trained tensor that stands in for a parameter of the base. Raises KeyError where there is none."""
        return self._take(self.replacements[parameter])

    def with_rows(self, parameter: str, matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The matrix [V, D] with the trained rows in it, rounded to `dtype` first; longer where they lie beyond it."""
        found = self.rows[parameter]
        rows = self._take(found.key).to(dtype)
        if not torch.isfinite(rows).all():
            raise UserError(f"{parameter}: trained rows are infinite or not a number in {dtype}", "train.learning_rate")
        missing = max(found.tokens) + 1 - len(matrix)
        matrix = torch.cat([matrix, matrix.new_zeros(max(0, missing), matrix.shape[1])])
        matrix[list(found.tokens)] = rows.to(matrix.dtype)
        return matrix

    def bias_update(self, module: str) -> torch.Tensor:
        """s·b of a trained LoRA bias [N], fp32: PEFT scales B·A·x + b as a whole."""
        return self._take(self.lora[module]["bias"]).float() * self.config.scaling_of(module)

    def low_rank(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A [R, K] and B [N, R] of a module, as they are stored."""
        return self._take(self.lora[module]["A"]), self._take(self.lora[module]["B"])

    def weight_update(self, module: str, shape: tuple[int, ...], device: str) -> LowRankUpdate:
        """The change of a module's weight, which has this shape. Raises UserError if the tensors do not fit."""
        tensors = {
            part: self._take(key).to(device, torch.float64) for part, key in self.lora[module].items() if part != "bias"
        }
        if "embedding_A" in tensors:
            # PEFT holds them for the transposed weight: A is [R, vocabulary], B is [hidden, R].
            b, a = tensors["embedding_A"].T.contiguous(), tensors["embedding_B"].T.contiguous()
        else:
            b, a = tensors["B"], tensors["A"]
        rank = self.config.rank_of(module)
        magnitude = tensors.get("magnitude")
        fits = (b.shape[0], a.shape[1]) == tuple(shape) and b.shape[1] == a.shape[0] == rank
        if not fits or (magnitude is not None and tuple(magnitude.shape) != (shape[0],)):
            raise UserError(
                f"{module}: B {list(b.shape)} and A {list(a.shape)} do not fit a weight {list(shape)} with rank {rank}",
                where=str(self.directory),
                fix="merge into the base the adapter was trained on",
            )
        return LowRankUpdate(b, a, self.config.scaling_of(module), magnitude)

    def spec(self, key: str) -> TensorSpec:
        """Dtype and shape of one of the adapter's tensors."""
        return self._reader.spec(key)

    def check_all_taken(self) -> None:
        """Raise RuntimeError if a tensor of the adapter went nowhere."""
        if self._untaken:
            raise RuntimeError(f"the merge left out {sorted(self._untaken)}")

    def _take(self, key: str) -> torch.Tensor:
        self._untaken.discard(key)
        return self._reader.read(key)

    def _sort_tensors(self) -> None:
        others = []
        for key in self._reader.names():
            name = key.removeprefix(KEY_PREFIX)
            suffix = next((suffix for suffix in LORA_PARTS if name.endswith(suffix)), None)
            if suffix is not None and key.startswith(KEY_PREFIX):
                self.lora.setdefault(name.removesuffix(suffix), {})[LORA_PARTS[suffix]] = key
            elif name.endswith(TOKENS) and key.startswith(KEY_PREFIX):
                module = name.removesuffix(TOKENS)
                self.rows[f"{module}.weight"] = TrainedRows(key, self._tokens_of(module))
            else:
                others.append(key)
        expected = [{"A", "B", "magnitude"}] if self.config.dora else [{"A", "B"}, {"embedding_A", "embedding_B"}]
        problems = [
            Problem(f"{module} has the LoRA tensors {sorted(parts)}, which is not a complete set", str(self.directory))
            for module, parts in self.lora.items()
            if set(parts) - {"bias"} not in expected
        ]
        if self.config.tokens and not self.rows:
            what = f"trainable_token_indices: {self.config.tokens}, and the adapter holds no rows of them"
            problems.append(Problem(what, str(self.directory)))
        for parameter, rows in self.rows.items():
            if len(rows.tokens) != self.spec(rows.key).shape[0] or parameter.removesuffix(".weight") in self.lora:
                what = f"{rows.key} is not of {len(rows.tokens)} tokens and nothing else that is trained there"
                problems.append(Problem(what, str(self.directory)))
        for key in others:
            parameter = key.removeprefix(KEY_PREFIX).replace(".base_layer.", ".")
            if key.startswith(KEY_PREFIX) and self._may_replace(parameter) and self.spec(key).dtype.is_floating_point:
                self.replacements[parameter] = key
            else:
                problems.append(Problem(f"unknown tensor {key}: the merge would lose it", str(self.directory)))
        if problems:
            raise UserError(problems)

    def _tokens_of(self, module: str) -> tuple[int, ...]:
        """Those whose rows of this layer are trained, in the order of the rows."""
        given = self.config.tokens
        layers = given if isinstance(given, dict) else {module: given}
        return tuple(next((ids for name, ids in layers.items() if module.endswith(name)), ()))

    def _may_replace(self, parameter: str) -> bool:
        """Whether PEFT saves this parameter whole: a trained bias, one of modules_to_save, or the base of an adapted
        embedding or output head."""
        module, _, kind = parameter.rpartition(".")
        if "lora_" in parameter:
            return False
        if (kind == "bias" and self.config.bias != "none") or (kind == "weight" and module in self.lora):
            return True
        parts = module.split(".")
        owners = [".".join(parts[: depth + 1]) for depth in range(len(parts))]
        return any(owner.endswith(saved) for owner in owners for saved in self.config.modules_to_save)


def read_lora_config(path: Path) -> LoraConfig:
    """Read adapter_config.json. Raises UserError, naming every setting that the merge does not know how to honour."""
    if not path.is_file():
        raise UserError("missing: this is not an adapter directory", where=str(path), fix="run `qlora train` first")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"not valid JSON: {error}", where=str(path)) from error
    fix = "train without it, or load the adapter with PEFT instead of merging it"
    unknown = [key for key, value in config.items() if value and key not in HONOURED | WITHOUT_EFFECT]
    problems = [Problem(f"{key}: {config[key]} cannot be merged", str(path), fix) for key in unknown]
    if config.get("peft_type") != "LORA":
        problems.append(Problem(f"peft_type: {config.get('peft_type')} is not LORA", str(path), fix))
    init: Any = config.get("init_lora_weights", True)
    if init not in BASE_PRESERVING_INITS and not (init == "pissa" and (path.parent / BEGINNING).is_file()):
        problems.append(Problem(f"init_lora_weights: {init} changes the base before training", str(path), fix))
    if problems:
        raise UserError(problems)
    return LoraConfig(
        rank=config["r"],
        alpha=config["lora_alpha"],
        rank_pattern=config.get("rank_pattern") or {},
        alpha_pattern=config.get("alpha_pattern") or {},
        rslora=bool(config.get("use_rslora")),
        dora=bool(config.get("use_dora")),
        bias=config.get("bias", "none"),
        modules_to_save=tuple(config.get("modules_to_save") or ()),
        tokens=config.get("trainable_token_indices") or {},
    )
