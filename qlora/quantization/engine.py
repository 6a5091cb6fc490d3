"""Quantize a 16-bit checkpoint with GPTQ, one decoder layer at a time, into an AutoGPTQ v1 checkpoint.

For each layer: find which linears share an input; gather the Hessian of each input over all calibration rows; solve;
write the packed tensors; let the layer go on with the weights that the packed tensors stand for, so that what follows
is calibrated on what will be served. Device memory holds one layer and one batch of activations.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from qlora.errors import Problem, UserError
from qlora.models.checkpoint import CheckpointWriter, copy_side_files, edit_config
from qlora.models.gptq_format import (
    QUANTIZE_CONFIG_NAME,
    TENSOR_NAMES,
    GPTQTensors,
    check_group_size,
    dequantize,
    pack,
    packed_specs,
    quantization_config,
)
from qlora.quantization.calibration import make_batches
from qlora.quantization.modules import layer_linears, quantizable_modules
from qlora.quantization.settings import GPTQSettings, ModuleReport, QuantizeReport
from qlora.quantization.skeleton import Skeleton
from qlora.quantization.solver import Solution, output_error, solve
from qlora.quantization.walk import CalibrationStates, collect_hessians, enter_model, shared_inputs

SOURCE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
Progress = Callable[[int, int, str], None]

# Padded tokens per forward: what keeps the device busy without holding much.
BATCH_TOKENS = {"cpu": 2048, "cuda": 8192}


def quantize_checkpoint(
    source_dir: Path,
    output_dir: Path,
    calibration: Sequence[Sequence[int]],
    settings: GPTQSettings,
    *,
    device: str,
    modules: Sequence[str] | None = None,
    progress: Progress | None = None,
    attn_implementation: str = "sdpa",
    trust_remote_code: bool = False,
) -> QuantizeReport:
    """Quantize the linears of `source_dir` (a Hugging Face checkpoint) into the existing, empty `output_dir`.

    `calibration` holds token ids, one document per row, without padding. `modules` limits quantization to linears of
    these names inside each decoder layer. `progress(done, layers, name)` is called after each layer. Equal inputs give
    equal bytes. Raises UserError for what cannot be quantized, WillNotFit when the disk is too small.
    """
    started = time.perf_counter()
    skeleton = Skeleton(Path(source_dir), attn_implementation=attn_implementation, trust_remote_code=trust_remote_code)
    job = _Job(skeleton, settings, quantizable_modules(skeleton.model, modules))
    job.check()
    vocabulary = skeleton.model.config.get_text_config().vocab_size
    batches = make_batches(calibration, BATCH_TOKENS[torch.device(device).type], vocabulary, device)
    with torch.no_grad():
        reports = job.run(enter_model(skeleton, batches, device), Path(output_dir), progress)
    _write_configs(skeleton, Path(output_dir), settings, list(job.linears))
    tokens = sum(batch.tokens for batch in batches)
    return QuantizeReport(
        modules=tuple(reports),
        rows=len(calibration),
        tokens=tokens,
        parameters=sum(linear.weight.numel() for linear in job.linears.values()),
        seconds=time.perf_counter() - started,
        warnings=_warnings(tokens, max(linear.in_features for linear in job.linears.values())),
    )


@dataclass(frozen=True)
class _Job:
    """What is quantized, and how."""

    skeleton: Skeleton
    settings: GPTQSettings
    linears: Mapping[str, nn.Linear]
    """Full name → layer, as `quantizable_modules` gives it."""

    def check(self) -> None:
        """Raise UserError for linears that the format or the solver cannot take, before anything is computed."""
        shapes = {name: (linear.out_features, linear.in_features) for name, linear in self.linears.items()}
        check_group_size(shapes, self.settings.group_size, self.settings.bits)
        dtypes = {name: self.skeleton.reader.spec(self._weight(name)).dtype for name in self.linears}
        problems = [
            Problem(f"stored as {dtype}; expected is one of {SOURCE_DTYPES}", name, "name the merged 16-bit directory")
            for name, dtype in dtypes.items()
            if dtype not in SOURCE_DTYPES
        ]
        if problems:
            raise UserError(problems)

    def run(self, states: CalibrationStates, output_dir: Path, progress: Progress | None) -> list[ModuleReport]:
        """Quantize layer after layer, and write every tensor of the output checkpoint."""
        reader, layers = self.skeleton.reader, self.skeleton.layers
        replaced = {self._weight(name) for name in self.linears} | {_second_copy_of_embeddings(self.skeleton)}
        kept = [name for name in reader.names() if name not in replaced]
        plan = {name: reader.spec(name) for name in kept}
        for name, linear in self.linears.items():
            plan |= packed_specs(self._prefix(name), linear.in_features, linear.out_features, self.settings.format)
        reports: list[ModuleReport] = []
        with CheckpointWriter(output_dir, plan) as writer:
            for index in range(len(layers)):
                reports += self._quantize_layer(index, states, writer)
                if progress:
                    progress(index + 1, len(layers), f"{self.skeleton.layers_name}.{index}")
            for name in kept:
                writer.write(name, reader.read(name))
        return reports

    def _quantize_layer(self, index: int, states: CalibrationStates, writer: CheckpointWriter) -> list[ModuleReport]:
        name = f"{self.skeleton.layers_name}.{index}"
        layer = self.skeleton.fill_layer(index, states.device)
        linears = {local: module for local, module in layer_linears(layer).items() if f"{name}.{local}" in self.linears}
        groups = shared_inputs(linears, layer, states, index)
        reports = []
        for stage in [[group] for group in groups] if self.settings.true_sequential else [groups]:
            for group, hessian in zip(stage, collect_hessians(linears, stage, layer, states, index), strict=True):
                reports += self._quantize_group({f"{name}.{local}": linears[local] for local in group}, hessian, writer)
        if index + 1 < len(self.skeleton.layers):
            states.advance(layer, index)
        layer.to("meta")
        return reports

    def _quantize_group(
        self, linears: Mapping[str, nn.Linear], hessian: torch.Tensor, writer: CheckpointWriter
    ) -> list[ModuleReport]:
        """Solve the linears of one input as one stacked weight, write them, and put the result in their place."""
        started = time.perf_counter()
        # From the file again, not from the module: the file may hold more precision than the layer computes in.
        weights = [self.skeleton.reader.read(self._weight(name)).to(hessian) for name in linears]
        try:
            solution = solve(torch.cat(weights), hessian, self.settings)
        except ArithmeticError as error:
            fix = "check the merged model and the calibration rows; raise quantize.damp"
            raise UserError(str(error), where=", ".join(linears), fix=fix) from error
        figures = []
        for (name, linear), weight, packed in zip(linears.items(), weights, self._pack(solution, linears), strict=True):
            quantized = dequantize(packed, self.settings.bits)
            figures += [output_error(quantized - weight, hessian).sum(), output_error(weight, hessian).sum()]
            linear.weight.copy_(quantized)
            for kind in TENSOR_NAMES:
                writer.write(self._prefix(name) + kind, getattr(packed, kind))
        losses = torch.stack(figures).tolist()
        seconds = (time.perf_counter() - started) / len(linears)
        return [
            ModuleReport(
                name=self._prefix(name).removesuffix("."),
                loss=loss,
                relative_loss=loss / power if power else 0.0,
                damp=solution.damp,
                dead_columns=solution.dead_columns,
                seconds=seconds,
            )
            for name, loss, power in zip(linears, losses[::2], losses[1::2], strict=True)
        ]

    def _pack(self, solution: Solution, linears: Mapping[str, nn.Linear]) -> Iterator[GPTQTensors]:
        """The tensors of each of the linears that were solved together."""
        outputs = [linear.out_features for linear in linears.values()]
        codes, zeros, scales = (
            tensor.split(outputs, dim=1)
            for tensor in (solution.codes_KN, solution.grid.zeros_GN, solution.grid.scales_GN)
        )
        for part in zip(codes, zeros, scales, strict=True):
            yield pack(*part, solution.g_idx, self.settings.bits)

    def _prefix(self, name: str) -> str:
        """What the names of a linear's tensors start with in the checkpoint."""
        return self.skeleton.checkpoint_name(f"{name}.")

    def _weight(self, name: str) -> str:
        return self._prefix(name) + "weight"


def _second_copy_of_embeddings(skeleton: Skeleton) -> str | None:
    """The stored output head of a model whose head is tied to its embeddings: engines stumble over it."""
    model = skeleton.model
    modules = {id(module): name for name, module in model.named_modules()}
    head = f"{modules.get(id(model.get_output_embeddings()))}.weight"
    if not model.config.get_text_config().tie_word_embeddings or head not in skeleton.reader.names():
        return None
    embeddings = skeleton.checkpoint_name(f"{modules[id(model.get_input_embeddings())]}.weight")
    return head if torch.equal(skeleton.reader.read(head), skeleton.reader.read(embeddings)) else None


def _write_configs(skeleton: Skeleton, output_dir: Path, settings: GPTQSettings, quantized: Sequence[str]) -> None:
    """The source's side files, its config.json with a quantization_config, and quantize_config.json."""
    every = {
        local for layer in skeleton.layers for local, module in layer.named_modules() if isinstance(module, nn.Linear)
    }
    chosen = [name.removeprefix(f"{skeleton.layers_name}.").partition(".")[2] for name in quantized]
    config = quantization_config(
        settings.format,
        modules_in_block=None if every == set(chosen) else list(dict.fromkeys(chosen)),
        provenance={
            "act_order": settings.act_order,
            "true_sequential": settings.true_sequential,
            "damp": settings.damp,
        },
    )
    copy_side_files(skeleton.reader.directory, output_dir)
    edit_config(output_dir, {"quantization_config": config})
    (output_dir / QUANTIZE_CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _warnings(tokens: int, widest: int) -> tuple[str, ...]:
    if tokens >= widest:
        return ()
    return (f"{tokens} calibration tokens for layers of {widest} inputs; several times as many are needed",)
