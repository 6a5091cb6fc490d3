"""The results of the quality study: a line per variant and seed, kept as they come, and their summary over seeds."""

from __future__ import annotations

import json
import os
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PEERS = ("gptqmodel", "llmcompressor")
COLUMNS = {
    "loss": ("loss", "{:.4f}"),
    "kl": ("KL to trained", "{:.5f}"),
    "kl_share": ("KL / best peer", "{:.2f}"),
    "top1": ("top-1", "{:.4f}"),
    "gain_retained": ("gain kept", "{:.2%}"),
    "perplexity": ("general perplexity", "{:.2f}"),
    "perplexity_change": ("against merged", "{:+.1%}"),
    "quantize_seconds": ("quantize s", "{:.1f}"),
    "refine_seconds": ("refine s", "{:.1f}"),
}


class Results:
    """Records in a JSON-lines file, one object per line; a line cut short by a kill is left out."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            path.write_text(whole, encoding="utf-8")
        self.records = [json.loads(line) for line in whole.splitlines()]

    def has(self, seed: int, name: str) -> bool:
        """Whether there is a measurement; a failure is not one."""
        return any(r["seed"] == seed and r["name"] == name and "error" not in r for r in self.records)

    def add(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())


def summary(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per variant, in the order of first appearance: `{figure: {mean, std, values}}` over its seeds.

    The last measurement of a variant and seed counts. Adds, seed by seed: gain retained, perplexity against the merged
    model's, and KL as a share of the better peer's with the same bits and group size.
    """
    last = {(record["name"], record["seed"]): record for record in records if "error" not in record}
    rows: dict[str, dict[str, Any]] = {}
    for record in records:
        rows.setdefault(record["name"], {"name": record["name"], "seeds": [], "values": defaultdict(list)})
    for (name, seed), record in sorted(last.items(), key=lambda item: item[0][1]):
        rows[name]["seeds"].append(seed)
        for figure, value in (record | derived(record, last)).items():
            if figure in COLUMNS and value is not None:
                rows[name]["values"][figure].append(value)
    return [
        {"name": row["name"], "seeds": row["seeds"]}
        | {figure: spread(row["values"][figure]) for figure in COLUMNS if row["values"][figure]}
        for row in rows.values()
        if row["seeds"] or row["name"] != "reference"
    ]


def derived(record: dict[str, Any], every: dict[tuple[str, int], dict[str, Any]]) -> dict[str, float]:
    """Figures that hold one measurement against others of its seed."""
    seed = record["seed"]
    found = {}
    base, trained, merged = (every.get((name, seed)) for name in ("base", "trained", "merged"))
    if base and trained and base["loss"] > trained["loss"]:
        found["gain_retained"] = (base["loss"] - record["loss"]) / (base["loss"] - trained["loss"])
    if merged:
        found["perplexity_change"] = record["perplexity"] / merged["perplexity"] - 1
    form = [record.get(key) for key in ("bits", "group_size")]
    peers = [
        other["kl"]
        for (_, other_seed), other in every.items()
        if other_seed == seed
        and other.get("engine") in PEERS
        and [other.get(key) for key in ("bits", "group_size")] == form
    ]
    if record.get("engine") == "ours" and peers:
        found["kl_share"] = record["kl"] / min(peers)
    return found


def spread(values: Sequence[float]) -> dict[str, Any]:
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "values": list(values),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The summary as a Markdown table: mean ± standard deviation over seeds."""
    head = ["variant", "seeds", *(title for title, _ in COLUMNS.values())]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        cells = [row["name"], str(len(row["seeds"])) if row["seeds"] else "failed"]
        for figure, (_, form) in COLUMNS.items():
            cell = row.get(figure)
            text = form.format(cell["mean"]) if cell else ""
            cells.append(
                text + (f" ± {form.format(cell['std']).lstrip('+')}" if cell and cell["std"] is not None else "")
            )
        lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
