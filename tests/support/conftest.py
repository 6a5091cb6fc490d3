"""Rows for every method."""

import json

import pytest

BOXES = {number: word for number, word in enumerate(("copper", "granite", "linen", "cedar", "marble", "bronze"))}


@pytest.fixture
def rows_of(tmp_path):
    """`rows_of(method)`: what `tiny_recipe` takes as `data` to learn by this method."""

    def write(method: str) -> dict:
        rows = []
        for number, word in BOXES.items():
            asked = f"What is box {number} made of?"
            better, worse = f"It is {word}.", f"It is {BOXES[(number + 1) % len(BOXES)]}."
            if method == "kto":
                rows.append({"prompt": asked, "completion": better, "label": True})
                rows.append({"prompt": asked, "completion": worse, "label": False})
            elif method == "sft":
                rows.append({"prompt": asked, "completion": better})
            else:
                rows.append({"prompt": asked, "chosen": better, "rejected": worse})
        files = [tmp_path / f"{method}-{split}.jsonl" for split in ("train", "eval")]
        for path, part in zip(files, (rows[:-2], rows[-2:]), strict=True):
            path.write_text("".join(json.dumps(row) + "\n" for row in part))
        return {"train": [{"path": str(files[0])}], "eval": {"path": str(files[1])}}

    return write
