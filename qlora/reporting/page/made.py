"""Sections of the page about how the models were made: training, time and memory, data, lineage, how to do it again."""

from __future__ import annotations

import math
from typing import Any

from qlora.facts import RunFacts
from qlora.recipe_file import dump_recipe
from qlora.reporting import words
from qlora.reporting.console import duration
from qlora.reporting.figures import STAGES, size
from qlora.reporting.page.charts import Curve, bar, curve_chart
from qlora.reporting.page.html import Child, Html, row, table, tag
from qlora.reporting.page.measured import missing, section


def training_section(facts: RunFacts) -> Html:
    title = "How training went"
    lead = (
        "The loss on training rows after every step, and on held-out rows where it was measured. It should fall, then "
        "level out; held-out loss that rises again means too many epochs."
    )
    metrics = facts.metrics("train")
    curve = metrics.get("curve") or []
    curves = [
        Curve(label, kind, points, dots=kind == "held-out" and len(points) <= 40)
        for label, kind, key in (("training rows", "training", "loss"), ("held-out rows", "held-out", "eval_loss"))
        if (points := [(each["step"], each[key]) for each in curve if _finite(each.get(key))])
    ]
    if not curves:
        return section("training", title, lead, missing("curve"))
    last = "; ".join(f"{each.label}: {each.points[0][1]:.4f} to {each.points[-1][1]:.4f}" for each in curves)
    picture = curve_chart("loss-curve", "Loss over the steps of training", last, curves)
    key = tag("span", *(tag("span", each.label, class_=f"key {each.kind}") for each in curves), class_="keys")
    content: list[Child] = [
        tag("figure", tag("figcaption", tag("b", "Loss"), " in nats per token, lower is better ", key), picture)
    ]
    final = metrics["mean_loss"] if metrics.get("final_loss") is None else metrics["final_loss"]
    numbers: dict[str, Child] = {
        "steps": f"{metrics['steps']:,}",
        "loss at the end": f"{final:.4f}",
        "speed": f"{metrics['tokens_per_second']:,.0f} tokens a second" if metrics.get("tokens_per_second") else None,
        "processes": f"{metrics['processes']}",
        "best step": f"{metrics['best']['step']:,}" if metrics.get("best") else None,
        "a step": metrics.get("plan"),
    }
    return section("training", title, lead, *content, pairs(numbers))


def _finite(number: Any) -> bool:
    return isinstance(number, (int, float)) and math.isfinite(number)


def pairs(found: dict[str, Child]) -> Html:
    """Names and values; those that are None are left out."""
    return tag(
        "dl", *(tag("div", tag("dt", name), tag("dd", shown)) for name, shown in found.items() if shown), class_="pairs"
    )


def costs_section(facts: RunFacts) -> Html:
    title = "What it took"
    lead = (
        "Time and peak memory of every stage. The mark is what was estimated before it ran; estimates count tensors "
        "and floating-point work, and are off by some part."
    )
    stages = [name for name in STAGES if name in facts.stages]
    seconds = {
        name: (facts.metrics(name).get("seconds") or 0.0, words.expected(facts, name).get("seconds")) for name in stages
    }
    memory = {name: words.memory(facts, name) for name in stages}
    most_seconds = max([number or 0 for found in seconds.values() for number in found], default=0) or 1
    most_memory = max([number or 0 for _, *found in memory.values() for number in found], default=0) or 1
    rows = []
    for name in stages:
        took, thought = seconds[name]
        where, peak, peak_thought = memory[name]
        rows.append(
            row(
                [name, tag("small", STAGES[name])],
                _cost(duration(took), took, duration(max(1.0, thought)) if thought else None, thought, most_seconds),
                _cost(_gib(peak), peak or 0, _gib(peak_thought) if peak_thought else None, peak_thought, most_memory),
                where,
            )
        )
    total = sum(took for took, _ in seconds.values())
    heads = ("stage", "time", "peak memory", "where")
    content: list[Child] = [
        table(f"All stages together: {duration(total)}", heads, rows, class_="costs", numbers=False)
    ]
    if not any(words.expected(facts, name) for name in stages):
        content.append(missing("expected"))
    return section("cost", title, lead, *content)


def _cost(shown: str, used: float, estimate: str | None, expected: float | None, most: float) -> Child:
    mark = expected / most if expected else None
    return [
        shown,
        tag("span", f" estimate {estimate}", class_="estimate") if estimate else None,
        bar(used / most, mark),
    ]


def _gib(number: float | None) -> str:
    return f"{number:.1f} GiB" if number else "–"


def data_section(facts: RunFacts) -> Html:
    title = "What it learned from"
    lead = (
        "A token is a piece of a word. The model reads all tokens of a row, and learns from the answers only, unless "
        "the recipe says otherwise."
    )
    found = facts.metrics("train").get("data")
    quantize = facts.metrics("quantize")
    trained: dict[str, Child] = {}
    if found:
        share = found["supervised_tokens"] / max(1, found["tokens"])
        trained = {
            "training rows": f"{found['rows']:,}"
            + (f" of {found['rows_read']:,} read" if found["rows_read"] != found["rows"] else ""),
            "tokens": f"{found['tokens']:,}",
            "learned from": f"{found['supervised_tokens']:,} tokens ({share:.0%})",
            "longest row": f"{found['longest']:,} tokens",
            "cut to fit": f"{found['truncated']:,} rows",
            "left out": f"{found['dropped']:,} rows",
            "held out of them": f"{found['held_out']:,} rows",
            "taken out": f"{found['removed']:,} rows that are held-out rows too" if found.get("removed") else None,
        }
    measured, calibrated = facts.ladder, None
    if "calibration_rows" in quantize:
        calibrated = (
            f"{quantize['calibration_rows']:,} rows, {quantize['calibration_tokens']:,} tokens, which tell the "
        )
        calibrated += "quantizer what layers really see"
    trained |= {
        "measured on": f"{measured['rows']:,} held-out rows, {measured['tokens']:,} answer tokens"
        if measured
        else None,
        "calibrated on": calibrated,
    }
    files = ", ".join(source.path for source in facts.recipe.data.train)
    trained["files"] = tag("bdi", files)
    return section("data", title, lead, pairs(trained))


def lineage_section(facts: RunFacts) -> Html:
    title = "Where every file comes from"
    lead = (
        "Versions of everything that changes results, and digests (SHA-256) of what was read and written: equal "
        "digests are equal bytes."
    )
    content: list[Child] = []
    versions = {name: entry.get("versions") or {} for name, entry in facts.stages.items()}
    packages = list(dict.fromkeys(package for found in versions.values() for package in found))
    if packages:
        rows = [row(package, *(found.get(package, "–") for found in versions.values())) for package in packages]
        content.append(table("Versions by stage", ("package", *versions), rows, numbers=False))
    for name, entry in facts.stages.items():
        outputs = entry.get("outputs") or {}
        rows = [
            row(tag("code", file), size_of(each["bytes"]), tag("code", each["sha256"], class_="digest"))
            for file, each in outputs.items()
        ]
        about: dict[str, Child] = {
            "began": entry.get("started"),
            "fingerprint": tag("code", entry["fingerprint"], class_="digest") if "fingerprint" in entry else None,
            "base": tag("code", (entry.get("inputs") or {}).get("base"), class_="digest")
            if (entry.get("inputs") or {}).get("base")
            else None,
            "taken from": entry.get("taken_from"),
        }
        written = table(f"Files of {name}", ("file", "size", "SHA-256"), rows, numbers=False) if rows else None
        content.append(
            tag(
                "details",
                tag("summary", f"{name}: {len(outputs)} {'file' if len(outputs) == 1 else 'files'}"),
                pairs(about),
                written,
            )
        )
    return section("lineage", title, lead, *content)


def size_of(count: int) -> str:
    return size(count) if count >= 2**20 else f"{count:,} B"


def again_section(facts: RunFacts) -> Html:
    title = "Do it again"
    lead = (
        "The recipe as it was executed, every key of it. With the same versions, data and kind of device it gives the "
        "same files."
    )
    versions: dict[str, str] = next(
        (entry["versions"] for entry in reversed(facts.stages.values()) if entry.get("versions")), {}
    )
    pinned = " ".join(f"{name}=={version.partition('+')[0]}" for name, version in versions.items() if name != "qlora")
    commands = f"pip install {pinned}\n" if pinned else ""
    commands += f"qlora run {facts.dirs.recipe}"
    recipe = dump_recipe(facts.recipe)
    return section(
        "again",
        title,
        lead,
        _copied("commands", commands),
        tag("details", tag("summary", "recipe.yaml"), _copied("recipe", recipe)),
    )


def _copied(name: str, content: str) -> Html:
    button = tag("button", "Copy", type="button", class_="copy", data_copies=name, hidden=True)
    return tag("div", button, tag("pre", content, id=name, tabindex="0"), class_="copied")
