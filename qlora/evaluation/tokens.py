"""What a checkpoint's files say of its special tokens and its chat template, and where stages say different things.

A server reads these from the checkpoint alone. Where they are not what training used, it sends other prompts than the
model was taught, or does not know where an answer ends.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora.artifacts import read_json

TRAINED = "adapter"
"""The stage whose tokenizer the model was trained with."""


@dataclass(frozen=True)
class TokenFacts:
    """Ids, None where there is none.

    generation_eos: where generation ends by generation_config.json, or failing that config.json; None without either.
    """

    bos: int | None
    eos: int | None
    pad: int | None
    chat_template_sha256: str | None
    generation_eos: tuple[int, ...] | None = None


def token_facts(directory: Path, trust_remote_code: bool = False) -> TokenFacts:
    """Of a checkpoint's or an adapter's directory, from its files."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    template = tokenizer.chat_template
    return TokenFacts(
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
        None if not template else _digest(template),
        _generation_eos(directory),
    )


def _digest(template: str | Mapping[str, str]) -> str:
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _generation_eos(directory: Path) -> tuple[int, ...] | None:
    for name in ("generation_config.json", "config.json"):
        found: Any = read_json(directory / name) if (directory / name).is_file() else {}
        found = found.get("eos_token_id", (found.get("text_config") or {}).get("eos_token_id"))
        if found is not None:
            return tuple(found) if isinstance(found, list) else (found,)
    return None


NAMES = {"bos": "the BOS token", "eos": "the EOS token", "pad": "the pad token", "chat_template_sha256": "the template"}


def mismatches(
    stages: Mapping[str, TokenFacts],
    *,
    ends: Collection[int] = (),
    template_named: bool = False,
) -> list[str]:
    """Where stages differ in a way that changes serving, in words.

    stages: `base`, `adapter`, and checkpoints by name. ends: tokens that end the answers that were learned.
    template_named: whether the recipe names the chat template, which is then not the base's. A base without a template
    or a pad token is given one.
    """
    trained, base = stages[TRAINED], stages["base"]
    found = []
    for key, what in NAMES.items():
        before, used = getattr(base, key), getattr(trained, key)
        given = before is None and key in ("pad", "chat_template_sha256")
        if before != used and not given and not (template_named and key == "chat_template_sha256"):
            found.append(f"{what} of the base is {before}, training used {used}")
        for stage, facts in stages.items():
            if stage not in ("base", TRAINED) and getattr(facts, key) != used:
                found.append(f"{what} of {stage}/ is {getattr(facts, key)}, training used {used}")
    for stage, facts in stages.items():
        if stage in ("base", TRAINED):
            continue
        stops = {token for token in (facts.eos, *(facts.generation_eos or ())) if token is not None}
        if missing := sorted(set(ends) - stops):
            taught, known = (", ".join(map(str, tokens)) or "none" for tokens in (missing, sorted(stops)))
            found.append(
                f"answers were taught to end with token {taught}, and {stage}/ ends with {known}: servers would run on"
            )
    return found
