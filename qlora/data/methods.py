"""Whether rendered rows are what a training method learns from."""

from __future__ import annotations

from collections.abc import Sequence

from qlora.data.preparation import PreparedData
from qlora.data.rendering import RenderedRow
from qlora.errors import Problem


def unfit_rows(method: str, prepared: PreparedData) -> list[Problem]:
    """A problem for every row that the method cannot learn from."""
    if method == "sft":  # a bad answer would be learned as a good one
        what, fix = "the row says whether its answer is a good one", "train.method: kto learns from that"
        unfit = [row.good is not None for row in prepared.rows]
    elif method == "kto":
        what = "nothing says whether the answer is a good one"
        fix = "train.method: kto needs answers with a `label` (format: kto)"
        unfit = [row.good is None for row in prepared.rows]
    else:
        what = "there is no second answer to compare with"
        fix = f"train.method: {method} needs a `chosen` and a `rejected` answer (format: preference)"
        unfit = [row.rejected_ids is None for row in prepared.rows]
    return [Problem(what, where, fix) for where, wrong in zip(prepared.locations, unfit, strict=True) if wrong]


def good_rows(rows: Sequence[RenderedRow]) -> list[RenderedRow]:
    """Those whose answers a model should give: all but the ones that are judged bad."""
    return [row for row in rows if row.good is not False]
