"""Read a recipe: YAML with `extends`, `section.key=value` overrides, all errors at once with file, line and a hint."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from qlora.errors import Problem, UserError
from qlora.paths import expand, packaged_recipes
from qlora.recipe import CALIBRATION_NAMES, Recipe

Key = tuple[str | int, ...]
# Keys whose value is a path relative to the file that names it.
PATH_KEYS = (
    ("model", "base"),
    ("data", "chat_template"),
    ("lora", "start_from"),
    ("quantize", "calibration", "from"),
    ("quantize", "calibration", "mix", "from"),
    ("evaluate", "general"),
)


@dataclass
class Tree:
    """Plain YAML data, and for every key where it was written (`file:line`)."""

    data: dict[str, Any] = field(default_factory=dict)
    where: dict[Key, str] = field(default_factory=dict)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The validated recipe. `path` is a YAML file or the name of a packaged recipe.

    Raises `UserError` with every problem found.
    """
    tree = _read(find_recipe(path), seen=())
    for override in overrides:
        _merge(tree, _parse_override(override))
    try:
        return Recipe.model_validate(tree.data)
    except ValidationError as error:
        raise UserError(_problems(error, tree, str(path))) from None


def find_recipe(path: str | Path) -> Path:
    """A recipe's file, from a path or from the name of a packaged recipe."""
    direct = Path(path).expanduser()
    if direct.is_file():
        return direct.resolve()
    named = packaged_recipes() / f"{path}.yaml"
    if named.is_file():
        return named
    known = [candidate.stem for candidate in packaged_recipes().glob("*.yaml")]
    nearby = [str(candidate) for candidate in direct.parent.glob("*.y*ml")] if direct.parent.is_dir() else []
    raise UserError(
        f"no recipe {path}",
        fix=f"{_did_you_mean(str(path), nearby + known)}`qlora recipes list` shows those that ship with the package",
    )


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, defaults included."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def _read(path: Path, seen: tuple[Path, ...]) -> Tree:
    if path in seen:
        raise UserError("recipes extend each other in a circle", " → ".join(str(p) for p in (*seen, path)))
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=_Scalars)
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 text ({error.reason} at byte {error.start})", str(path)) from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"not valid YAML: {error.problem}", f"{path}:{line}") from None
    tree = Tree()
    if node is not None:
        tree.data = _construct(node, path, (), tree.where)
    if not isinstance(tree.data, dict):
        raise UserError("a recipe is a mapping of sections", str(path), "start from `qlora recipes copy quickstart`")
    _resolve_paths(tree.data, path.parent)
    parent = tree.data.pop("extends", None)
    if parent is None:
        return tree
    parent_path = (path.parent / expand(str(parent))).resolve()
    if not parent_path.is_file():
        raise UserError(
            f"extends {parent}, which is not there", tree.where[("extends",)], "give a path relative to this file"
        )
    base = _read(parent_path, (*seen, path))
    _merge(base, tree)
    return base


class _Scalars(yaml.SafeLoader):
    """YAML 1.1 scalars, but 2e-4 is a number (the 1.1 pattern wants a dot)."""


_Scalars.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _construct(node: yaml.Node, path: Path, key: Key, where: dict[Key, str]) -> Any:
    where[key] = f"{path}:{node.start_mark.line + 1}"
    if isinstance(node, yaml.MappingNode):
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            name = str(key_node.value)
            if name in result:
                raise UserError(
                    f"{'.'.join(map(str, (*key, name)))} is given twice", f"{path}:{key_node.start_mark.line + 1}"
                )
            result[name] = _construct(value_node, path, (*key, name), where)
            where[(*key, name)] = f"{path}:{key_node.start_mark.line + 1}"
        return result
    if isinstance(node, yaml.SequenceNode):
        return [_construct(item, path, (*key, index), where) for index, item in enumerate(node.value)]
    return yaml.constructor.SafeConstructor().construct_object(node)


def parse_value(text: str) -> Any:
    """What a value on the command line stands for."""
    return yaml.load(text, Loader=_Scalars)  # noqa: S506 - a SafeLoader with one more number pattern


def _parse_override(text: str) -> Tree:
    """`section.key=value` as a tree; the value is YAML."""
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise UserError(
            f"{text!r} is not an override", "command line", "write section.key=value, for example train.epochs=2"
        )
    try:
        parsed = parse_value(value)
    except yaml.YAMLError:
        raise UserError(f"the value of {name} is not valid YAML: {value}", "command line") from None
    keys: Key = tuple(int(part) if part.isdigit() else part for part in name.split("."))
    tree = Tree(where={keys[: i + 1]: f"command line ({text})" for i in range(len(keys))})
    for key in reversed(keys):
        parsed = {key: parsed}
    tree.data = parsed
    _resolve_paths(tree.data, Path.cwd())
    return tree


def _merge(base: Tree, over: Tree) -> None:
    """Lay `over` onto `base`: mappings merge, everything else replaces; integer keys address list items."""
    base.data = _merged(base.data, over.data, over.where)
    base.where |= over.where


def _merged(base: Any, over: Any, where: dict[Key, str]) -> Any:
    if isinstance(over, dict) and isinstance(base, list) and all(isinstance(key, int) for key in over):
        for index, value in over.items():
            if index > len(base):
                raise UserError(f"there is no item {index} in a list of {len(base)}", next(iter(where.values())))
            base = [
                *base[:index],
                _merged(base[index] if index < len(base) else None, value, where),
                *base[index + 1 :],
            ]
        return base
    if isinstance(over, dict) and isinstance(base, dict):
        return {**base, **{key: _merged(base.get(key), value, where) for key, value in over.items()}}
    return over


def _resolve_paths(data: dict[Any, Any], folder: Path) -> None:
    """Make paths absolute that exist beside the file that names them; hub ids stay as they are."""
    for section, *rest in PATH_KEYS:
        parent: Any = data.get(section)
        for key in rest[:-1]:
            parent = parent.get(key) if isinstance(parent, dict) else None
        if isinstance(parent, dict) and isinstance(parent.get(rest[-1]), str):
            parent[rest[-1]] = _resolved(parent[rest[-1]], folder)
    lora = data.get("lora")
    combined = lora.get("combine") if isinstance(lora, dict) else None
    for part in combined if isinstance(combined, list) else []:
        if isinstance(part, dict) and isinstance(part.get("path"), str):
            part["path"] = _resolved(part["path"], folder)
    evaluate = data.get("evaluate")
    if isinstance(evaluate, dict) and isinstance(tasks := evaluate.get("tasks"), list):
        files = (".yaml", ".yml")
        evaluate["tasks"] = [
            _resolved(task, folder) if isinstance(task, str) and task.endswith(files) else task for task in tasks
        ]
    found = data.get("data")
    sources: dict[str, Any] = found if isinstance(found, dict) else {}
    train = sources.get("train")
    listed = list(train) if isinstance(train, list) else list(train.values()) if isinstance(train, dict) else []
    for source in [*listed, sources.get("eval")]:
        if isinstance(source, dict) and isinstance(source.get("path"), str):
            source["path"] = _resolved(source["path"], folder)


def _resolved(text: str, folder: Path) -> str:
    if text in CALIBRATION_NAMES:  # also where a file or folder happens to have that name
        return text
    path = expand(text)
    candidate = folder / path
    looks_local = candidate.exists() or text.startswith((".", "~", "/", "$")) or Path(path).suffix in LOCAL_SUFFIXES
    return os.path.normpath(candidate) if looks_local else text


LOCAL_SUFFIXES = {".json", ".jsonl", ".csv", ".parquet", ".txt", ".gguf", ".jinja", ".yaml", ".yml"}


def _problems(error: ValidationError, tree: Tree, recipe: str) -> list[Problem]:
    problems = []
    for item in error.errors():
        loc = tuple(part for part in item["loc"] if not (isinstance(part, str) and part.startswith("function-")))
        name = ".".join(str(part) for part in loc)
        where = next((tree.where[loc[:n]] for n in range(len(loc), -1, -1) if loc[:n] in tree.where), recipe)
        if item["type"] == "extra_forbidden":
            known = _fields_at(loc[:-1])
            problems.append(
                Problem(
                    f"unknown key {name}", where, f"{_did_you_mean(str(loc[-1]), known)}known here: {', '.join(known)}"
                )
            )
        elif item["type"] == "missing":
            problems.append(Problem(f"{name} is missing", where, "it has no default"))
        else:
            message = item["msg"].removeprefix("Value error, ")
            shown = f" (got {item['input']!r})" if loc and not isinstance(item["input"], (dict, BaseModel)) else ""
            problems.append(Problem(f"{name}: {message}{shown}" if name else message, where))
    return problems


def _fields_at(loc: Key) -> list[str]:
    """Names of the keys that the schema knows at a position."""
    model: type[BaseModel] | None = Recipe
    for part in loc:
        if isinstance(part, int) or model is None:
            continue
        fields = _by_key(model)
        if part not in fields:  # a key of the user's own, as in quantize.modules
            continue
        annotation = fields[part].annotation
        model = next((t for t in _nested(annotation) if isinstance(t, type) and issubclass(t, BaseModel)), None)
    return list(_by_key(model)) + (["extends"] if not loc else []) if model else []


def _by_key(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """A section's fields by the key that recipes use."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


def _nested(annotation: Any) -> list[Any]:
    return [annotation, *(leaf for arg in get_args(annotation) for leaf in _nested(arg))]


def _did_you_mean(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]}? " if close else ""
