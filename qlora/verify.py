"""`qlora verify`: whether a server answers as the checkpoint does, or files are still those that the run wrote."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from qlora.artifacts import read_json
from qlora.errors import NotAsWritten, UserError
from qlora.evaluation.replay import Agreement, Match, Server, replay
from qlora.publishing.manifest import check_folder
from qlora.reporting.console import StageProgress, console

PROMPT_SHOWN = 25  # last characters
NAMES = {"gptq": "the GPTQ model", "trained": "the trained model"}
ADVICE = {
    "gptq": "check that it serves this checkpoint, with its own tokenizer, chat template and generation_config.json; "
    "a merged or adapted model is compared by --against trained",
    "trained": "check that it serves the merged model, or the adapter on the base that it was trained on",
}


def verify_files(folder: Path) -> None:
    """Raises NotAsWritten, naming every file that differs, is missing or was added."""
    with StageProgress("verify") as progress:
        found = check_folder(folder, progress.update)
    if found.problems:
        raise NotAsWritten(found.problems)
    console().print(f"{folder}: whole, {found.files} files with {found.size / 1e6:,.1f} MB as written", markup=False)


def verify_server(url: str, run: Path, model: str, against: str, least: float, timeout: float) -> None:
    """Replay the golden prompts of a run or an export. Raises NotAsWritten below the `least` agreement.

    against: the rung whose answers count, `gptq` or `trained`.
    """
    contract = read_contract(run, against)
    out = console()
    agreement = replay(contract, Server(url, model, os.environ.get("OPENAI_API_KEY"), timeout))
    out.print(f"{agreement.model} at {url}, asked in {agreement.form}", markup=False)
    out.print(_table(agreement, against))
    share, number = agreement.share(against), len(agreement.prompts)
    rungs = agreement.prompts[0].matches
    of = " and ".join(f"{agreement.exact(rung)} of {number} answers are those of {NAMES[rung]}" for rung in rungs)
    if share is None:
        fix = "nearly every token could have been another: raise evaluate.golden and evaluate it again"
        raise NotAsWritten(f"too few tokens are left to judge; {of}", url, fix)
    said = f"{share:.1%} of judged tokens as {NAMES[against]} has them, at least {least:.1%} are asked for; {of}"
    if share < least:
        raise NotAsWritten(said, url, ADVICE[against])
    out.print(f"\n[green]It serves {NAMES[against]}[/green]: {said}")


def read_contract(run: Path, rung: str) -> dict[str, Any]:
    """contract.json of a run directory, an exported folder, or the file itself.

    Raises UserError where it has no golden prompts that this rung answered.
    """
    candidates = [run, run / "contract.json", run / "evaluation" / "contract.json"]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        raise UserError("there is no contract.json", str(run), "name a run that was evaluated, or an export of it")
    contract: dict[str, Any] = read_json(found)
    if not contract.get("golden"):
        raise UserError("it has no golden prompts", str(found), "set evaluate.golden: 8, and `qlora evaluate` again")
    if rung not in contract["golden"][0]:
        raise UserError(f"its golden prompts have no answers of {NAMES[rung]}", str(found), "`qlora evaluate` again")
    return contract


def _table(agreement: Agreement, against: str) -> Table:
    table = Table(box=None, pad_edge=False)
    rungs = list(agreement.prompts[0].matches)
    table.add_column("prompt", no_wrap=True)
    for title in ("tokens", *rungs):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column(f"parts from {against} at", no_wrap=True)
    for each in agreement.prompts:
        shown = " ".join(each.asked.split())
        shown = shown if len(shown) <= PROMPT_SHOWN else f"…{shown[-PROMPT_SHOWN:]}"
        counts = [_same(each.matches[rung]) for rung in rungs]
        match = each.matches[against]
        table.add_row(escape(shown), str(match.tokens), *counts, _where(match))
    return table


def _same(match: Match) -> str:
    """Of all tokens of an answer, those before the first that differs."""
    return "exact" if match.exact else f"{match.agreed / match.tokens:.0%}"


def _where(match: Match) -> str:
    if match.at is None or match.margin is None:
        return ""
    where = f"token {match.at + 1}"
    return f"{where}, a near tie" if match.tied else f"[red]{where}, ahead by {match.margin:.1f} nats[/red]"
