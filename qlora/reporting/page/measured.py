"""Sections of the page about how good the models are: verdict, ladder, survival, answers, serving."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qlora.facts import RunFacts
from qlora.reporting import words
from qlora.reporting.figures import (
    RUNGS,
    SURVIVAL,
    Figure,
    figure_of,
    interval,
    is_noise,
    measured_figures,
    value,
)
from qlora.reporting.page.charts import Dot, dot_chart
from qlora.reporting.page.heatmap import heat_map
from qlora.reporting.page.html import Child, Html, row, table, tag, with_code

ANSWERS, OPEN, CHARACTERS = 24, 3, 1200  # prompts on the page, of them open at once, and of a text shown
TOKENS = {
    "bos": "begins with",
    "eos": "ends with",
    "generation_eos": "stops writing at",
    "pad": "pads with",
    "chat_template_sha256": "chat template",
}
MARKS = {True: ("pass", "✓", "passed"), False: ("fail", "✗", "failed"), None: ("", "–", "did not apply")}


def section(name: str, title: str, lead: Child, *content: Child) -> Html:
    """A part of the page with a heading of its own, and a sentence on what it shows."""
    head = tag("h2", title, id=f"{name}-head")
    return tag("section", head, tag("p", lead, class_="lead"), *content, id=name, aria_labelledby=f"{name}-head")


def missing(part: str) -> Html:
    """The line that stands where something was not measured."""
    what, how = words.MISSING[part]
    return tag("p", f"Not here: {what}. To have it: ", with_code(how if "`" in how else f"`{how}`"), class_="missing")


def verdict_section(facts: RunFacts) -> Html:
    """The page's first heading, what it rests on, and what to do."""
    said = words.headline(facts)
    model = facts.recipe.model.base.rpartition("/")[2]
    eyebrow = tag("p", tag("bdi", facts.recipe.name), " · made from ", tag("bdi", model), class_="eyebrow")
    parts: list[Child] = [eyebrow, tag("h1", said.title, id="verdict-head"), tag("p", said.text, class_="lead")]
    if tiles := words.tiles(facts):
        parts.append(
            tag(
                "dl",
                *(
                    tag("div", tag("dt", t.title), tag("dd", tag("b", t.shown), " ", tag("span", t.note)))
                    for t in tiles
                ),
                class_="tiles",
            )
        )
    if said.reasons:
        parts.append(tag("h2", "What failed"))
        parts.append(
            tag(
                "ul", *(tag("li", tag("b", r.what), " ", tag("code", r.where) if r.where else "") for r in said.reasons)
            )
        )
    steps = tag("ul" if len(said.todo) == 1 else "ol", *(tag("li", _with_command(step)) for step in said.todo))
    parts += [tag("h2", "What to do"), steps]
    if said.checks:
        parts += [tag("h2", "Checks of the recipe"), _checks(said.checks)]
    return tag("section", *parts, id="verdict", class_=f"verdict {said.tone}", aria_labelledby="verdict-head")


def _with_command(step: str) -> Child:
    before, colon, command = step.partition(": ")
    return [before, ": ", tag("code", command)] if colon else step


def _checks(checks: Sequence[words.Check]) -> Html:
    rows = []
    for check in checks:
        kind, mark, said = MARKS[check.passed]
        shown = tag("span", tag("span", mark, aria_hidden="true"), " ", said, class_=kind)
        asked = [check.asks, tag("small", tag("code", check.key))] if check.key else check.asks
        rows.append(row(asked, check.found, shown))
    heads = ("asked", "found", tag("span", "result", class_="hidden"))
    return table("What the recipe asks of the models, and what was found", heads, rows, numbers=False)


def ladder_section(facts: RunFacts) -> Html:
    lead = (
        "The same held-out rows, given to the model at every step of its making. What matters is the last line against "
        "“trained”: the difference is what shipping it in few bits costs."
    )
    title = "How good the model is at every step"
    ladder = facts.ladder
    if ladder is None:
        return section("ladder", title, lead, missing("ladder"))
    rungs, figures = ladder["rungs"], measured_figures(ladder["rungs"])
    content: list[Child] = [_ladder_pictures(ladder)]
    heads = ["model", *(figure.title for figure in figures)]
    rows = [
        row(
            [rung["label"], tag("small", RUNGS.get(rung["name"], ""))],
            *(_number(rung, figure) for figure in figures),
            class_="strong" if rung["name"] in ("trained", "gptq") else None,
        )
        for rung in rungs
    ]
    caption = f"{ladder['rows']:,} held-out rows, {ladder['tokens']:,} answer tokens"
    content.append(table(caption, heads, rows, class_="ladder"))
    if any(rung.get("intervals") for rung in rungs):
        sure = f"{ladder.get('confidence', 0.95):.0%}"
        content.append(
            tag(
                "p",
                f"Below a figure, and as whiskers in the picture: where it would lie with other rows like these, with "
                f"{sure} certainty. Differences smaller than that are noise."
                + (" ≈: not to be told from the trained model's." if any(rung.get("noise") for rung in rungs) else ""),
                class_="hint",
            )
        )
    else:
        content.append(missing("intervals"))
    content.append(terms(figures))
    content += [_general(rungs), _tasks(rungs), _merges(facts)]
    parts = {"general": _general(rungs), "tasks": _tasks(rungs), "merges": facts.merges}
    content += [missing(name) for name, found in parts.items() if found is None]
    return section("ladder", title, lead, *content)


def _number(rung: Mapping[str, Any], figure: Figure) -> Child:
    shown = figure.show(value(rung, figure.key))
    if is_noise(rung, figure.key):
        shown = f"≈ {shown}"
    found = interval(rung, figure.key)
    if found is None or found[0] == found[1]:
        return shown
    return [shown, tag("small", f"{figure.show(found[0])} – {figure.show(found[1])}")]


def _ladder_pictures(ladder: Mapping[str, Any]) -> Html:
    pictures = []
    for key, note in (
        ("loss", "on answers, lower is better"),
        ("kl", "distance to the trained model, lower is better"),
    ):
        figure, dots = figure_of(key), []
        for rung in ladder["rungs"]:
            number, found = value(rung, key), interval(rung, key)
            if number is None or (key == "kl" and rung["name"] == "trained"):
                continue
            low, high = found or (None, None)
            dots.append(Dot(rung["label"], number, figure.show(number), low, high, rung["name"] == "gptq"))
        if len(dots) < 2:
            continue
        numbers = [dot.value for dot in dots]
        apart = key == "kl" and max(numbers) > 20 * max(min(numbers), 1e-12)
        said = "; ".join(f"{dot.label}: {dot.shown}" for dot in dots)
        scale = "; in powers of ten" if apart else ""
        chart = dot_chart(f"ladder-{key}", f"{figure.title} of every model", said, dots, logarithmic=apart)
        heading = tag("figcaption", tag("b", figure.title), f" {note}{scale}")
        pictures.append(tag("figure", heading, chart))
    return tag("div", *pictures, class_="pair")


def terms(figures: Sequence[Figure]) -> Html:
    """What each figure means."""
    return tag(
        "dl", *(tag("div", tag("dt", figure.title), tag("dd", figure.meaning)) for figure in figures), class_="terms"
    )


def _general(rungs: Sequence[Mapping[str, Any]]) -> Html | None:
    measured = [rung for rung in rungs if rung.get("general")]
    if not measured:
        return None
    keys = [
        key
        for key in ("loss", "perplexity", "kl")
        if any(value(rung, f"general.{key}") is not None for rung in measured)
    ]
    figures = [figure_of(f"general.{key}") for key in keys]
    rows = [row(rung["label"], *(_number(rung, figure) for figure in figures)) for rung in measured]
    text = (
        "On general text, which has nothing to do with the task: what fine-tuning and compressing made the model "
        "forget."
    )
    heads = ("model", *(figure.title.partition(",")[0] for figure in figures))
    return Html(tag("h3", "General text") + tag("p", text) + table("Figures on general text", heads, rows))


def _merges(facts: RunFacts) -> Html | None:
    """Both merges behind the quantizer, and which to ship."""
    merges = facts.merges
    if merges is None:
        return None
    both = {base: merges[base] for base in ("dequantized", "original") if merges.get(base)}
    ship = "Either can be shipped" if merges["ship"] == "either" else f"Ship the merge into the {merges['ship']} base"
    figures = measured_figures(list(both.values()))
    rows = [row(f"into the {base} base", *(_number(rung, figure) for figure in figures)) for base, rung in both.items()]
    text = (
        "The adapter can be written into the base as training saw it, dequantized from 4 bits, or into the original in "
        "16 bits, which is without the error of 4 bits that the adapter may have made up for. Both, compressed again:"
    )
    shown = table("Both merges, compressed", ("merge", *(figure.title for figure in figures)), rows, class_="ladder")
    verdict = tag("p", tag("b", f"{ship}: "), merges["why"])
    return Html(tag("h3", "Which base to merge into") + tag("p", text) + shown + verdict)


def _tasks(rungs: Sequence[Mapping[str, Any]]) -> Html | None:
    columns = list(
        dict.fromkeys(
            (task, metric) for rung in rungs for task, found in (rung.get("tasks") or {}).items() for metric in found
        )
    )
    if not columns:
        return None
    rows = []
    for rung in rungs:
        if not rung.get("tasks"):
            continue
        cells = []
        for task, metric in columns:
            found = (rung["tasks"].get(task) or {}).get(metric) or {}
            error = f" ± {found['stderr']:.3f}" if found.get("stderr") is not None else ""
            cells.append("–" if found.get("value") is None else f"{found['value']:.3f}{error}")
        rows.append(row(rung["label"], *cells))
    text = "Public tests (lm-eval), value ± standard error. More is better for accuracies."
    heads = ("model", *(f"{task} {metric}" for task, metric in columns))
    return Html(tag("h3", "Tests by name") + tag("p", text) + table("Tests by name", heads, rows))


def survival_section(facts: RunFacts) -> Html:
    title = "What compressing cost, layer by layer"
    lead = (
        "Compressing rounds every weight. That changes what a layer puts out, and may undo what training changed. Each "
        "cell is one module (a matrix of weights) of one layer; the stronger the colour, the worse it came through."
    )
    survival = facts.survival
    if survival is None or not survival["modules"]:
        return section("survival", title, lead, missing("survival"))
    content: list[Child] = []
    if survival.get("damaged"):
        damaged = (tag("li", tag("code", each["name"]), f": {each['why']}") for each in survival["damaged"])
        content += [tag("div", tag("h3", "Damaged modules"), tag("ul", *damaged), class_="alarm")]
    overall = survival.get("overall") or {}
    measured = [figure for figure in SURVIVAL if overall.get(figure.key) is not None]
    summary = [tag("div", tag("dt", figure.title), tag("dd", figure.show(overall[figure.key]))) for figure in measured]
    by_name = {module["name"]: module for module in survival["modules"]}
    worst = [by_name[name] for name in survival.get("worst") or [] if name in by_name]
    aside: list[Child] = [tag("h3", "All modules together"), tag("dl", *summary, class_="pairs")]
    if worst:
        shown = [figure for figure in measured if figure.key in ("energy", "output_error")] or measured[:2]
        items = (
            tag(
                "li",
                tag("code", module["name"]),
                tag("small", "; ".join(f"{f.title.lower()} {f.show(module.get(f.key))}" for f in shown)),
            )
            for module in worst
        )
        aside += [tag("h3", "Where most was lost"), tag("ol", *items, class_="worst")]
    content.append(
        tag(
            "div",
            heat_map(survival["modules"]),
            tag("aside", *aside, aria_label="Summary of all modules"),
            class_="beside",
        )
    )
    return section("survival", title, lead, *content)


def generations_section(facts: RunFacts) -> Html:
    title = "The same questions, answered at every step"
    lead = "Held-out prompts, and what each model wrote. A tick: the expected answer, letter by letter."
    rows = (facts.generations or {}).get("rows")
    if not rows:
        return section("answers", title, lead, missing("generations"))
    labels = {rung["name"]: rung["label"] for rung in (facts.ladder or {"rungs": []})["rungs"]}
    parts = [_answers(number, each, labels) for number, each in enumerate(rows[:ANSWERS])]
    left = len(rows) - len(parts)
    more = (
        tag("p", f"{left:,} more in {facts.dirs.evaluation / 'generations.json'}", class_="hint") if left > 0 else None
    )
    return section("answers", title, lead, *parts, more)


def _answers(number: int, each: Mapping[str, Any], labels: Mapping[str, str]) -> Html:
    expected = each.get("expected")
    body: list[Child] = []
    prompt = tag("div", tag("dt", "prompt"), tag("dd", tag("pre", cut(each["prompt"]), dir="auto")))
    body.append(prompt)
    if expected is not None:
        body.append(tag("div", tag("dt", "expected"), tag("dd", tag("pre", cut(expected), dir="auto"))))
    for name in [
        *(name for name in labels if name in each["answers"]),
        *(n for n in each["answers"] if n not in labels),
    ]:
        answer = each["answers"][name]
        right = expected is not None and answer is not None and answer.strip() == expected.strip()
        mark = (
            tag(
                "span",
                tag("span", " ✓", aria_hidden="true"),
                tag("span", " as expected", class_="hidden"),
                class_="pass",
            )
            if right
            else None
        )
        body.append(
            tag("div", tag("dt", labels.get(name, name), mark), tag("dd", tag("pre", cut(answer or ""), dir="auto")))
        )
    first = " ".join(str(each["prompt"]).split())
    short = first if len(first) <= 90 else "… " + first[-88:]
    summary = tag("summary", f"{number + 1}. ", tag("bdi", short))
    return tag("details", summary, tag("dl", *body, class_="answers"), open=number < OPEN)


def cut(words_: str) -> str:
    """A text that may be long, from its beginning."""
    return (
        words_
        if len(words_) <= CHARACTERS
        else f"{words_[:CHARACTERS]} … ({len(words_) - CHARACTERS:,} more characters)"
    )


def contract_section(facts: RunFacts) -> Html:
    title = "Where it can be served"
    lead = "Engines that load this checkpoint, by the number of GPUs that share it (tensor parallel)."
    contract = facts.contract
    if contract is None:
        return section("serving", title, lead, missing("contract"))
    engines = contract.get("engines") or []
    degrees = sorted({each["tensor_parallel"] for each in engines})
    rows = []
    for name in dict.fromkeys(each["engine"] for each in engines):
        mine = {each["tensor_parallel"]: each for each in engines if each["engine"] == name}
        reasons = dict.fromkeys(each["reason"] for each in mine.values() if each.get("reason"))
        rows.append(
            row(
                [name, tag("small", next(iter(mine.values()))["version"])],
                *(_accepts(mine.get(degree)) for degree in degrees),
                [tag("div", reason, class_="reason") for reason in reasons],
            )
        )
    heads = ("engine", *(f"{degree} GPU{'s' if degree > 1 else ''}" for degree in degrees), "why not, or what to mind")
    content: list[Child] = [table("Engines by number of GPUs", heads, rows, numbers=False, class_="engines")]
    if contract.get("mismatches"):
        found = tag("ul", *(tag("li", each) for each in contract["mismatches"]))
        content.append(tag("div", tag("h3", "What stages disagree about"), found, class_="alarm"))
    tokens = contract.get("tokens") or {}
    if tokens:
        pairs = (
            tag("div", tag("dt", TOKENS.get(name, name)), tag("dd", tag("code", _short(found))))
            for name, found in tokens.items()
        )
        text = "Servers must begin, end and pad with the same tokens as training did, and write conversations alike:"
        content += [tag("p", text), tag("dl", *pairs, class_="pairs")]
    golden = contract.get("golden") or []
    if golden:
        same = sum(each["trained"]["ids"] == each["gptq"]["ids"] for each in golden)
        text = (
            f"Golden prompts, kept with their answers to compare a server with: {len(golden)}, of which the trained "
            f"model and the checkpoint answer {same} alike, token by token. "
        )
        content.append(tag("p", text, "Ask a server: ", tag("code", f"qlora verify URL {facts.dirs.root}")))
    return section("serving", title, lead, *content)


def _accepts(engine: Mapping[str, Any] | None) -> Html:
    if engine is None:
        return tag("span", "–")
    kind, mark, _ = MARKS[bool(engine["accepts"])]
    return tag("span", tag("span", mark, aria_hidden="true"), " yes" if engine["accepts"] else " no", class_=kind)


def _short(found: Any) -> str:
    shown = "none" if found is None else str(found)
    return f"{shown[:12]}…" if len(shown) == 64 else shown
