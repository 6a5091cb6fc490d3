"""report/index.html: one file that says what a run made and how good it is, for a reader who does not know GPTQ.

Made from `RunFacts` alone. It asks for nothing from any network, and only its own script may run.
"""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from pathlib import Path

from qlora.artifacts import write_text
from qlora.facts import RunFacts
from qlora.reporting.page import made, measured
from qlora.reporting.page.html import Html, empty, tag
from qlora.reporting.words import headline

SECTIONS = (
    ("ladder", "Quality", measured.ladder_section),
    ("training", "Training", made.training_section),
    ("survival", "Layers", measured.survival_section),
    ("cost", "Cost", made.costs_section),
    ("answers", "Answers", measured.generations_section),
    ("data", "Data", made.data_section),
    ("serving", "Serving", measured.contract_section),
    ("lineage", "Lineage", made.lineage_section),
    ("again", "Again", made.again_section),
)


def write_page(facts: RunFacts) -> Path:
    """Write the run's page, whole or not at all; returns where it is."""
    path = facts.dirs.report / "index.html"
    write_text(path, page(facts))
    return path


def page(facts: RunFacts) -> str:
    """The document."""
    style, script = _own("style.css"), _own("script.js")
    links = [tag("a", title, href=f"#{name}") for name, title, _ in SECTIONS]
    theme = tag("button", "Dark", type="button", id="theme", aria_pressed="false", hidden=True)
    body = tag(
        "body",
        tag("a", "Skip to the verdict", href="#verdict", class_="skip"),
        tag("header", tag("nav", *links, aria_label="Sections"), theme),
        tag("main", measured.verdict_section(facts), *(make(facts) for _, _, make in SECTIONS)),
        tag("footer", tag("p", f"Written by qlora {_version()}. This page loads nothing from anywhere.")),
        tag("script", script),
    )
    allowed = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{_digest(script)}'"
    head = tag(
        "head",
        empty("meta", charset="utf-8"),
        empty("meta", http_equiv="Content-Security-Policy", content=allowed),
        empty("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{facts.recipe.name}: {headline(facts).title}"),
        tag("style", style),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _own(name: str) -> Html:
    return Html(files(__package__).joinpath(name).read_text(encoding="utf-8"))


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _version() -> str:
    from qlora import __version__

    return __version__
