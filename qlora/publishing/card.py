"""Model cards in the Hub's format, one for each kind of result, written from what the run measured.

The base a card names in `base_model` is what the Hub draws its family trees from: an adapter is one of its base, a
merged model a fine-tune of it. A GPTQ checkpoint is a quantization of the merged model where that is published too, and
else a fine-tune of the base: it is more than the base in fewer bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from qlora.errors import Problem
from qlora.facts import RunFacts
from qlora.publishing import serving
from qlora.reporting.console import duration
from qlora.verdict import verdict

TITLES = {"gptq": "{bits}-bit {method}", "merged": "merged, 16 bits", "adapter": "LoRA adapter"}
LADDER = (
    ("loss", "loss", "{:.4f}"),
    ("perplexity", "perplexity", "{:.3f}"),
    ("KL to trained", "kl", "{:.4f}"),
    ("top-1", "top1", "{:.2%}"),
    ("gain kept", "gain_retained", "{:.1%}"),
    ("exact match", "exact_match", "{:.1%}"),
    ("preferred", "preferred", "{:.1%}"),
)
HOW_TO_READ = (
    "Loss and perplexity are of the answers' tokens; KL is how far predictions are from the trained model's, in nats "
    "per token; top-1 how often both would say the same next token; gain kept the share of the fine-tune's improvement "
    "over the base that is left."
)


@dataclass(frozen=True)
class Origin:
    """What a run cannot say of itself. repos: where kinds are published, by kind."""

    license: str | None = None
    repos: Mapping[str, str] = field(default_factory=dict)
    forced: bool = False
    """Whether it is published although the verdict is against it."""


def model_card(facts: RunFacts, kind: str, origin: Origin) -> str:
    """README.md of `gptq`, `merged` or `adapter`: front matter, then text."""
    front = yaml.safe_dump(_front_matter(facts, kind, origin), sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n\n{_text(_body(facts, kind, origin))}"


def overview(facts: RunFacts, kinds: Sequence[str], origin: Origin) -> str:
    """README.md of a folder that holds several of them."""
    folders = [f"- [`{kind}/`]({kind}/README.md): {_title(facts, kind)}" for kind in kinds]
    head = [f"# {facts.recipe.name}", *_warning(facts, origin), *_about(facts), "\n".join(folders)]
    check = "`qlora verify .` in this folder compares every file with `MANIFEST.json`."
    return _text([*head, *_quality(facts), *_made(facts), check])


def _body(facts: RunFacts, kind: str, origin: Origin) -> Iterator[str]:
    yield f"# {facts.recipe.name}: {_title(facts, kind)}"
    yield from _warning(facts, origin)
    yield from _about(facts)
    yield from _quality(facts)
    yield "## Use it"
    yield from serving.commands(facts, kind, base_link(facts), origin.repos.get(kind, f"./{kind}"))
    yield from _made(facts)
    yield "## Limits"
    yield "\n".join(f"- {limit}" for limit in _limits(facts, kind, origin))
    yield "## Where it comes from"
    yield from _lineage(facts)


def _text(blocks: Iterator[str] | Sequence[str]) -> str:
    return "\n\n".join(block for block in blocks if block) + "\n"


# -- front matter -----------------------------------------------------------------------------------------------------


def _front_matter(facts: RunFacts, kind: str, origin: Origin) -> dict[str, Any]:
    recipe, base = facts.recipe, hub_base(facts)
    front: dict[str, Any] = {}
    if kind == "gptq" and "merged" in origin.repos:
        front |= {"base_model": origin.repos["merged"], "base_model_relation": "quantized"}
    elif base is not None:
        front |= {"base_model": base, "base_model_relation": "adapter" if kind == "adapter" else "finetune"}
    if origin.license is not None:
        front["license"] = origin.license
    front |= {"library_name": "peft" if kind == "adapter" else "transformers", "pipeline_tag": "text-generation"}
    tags = {"adapter": ["lora"], "merged": [], "gptq": [recipe.quantize.method, f"{recipe.quantize.bits}-bit"]}
    front["tags"] = ["qlora", *tags[kind]] + ([recipe.train.method] if recipe.train.method != "sft" else [])
    if datasets := [name for name, on_hub in _sources(facts) if on_hub]:
        front["datasets"] = datasets
    return front


def hub_base(facts: RunFacts) -> str | None:
    """The base's id on the Hub; None where it was a file or folder."""
    base = facts.recipe.model.base
    return None if Path(base).is_absolute() or base.endswith(".gguf") or Path(base).exists() else base


def base_link(facts: RunFacts) -> str:
    """The base's name: an id on the Hub, or that of a file or folder."""
    return hub_base(facts) or Path(facts.recipe.model.base).name


def _sources(facts: RunFacts) -> list[tuple[str, bool]]:
    """Names of the training data, and whether they are on the Hub."""
    from qlora.data.sources import is_local

    return [
        (Path(source.path).name, False) if is_local(source.path) else (source.path, True)
        for source in facts.recipe.data.train
    ]


# -- text -------------------------------------------------------------------------------------------------------------


def _title(facts: RunFacts, kind: str) -> str:
    quantize = facts.recipe.quantize
    return TITLES[kind].format(bits=quantize.bits, method=quantize.method.upper())


def _warning(facts: RunFacts, origin: Origin) -> Iterator[str]:
    """The first thing to read, where this is not to be shipped."""
    found = verdict(facts)
    if found.ship:
        return
    reasons: Sequence[Problem] = found.reasons or (Problem("nothing was measured: no rows were held out"),)
    head = "Published with `--force`: " if origin.forced else ""
    lines = [f"> **{head}{'This' if not head else 'this'} model did not pass its own checks.**", ">"]
    yield "\n".join(lines + [f"> - {reason.what}" for reason in reasons])


def _about(facts: RunFacts) -> Iterator[str]:
    recipe, base = facts.recipe, hub_base(facts)
    name = f"[{base}](https://huggingface.co/{base})" if base else f"`{base_link(facts)}`"
    revision = facts.base.get("revision")
    at = f" at revision `{revision}`" if revision else ""
    quantize, refined = recipe.quantize, (facts.metrics("quantize").get("refine") or {}).get("kept")
    trained = {"none": "in 16 bits", "checkpoint": "in its own packed codes"}.get(recipe.model.quantization)
    trained = trained or f"in {recipe.model.quantization.upper()}"
    how = "a weighted sum of adapters" if recipe.lora.combine else f"a LoRA adapter of rank {recipe.lora.r}"
    merged = "exactly into the weights that training saw" if recipe.merge.base == "dequantized" else "into the base"
    yield (
        f"A fine-tune of {name}{at}: {how} on the base {trained}, merged {merged}, then quantized to {quantize.bits} "
        f"bits with {quantize.method.upper()}, {_groups(quantize.group_size)}{' and refined' if refined else ''}. "
        "What each of these steps did to the model was measured; the figures are below."
    )


def _groups(size: int) -> str:
    return f"groups of {size}" if size > 0 else "a scale for each output"


def _quality(facts: RunFacts) -> Iterator[str]:
    yield "## How good it is"
    if facts.ladder is None:
        yield "Nothing was measured: no rows were held out."
        return
    ladder = facts.ladder
    columns = [column for column in LADDER if any(rung.get(column[1]) is not None for rung in ladder["rungs"])]
    metrics = list(dict.fromkeys(name for rung in ladder["rungs"] for name in rung.get("metrics") or {}))
    rows = [["model", *(title for title, _, _ in columns), *metrics]]
    for rung in ladder["rungs"]:
        measured = rung.get("metrics") or {}
        cells = [_cell(rung.get(key), form) for _, key, form in columns]
        rows.append([rung["label"], *cells, *(_cell(measured.get(name), "{:.1%}") for name in metrics)])
    apart = ", that nothing learned from" if facts.recipe.data.overlap == "remove" else ""
    yield f"On {ladder['rows']:,} held-out rows with {ladder['tokens']:,} answer tokens{apart}:"
    yield _table(rows)
    yield HOW_TO_READ
    if verdict(facts).ship:
        yield f"Verdict: **ship**. {_held(facts)}"


def _held(facts: RunFacts) -> str:
    """Which limits the recipe set, all of which hold here."""
    gates = facts.recipe.evaluate.gates.model_dump(exclude_none=True)
    if not facts.recipe.merges_exactly:
        gates.pop("merge_kl", None)
    metrics = gates.pop("metrics")
    limits = gates | {f"metrics.{name}": limit for name, limit in metrics.items()}
    if not limits:
        return "The recipe sets no limits; the tokens and the chat template that servers read are those of training."
    named = ", ".join(f"{name} {limit:g}" for name, limit in limits.items())
    return f"The recipe's limits hold ({named}), and servers read the tokens and the chat template of training."


def _cell(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = [head, ["---", *("---:" for _ in head[1:])], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _made(facts: RunFacts) -> Iterator[str]:
    recipe, trained = facts.recipe, facts.metrics("train")
    yield "## How it was made"
    points = []
    if data := trained.get("data"):
        names = ", ".join(
            f"[{n}](https://huggingface.co/datasets/{n})" if hub else f"`{n}`" for n, hub in _sources(facts)
        )
        points.append(
            f"**Data**: {names}; {data['rows']:,} rows with {data['tokens']:,} tokens, "
            f"{data['supervised_tokens']:,} of them learned from"
        )
    if "steps" in trained:
        points.append(
            f"**Training**: {recipe.train.method.upper()}, {trained['steps']:,} steps, learning rate "
            f"{recipe.train.learning_rate:g}, seed {recipe.seed}; adapter of rank {recipe.lora.r}, alpha "
            f"{recipe.lora.alpha:g}"
        )
    quantized = facts.metrics("quantize")
    if "calibration_rows" in quantized:
        points.append(
            f"**Quantization**: {recipe.quantize.bits} bits, {_groups(recipe.quantize.group_size)}, calibrated on "
            f"{quantized['calibration_rows']:,} rows with {quantized['calibration_tokens']:,} tokens"
        )
    yield "\n".join(f"- {point}" for point in points)
    rows = [["stage", "time", "GPU memory", "host memory"]]
    for name in ("train", "merge", "quantize", "evaluate"):
        if metrics := facts.metrics(name):
            memory = [_cell(metrics.get(key), "{:.1f} GiB") for key in ("gpu_peak_gib", "host_peak_gib")]
            rows.append([name, duration(metrics["seconds"]), *memory])
    yield _table(rows)
    yield "The whole recipe is in `recipe.yaml`; `qlora run recipe.yaml` makes it again from the same data."


def _limits(facts: RunFacts, kind: str, origin: Origin) -> Iterator[str]:
    yield "It was measured on held-out rows of its own task; nothing is known here of other tasks, or of its safety."
    if kind == "adapter":
        held = facts.recipe.model.quantization
        yield (
            f"It was trained on the base in {held}: added to the base in another form, it is not the model that was "
            "measured. The merged and GPTQ checkpoints hold the weights it was trained around."
        )
    if kind == "gptq":
        yield from (f"Quantization: {warning}." for warning in facts.metrics("quantize").get("warnings", []))
    yield from (f"{reason.what}." for reason in verdict(facts).reasons)
    if origin.license is None:
        yield "The base's license was not found on the machine that made it: it applies here too, look it up."


def _lineage(facts: RunFacts) -> Iterator[str]:
    rows = [f"- {name}: `{entry['fingerprint'][:16]}`" for name, entry in facts.stages.items()]
    yield "Fingerprints of the stages, over recipe, data, base and versions; `lineage.json` has all that is in them:"
    yield "\n".join(rows)
    used = dict.fromkeys(pair for entry in facts.stages.values() for pair in entry["versions"].items())
    yield f"Made with {', '.join(f'{name} {version}' for name, version in used)}."
    if codes := facts.base.get("digest"):
        yield f"The base's quantized codes have the digest `{codes[:16]}`, which the merge compared with its own."
    yield "`MANIFEST.json` has the sha256 of every file; `qlora verify FOLDER` compares them."
