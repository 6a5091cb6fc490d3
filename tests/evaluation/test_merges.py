"""Both merges on one ladder, and which of them to ship."""

import shutil
from collections import namedtuple

import pytest

from qlora import cli
from qlora.artifacts import read_json
from qlora.check import check
from qlora.evaluation.merges import compare, which_to_ship
from qlora.recipe_file import load_recipe


def rung(loss=1.0, kl=0.01, general=None, **more):
    return {"loss": loss, "kl": kl, "general": None if general is None else {"loss": general}, **more}


def test_the_task_decides_then_general_text_then_the_trained_model():
    assert which_to_ship(rung(loss=1.0, general=3.0), rung(loss=1.1, general=2.0))[0] == "dequantized"
    assert which_to_ship(rung(loss=1.1), rung(loss=1.0)) == (
        "original",
        "loss on the held-out answers 1.0000, with the dequantized base 1.1000",
    )
    ship, why = which_to_ship(rung(general=3.0), rung(general=2.9, kl=0.3))
    assert ship == "original" and why.endswith("equal within the noise: loss on the held-out answers")
    assert which_to_ship(rung(kl=0.001), rung(kl=0.3))[0] == "dequantized"
    assert which_to_ship(rung(preferred=0.7, loss=1), rung(preferred=0.8, loss=2))[0] == "original"
    ship, why = which_to_ship(rung(loss=1.0, kl=0.01), rung(loss=1.0004, kl=0.0102))
    assert ship == "either" and "KL to the trained model" in why


def test_a_difference_inside_an_interval_decides_nothing():
    wide, narrow = {"loss": [0.8, 1.2]}, {"loss": [1.06, 1.14]}
    first, second = rung(loss=1.0, intervals=wide), rung(loss=1.1, kl=0.3, intervals=narrow)
    assert which_to_ship(first, second)[1].startswith("KL to the trained model")
    apart = rung(loss=1.3, kl=0.3, intervals={"loss": [1.25, 1.35]})
    assert which_to_ship(first, apart)[1].startswith("loss on the held-out answers")


def test_the_file_has_figures_of_both_with_and_without_merged_rungs():
    content = compare({"dequantized": rung(loss=0.9), "original": None}, {"dequantized": rung(), "original": rung(2.0)})
    assert content.keys() == {"dequantized", "original", "ship", "why"} and content["ship"] == "dequantized"
    assert content["dequantized"]["merged"]["loss"] == 0.9 and content["original"]["merged"] is None
    assert content["original"]["loss"] == 2.0


def command(capsys, *arguments: object) -> tuple[int, str]:
    code = cli._exit_code(lambda: cli.qlora.main([str(each) for each in arguments], standalone_mode=False))
    captured = capsys.readouterr()
    return code, captured.out + captured.err


@pytest.mark.parametrize("write", [True, False])
def test_both_merges_go_through_gptq_and_stand_on_one_ladder(tiny_recipe, write, capsys):
    own = "dequantized" if write else "original"
    path = tiny_recipe(merge={"write": write, "base": own}, evaluate={"compare_merges": True})
    code, text = command(capsys, "run", path)
    assert code == 0, text
    folder = load_recipe(path).run_dir / "evaluation"
    rungs = {each["name"]: each for each in read_json(folder / "ladder.json")["rungs"]}
    there = ["merged", "gptq", "merged_other", "gptq_other"] if write else ["gptq", "gptq_other"]
    assert list(rungs)[3:] == there
    other = "original" if write else "dequantized"
    assert rungs["gptq_other"]["label"] == f"GPTQ, {other} base"
    assert rungs["gptq_other"]["loss"] != rungs["gptq"]["loss"] and f"GPTQ, {other} base" in text
    content = read_json(folder / "merges.json")
    assert content[own]["kl"] == rungs["gptq"]["kl"] and content[other]["kl"] == rungs["gptq_other"]["kl"]
    assert (content[other]["merged"] is not None) == write
    assert content["ship"] in ("dequantized", "original", "either") and content["why"]
    assert f"Ship the merge into the {content['ship']} base" in " ".join(text.split()) or content["ship"] == "either"
    assert {each.name for each in folder.iterdir()} == {"contract.json", "ladder.json", "merges.json", "survival.json"}


def test_where_both_merges_are_one_comparing_them_is_refused(tiny_recipe, capsys):
    path = tiny_recipe(model={"quantization": "none"}, evaluate={"compare_merges": True})
    for name in ("check", "run"):
        code, text = command(capsys, name, path)
        assert code == 2 and "evaluate.compare_merges" in text and "both merges are one" in text
    assert not (load_recipe(path).run_dir / "adapter").exists()


def test_what_it_costs_is_known_before_and_a_full_disk_is_noticed(tiny_recipe, capsys, monkeypatch):
    plain, both = (
        {stage.stage: stage for stage in check(load_recipe(tiny_recipe(evaluate={"compare_merges": asked}))).stages}
        for asked in (False, True)
    )
    made = plain["merge"].disk + plain["quantize"].disk
    assert both["evaluate"].disk == plain["evaluate"].disk + made > made > 0
    assert both["evaluate"].seconds > plain["evaluate"].seconds + plain["quantize"].seconds
    path = tiny_recipe(evaluate={"compare_merges": True})
    for name in ("train", "merge", "quantize"):
        assert command(capsys, name, path)[0] == 0
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**40, 2**40 - 2**16, 2**16))
    code, text = command(capsys, "evaluate", path)
    assert code == 4 and "the other merge and its quantization (evaluate.compare_merges) needs" in text
