"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table


def ladder_table(rungs: Sequence[dict[str, Any]], rows: int, tokens: int) -> Table:
    """The ladder, one line per rung; columns nobody measured are left out."""
    title = f"The ladder: {rows} held-out rows, {tokens:,} answer tokens; KL and top-1 to the trained model"
    table = Table(title=title, title_justify="left", title_style="", box=None)
    table.add_column("model", no_wrap=True)
    columns = [
        ("loss", "loss", "{:.4f}"),
        ("ppl", "perplexity", "{:.3f}"),
        ("KL", "kl", "{:.4f}"),
        ("top-1", "top1", "{:.2%}"),
        ("gain kept", "gain_retained", "{:.1%}"),
        ("exact", "exact_match", "{:.0%}"),
        ("preferred", "preferred", "{:.1%}"),
        ("margin", "margin", "{:.2f}"),
    ]
    if any(rung.get("preferred") is not None for rung in rungs):  # training is for something else then
        columns = [column for column in columns if column[1] not in ("perplexity", "gain_retained")]
    columns = [column for column in columns if any(rung.get(column[1]) is not None for rung in rungs)]
    for title, _, _ in columns:
        table.add_column(title, justify="right")
    for rung in rungs:
        cells = ["—" if rung.get(key) is None else form.format(rung[key]) for _, key, form in columns]
        table.add_row(rung["label"], *cells, style="bold" if rung["name"] in {"trained", "gptq"} else "")
    return table
