"""Experiment trackers: one run across all stages, in Weights & Biases, TensorBoard, or nowhere.

Without an API key wandb writes an offline run in silence; `wandb sync` uploads it later. There is no telemetry.
"""

from __future__ import annotations

import netrc
import os
import urllib.parse
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora.artifacts import read_json, write_json
from qlora.errors import UserError
from qlora.facts import RunFacts
from qlora.recipe import Recipe
from qlora.reporting.figures import SURVIVAL, Figure, measured_figures, value


class Tracker:
    """Sends metrics of every stage to the trackers of the recipe. Without any it does nothing."""

    def __init__(self, recipe: Recipe, directory: Path) -> None:
        self._recipe, self._directory = recipe, directory
        self._wandb: Any = None
        self._writer: Any = None

    def _start(self) -> None:
        """Open the trackers with the first metric, so that a run that fails before has none."""
        if "wandb" in self._recipe.track.to and self._wandb is None:
            self._wandb = _start_wandb(self._recipe, self._directory)
        if "tensorboard" in self._recipe.track.to and self._writer is None:
            self._writer = _start_tensorboard(self._directory)

    def log(self, stage: str, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Numbers of one stage, as `<stage>/<name>`; `step` is the optimizer step during training."""
        self._start()
        numbers = {f"{stage}/{key}": value for key, value in metrics.items() if isinstance(value, (int, float))}
        if self._wandb is not None:
            self._wandb.log(numbers | ({f"{stage}/step": step} if step is not None else {}))
        if self._writer is not None:
            for key, value in numbers.items():
                self._writer.add_scalar(key, value, step or 0)

    def show(self, facts: RunFacts, report: Path) -> None:
        """What was measured of a finished run, as tables and plots; wandb gets the report itself too."""
        if not self._recipe.track.to:
            return
        self._start()
        figures = measured_figures(facts.ladder["rungs"]) if facts.ladder else []
        rungs = facts.ladder["rungs"] if facts.ladder else []
        modules = facts.survival["modules"] if facts.survival else []
        if self._wandb is not None:
            self._wandb.log(_wandb_plots(figures, rungs, modules, report))
        if self._writer is not None and rungs:
            self._writer.add_text("ladder", _markdown(figures, rungs))

    def close(self, exit_code: int = 0) -> None:
        if self._wandb is not None:
            self._wandb.finish(exit_code=exit_code)
            self._wandb = None
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _start_wandb(recipe: Recipe, directory: Path) -> Any:
    os.environ.setdefault("WANDB_SILENT", "true")  # read at import; the settings below come too late for some lines
    import wandb

    directory.mkdir(parents=True, exist_ok=True)
    id_file = directory / "wandb.json"
    run_id = read_json(id_file)["id"] if id_file.is_file() else uuid.uuid4().hex[:8]
    write_json(id_file, {"id": run_id, "project": recipe.track.project})
    logged_in = _has_wandb_key()
    run = wandb.init(
        project=recipe.track.project,
        name=recipe.name,
        id=run_id,
        dir=str(directory),
        config=recipe.model_dump(mode="json"),
        resume="allow" if logged_in else None,
        mode=None if "WANDB_MODE" in os.environ else "online" if logged_in else "offline",
        settings=wandb.Settings(silent=True, console="off"),
    )
    run.define_metric("train/step")
    run.define_metric("train/*", step_metric="train/step")
    return run


def _wandb_plots(
    figures: Sequence[Figure], rungs: Sequence[Mapping[str, Any]], modules: Sequence[Mapping[str, Any]], report: Path
) -> dict[str, Any]:
    """The ladder and every module as tables, figures as bars over rungs, and as curves over layers, one for a kind."""
    import wandb

    plots: dict[str, Any] = {"report": wandb.Html(str(report))}
    if rungs:
        rows = [[rung["label"], *(value(rung, figure.key) for figure in figures)] for rung in rungs]
        plots["ladder/table"] = wandb.Table(["model", *(figure.title for figure in figures)], rows)
        for figure in figures:
            bars = [[rung["label"], value(rung, figure.key)] for rung in rungs if value(rung, figure.key) is not None]
            table = wandb.Table(["model", figure.title], bars)
            plots[f"ladder/{figure.key}"] = wandb.plot.bar(
                table, "model", figure.title, title=figure.plain or figure.title
            )
    if modules:
        keys = ("name", "layer", "kind", *(figure.key for figure in SURVIVAL))
        plots["survival/modules"] = wandb.Table(list(keys), [[module.get(key) for key in keys] for module in modules])
    for figure in SURVIVAL:
        lines: dict[str, list[tuple[int, float]]] = {}
        for module in modules:
            if module.get("layer") is not None and module.get(figure.key) is not None:
                lines.setdefault(module["kind"], []).append((module["layer"], module[figure.key]))
        if lines:
            layers, values = zip(*(zip(*sorted(points), strict=True) for points in lines.values()), strict=True)
            plots[f"survival/{figure.key}"] = wandb.plot.line_series(
                [list(each) for each in layers],
                [list(each) for each in values],
                keys=list(lines),
                title=figure.title,
                xname="layer",
            )
    return plots


def _markdown(figures: Sequence[Figure], rungs: Sequence[Mapping[str, Any]]) -> str:
    lines = [["model", *(figure.title for figure in figures)], ["---"] * (len(figures) + 1)]
    lines += [[rung["label"], *(figure.show(value(rung, figure.key)) for figure in figures)] for rung in rungs]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _has_wandb_key() -> bool:
    """Whether `wandb login` was done: a key in the environment, or one for the server in the netrc file."""
    server = urllib.parse.urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        known = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return bool(os.environ.get("WANDB_API_KEY"))
    return bool(os.environ.get("WANDB_API_KEY")) or known.authenticators(server) is not None


def _start_tensorboard(directory: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(
            "track.to lists tensorboard, which is not installed", "track.to", "pip install tensorboard"
        ) from None
    return SummaryWriter(log_dir=str(directory / "tensorboard"))
