"""The commands on what a run made: shown, compared, talked to, measured, verified, published."""

from __future__ import annotations

import signal
from pathlib import Path

import click

from qlora.cli_arguments import OVERRIDES, RECIPE


@click.command()
@click.argument("run", metavar="RUN")
@click.option("--text", is_flag=True, help="Show it here, and write nothing.")
def report(run: str, text: bool) -> None:
    """Write the report of a run again: RUN/report/index.html. RUN is its directory, its name, or its recipe."""
    from qlora.facts import RunFacts, find_run
    from qlora.reporting.console import console

    facts = RunFacts.read(find_run(run))
    if text:
        from qlora.reporting.text import show

        show(facts, console())
        return
    from qlora.reporting.page import write_page

    console().print(f"Report: [bold]{write_page(facts)}[/bold]")


@click.command()
@click.argument("runs", metavar="RUN RUN...", nargs=-1, required=True)
def compare(runs: tuple[str, ...]) -> None:
    """What differs between runs: recipes, data, versions; and their ladders, time and memory side by side."""
    from qlora.facts import RunFacts, find_run
    from qlora.reporting.compare import show
    from qlora.reporting.console import console

    show([RunFacts.read(find_run(run)) for run in runs], console())


@click.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, help="Default: 0, the likeliest token.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=512, show_default=True, help="Of an answer.")
@click.option("--system", metavar="TEXT", help="Text before the conversation.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="Default: a GPU if any.")
@click.option("--base", metavar="MODEL", help="Of an adapter away from its run, if its base is not where it was.")
@click.option(
    "--trust-remote-code", is_flag=True,
    help="Run the Python code that comes with a model. Read it first. Of a run, its recipe says so.",
)  # fmt: skip
def chat(
    directory: Path, temperature: float, max_tokens: int, system: str | None, device: str, base: str | None,
    trust_remote_code: bool,
) -> None:  # fmt: skip
    """Talk to a run, or to an adapter, merged or GPTQ directory: /help lists what can be done in a conversation.

    Reads a message per line where standard input is no terminal.
    """
    from qlora.chat import Session, Settings
    from qlora.reporting.console import keep_transformers_quiet
    from qlora.reporting.screen import Screen
    from qlora.shelf import open_shelf

    keep_transformers_quiet()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # leaves, where Ctrl-C only ends an answer
    shelf = open_shelf(directory, device, base, trust_remote_code)
    try:
        Session(shelf, Settings(temperature, max_tokens, system), Screen()).run()
    except KeyboardInterrupt:  # before there was a prompt
        raise click.exceptions.Exit(130) from None


@click.command()
@click.argument(
    "directories",
    nargs=-1,
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR...",
)
@click.option("--batch", default="1,8,32", show_default=True, help="Rows at a time.")
@click.option("--prompt", default="128,1024", show_default=True, help="Tokens of a prompt.")
@click.option("--new", type=click.IntRange(min=2), default=128, show_default=True, help="New tokens for each row.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), default="bfloat16", show_default=True)
@click.option(
    "--as", "forms", default="16bit,nf4,int8,gptq,awq", show_default=True,
    help="Forms to measure a directory in, of those that it has; also nf4-double.",
)  # fmt: skip
@click.option(
    "--kernel", default="auto", show_default=True,
    help="For GPTQ and AWQ: qlora, marlin, exllamav2, triton (GPTQ), torch, or auto for all that are there.",
)  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), default=Path("bench"), show_default=True, help="Results.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
def bench(
    directories: tuple[Path, ...], batch: str, prompt: str, new: int, dtype: str, forms: str, kernel: str, out: Path,
    device: str,
) -> None:  # fmt: skip
    """Load time, prefill, decode throughput and peak memory of models, as tables and plots.

    DIR is a checkpoint in 16 bits, which bitsandbytes can load in 4 and 8 bits too, or one of GPTQ or AWQ. What
    OUT/bench.json has already is not measured again.
    """
    from qlora.evaluation.bench import run

    run(
        [path.resolve() for path in directories], _words(forms), _words(kernel), _numbers("--batch", batch),
        _numbers("--prompt", prompt), new, dtype, device, out,
    )  # fmt: skip


def _words(text: str) -> list[str]:
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def _numbers(option: str, text: str) -> list[int]:
    words = _words(text)
    if not words or not all(word.isdigit() and int(word) > 0 for word in words):
        raise click.BadParameter(f"{text} is no list of numbers such as 1,8,32", param_hint=option)
    return [int(word) for word in words]


@click.command()
@click.argument("target", metavar="URL|DIR")
@click.argument("run", type=click.Path(exists=True, path_type=Path), required=False)
@click.option("--model", default="", help="The checkpoint's name on the server. Default: the only one it has.")
@click.option("--against", type=click.Choice(["gptq", "trained"]), default="gptq", help="Whose answers count.")
@click.option("--agree", type=click.FloatRange(0, 1), default=0.9, show_default=True, help="Least share of tokens.")
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), default=120.0, help="Seconds for an answer.")
def verify(target: str, run: Path | None, model: str, against: str, agree: float, timeout: float) -> None:
    """Does a server answer as the checkpoint does: qlora verify URL RUN. Are files as written: qlora verify DIR.

    URL is that of an OpenAI-compatible API; a key is taken from OPENAI_API_KEY. DIR is an exported folder, a download
    of what was published, or a run. Ends with 3 if not.
    """
    from qlora import verify as verifying

    if target.startswith(("http://", "https://")):
        if run is None:
            raise click.UsageError("name the run too, whose golden prompts are replayed: qlora verify URL RUN")
        verifying.verify_server(target, run, model, against, agree, timeout)
    else:
        verifying.verify_files(Path(target))


@click.command()
@RECIPE
@OVERRIDES
@click.option("--dry-run", is_flag=True, help="Print files and sizes, and send nothing.")
@click.option("--force", is_flag=True, help="Although a gate failed or nothing was measured; the card says so first.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def publish(recipe: str, overrides: tuple[str, ...], dry_run: bool, force: bool, yes: bool) -> None:
    """Results to the Hugging Face Hub, if the gates passed. Run it again to go on after an interrupt.

    The repositories are those of the recipe's section `publish`; the token is that of HF_TOKEN or `hf auth login`.
    """
    from qlora.pipeline import Pipeline
    from qlora.publishing import hub
    from qlora.recipe_file import load_recipe

    loaded = load_recipe(recipe, overrides)
    hub.require_section(loaded)
    Pipeline(loaded).require_all("publish")
    hub.publish(loaded, force=force, dry_run=dry_run, agreed=yes)


@click.command()
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--to", "target", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option("--what", default="adapter,merged,gptq,report", show_default=True, help="Which results.")
def export(run: Path, target: Path, what: str) -> None:
    """A run's results in a folder that needs nothing else: checkpoints, model cards, report, manifest.

    Weights are hard links where there are such. `qlora verify DIR` compares the folder with its manifest.
    """
    from qlora.publishing import export as exporting
    from qlora.reporting.console import StageProgress

    wanted = what.split(",")
    if unknown := [name for name in wanted if name not in exporting.WHAT]:
        raise click.UsageError(f"--what: {', '.join(unknown)} is none of {', '.join(exporting.WHAT)}")
    with StageProgress("export") as progress:
        files = exporting.export(run, target, wanted, progress.update)
    click.echo(f"{target}: {files} files")


RESULTS = (report, compare, chat, bench, verify, publish, export)
