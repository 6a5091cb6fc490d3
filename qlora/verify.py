"""`qlora verify`: whether a server answers as the checkpoint does, or files are still those that the run wrote."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from qlora.artifacts import read_json
from qlora.errors import NotAsWritten, QloraError, UserError
from qlora.evaluation.replay import Agreement, Match, Replayed, Server, replay
from qlora.publishing.manifest import check_folder
from qlora.reporting.console import StageProgress, console

PROMPT_SHOWN = 40  # last characters


def verify_files(folder: Path) -> None:
    """Raises NotAsWritten, naming every file that differs, is missing or was added."""
    with StageProgress("verify") as progress:
        found = check_folder(folder, progress.update)
    if found.problems:
        raise NotAsWritten(found.problems)
    console().print(f"{folder}: whole, {found.files} files with {found.size / 1e6:,.1f} MB as written", markup=False)


def verify_server(url: str, run: Path, model: str, least: float, timeout: float) -> None:
    """Replay the golden prompts of a run or an export. Raises NotAsWritten below the `least` agreement."""
    contract = read_contract(run)
    out = console()
    agreement = replay(contract, Server(url, model, os.environ.get("OPENAI_API_KEY"), timeout))
    out.print(f"{agreement.model} at {url}, asked in {agreement.form}", markup=False)
    out.print(_table(agreement))
    share, of = agreement.share, f"{agreement.exact} of {len(agreement.prompts)} answers are the GPTQ model's"
    if share is None:
        fix = "nearly every token could have been another: raise evaluate.golden and evaluate it again"
        raise NotAsWritten(f"too few tokens are left to judge; {of}", url, fix)
    said = f"{share:.1%} of judged tokens as the GPTQ model has them, at least {least:.1%} are asked for; {of}"
    if share < least:
        fix = "check that it serves this checkpoint with its own tokenizer, chat template and generation_config.json"
        raise NotAsWritten(said, url, fix)
    out.print(f"\n[green]It serves this checkpoint[/green]: {said}")


def read_contract(run: Path) -> dict[str, Any]:
    """contract.json of a run directory, an exported folder, or the file itself. Raises UserError without prompts."""
    candidates = [run, run / "contract.json", run / "evaluation" / "contract.json"]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        raise UserError("there is no contract.json", str(run), "name a run that was evaluated, or an export of it")
    contract: dict[str, Any] = read_json(found)
    if not contract.get("golden"):
        raise UserError("it has no golden prompts", str(found), "set evaluate.golden: 8, and `qlora evaluate` again")
    if "gptq" not in contract["golden"][0]:
        raise QloraError("its golden prompts have no answers of the GPTQ model", str(found), "`qlora evaluate` again")
    return contract


def _table(agreement: Agreement) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in ("prompt", "tokens", "as GPTQ", "as trained", "where it parts from GPTQ"):
        table.add_column(title, justify="right" if title in ("tokens", "as GPTQ", "as trained") else "left")
    for each in agreement.prompts:
        shown = " ".join(each.prompt.split())
        shown = shown if len(shown) <= PROMPT_SHOWN else f"…{shown[-PROMPT_SHOWN:]}"
        trained = "–" if each.trained is None else _same(each.trained)
        table.add_row(escape(shown), str(each.gptq.tokens), _same(each.gptq), trained, _where(each))
    return table


def _same(match: Match) -> str:
    """Of all tokens of an answer, those before the first that differs."""
    return "exact" if match.exact else f"{match.agreed / match.tokens:.0%}"


def _where(each: Replayed) -> str:
    match = each.gptq
    if match.at is None or match.margin is None:
        return ""
    said = f"token {match.at + 1}, preferred by {match.margin:.2f} nats"
    return f"{said}: a near tie, the rest is not judged" if match.tied else f"[red]{said}[/red]"
