"""An adapter that training goes on from: another run's, or one that PEFT wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from qlora.artifacts import file_digest, read_json
from qlora.errors import UserError
from qlora.models.principal import FILE as BEGINNING
from qlora.models.provenance import FILE_NAME, Provenance, read_provenance
from qlora.recipe import Lora

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
WHERE = "lora.start_from"
# What decides the function of an adapter's weights: PEFT's key, the recipe's.
SETTINGS = {
    "r": "r",
    "lora_alpha": "alpha",
    "use_rslora": "rslora",
    "use_dora": "dora",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
}


def start_from(model: Any, lora: Lora) -> None:
    """Give a fresh adapter the weights of the one in `lora.start_from`. Raises UserError as `require_fit` does."""
    from peft import set_peft_model_state_dict

    assert lora.start_from is not None
    require_fit(model, lora)
    set_peft_model_state_dict(model, _weights(lora))


def require_fit(model: Any, lora: Lora) -> None:
    """Raise UserError unless the adapter in `lora.start_from` is what the recipe attaches to this model.

    The model may be on the meta device.
    """
    from peft import get_peft_model_state_dict

    config = read_json(_file(lora, CONFIG))
    if (Path(str(lora.start_from)) / BEGINNING).is_file():
        raise UserError(
            "the adapter to go on from has a base of its own: what lora.init: pissa left of this one",
            WHERE,
            "take the merged model of its run as model.base, and begin anew",
        )
    other = [
        f"lora.{ours} {getattr(lora, ours)} (there {config.get(theirs)})"
        for theirs, ours in SETTINGS.items()
        if (config.get(theirs) or False) != (getattr(lora, ours) or False)
    ]
    if other:
        raise UserError(
            f"the adapter to go on from has another {', '.join(other)}", WHERE, "give the recipe the adapter's settings"
        )
    _require_tokens(model, lora, config)
    found, expected = _weights(lora), get_peft_model_state_dict(model, save_embedding_layers=False)
    wrong = sorted(
        name
        for name in found.keys() | expected.keys()
        if name not in found or name not in expected or found[name].shape != expected[name].shape
    )
    if wrong:
        raise UserError(
            f"{len(wrong)} tensors of the adapter to go on from are not those of lora.target_modules on this base, "
            f"such as {wrong[0]}",
            WHERE,
            "name the modules that the adapter has in lora.target_modules, and its base in model.base",
        )


def _require_tokens(model: Any, lora: Lora, config: dict[str, Any]) -> None:
    """Raise UserError unless the same rows are trained there, of tokens of the same text."""
    there, here = ((each or {}) for each in (config.get("trainable_token_indices"), _indices(model)))
    texts = [token.text for token in lora.new_tokens]
    same = there == here
    if same and texts and (Path(str(lora.start_from)) / "tokenizer_config.json").is_file():
        from qlora.models.loading import load_tokenizer

        known = load_tokenizer(Path(str(lora.start_from))).get_vocab()
        same = all(text in known for text in texts)
    if not same:
        raise UserError(
            "the adapter to go on from trains other tokens",
            WHERE,
            "give lora.new_tokens and train_tokens of its recipe",
        )


def _indices(model: Any) -> Any:
    return model.peft_config["default"].trainable_token_indices


def require_base(provenance: Provenance, lora: Lora) -> None:
    """Raise UserError where the adapter to go on from says that it was trained on other weights."""
    assert lora.start_from is not None
    kept = Path(lora.start_from) / FILE_NAME
    if not kept.is_file():  # PEFT's own adapters do not say
        return
    theirs = read_provenance(kept)
    if theirs.digest != provenance.digest:
        raise UserError(
            f"the adapter to go on from was trained on other weights ({theirs.base_id}, {theirs.settings.quant_type})",
            WHERE,
            "use its model.base, model.revision and model.quantization",
        )


def starting_digest(lora: Lora) -> str | None:
    """Of the adapter's weights, whatever their path."""
    return file_digest(_file(lora, WEIGHTS)) if lora.start_from is not None else None


def _weights(lora: Lora) -> dict[str, torch.Tensor]:
    return load_file(_file(lora, WEIGHTS))


def _file(lora: Lora, name: str) -> Path:
    path = Path(str(lora.start_from)) / name
    if not path.is_file():
        raise UserError(f"there is no {name}", f"{WHERE}: {lora.start_from}", "give the directory of a LoRA adapter")
    return path
