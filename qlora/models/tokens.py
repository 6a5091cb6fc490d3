"""Tokens whose rows in embeddings and output head are trained by index: new ones, and some that the base has.

A new token begins as the mean of the rows of the pieces that its text was cut into before. It takes a spare row where
the vocabulary was padded; where there is none left, embeddings and head grow by as many rows as are needed, all of them
trained, so that the adapter holds every number that the base does not. Untied heads learn rows of their own.

PEFT puts the trained rows into a copy of the whole matrix in every forward, and its gradient is as large. Here
(`read_rows_apart`) the frozen matrix is read as it is and what belongs to the trained rows is put into the output.

Shapes: V vocabulary, D width, n trained tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from torch import nn

from qlora.errors import Problem, UserError
from qlora.recipe import Lora


@dataclass(frozen=True)
class TrainedTokens:
    """Ids of trained tokens, ascending, and of the new ones among them the ids of their pieces (none: of no text)."""

    ids: tuple[int, ...]
    pieces: Mapping[int, Sequence[int]]

    @classmethod
    def of_layers(cls, indices: Any) -> TrainedTokens:
        """From PEFT's `trainable_token_indices`: of the embeddings, or by the name of the layer."""
        lists = indices.values() if isinstance(indices, dict) else [indices]
        return cls(tuple(sorted({token for ids in lists for token in ids})), {})

    @property
    def rows(self) -> int:
        """That a vocabulary needs for all of them."""
        return max(self.ids) + 1


def add_tokens(tokenizer: Any, lora: Lora) -> TrainedTokens | None:
    """Add `lora.new_tokens` to the base's tokenizer, and find `lora.train_tokens`; None where there are neither.

    Raises UserError, with all problems, for new tokens that are tokens already and known ones that are not.
    """
    if not lora.new_tokens and not lora.train_tokens:
        return None
    vocabulary, problems = tokenizer.get_vocab(), []
    known: dict[str, int] = {}
    for text in lora.train_tokens:
        pieces = _pieces(tokenizer, text)
        if text in vocabulary or len(pieces) == 1:
            known[text] = vocabulary.get(text, pieces[0] if pieces else -1)
        else:
            what = f"{text!r} is not one token of the base's, but {len(pieces)}"
            problems.append(Problem(what, "lora.train_tokens", "lora.new_tokens adds tokens"))
    new: dict[str, list[int]] = {}
    for token in lora.new_tokens:
        pieces = new[token.text] = _pieces(tokenizer, token.text)
        if token.text in vocabulary or (len(pieces) == 1 and pieces[0] != tokenizer.unk_token_id):
            what = f"{token.text!r} is a token of the base's already"
            problems.append(Problem(what, "lora.new_tokens", "lora.train_tokens trains the rows of such"))
    if problems:
        raise UserError(problems)
    added = [AddedToken(token.text, special=token.special, normalized=False) for token in lora.new_tokens]
    tokenizer.add_tokens([token for token in added if not token.special])
    tokenizer.add_tokens([token for token in added if token.special], special_tokens=True)
    ids = {text: tokenizer.convert_tokens_to_ids(text) for text in new}
    wrong = [text for text in new if tokenizer.encode(text, add_special_tokens=False) != [ids[text]]]
    if wrong:
        raise UserError(f"the tokenizer does not take {wrong[0]!r} as one token", "lora.new_tokens", "leave it out")
    return TrainedTokens(tuple(sorted({*ids.values(), *known.values()})), {ids[text]: new[text] for text in new})


def _pieces(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return found


def trained_tokens(lora: Lora, directory: Path, trust_remote_code: bool) -> TrainedTokens | None:
    """Those of a recipe, by the tokenizer in the base's directory. Raises UserError as `add_tokens` does."""
    from qlora.models.loading import load_tokenizer

    if not lora.new_tokens and not lora.train_tokens:
        return None
    return add_tokens(load_tokenizer(directory, trust_remote_code), lora)


def begin_rows(model: Any, tokens: TrainedTokens) -> None:
    """Give a base without an adapter a row for every trained token, and new tokens their first numbers.

    The model may be on the meta device. Raises UserError where rows of tokens that are not trained would be missing.
    """
    matrices = [module.weight for module in _layers(model)]
    before = len(matrices[0])
    grow(model, tokens)
    with torch.no_grad():
        for matrix in [module.weight for module in _layers(model)]:
            for token in tokens.ids:
                if token in tokens.pieces or token >= before:
                    pieces = list(tokens.pieces.get(token, ())) or list(range(before))
                    matrix[token] = matrix[pieces].double().mean(0).to(matrix.dtype)


def grow(model: Any, tokens: TrainedTokens) -> None:
    """Embeddings and head with rows for all trained tokens. Raises as `begin_rows` does."""
    before = len(_layers(model)[0].weight)
    if tokens.rows <= before:
        return
    gap = sorted(set(range(before, tokens.rows)) - set(tokens.ids))
    if gap:
        raise UserError(
            f"the base's tokenizer has {len(gap)} tokens that the model has no row for, such as number {gap[0]}",
            "lora.new_tokens",
            "name them in lora.train_tokens, which gives them one",
        )
    model.resize_token_embeddings(tokens.rows, mean_resizing=False)


def token_indices(model: Any, tokens: TrainedTokens, lora: Lora) -> dict[str, list[int]]:
    """PEFT's `trainable_token_indices` for a base: of its embeddings, and of its head where that is another matrix.

    Raises UserError for heads with a bias, which PEFT leaves out, and for layers that are trained whole.
    """
    names = {id(module): name for name, module in model.named_modules()}
    found, problems = {}, []
    for module in _layers(model):
        name = names[id(module)]
        found[name] = list(tokens.ids)
        if getattr(module, "bias", None) is not None or not isinstance(module, (nn.Embedding, nn.Linear)):
            what = f"{name} is not a plain matrix ({type(module).__name__}, perhaps with a bias): no rows of it alone"
            problems.append(Problem(what, "lora.new_tokens", "train it whole, by lora.modules_to_save"))
        if any(name.endswith(saved) for saved in lora.modules_to_save):
            what = f"{name} is trained whole, which its rows are part of"
            problems.append(Problem(what, "lora.modules_to_save", "leave it out, or new_tokens and train_tokens"))
    if problems:
        raise UserError(problems)
    return found


def require_rows(adapted: Any) -> None:
    """Raise UserError where PEFT does not train the rows of a head that is tied to the embeddings."""
    from peft.utils import TrainableTokensWrapper

    whole = adapted.get_base_model()
    if not isinstance(whole.get_output_embeddings(), TrainableTokensWrapper):
        what = f"PEFT does not see that embeddings and output head of {type(whole).__name__} are one matrix"
        raise UserError(what, "lora.new_tokens", "leave out new_tokens and train_tokens")


def read_rows_apart(model: nn.Module) -> int:
    """Have layers with trained rows read these beside their frozen matrix; returns how many layers there are."""
    from peft.utils import TrainableTokensWrapper

    wrappers: list[Any] = [module for module in model.modules() if isinstance(module, TrainableTokensWrapper)]
    for wrapper in wrappers:
        wrapper.token_adapter.forward = _forward(wrapper.token_adapter)
        wrapper.bias = None  # TRL looks for a head's, and PEFT does not say that there is none
    return len(wrappers)


def row_ids(layer: Any) -> torch.Tensor:
    """The tokens, int64 [n], whose rows a `TrainableTokensLayer` with one adapter trains; on its device."""
    (ids,) = layer.token_indices.values()
    return torch.tensor(ids, device=layer.get_base_layer().weight.device)


def learned_rows(layer: Any) -> torch.Tensor | None:
    """These rows [n, D], differentiable; None where the adapter is off or merged."""
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return None
    learned: torch.Tensor = layer.trainable_tokens_delta[layer.active_adapters[0]]
    return learned


def _forward(layer: Any) -> Callable[..., torch.Tensor]:
    ids_n, is_head = row_ids(layer), isinstance(layer.get_base_layer(), nn.Linear)
    # The place of each token among the trained ones; all others have the one behind, whose gradient nobody adds up.
    places_V = torch.full((len(layer.get_base_layer().weight),), len(ids_n), device=ids_n.device)
    places_V[ids_n] = torch.arange(len(ids_n), device=ids_n.device)
    plain: Callable[..., torch.Tensor] = layer.forward

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        learned_nD = learned_rows(layer)
        if learned_nD is None or args or kwargs:
            return plain(x, *args, **kwargs)
        base = layer.get_base_layer()
        out: torch.Tensor = base(x)
        rows_nD = learned_nD.to(base.weight.dtype)
        if is_head:
            return out.index_copy(-1, ids_n, nn.functional.linear(x, rows_nD).to(out.dtype))
        if (scale := getattr(base, "embed_scale", None)) is not None:
            rows_nD = rows_nD * scale.to(rows_nD.dtype)
        places, padded_D = places_V[x], nn.functional.pad(rows_nD, (0, 0, 0, 1))
        found = nn.functional.embedding(places, padded_D, padding_idx=len(ids_n))
        return torch.where((places < len(ids_n))[..., None], found.to(out.dtype), out)

    return forward


def _layers(model: Any) -> list[Any]:
    """The embeddings, and the head where that is another matrix."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    return [embeddings] if head is None or head.weight is embeddings.weight else [embeddings, head]
