"""The report in headless Chromium: quiet, offline, as wide as a phone, and usable by mouse and by keyboard."""

import sys
from pathlib import Path

import pytest

from qlora.facts import RunFacts
from qlora.reporting.page import write_page

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import chromium

pytestmark = pytest.mark.skipif(
    chromium.executable() is None, reason="Chromium is not installed: apt-get install chromium"
)


@pytest.fixture(scope="module")
def browser():
    with chromium.Chromium() as started:
        yield started


@pytest.fixture(scope="module")
def address(write_run, tmp_path_factory):
    """Of a report with everything in it, and hostile text."""
    directory = write_run(tmp_path_factory.mktemp("runs"), hostile=True)
    return write_page(RunFacts.read(directory)).as_uri()


@pytest.fixture(scope="module")
def shown(browser, address):
    return browser.open(address)


def test_it_asks_for_nothing_and_complains_of_nothing(shown, address):
    assert shown.requests == [address]
    assert shown.complaints == []
    assert shown.script("typeof window.hurt") == "undefined"


def test_the_verdict_is_the_first_heading(shown):
    first = shown.script("document.querySelector('h1,h2,h3').innerText")
    assert first == "Ship it: it passed all 3 checks"
    assert shown.script("document.title").endswith(first)


def test_values_of_a_cell_appear_under_the_mouse(shown):
    shown.hover("td[data-steps]")
    tip = "document.getElementById('tip')"
    assert shown.script(f"{tip}.hidden") is False
    said = shown.script(f"{tip}.innerText")
    assert "model.layers.0.self_attn.q_proj" in said and "Update kept" in said and "Output error" in said
    shown.hover("h1")
    assert shown.script(f"{tip}.hidden") is True


def test_cells_are_reached_and_walked_by_keyboard(shown):
    shown.script("document.querySelector('input[name=figure]:checked').focus()")
    shown.press("Tab")
    names = [shown.script("document.activeElement.dataset.name")]
    for key in ("ArrowRight", "ArrowDown", "ArrowLeft"):
        shown.press(key)
        names.append(shown.script("document.activeElement.dataset.name"))
    found = [(name.split(".")[2], name.split(".")[4].partition("<")[0]) for name in names]
    assert found == [("0", "q_proj"), ("0", "k_proj"), ("1", "k_proj"), ("1", "q_proj")]
    assert shown.script("document.activeElement.getAttribute('aria-describedby')") == "tip"
    assert names[-1] in shown.script("document.getElementById('tip').textContent")
    shown.press("Escape")
    assert shown.script("document.getElementById('tip').hidden") is True


def test_output_errors_colour_the_map_until_another_figure_is_chosen(shown):
    cell = "document.querySelectorAll('td[data-steps]')[13]"
    meaning = "document.querySelector('.meaning:not([hidden])')"
    assert shown.script("document.getElementById('heat-figure').innerText") == "Output error"
    assert "what rounding costs" in shown.script(f"{meaning}.innerText")
    before = shown.script(f"[{cell}.className, {cell}.textContent]")
    shown.script("document.getElementById('figure-1').click()")
    after = shown.script(f"[{cell}.className, {cell}.textContent]")
    steps, values = shown.script(f"[{cell}.dataset.steps, {cell}.dataset.values]")
    assert before == [f"h{steps[0]}", values.split("|")[0]] and after == [f"h{steps[1]}", values.split("|")[1]]
    assert shown.script("document.getElementById('heat-figure').innerText") == "Update kept"
    assert "what training changed" in shown.script(f"{meaning}.innerText")


def test_light_and_dark_follow_the_system_and_the_button(shown):
    ground = "getComputedStyle(document.body).backgroundColor"
    light = shown.script(ground)
    shown.script("document.getElementById('theme').click()")
    dark = shown.script(ground)
    assert light == "rgb(255, 255, 255)" and dark != light
    assert shown.script("document.getElementById('theme').getAttribute('aria-pressed')") == "true"
    shown.script("document.getElementById('theme').click()")
    assert shown.script(ground) == light
    shown.script("delete document.documentElement.dataset.theme")
    shown.emulate(dark=True)
    assert shown.script(ground) == dark
    shown.emulate(media="print", dark=True)
    assert shown.script(ground) == light
    shown.emulate()


def test_a_phone_scrolls_downwards_only(shown):
    shown.size(390, 800)
    assert shown.script("document.documentElement.scrollWidth") == 390
    shown.size(1280)
    assert shown.script("document.documentElement.scrollWidth") == 1280


def test_a_screen_reader_is_told_what_things_are(shown):
    shown.call("Accessibility.enable")
    nodes = shown.call("Accessibility.getFullAXTree")["nodes"]
    found = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if "role" in node]
    assert {"banner", "navigation", "main", "contentinfo", "grid", "region", "radiogroup", "group"} & {
        r for r, _ in found
    }
    for role in ("main", "navigation", "grid", "gridcell", "rowheader", "columnheader", "radio", "button"):
        assert any(each == role for each, _ in found), role
    for role in ("image", "img", "button", "radio", "region", "grid"):
        assert all(name for each, name in found if each == role), role
    assert ("image", "Loss over the steps of training") in found
