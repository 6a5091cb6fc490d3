"""GPTQ and AWQ by gptqmodel (github.com/ModelCloud/GPTQModel), called as qlora's own engine is: a second opinion.

gptqmodel reads a merged checkpoint from disk and writes one; what it writes is made as true as ours: the source's own
config and tokenizer, `dynamic` and `modules_in_block_to_quantize` for every reader, no path of this machine. An option
that gptqmodel has no counterpart for is refused if it was set, and named in the report's warnings if it was not.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

from qlora.data.calibration import CalibrationRow
from qlora.errors import Problem, UserError, missing_extra
from qlora.models.checkpoint import CheckpointReader, TensorSource
from qlora.models.gptq_format import QUANTIZE_CONFIG_NAME
from qlora.models.module_rules import dynamic_config, modules_in_block
from qlora.models.side_files import copy_side_files, edit_config
from qlora.quantization.engine import Progress
from qlora.quantization.modules import Linear, quantizable_modules, weight_shape
from qlora.quantization.settings import GPTQSettings, ModuleReport, QuantizeReport
from qlora.quantization.skeleton import Skeleton

Method = Literal["gptq", "awq"]

# Options of GPTQSettings that gptqmodel follows.
HONOURED: dict[Method, frozenset[str]] = {
    "gptq": frozenset({"bits", "group_size", "sym", "act_order", "true_sequential", "damp", "modules", "skip"}),
    "awq": frozenset({"bits", "group_size", "sym"}),
}
AWQ_OUTPUTS = 64  # gptqmodel 7.6 searches AWQ's clipping range for this many outputs at a time
SCRATCH_NAME = "gptqmodel-scratch"


def quantize_with_gptqmodel(
    source: TensorSource,
    output_dir: Path,
    calibration: Sequence[CalibrationRow],
    settings: GPTQSettings,
    *,
    method: Method = "gptq",
    device: str,
    progress: Progress | None = None,
    attn_implementation: str = "sdpa",
    trust_remote_code: bool = False,
) -> QuantizeReport:
    """What `quantize_checkpoint` does, by gptqmodel in this process. It cannot go on where it was interrupted.

    `progress` is called before and after; in between gptqmodel shows its own. Every position of every row counts: rows'
    `loss` is not used. Raises UserError when gptqmodel is not installed, when `source` is not a checkpoint on disk, for
    options without counterpart, and for modules that the settings do not fit.
    """
    started = time.perf_counter()
    unused = check_options(settings, method)
    if not isinstance(source, CheckpointReader):
        raise UserError("gptqmodel reads the merged weights from disk", "merge.write", "set merge.write: true")
    if importlib.util.find_spec("gptqmodel") is None:
        raise missing_extra("gptqmodel", "gptq", "quantize.engine: gptqmodel")
    skeleton = Skeleton(source, attn_implementation=attn_implementation, trust_remote_code=trust_remote_code)
    linears = quantizable_modules(skeleton.model)
    shapes = {_stored_name(skeleton, name): weight_shape(linear) for name, linear in linears.items()}
    settings.check_shapes(shapes)
    if method == "awq":
        check_outputs(shapes)
    wanted = [name for name in shapes if settings.for_module(name) is not None]
    if progress:
        progress(0, 1, f"{method} by gptqmodel")
    dynamic = dynamic_config(settings.rules, list(shapes))
    load_options = {
        "dtype": skeleton.dtype,
        "attn_implementation": attn_implementation,
        "trust_remote_code": trust_remote_code,
    }
    options = _options(settings, method, dynamic) | {"device": device}
    log = _run(source.directory.resolve(), output_dir.resolve(), calibration, method, options, load_options)
    every = [
        _stored_name(skeleton, f"{skeleton.layers_name}.{index}.{local}")
        for index, layer in enumerate(skeleton.layers)
        for local, module in layer.named_modules()
        if isinstance(module, Linear)
    ]
    packed = {name.removesuffix(".qweight") for name in CheckpointReader(output_dir).names() if ".qweight" in name}
    quantized = [name for name in shapes if name in packed]
    _write_configs(source.directory, output_dir, every, quantized, dynamic)
    tokens = sum(len(row.input_ids) for row in calibration)
    reports = [_module_report(name, shapes[name][1], _entry(log, name), tokens, settings) for name in quantized]
    if progress:
        progress(1, 1, f"{method} by gptqmodel")
    return QuantizeReport(
        modules=tuple(reports),
        rows=len(calibration),
        tokens=tokens,
        parameters=sum(outputs * inputs for outputs, inputs in map(shapes.__getitem__, quantized)),
        seconds=time.perf_counter() - started,
        timings={},
        warnings=_warnings(unused, [name for name in wanted if name not in packed], reports, log),
    )


def check_options(settings: GPTQSettings, method: Method) -> list[str]:
    """Names of options that gptqmodel does not follow. Raises UserError for those that are not at their default."""
    default = GPTQSettings()
    unused = [item.name for item in fields(settings) if item.name not in HONOURED[method]]
    problems = [
        Problem(
            f"gptqmodel has no counterpart for it in {method}", f"quantize.{name}", "leave it out, or engine: native"
        )
        for name in unused
        if getattr(settings, name) != getattr(default, name)
    ]
    if problems:
        raise UserError(problems)
    return unused


def check_outputs(shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raise UserError for linears, given as full name → (N, K), that gptqmodel's AWQ cannot take."""
    wrong = {name: outputs for name, (outputs, _) in shapes.items() if outputs % AWQ_OUTPUTS}
    if wrong:
        name = next(iter(wrong))
        what = f"{wrong[name]} outputs; gptqmodel's AWQ takes multiples of {AWQ_OUTPUTS}"
        raise UserError(what, name, "use quantize.method: gptq")


def _options(settings: GPTQSettings, method: Method, dynamic: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The settings as gptqmodel's configuration classes spell them."""
    shared: dict[str, Any] = {"bits": settings.bits, "group_size": settings.group_size, "sym": settings.sym}
    if method == "awq":
        return shared
    return shared | {
        "desc_act": False,
        # Its order of columns by activation, inside and between groups, that keeps desc_act false.
        "act_group_aware": settings.act_order,
        "true_sequential": settings.true_sequential,
        "damp_percent": settings.damp,
        "dynamic": dynamic or None,
    }


def _run(
    source_dir: Path,
    output_dir: Path,
    calibration: Sequence[CalibrationRow],
    method: Method,
    options: Mapping[str, Any],
    load_options: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Quantize and save with gptqmodel; its log, an entry per module."""
    for left in output_dir.iterdir():  # by an interrupted run, which gptqmodel cannot take up
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    scratch = output_dir / SCRATCH_NAME
    scratch.mkdir()
    if (os.cpu_count() or 1) <= 2:
        # With the single worker that it starts by default on two cores, gptqmodel 7.6 fails.
        os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.quantization.config import AWQConfig, GPTQConfig

    rows = [{"input_ids": list(row.input_ids), "attention_mask": [1] * len(row.input_ids)} for row in calibration]
    # The plain kernels only pack here; those for CUDA do not exist everywhere.
    kind, kernel = (AWQConfig, BACKEND.AWQ_TORCH) if method == "awq" else (GPTQConfig, BACKEND.GPTQ_TORCH)
    with _working_directory(scratch):
        model = GPTQModel.load(str(source_dir), kind(**options, offload_to_disk_path=str(scratch)), **load_options)
        model.quantize(rows, batch_size=1, calibration_data_min_length=0, backend=kernel)
        model.save(str(output_dir))
    shutil.rmtree(scratch)
    return list(model.quant_log)


@contextlib.contextmanager
def _working_directory(directory: Path) -> Iterator[None]:
    """gptqmodel writes a folder `logs` wherever the process stands."""
    before = Path.cwd()
    os.chdir(directory)
    try:
        yield
    finally:
        os.chdir(before)


def _write_configs(
    source_dir: Path,
    output_dir: Path,
    linears: Sequence[str],
    quantized: Sequence[str],
    dynamic: Mapping[str, Mapping[str, Any]],
) -> None:
    """The source's side files in place of gptqmodel's, with its quantization_config as every reader needs it."""
    path = output_dir / QUANTIZE_CONFIG_NAME
    config = json.loads(path.read_text(encoding="utf-8"))
    config["meta"].pop("offload_to_disk_path", None)
    # gptqmodel moves rules that leave modules out to the front; here the order of the recipe counts.
    config.pop("dynamic", None)
    if dynamic:
        config["dynamic"] = dict(dynamic)
    if (chosen := modules_in_block(linears, quantized)) is not None:
        config["modules_in_block_to_quantize"] = [chosen]
    for left in output_dir.iterdir():
        if left.suffix != ".safetensors" and not left.name.endswith(".safetensors.index.json"):
            left.unlink()
    copy_side_files(source_dir, output_dir)
    edit_config(output_dir, {"quantization_config": config})
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _stored_name(skeleton: Skeleton, name: str) -> str:
    return skeleton.checkpoint_name(f"{name}.").removesuffix(".")


def _entry(log: Sequence[Mapping[str, Any]], name: str) -> Mapping[str, Any]:
    """gptqmodel's log entry of the module of this full name; empty if it has none."""
    return next((entry for entry in log if name.endswith(f".{entry['layer']}.{entry['module']}")), {})


def _module_report(
    name: str, inputs: int, entry: Mapping[str, Any], tokens: int, settings: GPTQSettings
) -> ModuleReport:
    damp = _number(entry.get("damp"))
    seen = _number(entry.get("samples"))
    return ModuleReport(
        name=name,
        loss=None,
        relative_loss=None,
        inputs=inputs,
        tokens=tokens if seen is None else int(seen),
        damp=damp,
        damp_raised=damp is not None and damp > settings.damp * 1.001,  # it logs five decimals
        dead_columns=None,
    )


def _warnings(
    unused: Sequence[str],
    left_out: Sequence[str],
    reports: Sequence[ModuleReport],
    log: Sequence[Mapping[str, Any]],
) -> tuple[str, ...]:
    """Everything in which the result is not what the settings asked for."""
    version = importlib.metadata.version("gptqmodel")
    found = [f"gptqmodel {version} has no counterpart for {', '.join(unused)}"]
    if left_out:
        found.append(f"gptqmodel left {len(left_out)} modules in 16 bits, {left_out[0]} …")
    rounded = [entry["module"] for entry in log if _number(entry.get("loss")) is None]
    if rounded:
        found.append(f"gptqmodel rounded {len(rounded)} modules to nearest (its fallback), {rounded[0]} …")
    raised = [report.name for report in reports if report.damp_raised]
    if raised:
        found.append(f"{len(raised)} modules needed more damping than asked for, {raised[0]} …")
    return tuple(found)


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
