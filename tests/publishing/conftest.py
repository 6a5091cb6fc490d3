"""A finished run to give away, the Hub's HTTP API on this machine, and the command in this process."""

import subprocess
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from qlora import cli


@pytest.fixture(scope="session")
def recipe_file(tmp_path_factory, write_recipe) -> Path:
    """The recipe of a run that is finished: a few facts, learned well enough to be sure of them."""
    from qlora.pipeline import Pipeline
    from qlora.recipe_file import load_recipe

    path = write_recipe(
        tmp_path_factory.mktemp("given") / "facts.yaml",
        name="facts",
        lora={"r": 32, "alpha": 64},
        train={"max_steps": 30, "batch_size": 8, "checkpoint_every": 1000},
        merge={"max_shard_gb": 0.00005},
        evaluate={"golden": 8, "golden_tokens": 48, "gates": {"merge_kl": None, "top1": 0.5}},
        publish={"repo": "ada/facts", "what": ["adapter", "merged", "gptq"], "license": "apache-2.0"},
    )
    Pipeline(load_recipe(path)).run()
    return path


@pytest.fixture(scope="session")
def run_dir(recipe_file) -> Path:
    return recipe_file.parent / "runs" / "facts"


@pytest.fixture(scope="session")
def qlora():
    """`qlora(*arguments)`: the command, with what it prints and its exit code."""

    def command(*arguments: object) -> subprocess.CompletedProcess:
        called = list(map(str, arguments))
        with redirect_stdout(StringIO()) as stdout, redirect_stderr(StringIO()) as stderr:
            code = cli._exit_code(lambda: cli.qlora.main(called, standalone_mode=False))
        assert "Traceback" not in stderr.getvalue(), stderr.getvalue()
        return subprocess.CompletedProcess(called, code, stdout.getvalue(), stderr.getvalue())

    return command
