"""The report of a run, as text: what it says of the verdict, what is left out, colours that can be read, its size."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from qlora import cli
from qlora.artifacts import result_digest
from qlora.facts import RunFacts
from qlora.reporting.page import page, write_page
from qlora.reporting.page.html import Html, tag

STYLE = (Path(cli.__file__).parent / "reporting" / "page" / "style.css").read_text(encoding="utf-8")


class Outline(HTMLParser):
    """Tags, the text of each, and ids."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, name, attributes):
        self.tags.append((name, dict(attributes)))
        if name not in ("meta", "input", "link"):
            self._open.append(name)
            self.texts.setdefault(name, []).append("")

    def handle_endtag(self, name):
        assert self._open and self._open[-1] == name, f"</{name}> in {self._open}"
        self._open.pop()

    def handle_data(self, data):
        for name in set(self._open):
            self.texts[name][-1] += data


@pytest.fixture(scope="module")
def shown(write_run, tmp_path_factory):
    return page(RunFacts.read(write_run(tmp_path_factory.mktemp("runs"))))


def test_elements_escape_text_and_attributes():
    made = tag("p", "<b>", Html("<i></i>"), None, [tag("b", "&")], title='"', data_x="<", hidden=False, open=True)
    assert made == '<p title="&quot;" data-x="&lt;" open>&lt;b&gt;<i></i><b>&amp;</b></p>'
    assert tag("p", "half a pair \ud800").encode() == b"<p>half a pair ?</p>"


def test_the_verdict_comes_first_in_words_with_what_to_do(write_run, tmp_path):
    passed = Outline(page(RunFacts.read(write_run(tmp_path, "passed"))))
    assert [name for name, _ in passed.tags if name in ("h1", "h2")][0] == "h1"
    assert passed.texts["h1"] == ["Ship it: it passed all 3 checks"]
    failed = page(RunFacts.read(write_run(tmp_path, "failed", failed=True)))
    assert Outline(failed).texts["h1"] == ["Do not ship it: 1 check failed"]
    assert "the gate wants at most 0.001" in failed and "Try a smaller group_size" in failed
    without = write_run(tmp_path, "unknown", without=("ladder",), overrides=("data.eval=null", "data.eval_share=0"))
    unknown = page(RunFacts.read(without))
    assert Outline(unknown).texts["h1"][0].startswith("Not measured") and "or set data.eval_share." in unknown


def test_what_was_measured_of_another_checkpoint_says_nothing_of_this_one(write_run, tmp_path):
    directory = write_run(tmp_path)
    lineage = json.loads((directory / "lineage.json").read_text())
    stages = lineage["stages"]
    stages["evaluate"]["inputs"]["result of quantize"] = result_digest(stages["quantize"]["outputs"])
    (directory / "lineage.json").write_text(json.dumps(lineage))
    assert "Ship it" in page(RunFacts.read(directory))
    stages["quantize"]["outputs"]["model.safetensors"]["sha256"] = "0" * 64
    (directory / "lineage.json").write_text(json.dumps(lineage))
    assert "Run what is missing: " in page(RunFacts.read(directory)).replace("<code>", "")


def test_what_was_not_measured_is_one_line_with_the_key_that_turns_it_on(write_run, tmp_path, shown):
    parts = ("ladder", "survival", "generations", "contract", "merges")
    bare = page(RunFacts.read(write_run(tmp_path, "bare", without=parts)))
    assert bare.count('class="missing"') == 4, "one line each; where there is no ladder, none on what it might hold"
    assert "<code>evaluate.survival: true</code>" in bare and "<code>evaluate.generate: true</code>" in bare
    assert 'class="missing"' not in shown
    lone = page(RunFacts.read(write_run(tmp_path, "lone", without=("merges",))))
    assert "<code>evaluate.compare_merges: true</code>" in lone and lone.count('class="missing"') == 1


def test_a_run_that_has_only_trained_has_a_report(write_run, tmp_path):
    directory = write_run(tmp_path, without=("ladder", "survival", "generations", "contract"))
    lineage = json.loads((directory / "lineage.json").read_text())
    lineage["stages"] = {"train": lineage["stages"]["train"]}
    del lineage["stages"]["train"]["expected"]
    (directory / "lineage.json").write_text(json.dumps(lineage))
    assert "Not measured" in page(RunFacts.read(directory))


def test_a_run_learned_from_preferences_is_judged_by_them(write_run, tmp_path):
    directory = write_run(tmp_path, without=("merges",))
    path = directory / "evaluation" / "ladder.json"
    ladder = json.loads(path.read_text())
    for rung in ladder["rungs"][2:]:
        rung |= {"preferred": 0.81, "margin": 1.25}
    path.write_text(json.dumps(ladder))
    said = page(RunFacts.read(directory))
    assert "favours the better answer 81% of the time" in said
    assert said.count('<th scope="col">Perplexity') == 1, "of general text only"


def test_every_figure_of_the_ladder_is_on_the_page_and_every_layer(shown):
    for said in (
        "0.6120",
        "0.0093",
        "99.77%",
        "99.3%",
        "94.0%",
        "0.5620 – 0.6720",
        "arc_easy acc",
        "0.604 ± 0.011",
        "≈ 0.6120",
        "Ship the merge into the dequantized base",
    ):
        assert said in shown, said
    cells = [attributes for name, attributes in Outline(shown).tags if name == "td" and "data-steps" in attributes]
    assert len(cells) == 4 * 7 + 1
    assert cells[0]["data-name"] == "model.layers.0.self_attn.q_proj"
    figures = [each["title"] for each in json.loads(re.search(r'id="heat-figures">(.*?)</script>', shown)[1])]
    assert figures[:2] == ["Output error", "Update kept"]
    head = next(attributes for attributes in cells if attributes["data-name"] == "lm_head")
    assert head["data-steps"].count("-") == 5 and head["data-values"].split("|").count("–") == 5


def test_tables_have_captions_and_headings_pictures_have_names(shown):
    outline = Outline(shown)
    names = [name for name, _ in outline.tags]
    assert names.count("table") == names.count("caption")
    assert all("scope" in attributes for name, attributes in outline.tags if name == "th")
    ids = [attributes["id"] for _, attributes in outline.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for name, attributes in outline.tags:
        if name == "svg" and attributes.get("role") == "img":
            assert attributes["aria-labelledby"] in ids and attributes["aria-describedby"] in ids
    assert {"header", "nav", "main", "footer"} <= set(names)


def test_no_text_of_others_is_markup(write_run, tmp_path):
    said = page(RunFacts.read(write_run(tmp_path, hostile=True)))
    outline = Outline(said)
    assert [name for name, _ in outline.tags].count("script") == 2 and "img" not in outline.texts
    assert not any(key.startswith("on") for _, attributes in outline.tags for key in attributes)


@pytest.mark.parametrize(("layers", "most"), [(30, 200_000), (80, 400_000)])
def test_it_stays_small_for_large_models(write_run, tmp_path, layers, most):
    written = write_page(RunFacts.read(write_run(tmp_path, layers=layers)))
    assert written.stat().st_size < most
    assert [path.name for path in written.parent.iterdir()] == ["index.html"]


def test_experts_of_a_layer_share_a_cell(write_run, tmp_path):
    directory = write_run(tmp_path)
    path = directory / "evaluation" / "survival.json"
    survival = json.loads(path.read_text())
    first = survival["modules"][0]
    survival["modules"] += [first | {"name": f"expert {error}", "output_error": error} for error in (0.5, 0.6, 0.7)]
    path.write_text(json.dumps(survival))
    said = page(RunFacts.read(directory))
    assert "(worst of 4)" in said and 'data-values="0.7000|' in said


def test_colours_of_text_can_be_told_from_what_is_behind_them():
    colours = {
        name: (light, dark) for name, light, dark in re.findall(r"--([\w-]+): light-dark\((#\w+), (#\w+)\)", STYLE)
    }
    behind = {
        "page": ("ink", "muted", "accent", "second", "good", "bad"),
        "panel": ("ink",),
        "good-panel": ("ink", "good"),
        "bad-panel": ("ink", "bad", "good"),
        "warn-panel": ("ink", "warn", "good"),
    }
    for theme in (0, 1):
        for ground, texts in behind.items():
            for text in texts:
                found = _contrast(colours[text][theme], colours[ground][theme])
                assert found >= 4.5, (text, ground, theme, found)
        steps = [_luminance(colours[f"h{step}"][theme]) for step in range(1, 8)]
        assert steps == sorted(steps, reverse=theme == 0), "steps of colour go one way"


def _luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _contrast(one: str, other: str) -> float:
    """WCAG 2.2, contrast ratio."""
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)
