"""Tasks of lm-eval (EleutherAI's harness, extra `eval`) on a model that is loaded already.

A task is one that lm-eval knows by name, or a YAML file in its format; data files that such a file names are looked for
beside it, so that a task with local rows needs no network. lm-eval is imported when there is something to measure.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import importlib.metadata
import importlib.util
import io
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from qlora.artifacts import file_digest
from qlora.errors import Problem, UserError, missing_extra
from qlora.recipe_measuring import Evaluate

KEY = "evaluate.tasks"
DRAWS = 1000  # of lm-eval's own bootstrap, for figures whose error has no formula
FEWSHOT_SEED = 1234  # lm-eval's own
SUFFIXES = (".yaml", ".yml")
Figures = dict[str, dict[str, dict[str, float | None]]]
"""Task → metric → value and standard error."""


def require_tasks(section: Evaluate) -> None:
    """Raises UserError for tasks that are not there, before anything is trained. Of names it takes half a minute."""
    if not section.tasks:
        return
    if importlib.util.find_spec("lm_eval") is None:
        raise missing_extra("lm-eval", "eval", KEY)
    problems = [problem for task in section.tasks if _is_file(task) for problem in _file_problems(Path(task))]
    names = [task for task in section.tasks if not _is_file(task)]
    known = _manager(named=True).all_tasks if names else []
    for name in names:
        if name not in known:
            meant = difflib.get_close_matches(name, known, n=1)
            fix = f"did you mean {meant[0]}?" if meant else "`lm-eval ls tasks` lists those it knows"
            problems.append(Problem(f"lm-eval knows no task {name}", KEY, fix))
    if problems:
        raise UserError(problems)


def task_digest(task: str) -> Any:
    """What changes when a task does: the content of its files, or its name and the version of lm-eval."""
    version = importlib.metadata.version("lm-eval") if importlib.util.find_spec("lm_eval") else None
    try:
        found, files = _read(Path(task)) if _is_file(task) else ({}, [])
    except (OSError, yaml.YAMLError):  # `require_tasks` says what is wrong with it
        files = []
    if not files:
        return [task, version]
    data = [Path(name) for name in _listed(_data_files(found)) if Path(name).is_file()]
    return [version, *(file_digest(path) for path in [*files, *sorted(data)])]


@contextlib.contextmanager
def open_tasks(section: Evaluate, tokenizer: Any) -> Iterator[Callable[[Any], Figures] | None]:
    """A function that measures all tasks of the recipe on a model; None where there are none.

    Raises UserError if a task, or its data, cannot be loaded.
    """
    if not section.tasks:
        yield None
        return
    require_tasks(section)
    if section.task_chat_template and not tokenizer.chat_template:
        raise UserError("there is no chat template", "evaluate.task_chat_template", "set data.chat_template")
    with tempfile.TemporaryDirectory() as folder:
        specs = [_beside(Path(task), Path(folder)) if _is_file(task) else task for task in section.tasks]
        # A file may be a group of tasks that lm-eval knows.
        named = any(not _is_file(task) or "group" in _read(Path(task))[0] for task in section.tasks)
        loaded = _load(specs, named)
        tokenizer = copy.deepcopy(tokenizer)  # lm-eval changes its padding
        yield lambda model: _measure(model, tokenizer, loaded, section)


def _load(specs: Sequence[str], named: bool) -> Any:
    import datasets
    import httpx

    with contextlib.redirect_stderr(io.StringIO()):
        try:
            loaded = _manager(named).load(list(specs))
        # As with any data set: not found, no network, wrong configuration; and KeyErrors for what a task lacks.
        except (
            OSError, ValueError, RuntimeError, KeyError, httpx.HTTPError, datasets.exceptions.DatasetsError
        ) as error:  # fmt: skip
            what = f"cannot be loaded: {str(error).strip().splitlines()[0] if str(error).strip() else error!r}"
            raise UserError(what, KEY, "connect to the hub, or name a task file with local rows") from error
    unsafe = [name for name, task in loaded["tasks"].items() if getattr(task, "UNSAFE_CODE", False)]
    if unsafe:
        what = f"{unsafe[0]} runs code that the model writes, which qlora does not do"
        raise UserError(what, KEY, "leave it out, and run lm-eval on the checkpoint where nothing can be harmed")
    return loaded


@functools.cache
def _manager(named: bool) -> Any:
    """lm-eval's index of tasks; to know its own it reads 14,000 files."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=named)


def _measure(model: Any, tokenizer: Any, loaded: Any, section: Evaluate) -> Figures:
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)  # every model is shown the same examples
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
        found = evaluate(
            lm=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=section.batch_size),
            task_dict=loaded,
            limit=section.task_limit,
            bootstrap_iters=DRAWS,
            log_samples=False,
            apply_chat_template=section.task_chat_template,
            fewshot_as_multiturn=section.task_chat_template,
        )
    assert found is not None, "there is one process"
    parts = {part for group, parts in found["group_subtasks"].items() if group in found["results"] for part in parts}
    return {task: figures for task, each in found["results"].items() if task not in parts and (figures := _of(each))}


def _of(result: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """lm-eval calls a figure `metric,filter`, and its error `metric_stderr,filter`; the filter is mostly `none`."""
    figures = {}
    for key, value in result.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        name = metric if filtered == "none" else key
        figures[name] = {"value": _number(value), "stderr": _number(result.get(f"{metric}_stderr,{filtered}"))}
    return figures


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _is_file(task: str) -> bool:
    return task.endswith(SUFFIXES)


class _Plain(yaml.SafeLoader):
    """YAML without its functions: `!function utils.score` is read as that text."""


_Plain.add_multi_constructor("!", lambda loader, suffix, node: f"!{suffix} {node.value}")


def _read(path: Path) -> tuple[dict[str, Any], list[Path]]:
    """A task file with what it includes, its data files as absolute paths where they lie beside it; and what was read,
    modules of its functions among it."""
    content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Plain)  # noqa: S506
    content = content if isinstance(content, dict) else {}
    if _data_files(content):
        content["dataset_kwargs"]["data_files"] = _absolute(_data_files(content), path.parent)
    files = [path, *sorted(path.parent.glob("*.py"))]
    included = content.pop("include", [])
    merged: dict[str, Any] = {}
    for name in included if isinstance(included, list) else [included]:
        below, more = _read(path.parent / name)
        merged |= below
        files += more
    return merged | content, files


def _data_files(content: dict[str, Any]) -> Any:
    arguments = content.get("dataset_kwargs")
    return arguments.get("data_files") if isinstance(arguments, dict) else None


def _absolute(named: Any, folder: Path) -> Any:
    if isinstance(named, dict):
        return {split: _absolute(each, folder) for split, each in named.items()}
    if isinstance(named, list):
        return [_absolute(each, folder) for each in named]
    return str((folder / named).resolve()) if (folder / named).is_file() else named


def _listed(named: Any) -> list[str]:
    if isinstance(named, (dict, list)):
        return [name for each in (named.values() if isinstance(named, dict) else named) for name in _listed(each)]
    return [named] if named else []


def _file_problems(path: Path) -> list[Problem]:
    try:
        content, _ = _read(path)
    except OSError as error:
        return [Problem(f"cannot be read: {error.strerror}", str(error.filename or path), f"correct {KEY}")]
    except yaml.YAMLError as error:
        return [Problem(f"no YAML: {str(error).splitlines()[0]}", str(path), "correct it")]
    if not content.keys() & {"task", "group"}:
        return [Problem("no task of lm-eval: it has no key `task`", str(path), f"correct it, or {KEY}")]
    local = content.get("dataset_path") in ("json", "csv", "parquet", "text")
    return [
        Problem(f"names the data file {name}, which is not there", str(path), "name it as it lies beside this file")
        for name in _listed(_data_files(content))
        if local and "://" not in name and not any(part in name for part in "*?[") and not Path(name).is_file()
    ]


def _beside(path: Path, folder: Path) -> str:
    """A task file that names its data files in full: lm-eval looks for them where the command was started."""
    content, _ = _read(path)
    if not _data_files(content):
        return str(path.resolve())
    target = folder / f"{len(list(folder.iterdir()))}-{path.name}"
    written = {"include": str(path.resolve()), "dataset_kwargs": content["dataset_kwargs"]}
    target.write_text(yaml.safe_dump(written), encoding="utf-8")
    return str(target)
