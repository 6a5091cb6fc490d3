"""Quantize a 16-bit checkpoint with GPTQ, one decoder layer at a time, into an AutoGPTQ v1 checkpoint.

For each layer: find which linears share an input; gather the Hessian of each input over all calibration rows; solve;
write the packed tensors; let the layer go on with the weights that the packed tensors stand for, so that what follows is
calibrated on what will be served. Device memory holds one layer and one batch of activations.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from qlora.errors import UserError
from qlora.models.checkpoint import CheckpointReader, CheckpointWriter, TensorSpec, copy_side_files, edit_config
from qlora.models.gptq_format import (
    QUANTIZE_CONFIG_NAME,
    TENSOR_NAMES,
    GPTQTensors,
    check_group_size,
    dequantize,
    pack,
    quantization_config,
)
from qlora.quantization.calibration import make_batches, record_layer_inputs
from qlora.quantization.modules import decoder_layers, layer_linears, quantizable_modules
from qlora.quantization.settings import GPTQSettings, ModuleReport, QuantizeReport
from qlora.quantization.skeleton import Skeleton, checkpoint_dtype
from qlora.quantization.solver import output_error, solve
from qlora.quantization.walk import CalibrationStates, collect_hessians, shared_inputs

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
    job = _Job(Path(source_dir), settings, device, modules, attn_implementation, trust_remote_code)
    return job.run(Path(output_dir), calibration, progress)


class _Job:
    """One quantization: the model, what of it is quantized, and what has been reported so far."""

    def __init__(
        self,
        source_dir: Path,
        settings: GPTQSettings,
        device: str,
        modules: Sequence[str] | None,
        attn_implementation: str,
        trust_remote_code: bool,
    ) -> None:
        self.source_dir = source_dir
        self.settings = settings
        self.device = device
        self.skeleton = Skeleton(
            source_dir, attn_implementation=attn_implementation, trust_remote_code=trust_remote_code
        )
        model = self.skeleton.model
        self.layers_name, self.layers = decoder_layers(model)
        self.linears = quantizable_modules(model, modules)
        check_group_size(
            {name: (linear.out_features, linear.in_features) for name, linear in self.linears.items()},
            settings.group_size,
            settings.bits,
        )
        self.dtype = checkpoint_dtype(self.skeleton.reader, map(self._weight, self.linears))
        self.reports: list[ModuleReport] = []

    @torch.no_grad()
    def run(self, output_dir: Path, calibration: Sequence[Sequence[int]], progress: Progress | None) -> QuantizeReport:
        started = time.perf_counter()
        states = self._first_states(calibration)
        reader = self.skeleton.reader
        quantized = {self._weight(name): linear for name, linear in self.linears.items()}
        plan = _plan(reader, quantized, self.settings)
        with CheckpointWriter(output_dir, plan) as writer:
            for index, layer in enumerate(self.layers):
                self._quantize_layer(index, layer, states, writer)
                if progress:
                    progress(index + 1, len(self.layers), f"{self.layers_name}.{index}")
            for name in reader.names():
                if name in plan:
                    writer.write(name, reader.read(name))
        self._write_configs(output_dir)
        tokens = sum(batch.tokens for batch in states.batches)
        return QuantizeReport(
            modules=tuple(self.reports),
            rows=len(calibration),
            tokens=tokens,
            parameters=sum(linear.weight.numel() for linear in self.linears.values()),
            seconds=time.perf_counter() - started,
            warnings=self._warnings(tokens),
        )

    def _first_states(self, calibration: Sequence[Sequence[int]]) -> CalibrationStates:
        """Hidden states before the first layer. Embeddings are on the device only while this runs."""
        model = self.skeleton.model
        decoder = model.get_decoder()
        vocabulary = model.get_input_embeddings().num_embeddings
        batches = make_batches(calibration, BATCH_TOKENS[torch.device(self.device).type], vocabulary, self.device)
        name = self.layers_name.rpartition(".")[0]
        skip = self.layers_name.rpartition(".")[2] + "."
        self.skeleton.fill(decoder, name, self.device, self.dtype, skip=skip)
        inputs = record_layer_inputs(decoder, self.layers, batches, self.device)
        for child in decoder.children():
            if child is not self.layers:
                child.to("meta")
        return CalibrationStates(
            batches, [item.calls for item in inputs], [item.hidden_BTD for item in inputs], self.device
        )

    def _quantize_layer(
        self, index: int, layer: nn.Module, states: CalibrationStates, writer: CheckpointWriter
    ) -> None:
        name = f"{self.layers_name}.{index}"
        self.skeleton.fill(layer, name, self.device, self.dtype)
        linears = {local: module for local, module in layer_linears(layer).items() if f"{name}.{local}" in self.linears}
        groups = shared_inputs(layer, linears, states, index)
        stages = [[group] for group in groups] if self.settings.true_sequential else [groups]
        for stage in stages:
            for group, hessian in zip(stage, collect_hessians(layer, stage, states, index), strict=True):
                self._quantize_group({f"{name}.{local}": linears[local] for local in group}, hessian, writer)
        if index + 1 < len(self.layers):
            states.advance(layer, index)
        layer.to("meta")

    def _quantize_group(
        self, linears: Mapping[str, nn.Linear], hessian: torch.Tensor, writer: CheckpointWriter
    ) -> None:
        """Solve the linears of one input as one stacked weight, write them, and put the result in their place."""
        started = time.perf_counter()
        names = list(linears)
        # From the file again, not from the module: the file may hold more precision than the layer computes in.
        weights = [self.skeleton.reader.read(self._weight(name)).to(self.device, torch.float32) for name in names]
        weight = torch.cat(weights)
        try:
            solution = solve(weight, hessian, self.settings)
        except ArithmeticError as error:
            raise UserError(
                str(error), where=", ".join(names), fix="check the model and the calibration rows; raise quantize.damp"
            ) from error
        outputs = [linear.out_features for linear in linears.values()]
        losses = []
        for name, w, codes, scales, zeros in zip(
            names,
            weights,
            solution.codes_KN.split(outputs, dim=1),
            solution.grid.scales_GN.split(outputs, dim=1),
            solution.grid.zeros_GN.split(outputs, dim=1),
            strict=True,
        ):
            packed = pack(codes, zeros, scales, solution.g_idx, self.settings.bits)
            quantized = dequantize(packed, self.settings.bits)
            losses += [output_error(quantized - w, hessian).sum(), output_error(w, hessian).sum()]
            linears[name].weight.copy_(quantized)
            self._write_packed(writer, name, packed)
        figures = torch.stack(losses).tolist()
        seconds = time.perf_counter() - started
        self.reports += [
            ModuleReport(
                name=self._weight(name).removesuffix(".weight"),
                loss=loss,
                relative_loss=loss / power if power else 0.0,
                damp=solution.damp,
                dead_columns=solution.dead_columns,
                seconds=seconds / len(names),
            )
            for name, loss, power in zip(names, figures[::2], figures[1::2], strict=True)
        ]

    def _write_packed(self, writer: CheckpointWriter, name: str, packed: GPTQTensors) -> None:
        prefix = self._weight(name).removesuffix("weight")
        for kind in TENSOR_NAMES:
            writer.write(prefix + kind, getattr(packed, kind))

    def _write_configs(self, output_dir: Path) -> None:
        settings = self.settings
        local = [name.removeprefix(f"{self.layers_name}.").partition(".")[2] for name in self.linears]
        everything = {
            name for layer in self.layers for name, module in layer.named_modules() if isinstance(module, nn.Linear)
        }
        config = quantization_config(
            settings.format,
            modules_in_block=None if set(local) == everything else list(dict.fromkeys(local)),
            provenance={
                "act_order": settings.act_order,
                "true_sequential": settings.true_sequential,
                "damp": settings.damp,
            },
        )
        copy_side_files(self.source_dir, output_dir)
        edit_config(output_dir, {"quantization_config": config})
        (output_dir / QUANTIZE_CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def _warnings(self, tokens: int) -> tuple[str, ...]:
        widest = max(linear.in_features for linear in self.linears.values())
        if tokens >= widest:
            return ()
        return (f"{tokens} calibration tokens for layers of {widest} inputs; several times as many are needed",)

    def _weight(self, name: str) -> str:
        """The weight of the linear of this name, as the checkpoint calls it."""
        return self.skeleton.checkpoint_name(f"{name}.weight")


def _plan(
    reader: CheckpointReader, quantized: Mapping[str, nn.Linear], settings: GPTQSettings
) -> dict[str, TensorSpec]:
    """Every tensor of the output, in the order of the source."""
    plan: dict[str, TensorSpec] = {}
    for name in reader.names():
        if name not in quantized:
            plan[name] = reader.spec(name)
            continue
        prefix = name.removesuffix("weight")
        inputs, outputs = quantized[name].in_features, quantized[name].out_features
        groups = 1 if settings.group_size < 0 else inputs // settings.group_size
        plan[prefix + "qweight"] = TensorSpec(torch.int32, (inputs * settings.bits // 32, outputs))
        plan[prefix + "qzeros"] = TensorSpec(torch.int32, (groups, outputs * settings.bits // 32))
        plan[prefix + "scales"] = TensorSpec(torch.float16, (groups, outputs))
        plan[prefix + "g_idx"] = TensorSpec(torch.int32, (inputs,))
    return plan
