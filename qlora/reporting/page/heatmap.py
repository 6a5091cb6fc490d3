"""The heat map of layers: a table with a row for every layer and a column for every kind of module.

One figure is shown at a time. A cell carries all of them, and for each a step of colour from 0 (least lost) to
STEPS - 1 (most); the script shows another by changing the class. Where a layer has several modules of a kind
(experts), the cell is the worst of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from qlora.reporting.figures import SURVIVAL, Figure
from qlora.reporting.page.html import Html, empty, tag

STEPS = 8
LOGARITHMIC = 30  # from this ratio of the largest to the smallest error on, steps of colour are of its logarithm
Module = Mapping[str, Any]


def heat_map(modules: Sequence[Module]) -> Html:
    """The switch between figures, the legend, and the table. `modules`: as in evaluation/survival.json."""
    figures = [figure for figure in SURVIVAL if any(module.get(figure.key) is not None for module in modules)]
    ranges = {figure.key: _range(figure, modules) for figure in figures}
    layers = sorted({_layer(module) for module in modules})
    kinds = list(dict.fromkeys(module["kind"] for module in sorted(modules, key=lambda module: _layer(module))))
    cells: dict[tuple[int, str], list[Module]] = {}
    for module in modules:
        cells.setdefault((_layer(module), module["kind"]), []).append(module)
    head = tag("tr", tag("th", "layer", scope="col"), *(tag("th", tag("span", kind), scope="col") for kind in kinds))
    rows = []
    for number, layer in enumerate(layers):
        made = [
            _cell(cells.get((layer, kind), ()), figures, ranges, first=number == 0 == index)
            for index, kind in enumerate(kinds)
        ]
        name = "other" if layer == _OTHER else str(layer)
        rows.append(tag("tr", tag("th", name, scope="row"), *made))
    caption = tag("caption", "Every layer of the checkpoint: ", tag("span", figures[0].title, id="heat-figure"))
    undefined = any(module.get(figure.key) is None for module in modules for figure in figures)
    help_text = tag(
        "p",
        "Point at a cell, tap it, or move with the arrow keys to read its values.",
        " Hatched: not defined there, such as what is left of an update where nothing was trained."
        if undefined
        else None,
        class_="hint",
        id="heat-help",
    )
    grid = tag(
        "table",
        caption,
        tag("thead", head),
        tag("tbody", *rows),
        role="grid",
        class_="heat",
        aria_describedby="heat-help",
    )
    names = [{"title": figure.title, "key": figure.key} for figure in figures]
    data = Html(json.dumps(names).replace("<", "\\u003c"))
    return tag(
        "div",
        _switch(figures, ranges),
        tag("div", grid, class_="heat-box"),
        help_text,
        tag("div", id="tip", role="tooltip", hidden=True),
        tag("script", data, type="application/json", id="heat-figures"),
        class_="heat-map",
    )


_OTHER = 1 << 30  # modules of no layer, below all others


def _layer(module: Module) -> int:
    return _OTHER if module["layer"] is None else int(module["layer"])


def _switch(figures: Sequence[Figure], ranges: Mapping[str, tuple[float, float]]) -> Html:
    """Radio buttons, the meaning of the figure that is shown, and what its colours stand for."""
    buttons, meanings = [], []
    for index, figure in enumerate(figures):
        choice = empty("input", type="radio", name_="figure", value=index, checked=index == 0, id=f"figure-{index}")
        buttons.append(tag("label", choice, tag("span", figure.title), for_=f"figure-{index}"))
        best, worst = ranges[figure.key]
        steps = [tag("i", class_=f"h{step}") for step in range(STEPS)]
        legend = tag(
            "span",
            figure.show(best),
            tag("span", *steps, class_="ramp", aria_hidden="true"),
            figure.show(worst),
            class_="legend",
        )
        meanings.append(tag("p", figure.meaning, " ", legend, class_="meaning", data_figure=index, hidden=index != 0))
    return Html(tag("fieldset", tag("legend", "What the colours show"), *buttons, class_="switch") + "".join(meanings))


def _cell(
    modules: Sequence[Module], figures: Sequence[Figure], ranges: Mapping[str, tuple[float, float]], *, first: bool
) -> Html:
    if not modules:
        return tag("td", class_="none")
    shown, steps = [], ""
    for figure in figures:
        numbers = [module[figure.key] for module in modules if module.get(figure.key) is not None]
        worst = max(numbers, key=figure.badness, default=None)
        shown.append(figure.show(worst))
        steps += "-" if worst is None else str(_step(*map(figure.badness, (worst, *ranges[figure.key]))))
    name = modules[0]["name"] if len(modules) == 1 else f"{modules[0]['name']} (worst of {len(modules)})"
    return tag(
        "td",
        tag("span", shown[0]),
        class_="h" + steps[0],
        data_name=name,
        data_values="|".join(shown),
        data_steps=steps,
        tabindex="0" if first else "-1",
    )


def _range(figure: Figure, modules: Sequence[Module]) -> tuple[float, float]:
    """(best, worst): the ideal or the best that was found, and the worst or what would be bad."""
    numbers = [module[figure.key] for module in modules if module.get(figure.key) is not None]
    best = figure.ideal if figure.ideal is not None else min(numbers, key=figure.badness)
    far = best - figure.span if figure.higher else best + figure.span
    return best, max([*numbers, far], key=figure.badness)


def _step(value: float, best: float, worst: float) -> int:
    if best == worst:
        return 0
    if 0 < best < worst / LOGARITHMIC:
        value, best, worst = math.log(value), math.log(best), math.log(worst)
    return min(STEPS - 1, max(0, int(STEPS * (value - best) / (worst - best))))
