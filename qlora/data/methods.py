"""Whether rendered rows are what a training method learns from."""

from __future__ import annotations

import numpy as np

from qlora.data.preparation import PreparedData
from qlora.data.sources import BadRows
from qlora.data.store import NONE
from qlora.errors import Problem


def unfit_rows(method: str, prepared: PreparedData) -> BadRows:
    """The rows that the method cannot learn from."""
    rows, bad = prepared.rows, BadRows()
    if method == "sft":  # a bad answer would be learned as a good one
        what, fix = "the row says whether its answer is a good one", "train.method: kto learns from that"
        unfit_N = rows.column("good") != NONE
    elif method == "kto":
        what = "nothing says whether the answer is a good one"
        fix = "train.method: kto needs answers with a `label` (format: kto)"
        unfit_N = rows.column("good") == NONE
    else:
        what = "there is no second answer to compare with"
        fix = f"train.method: {method} needs a `chosen` and a `rejected` answer (format: preference)"
        unfit_N = rows.column("rejected") == NONE
    for index in np.flatnonzero(unfit_N).tolist():
        bad.add(Problem(what, rows.where(index), fix))
    return bad
