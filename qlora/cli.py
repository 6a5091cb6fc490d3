"""The commands. Parsing and exit codes only: what they do lives in the modules they import when called."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from qlora.cli_arguments import OVERRIDES, RECIPE
from qlora.cli_results import RESULTS

# GPU memory in segments that grow, instead of pieces which later fit nothing. Read by torch when it is imported.
ALLOCATOR = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="qlora")
def qlora() -> None:
    """Fine-tune on 4 bits, ship 4 bits, and know what you shipped.

    A recipe is a YAML file, or the name of one that ships with qlora. Any key can be set on the command line:
    qlora run quickstart train.epochs=2 lora.r=32
    """


@qlora.command()
@RECIPE
@OVERRIDES
@click.option(
    "--reuse",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of run directories: take over their finished stages where recipe, data and versions are the same.",
)
def run(recipe: str, overrides: tuple[str, ...], reuse: Path | None) -> None:
    """Every stage in order; finished ones are skipped. Safe to interrupt and run again."""
    from qlora.pipeline import Pipeline
    from qlora.recipe_file import load_recipe

    Pipeline(load_recipe(recipe, overrides), reuse).run()


@qlora.command()
@RECIPE
@OVERRIDES
@click.option("--cluster", type=click.Choice(["local", "slurm"]), default="local", help="Where jobs run.")
@click.option("--jobs", type=click.IntRange(min=1), help="At a time. Default: one for each visible GPU, or one.")
@click.option("--slurm", multiple=True, metavar="KEY=VALUE", help="A submitit parameter such as slurm_partition=gpu.")
@click.option(
    "--wandb", type=click.Path(path_type=Path), help="Write a sweep file for wandb's agents, and run nothing."
)
def sweep(
    recipe: str,
    overrides: tuple[str, ...],
    cluster: str,
    jobs: int | None,
    slurm: tuple[str, ...],
    wandb: Path | None,
) -> None:
    """A run for every combination of values: qlora sweep RECIPE lora.r=8,16 train.learning_rate=1e-4,2e-4

    Stages that several runs share are computed once. Run it again to go on after an interrupt.
    """
    from qlora import sweep as sweeps

    if wandb is not None:
        sweeps.write_wandb(recipe, overrides, wandb)
        return
    sweeps.sweep(recipe, overrides, cluster=cluster, jobs=jobs, parameters=dict(item.split("=", 1) for item in slurm))


def _stage(name: str, text: str) -> None:
    @qlora.command(name=name, help=text)
    @RECIPE
    @OVERRIDES
    def command(recipe: str, overrides: tuple[str, ...]) -> None:
        from qlora.pipeline import Pipeline
        from qlora.recipe_file import load_recipe

        Pipeline(load_recipe(recipe, overrides)).run_stage(name)


_stage("train", "Train the LoRA adapter on the 4-bit base. Also under `accelerate launch -m qlora train`.")
_stage("merge", "Merge the adapter into the dequantized base, exactly.")
_stage("quantize", "Quantize the merged model to a GPTQ checkpoint.")
_stage("evaluate", "Measure every stage on the held-out rows: the ladder, and its gates.")


@qlora.command()
@RECIPE
@OVERRIDES
def check(recipe: str, overrides: tuple[str, ...]) -> None:
    """What can be known before any GPU time: recipe, data and labels, memory, disk, serving engines."""
    from qlora.check import check as run_check
    from qlora.recipe_file import load_recipe
    from qlora.reporting.console import StageProgress, console
    from qlora.reporting.preflight import show

    with StageProgress("check") as progress:
        report = run_check(load_recipe(recipe, overrides), progress.update)
    show(report, console())
    report.raise_for_problems()


@qlora.group()
def recipes() -> None:
    """The recipes that ship with qlora."""


@recipes.command("list")
def list_recipes() -> None:
    """Names and purposes."""
    from qlora.paths import packaged_recipes

    for path in sorted(packaged_recipes().glob("*.yaml"), key=lambda path: path.stem):
        click.echo(f"{path.stem:24} {path.read_text(encoding='utf-8').splitlines()[0].lstrip('# ')}")


@recipes.command("show")
@click.argument("name")
def show_recipe(name: str) -> None:
    """Print one, with what it extends."""
    from qlora.recipe_file import find_recipe

    click.echo(_recipe_text(find_recipe(name)), nl=False)


@recipes.command("copy")
@click.argument("name")
@click.argument("target", type=click.Path(path_type=Path), required=False)
def copy_recipe(name: str, target: Path | None) -> None:
    """Copy one as a single file, with the data beside it, to edit: TARGET is a file (default: NAME.yaml here)."""
    import shutil

    from qlora.errors import UserError
    from qlora.recipe_file import find_recipe

    source = find_recipe(name)
    target = target or Path(f"{source.stem}.yaml")
    folder = source.with_suffix("")
    for destination in (target, *([target.parent / folder.name] if folder.is_dir() else [])):
        if destination.exists():
            raise UserError("this exists already", str(destination), "name another target")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(_recipe_text(source), encoding="utf-8")
    if folder.is_dir():
        shutil.copytree(folder, target.parent / folder.name)
    click.echo(f"{target}: edit it, then `qlora check {target}` and `qlora run {target}`")


def _recipe_text(path: Path) -> str:
    """A recipe that ships with qlora in one piece; anyone else's as it is."""
    from qlora.paths import packaged_recipes
    from qlora.recipe_text import flattened

    ours = path.parent == packaged_recipes()
    return flattened(path) if ours else path.read_text(encoding="utf-8")


@recipes.command("schema")
def show_schema() -> None:
    """The JSON schema of a recipe, for editors."""
    import json

    from qlora.recipe import Recipe

    click.echo(json.dumps(Recipe.model_json_schema(), indent=2))


@qlora.command()
def doctor() -> None:
    """Versions, GPU and kernels found, and pairs of versions known to break."""
    from qlora.doctor import diagnose, print_diagnosis
    from qlora.reporting.console import console

    print_diagnosis(diagnose(), console())


for command in RESULTS:
    qlora.add_command(command)


def main() -> None:
    """Run a command and end with its exit code (see qlora.errors)."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, _interrupt)
    os.environ.update(with_allocator(os.environ))
    logging.getLogger().addHandler(logging.NullHandler())  # what libraries log goes to the run's log file only
    logging.captureWarnings(True)
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # torchao's deprecations, printed by torch itself
    logging.raiseExceptions = False  # a log that cannot be written must not hide the error that is shown
    sys.exit(_exit_code(lambda: qlora.main(standalone_mode=False)))


def with_allocator(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment with our setting of torch's allocator, unless it has one under either of its names."""
    return dict(environment) if "PYTORCH_CUDA_ALLOC_CONF" in environment else ALLOCATOR | dict(environment)


def _interrupt(number: int, frame: Any) -> None:
    # Python drops exceptions raised inside finalisers; progress raises it again. Nothing is imported here: the signal
    # may have come in the middle of an import.
    if console := sys.modules.get("qlora.reporting.console"):
        console.interrupted = True  # type: ignore[attr-defined]
    raise KeyboardInterrupt


def _exit_code(command: Callable[[], Any]) -> int:
    from qlora.errors import QloraError

    try:
        command()
        return 0
    except click.exceptions.Exit as exit_request:
        return exit_request.exit_code
    except click.ClickException as error:
        error.show()
        return 2
    except QloraError as error:
        _say(f"{error.title}:\n" + "\n".join(f"  {problem}" for problem in error.problems))
        return error.exit_code
    except (KeyboardInterrupt, click.exceptions.Abort):
        _say("interrupted; finished stages are kept: the same command continues")
        return 130
    except Exception as error:
        return _no_space(error) if _is_disk_full(error) else _unexpected()


def _unexpected() -> int:
    import traceback

    from qlora.reporting import console

    traceback.print_exc()
    if console.last_log is not None:
        _say(f"unexpected failure; the log is {console.last_log}")
    return 1


def _is_disk_full(error: BaseException | None) -> bool:
    """Whether the disk is full, also where a library wrapped the system's error in one of its own."""
    import errno
    import shutil

    from qlora.reporting import console

    if console.last_log is not None and shutil.disk_usage(console.last_log.parent).free < 1 << 20:
        return True
    while error is not None:
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _no_space(error: Exception) -> int:
    _say(
        f"no space left on the disk ({str(error).splitlines()[0] if str(error) else type(error).__name__})\n"
        "    → free some space, or set output_dir to a larger disk; finished stages are kept and will be skipped"
    )
    return 4


def _say(text: str) -> None:
    from qlora.reporting.console import is_main_process

    if is_main_process():
        click.echo(text, err=True)
