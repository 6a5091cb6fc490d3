"""A model that is larger than its share of the GPU is measured all the same, and gives what it gives in one piece."""

import pytest
import torch

from qlora.artifacts import read_json
from qlora.models.loading import load_base, load_gptq, load_plain
from qlora.pipeline import Pipeline
from qlora.recipe_file import load_recipe

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
FITS_A_LAYER = 150_000  # bytes; the tiny model has 260,000
SMALL = {"memory": 0.00037, "batch_size": 2}  # GiB: by the formula, so much beside what two rows take


def logits(model):
    ids = torch.arange(3, 40, device="cuda")[None]
    with torch.inference_mode():
        return model(input_ids=ids).logits.float()


def test_parts_in_host_memory_change_nothing(tiny_recipe, tiny_model):
    whole = load_recipe(tiny_recipe(device="cuda"), [])
    Pipeline(whole).run()
    merged, gptq = whole.run_dir / "merged", whole.run_dir / "gptq"
    for load in (
        lambda **most: load_base(tiny_model, whole.model, "cuda:0", quantized=False, **most).eval(),
        lambda **most: load_plain(merged, torch.bfloat16, "cuda:0", **most),
        lambda **most: load_gptq(gptq, torch.bfloat16, "cuda:0", **most),
    ):
        spread = load(most=FITS_A_LAYER)
        assert {parameter.device.type for parameter in spread.parameters()} == {"cuda", "meta"}
        assert torch.equal(logits(spread), logits(load()))

    ladder = whole.run_dir / "evaluation/ladder.json"
    before = read_json(ladder)["rungs"]
    ladder.unlink()  # the stage is not up to date any more
    Pipeline(whole.model_copy(update={"evaluate": whole.evaluate.model_copy(update=SMALL)})).run()
    assert "wait in host memory" in "".join(path.read_text() for path in (whole.run_dir / "logs").iterdir())
    for one, other in zip(before, read_json(ladder)["rungs"], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3), one["name"]
