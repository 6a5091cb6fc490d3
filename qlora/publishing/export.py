"""`qlora export`: the results of a run in a folder that needs nothing else and names nothing of the machine.

    DIR/            README.md, MANIFEST.json, contract.json, ladder.json, recipe.yaml, lineage.json
    DIR/gptq/       the checkpoint with its model card; adapter/ and merged/ likewise
    DIR/report/     the run's report, if it was written

Weights are hard links where the file system has such. Files that name paths of this machine are written anew, so their
digests are not those in lineage.json, but those in MANIFEST.json.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from qlora.artifacts import atomic_directory, link_weights, require_disk, write_json, write_text
from qlora.errors import NotAsWritten, Problem, UserError
from qlora.facts import RunFacts
from qlora.publishing.card import Origin, model_card, overview
from qlora.publishing.manifest import NAME, Progress, check_folder, write_manifest
from qlora.publishing.private import Private

STAGES = {"adapter": "train", "merged": "merge", "gptq": "quantize"}
WHAT = (*STAGES, "report")
MEASURED = ("contract", "ladder", "survival")
"""Files of evaluation/ that are given away. Generations are not: they are held-out rows."""
NAMING = ("config.json", "adapter_config.json", "base.json", "tokenizer_config.json", "quantize_config.json")
"""Files of a checkpoint that may name where something lay."""


def export(run: Path, target: Path, what: Sequence[str], progress: Progress) -> int:
    """Write a run's results to `target`, whole or not at all; returns the number of files.

    Raises UserError for what the run has not, or a target that is not an earlier export; NotAsWritten for results that
    are no longer what the run wrote.
    """
    facts = RunFacts.read(run)
    if target.exists() and not (target / NAME).is_file():
        raise UserError("this exists already, and is no earlier export", str(target), "name another folder")
    kinds = available(facts, [kind for kind in what if kind in STAGES])
    require_whole(facts, kinds, progress)
    size = sum(entry["bytes"] for kind in kinds for entry in outputs(facts, kind).values())
    require_disk(target.absolute().parent, size, f"the export of {facts.recipe.name}")
    origin = Origin(facts_license(facts))
    with atomic_directory(target) as partial:
        known: dict[str, str] = {}
        for kind in kinds:
            digests = lay_out(facts, kind, partial / kind)
            write_text(partial / kind / "README.md", model_card(facts, kind, origin))
            known |= {f"{kind}/{name}": digest for name, digest in digests.items()}
        write_measured(facts, partial)
        if "report" in what and facts.dirs.report.is_dir():
            _copy_report(facts, partial / "report")
        write_text(partial / "README.md", overview(facts, kinds, origin))
        write_manifest(partial, {"run": facts.recipe.name}, known)
        return sum(path.is_file() for path in partial.rglob("*"))


def available(facts: RunFacts, kinds: Sequence[str]) -> list[str]:
    """The kinds, in the order of stages. Raises UserError for those that the run has not."""
    problems = []
    for kind in kinds:
        if STAGES[kind] not in facts.stages:
            fix = f"`qlora {STAGES[kind]} RECIPE` makes it"
            problems.append(Problem(f"there is no finished {kind}/", str(facts.dirs.root), fix))
        elif kind == "merged" and not facts.recipe.merge.write:
            what = "there are no merged weights, because merge.write is false"
            problems.append(Problem(what, str(facts.dirs.root), "leave merged out, or set merge.write: true"))
    if problems:
        raise UserError(problems)
    return [kind for kind in STAGES if kind in kinds]


def outputs(facts: RunFacts, kind: str) -> dict[str, dict[str, Any]]:
    """What a stage wrote: size and sha256 by file."""
    found: dict[str, dict[str, Any]] = facts.stages[STAGES[kind]]["outputs"]
    return found


def require_whole(facts: RunFacts, kinds: Sequence[str], progress: Progress) -> None:
    """Raise NotAsWritten if results are no longer what the run wrote: every byte is compared."""
    stages = {*(STAGES[kind] for kind in kinds), "evaluate"}
    if problems := check_folder(facts.dirs.root, progress, stages).problems:
        raise NotAsWritten(problems)


def lay_out(facts: RunFacts, kind: str, folder: Path) -> dict[str, str]:
    """A result's files in another folder, without paths of this machine; digests of those that are unchanged."""
    source: Path = getattr(facts.dirs, kind)
    files, private = outputs(facts, kind), Private(facts.recipe, facts.dirs.root)
    link_weights(source, folder, files)
    known = {name: entry["sha256"] for name, entry in files.items()}
    for name in NAMING:
        path = folder / name
        if path.is_file() and (text := path.read_text(encoding="utf-8")) != (clean := _clean_json(text, private)):
            write_text(path, clean)
            del known[name]
    return known


def _clean_json(text: str, private: Private) -> str:
    value = json.loads(text)
    cleaned = private.value(value)
    return text if cleaned == value else json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n"


def write_measured(facts: RunFacts, folder: Path) -> None:
    """What was measured, the recipe and the lineage."""
    private = Private(facts.recipe, facts.dirs.root)
    for name in MEASURED:
        content = getattr(facts, name)
        if content is not None:
            write_json(folder / f"{name}.json", private.value(content) if name != "contract" else content)
    recipe = private.value(facts.recipe.model_dump(mode="json"))
    recipe.pop("publish", None)
    write_text(folder / "recipe.yaml", yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=120))
    # `taken_from` is the folder of another run.
    stages = {
        name: {key: value for key, value in entry.items() if key != "taken_from"}
        for name, entry in facts.stages.items()
    }
    write_json(folder / "lineage.json", {"stages": private.value(stages)})


def _copy_report(facts: RunFacts, folder: Path) -> None:
    private = Private(facts.recipe, facts.dirs.root)
    for path in sorted(facts.dirs.report.rglob("*")):
        target = folder / path.relative_to(facts.dirs.report)
        if path.suffix in (".html", ".json", ".txt", ".svg", ".md"):
            write_text(target, private.text(path.read_text(encoding="utf-8")))
        elif path.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())


def facts_license(facts: RunFacts, ask_hub: Callable[[str], str | None] | None = None) -> str | None:
    """The license that a card names: the recipe's, the base's own card's on this machine, or what the Hub says."""
    publish, base = facts.recipe.publish, facts.recipe.model.base
    if publish is not None and publish.license:
        return publish.license
    if Path(base).is_dir():
        return _license_of(Path(base) / "README.md")
    if Path(base).is_absolute():
        return None
    return ask_hub(base) if ask_hub is not None else _license_of(_cached_card(base, facts.base.get("revision")))


def _cached_card(base: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(base, "README.md", revision=revision)
    return Path(found) if isinstance(found, str) else None


def _license_of(card: Path | None) -> str | None:
    """From the front matter of a model card."""
    if card is None or not card.is_file():
        return None
    text = card.read_text(encoding="utf-8", errors="replace")
    head = text.split("\n---", 1)[0].removeprefix("---\n") if text.startswith("---\n") else ""
    try:
        front = yaml.safe_load(head) or {}
    except yaml.YAMLError:
        return None
    found = front.get("license") if isinstance(front, dict) else None
    return found if isinstance(found, str) else None
