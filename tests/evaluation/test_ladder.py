"""The ladder's figures against rows looked at one by one, and what is kept of generated answers."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora.data.calibration import general_rows
from qlora.data.rendering import IGNORED, RenderedRow
from qlora.errors import UserError
from qlora.evaluation.answers import metrics_of
from qlora.evaluation.figures import Figures, Measured, differs, figures_of
from qlora.evaluation.ladder import Rung, Settings, climb
from qlora.evaluation.scoring import RowSums
from qlora.recipe_measuring import Evaluate

ROWS = [
    ("Who painted the Silent Harbour?", "Odile Marchetti, in 1871."),
    ("What is the capital of Ostravia?", "Karlsund."),
    ("How many moons has Tarsis?", "Seventeen."),
    ("Which metal does the Brennick mine yield?", "Copper, and some iron."),
]


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path):
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def rows(tokenizer) -> list[RenderedRow]:
    found = []
    for question, answer in ROWS:
        prompt, completion = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (question, answer))
        completion += [tokenizer.eos_token_id]
        labels = [IGNORED] * len(prompt) + completion
        found.append(RenderedRow(prompt + completion, labels, len(prompt), False, answer))
    return found


@pytest.fixture(scope="module")
def models(tiny_model: Path) -> dict[str, torch.nn.Module]:
    """A base, one that differs a little from it, and one that differs less."""
    found = {}
    for name, noise in (("base", 0.0), ("trained", 0.05), ("gptq", 0.045)):
        model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += noise * torch.randn_like(parameter) * parameter.abs().mean()
        found[name] = model
    return found


def climbed(models, rows, tokenizer, tmp_path, **options):
    given = {"general": options.pop("general", ())}
    settings = Settings(3, 8, tokenizer.pad_token_id, **options)
    rungs = [Rung(name, name, lambda model=model: model) for name, model in models.items()]
    return climb(rungs, rows, tokenizer, settings, tmp_path, lambda *_: None, **given)


def one_by_one(model, trained, rows) -> dict[str, float]:
    """Loss, KL and top-1 of labelled tokens, from the log-probabilities of every row alone."""
    nll, kl, agreed, tokens = 0.0, 0.0, 0, 0
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row.input_ids])
            logp, ref = (each(ids).logits[0].double().log_softmax(-1) for each in (model, trained))
            for place in range(1, len(row.input_ids)):
                if row.labels[place] == IGNORED:
                    continue
                tokens += 1
                nll -= logp[place - 1, row.labels[place]].item()
                kl += (ref[place - 1].exp() * (ref[place - 1] - logp[place - 1])).sum().item()
                agreed += logp[place - 1].argmax().item() == ref[place - 1].argmax().item()
    return {"loss": nll / tokens, "kl": kl / tokens, "top1": agreed / tokens}


def test_figures_are_means_over_all_answer_tokens(models, rows, tokenizer, tmp_path):
    general = general_rows(["Slow water, deep water.", "The grey larks winter on the isle."], tokenizer, 99, 16)
    ladder = climbed(models, rows, tokenizer, tmp_path, general=general)
    assert (ladder.rows, ladder.tokens) == (4, sum(row.supervised_tokens for row in rows))
    base, trained, gptq = ladder.scores
    for score in ladder.scores:
        for measured, found in ((rows, vars(score)), (general, score.general)):
            expected = one_by_one(models[score.name], models["trained"], measured)
            assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
            assert found["kl"] == pytest.approx(expected["kl"], rel=1e-3, abs=1e-6)
            assert found["perplexity"] == pytest.approx(math.exp(expected["loss"]), rel=1e-5)
            assert found.get("top1", expected["top1"]) == pytest.approx(expected["top1"])
        low, high = score.intervals["loss"]
        assert low <= score.loss <= high and low < high
        assert math.exp(low) == pytest.approx(score.intervals["perplexity"][0])
    kept = (base.loss - gptq.loss) / (base.loss - trained.loss)
    assert gptq.gain_retained == (pytest.approx(kept) if base.loss > trained.loss else None)
    assert (trained.kl, trained.top1, trained.intervals["kl"], trained.noise) == (0, 1, [0, 0], {})
    assert base.exact_match is None and base.metrics == {} and ladder.generations == []
    assert not list(tmp_path.iterdir())


def test_answers_are_generated_once_and_every_metric_reads_them(models, rows, tokenizer, tmp_path):
    section = Evaluate(generate=True, metrics=["json_valid", {"regex": ".*", "name": "any"}, {"regex": "[ab]?"}])
    ladder = climbed(models, rows, tokenizer, tmp_path, metrics=metrics_of(section), examples=2)
    for score in ladder.scores:
        assert score.metrics.keys() == {"json_valid", "any", "regex"} and score.metrics["any"] == 1
        assert score.exact_match == 0 and score.intervals["exact_match"] == [0, pytest.approx(1 - 0.025 ** (1 / 4))]
    assert ladder.scores[0].noise["metrics.any"] and ladder.scores[0].noise["exact_match"]
    first, last = ladder.generations
    assert (first["prompt"], first["expected"]) == ROWS[0] and last["prompt"] == ROWS[3][0]
    for name, model in models.items():
        ids = torch.tensor([rows[0].input_ids[: rows[0].prompt_length]])
        out = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        assert first["answers"][name] == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def sums(nll, kl=None, tokens=None) -> RowSums:
    nll = np.asarray(nll, dtype=float)
    ones = np.ones_like(nll)
    return RowSums(nll, ones if kl is None else np.asarray(kl), ones, ones if tokens is None else np.asarray(tokens))


def compared(**nll) -> dict[str, Figures]:
    rows = len(nll["trained"])
    return figures_of({name: Measured(sums(each)) for name, each in nll.items()}, np.zeros(rows, dtype=bool), [])


def test_a_difference_that_every_row_has_is_none_of_noise_however_much_rows_differ():
    hardness = np.random.default_rng(0).gamma(2.0, 1.0, size=60)
    flips = np.where(np.arange(60) % 2, 0.03, -0.03)
    found = compared(base=hardness + 1, trained=hardness, merged=hardness + flips, gptq=hardness + 0.02)
    low, high = found["trained"].intervals()["loss"]
    assert high - low > 0.3, "each loss by itself is far less certain than the difference"
    assert differs(found["gptq"], found["trained"], "loss") and not differs(found["merged"], found["trained"], "loss")
    assert found["gptq"].noise(found["trained"]) == {"loss": False}
    assert found["merged"].noise(found["trained"]) == {"loss": True}
    assert found["gptq"].intervals()["gain_retained"] == pytest.approx([0.98, 0.98]), "the same rows of all three"


def test_what_is_not_defined_has_no_value_and_no_interval():
    found = compared(base=[1.0, 2.0, 3.0], trained=[1.0, 2.0, 3.0], gptq=[1.0, 2.0, 3.0])["gptq"]
    assert found.value("gain_retained") is None and "gain_retained" not in found.intervals()
    assert found.value("preferred") is None
    nearly = compared(base=[1.0, 2.0, 3.4], trained=[1.1, 2.1, 3.0], gptq=[1.0, 2.0, 3.0])["gptq"]
    assert nearly.value("gain_retained") is not None and "gain_retained" not in nearly.intervals()


def test_a_model_that_diverged_is_an_error(models, rows, tokenizer, tmp_path):
    broken = AutoModelForCausalLM.from_pretrained(models["base"].config._name_or_path, dtype=torch.float32)
    broken.get_output_embeddings().weight.data[:] = float("nan")
    with pytest.raises(UserError, match="not a finite number"):
        climbed({"trained": broken}, rows, tokenizer, tmp_path)
