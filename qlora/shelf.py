"""The models that a directory holds, by name, each loaded when it is asked for: of a run, an adapter or a checkpoint.

A run has the rungs of its ladder: base, nf4 (what was trained on), trained, merged and gptq. A directory inside a run
stands for the whole run, beginning with itself. What is shipped is loaded without looking for the base.
"""

from __future__ import annotations

import re
import shlex
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora.artifacts import DAMAGED, read_json
from qlora.errors import UserError
from qlora.evaluation.ladder import BASE, START, TRAINED, Rung
from qlora.facts import RunFacts
from qlora.measure import free_for_training
from qlora.models.estimates import SHARE_OF_FREE
from qlora.models.loading import (
    DTYPES,
    load_for_training,
    load_gptq,
    load_plain,
    load_tokenizer,
    pick_device,
)
from qlora.models.provenance import FILE_NAME, Provenance, read_provenance, write_provenance
from qlora.models.resources import BYTES, layer_forward_bytes
from qlora.models.shapes import model_shapes, read_config, skeleton
from qlora.models.tokens import TrainedTokens, trained_tokens
from qlora.paths import RunDir
from qlora.pipeline import out_of_date
from qlora.recipe import Model
from qlora.rungs import GPTQ, MERGED, learning_rungs, shipped_rungs
from qlora.stages import Run

if TYPE_CHECKING:
    from qlora.models.base import Base

ADAPTER_CONFIG = "adapter_config.json"
MADE_BY = {TRAINED: "train", MERGED: "merge", GPTQ: "quantize"}  # the stage behind a rung
LONGEST = 8192  # tokens of a conversation that room is left for on a GPU, beside the model


class NothingThere(UserError):
    """A directory holds no model that can be loaded."""

    title = "There is no model to load"


class NotTrusted(UserError):
    """A model comes with code of its own, which nobody has said may run."""

    title = "This model is code that was not trusted"


@dataclass(frozen=True)
class Loaded:
    """A model on its device in eval mode, what it is in words, and its tokenizer."""

    label: str
    model: Any
    tokenizer: Any


@dataclass(frozen=True)
class Shelf:
    """Models of one directory by name, and the one to begin with.

    rungs: each finds its rung anew, so that it sees the memory which is free by then.
    tokenizers: the directory of each one's tokenizer.
    template_options: what its chat template is given beside messages.
    stale: of rungs that are not what their run's recipe and inputs make now, a line that says why, and what to do.
    """

    first: str
    rungs: Mapping[str, Callable[[], Rung]]
    tokenizers: Mapping[str, Path]
    trust_remote_code: bool = False
    template_options: Mapping[str, Any] = field(default_factory=dict)
    stale: Mapping[str, str] = field(default_factory=dict)

    def load(self, name: str) -> Loaded:
        """Raises UserError where files are missing, the base cannot be had, or a model's own code would have to run."""
        try:
            tokenizer = load_tokenizer(self.tokenizers[name], self.trust_remote_code)
            rung = self.rungs[name]()
            return Loaded(rung.label, rung.load(), tokenizer)
        except Exception as error:
            if self.trust_remote_code or not _asks_for_trust(error):
                raise
            raise NotTrusted(
                "loading it would run Python code that comes with it or with its base",
                str(self.tokenizers[name]),
                "read that code (*.py beside config.json); if you trust it, add --trust-remote-code",
            ) from None


def _asks_for_trust(error: BaseException | None) -> bool:
    """Whether transformers refused code that is not its own: it then names its argument, which libraries may wrap."""
    while error is not None and "trust_remote_code=True" not in str(error):
        error = error.__cause__ or error.__context__
    return error is not None


def open_shelf(
    directory: Path, device: str = "auto", base: str | None = None, trust_remote_code: bool = False
) -> Shelf:
    """What a directory holds: a run, an adapter of `qlora train`, or a merged, GPTQ, AWQ or other plain checkpoint.

    device: auto, cpu or cuda. base: for an adapter outside its run, the base if it is not where base.json says.
    trust_remote_code: whether code that comes with a model may run; of a run, its recipe says so.
    Raises UserError where there is no such thing.
    """
    directory, device = directory.resolve(), pick_device(device)
    whole, part = (directory, None) if RunDir(directory).lineage.is_file() else (directory.parent, directory.name)
    if RunDir(whole).lineage.is_file() and RunDir(whole).recipe.is_file():
        return _of_run(RunFacts.read(whole), device, part)
    if (directory / ADAPTER_CONFIG).is_file():
        return _of_adapter(directory, device, base, trust_remote_code)
    if (directory / "config.json").is_file():
        return _of_checkpoint(directory, device, trust_remote_code)
    raise NothingThere(
        "this is no run, adapter, merged or GPTQ directory" if directory.is_dir() else "there is no such directory",
        str(directory),
        "name the folder that `qlora run` wrote, such as runs/NAME, or adapter, merged or gptq in it",
    )


def _of_run(facts: RunFacts, device: str, part: str | None) -> Shelf:
    """part: the name of the directory inside the run that was asked for."""
    recipe, dirs = facts.recipe, facts.dirs
    run = Run(recipe)
    run.dirs = dirs  # wherever it lies by now
    trust = recipe.model.trust_remote_code

    def learning(name: str) -> Rung:
        tokens = trained_tokens(recipe.lora, run.base.directory, trust)
        most = room_beside_conversation(run.base.directory, device, trust)
        return _named(name, learning_rungs(run.base, recipe.model, dirs.adapter, tokens, device, most))

    def shipped(name: str) -> Rung:
        most = room_beside_conversation(dirs.merged if name == MERGED else dirs.gptq, device, trust)
        return _named(name, shipped_rungs(recipe, dirs, device, most))

    rungs: dict[str, Callable[[], Rung]] = {}
    if (dirs.adapter / ADAPTER_CONFIG).is_file():
        for name in (BASE, START, TRAINED) if recipe.model.requantizes else (BASE, TRAINED):
            rungs[name] = partial(learning, name)
    if recipe.merge.write and (dirs.merged / "config.json").is_file():
        rungs[MERGED] = partial(shipped, MERGED)
    if (dirs.gptq / "config.json").is_file():
        rungs[GPTQ] = partial(shipped, GPTQ)
    if not rungs:
        raise NothingThere("no stage of this run has finished yet", str(dirs.root), "qlora run RECIPE")
    tokenizers = {name: getattr(dirs, name) if name in (MERGED, GPTQ) else dirs.adapter for name in rungs}
    first = _first(rungs, dirs, part)
    return Shelf(first, rungs, tokenizers, trust, recipe.data.template_options, _stale(facts, rungs))


def _stale(facts: RunFacts, rungs: Iterable[str]) -> dict[str, str]:
    """As `Shelf.stale` has it."""
    reasons, root = out_of_date(facts), facts.dirs.root
    command = ["qlora", "run", str(facts.dirs.recipe)]
    if facts.recipe.run_dir.resolve() != root:  # it was moved, or is relative to another folder than this one
        command += [f"output_dir={root.parent}", f"name={root.name}"]
    update = shlex.join(command)
    return {
        name: f"{name} is out of date: {reasons[stage]}; `{update}` brings it up to date"
        for name in rungs
        if (stage := MADE_BY.get(name)) in reasons
    }


def _first(rungs: Mapping[str, Any], dirs: RunDir, part: str | None) -> str:
    """The rung of the directory that was asked for; of a whole run, the last one."""
    if part is None:
        return list(rungs)[-1]
    name = {dirs.adapter.name: TRAINED, dirs.merged.name: MERGED, dirs.gptq.name: GPTQ}.get(part)
    if name is None or name not in rungs:
        where, others = str(dirs.root / part), ", ".join(rungs)
        what = "this directory of the run holds no model" if name is None else f"this run has no {name} model on disk"
        raise NothingThere(what, where, f"the run itself has {others}: name {dirs.root}")
    return name


def _of_adapter(directory: Path, device: str, base: str | None, trust: bool) -> Shelf:
    """An adapter away from its run: base.json says which base it needs, and how training held that."""

    found_once = cache(partial(_base_of, directory, device, base, trust))

    def rung(name: str) -> Rung:
        found, section, tokens = found_once()
        most = room_beside_conversation(found.directory, device, trust)
        return _named(name, learning_rungs(found, section, directory, tokens, device, most))

    settings = read_provenance(directory / FILE_NAME).settings
    held = (BASE, TRAINED) if settings.quant_type in ("checkpoint", "none") else (BASE, START, TRAINED)
    rungs = {name: partial(rung, name) for name in held}
    return Shelf(TRAINED, rungs, dict.fromkeys(rungs, directory), trust)


def _base_of(adapter: Path, device: str, base: str | None, trust: bool) -> tuple[Base, Model, TrainedTokens | None]:
    """An adapter's base, its section of a recipe, and trained tokens. Raises UserError where it has other weights."""
    from qlora.models.base import resolve_base

    kept = read_provenance(adapter / FILE_NAME)
    try:
        found = resolve_base(base or kept.base_id, None if base else kept.revision, trust_remote_code=trust)
    except UserError as error:
        if base is not None:
            raise
        reason = error.problems[0].what
        raise NothingThere(
            f"its base {kept.base_id} is not found ({reason})", str(adapter), "say where it is: --base DIRECTORY"
        ) from None
    section = _section(kept, found, trust)
    indices = read_json(adapter / ADAPTER_CONFIG, DAMAGED).get("trainable_token_indices")
    tokens = TrainedTokens.of_layers(indices) if indices else None
    if found.revision is None or found.revision != kept.revision:
        _require_same_weights(kept, found, section, device, adapter)
    return found, section, tokens


def _section(kept: Provenance, base: Base, trust: bool) -> Model:
    """`model` of the recipe that an adapter was trained by, as far as its weights depend on it."""
    settings = kept.settings
    section: dict[str, Any] = {"base": str(base.directory), "trust_remote_code": trust}
    section |= {"quantization": settings.quant_type}
    section |= {"double_quant": settings.double_quant, "compute_dtype": str(settings.compute_dtype).split(".")[-1]}
    if settings.int8_threshold is not None:
        section["int8_threshold"] = settings.int8_threshold
    if settings.quant_type not in ("checkpoint", "none"):
        bare = skeleton(read_config(base.directory, trust_remote_code=trust), trust_remote_code=trust)
        head = bare.get_output_embeddings()
        heads = {name for name, module in bare.named_modules() if module is head}
        section["skip_modules"] = [f"^{re.escape(name)}$" for name in kept.unquantized if name not in heads]
    return Model(**section)


def _require_same_weights(kept: Provenance, base: Base, section: Model, device: str, adapter: Path) -> None:
    """Load the base as training held it, and compare its codes with those of base.json. Raises UserError."""
    if kept.beginning is not None:  # those are of what an adapter of its own left of the weights
        return
    model = load_for_training(base, section, device)
    with tempfile.TemporaryDirectory() as scratch:
        here = write_provenance(
            model, Path(scratch) / FILE_NAME, base_id=base.id, revision=base.revision, settings=kept.settings
        )
    if here.digest != kept.digest:
        raise NothingThere(
            f"this adapter was trained on other weights than {base.id} has",
            str(adapter),
            f"its base was {kept.base_id}" + (f", revision {kept.revision}" if kept.revision else ""),
        )


def _of_checkpoint(directory: Path, device: str, trust: bool) -> Shelf:
    config = read_json(directory / "config.json", DAMAGED)
    method = (config.get("quantization_config") or {}).get("quant_method")
    if not list(directory.glob("*.safetensors")):
        raise NothingThere("there are no weights (*.safetensors) in this directory", str(directory))
    dtype = DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")), DTYPES["bfloat16"])
    if method in ("gptq", "awq"):
        name, label, load = method, f"{method.upper()}, {config['quantization_config'].get('bits', 4)} bits", load_gptq
    elif method is None:
        name, label, load = directory.name, "as its checkpoint is", load_plain
    else:
        raise NothingThere(
            f"this checkpoint is quantized in a way that is not read here ({method})",
            str(directory),
            "name a 16-bit, GPTQ or AWQ checkpoint",
        )

    def rung() -> Rung:
        most = room_beside_conversation(directory, device, trust)
        return Rung(name, label, partial(load, directory, dtype, device, trust_remote_code=trust, most=most))

    return Shelf(name, {name: rung}, {name: directory}, trust)


def _named(name: str, rungs: list[Rung]) -> Rung:
    return next(rung for rung in rungs if rung.name == name)


def room_beside_conversation(directory: Path, device: str, trust_remote_code: bool = False) -> int | None:
    """Bytes of each GPU that a model may take, where in 16 bits it is larger than what a conversation leaves of one."""
    if device == "cpu":
        return None
    config = read_config(directory, trust_remote_code=trust_remote_code)
    shapes = model_shapes(skeleton(config, trust_remote_code=trust_remote_code))
    itemsize = BYTES["bfloat16"]
    tokens = min(LONGEST, window_of(config) or LONGEST)
    cache = 2 * itemsize * shapes.layers * shapes.key_value_heads * shapes.head_dim
    beside = tokens * (cache + layer_forward_bytes(shapes, itemsize)) + 4 * shapes.vocab_size
    most = max(0, round(SHARE_OF_FREE * free_for_training(device)) - beside)
    return most if itemsize * shapes.total > most else None


def window_of(config: Any) -> int | None:
    """Tokens that a model can read and write together; None where its configuration does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)
