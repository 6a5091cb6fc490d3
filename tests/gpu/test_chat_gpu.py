"""A conversation on a GPU: every rung of a run answers there, in parts in host memory too, as it does in one piece."""

from io import StringIO

import pytest
import torch

from qlora import shelf
from qlora.chat import Session, Settings
from qlora.pipeline import Pipeline
from qlora.recipe_file import load_recipe
from qlora.reporting.screen import Screen

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
FITS_A_LAYER = 150_000  # bytes; the tiny model has 260,000


def test_every_rung_answers(tiny_recipe, monkeypatch):
    recipe = load_recipe(tiny_recipe(device="cuda"), [])
    for stage in ("train", "merge", "quantize"):
        Pipeline(recipe).run_stage(stage)
    rungs = ("base", "nf4", "trained", "merged", "gptq")
    lines = "What is the capital of Ostravia?\n" + "".join(f"/rung {name}\n/again\n" for name in rungs)

    def conversation() -> str:
        out = StringIO()
        screen = Screen(StringIO(lines), out, StringIO())
        Session(shelf.open_shelf(recipe.run_dir, "cuda"), Settings(max_tokens=12), screen).run()
        return out.getvalue()

    whole = conversation()
    assert whole.count("> /again\n") == len(rungs) and len(whole) > len(lines)
    monkeypatch.setattr(shelf, "room_beside_conversation", lambda *arguments: FITS_A_LAYER)
    assert conversation() == whole
