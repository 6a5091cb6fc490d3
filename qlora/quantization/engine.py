"""Quantize a 16-bit checkpoint with GPTQ, one decoder layer at a time, into an AutoGPTQ v1 checkpoint.

For each layer: find which linears share an input; gather the statistics of each input over all calibration rows; solve
the linears of one input as one stacked weight; write the packed tensors; let the layer go on with the weights that the
packed tensors stand for, so that what follows is calibrated on what will be served. The next layer is read and the last
one written meanwhile. Device memory holds one layer (two with asymmetric calibration), statistics of its inputs, a few
batches of activations and a bounded part of the hidden states, however many calibration rows there are.

Time of a Llama-7B shape, 128 rows of 2,048 tokens, on an H100 (README), against its floor: the FLOPs of the part at 989
TFLOP/s for products of 16-bit numbers (three of them for one of fp32), 67 for the rest.

    forwards, statistics   16.2 s   8.3 s   linears 5.8e15 FLOPs (0.9e15 of the full model, a quarter of the rows),
                                            attention 0.1e15, H 1.7e15 (a little over half of K²), D 0.7e15
    solving                 4.8 s   1.5 s   Cholesky 0.25, products 0.4, and 745,000 columns at about 1 µs one by one
    packing                 0.5 s   0.1 s   memory; small kernels
    waiting for the disk    3.0 s           first layer in, last layer and embeddings out, from the page cache
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import nn

from qlora.data.calibration import CalibrationRow
from qlora.errors import Problem, UserError
from qlora.measure import Stopwatch
from qlora.models.checkpoint import CheckpointReader, CheckpointWriter, TensorSource
from qlora.models.gptq_format import (
    QUANTIZE_CONFIG_NAME,
    TENSOR_NAMES,
    GPTQTensors,
    dequantize,
    pack,
    packed_specs,
    quantization_config,
)
from qlora.models.module_rules import dynamic_config, modules_in_block
from qlora.models.side_files import copy_side_files, edit_config
from qlora.quantization.calibration import make_batches
from qlora.quantization.hessian import InputStatistics
from qlora.quantization.journal import JOURNAL_NAME, Journal
from qlora.quantization.modules import (
    Linear,
    layer_linears,
    put_weight,
    quantizable_modules,
    stored_to_NK,
    weight_shape,
)
from qlora.quantization.settings import GPTQSettings, ModuleReport, QuantizeReport, shortfalls
from qlora.quantization.skeleton import Skeleton
from qlora.quantization.solver import Solution, round_to_nearest, solve
from qlora.quantization.states import CalibrationStates, enter_model
from qlora.quantization.streams import BackgroundWriter, PrefetchingSource
from qlora.quantization.walk import InputGroup, Walk, collect_statistics, layer_order

SOURCE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
Progress = Callable[[int, int, str], None]

# What of the calibration rows the full model sees too, for asymmetric calibration: several times as many tokens as any
# linear has inputs, and a fraction of the time of all.
FULL_MODEL_TOKENS = 2**16

CPU_BATCH_TOKENS = 2048
# On a GPU: bytes of the widest activation of one forward, and tokens, large enough to keep it busy.
WIDEST_ACTIVATION_BYTES = 256 * 2**20
MOST_BATCH_TOKENS = 65536


def batch_tokens(device: str, widest: int) -> int:
    """Padded tokens per forward for a model whose widest linear has `widest` inputs or outputs."""
    if torch.device(device).type == "cpu":
        return CPU_BATCH_TOKENS
    # Each batch goes over sums of widest × widest: of fewer tokens that would take longer than multiplying them.
    return max(2048, widest // 3, min(MOST_BATCH_TOKENS, WIDEST_ACTIVATION_BYTES // (2 * widest)))


def quantize_checkpoint(
    source: Path | TensorSource,
    output_dir: Path,
    calibration: Sequence[CalibrationRow],
    settings: GPTQSettings,
    *,
    device: str,
    progress: Progress | None = None,
    attn_implementation: str = "sdpa",
    trust_remote_code: bool = False,
) -> QuantizeReport:
    """Quantize the linears of `source` (a Hugging Face checkpoint) into the existing `output_dir`.

    `progress(done, layers, name)` is called after each layer. Equal inputs give equal bytes, also when `output_dir`
    holds what an interrupted call with equal arguments left: then it goes on at the layer after the last finished one.
    Raises UserError for what cannot be quantized, WillNotFit when the disk is too small.
    """
    started = time.perf_counter()
    output_dir = Path(output_dir)
    stored = PrefetchingSource(CheckpointReader(source) if isinstance(source, Path) else source, device)
    try:
        skeleton = Skeleton(stored, attn_implementation=attn_implementation, trust_remote_code=trust_remote_code)
        job = _Job(skeleton, stored, settings, quantizable_modules(skeleton.model), Stopwatch(device))
        job.check()
        widest = max(max(weight_shape(linear)) for linear in job.linears.values())
        batches = make_batches(
            calibration,
            batch_tokens(device, widest),
            skeleton.model.config.get_text_config().vocab_size,
            device,
            settings.prompt_weight,
        )
        with torch.no_grad():
            with job.stopwatch.waiting("enter"):
                states = enter_model(skeleton, batches, device)
            reports = job.run(states, output_dir, progress)
    finally:
        stored.close()
    _write_configs(job, output_dir)
    (output_dir / JOURNAL_NAME).unlink(missing_ok=True)
    tokens = sum(batch.tokens for batch in batches)
    return QuantizeReport(
        modules=tuple(reports),
        rows=len(calibration),
        tokens=tokens,
        parameters=sum(linear.weight.numel() for linear in job.linears.values()),
        seconds=time.perf_counter() - started,
        timings=job.stopwatch.seconds(),
        warnings=shortfalls(reports),
    )


@dataclass(frozen=True)
class _Job:
    """What is quantized, and how."""

    skeleton: Skeleton
    stored: PrefetchingSource
    settings: GPTQSettings
    all_linears: Mapping[str, Linear]
    """Full name → layer, as `quantizable_modules` gives it."""
    stopwatch: Stopwatch

    @cached_property
    def module_settings(self) -> dict[str, GPTQSettings]:
        """Full name → settings of every linear that is quantized; they may differ."""
        chosen = {name: self.settings.for_module(self._prefix(name)[:-1]) for name in self.all_linears}
        return {name: settings for name, settings in chosen.items() if settings is not None}

    @cached_property
    def linears(self) -> dict[str, Linear]:
        """Full name → layer of what is quantized."""
        return {name: self.all_linears[name] for name in self.module_settings}

    def check(self) -> None:
        """Raise UserError for linears that the format or the solver cannot take, before anything is computed."""
        shapes = {self._prefix(name)[:-1]: weight_shape(linear) for name, linear in self.all_linears.items()}
        self.settings.check_shapes(shapes)
        dtypes = {name: self.stored.spec(self._weight(name)).dtype for name in self.linears}
        problems = [
            Problem(f"stored as {dtype}; expected is one of {SOURCE_DTYPES}", name, "name the merged 16-bit directory")
            for name, dtype in dtypes.items()
            if dtype not in SOURCE_DTYPES
        ]
        if problems:
            raise UserError(problems)

    def names(self, linears: Iterable[str]) -> list[str]:
        """Names of these modules in the checkpoint."""
        return [self._prefix(name).removesuffix(".") for name in linears]

    def run(self, states: CalibrationStates, output_dir: Path, progress: Progress | None) -> list[ModuleReport]:
        """Quantize layer after layer, and write every tensor of the output checkpoint."""
        layers = self.skeleton.layers
        replaced = {self._weight(name) for name in self.linears} | {self.skeleton.second_copy_of_embeddings()}
        kept = [name for name in self.stored.names() if name not in replaced]
        plan = {name: self.stored.spec(name) for name in kept}
        for name, linear in self.linears.items():
            outputs, inputs = weight_shape(linear)
            plan |= packed_specs(self._prefix(name), inputs, outputs, self.module_settings[name].format)
        journal = Journal(output_dir / JOURNAL_NAME)
        finished = [f"{self._prefix(name)}{kind}" for name in self._inside(journal.layers) for kind in TENSOR_NAMES]
        full = states.some(FULL_MODEL_TOKENS) if self.settings.asymmetric_calibration else None
        reports = list(journal.reports)
        self.stored.prefetch(self._stored_in(0))
        with BackgroundWriter(CheckpointWriter(output_dir, plan, written=finished)) as writer:
            for index in range(len(layers)):
                if index + 1 < len(layers):
                    self.stored.prefetch(self._stored_in(index + 1))
                with self.stopwatch.waiting("load"):
                    layer = self.skeleton.fill_layer(index, states.device)
                if index < journal.layers:
                    self._restore_layer(index, layer, states, full, output_dir)
                else:
                    found = self._quantize_layer(index, layer, states, full, writer)
                    reports += found
                    writer.then(partial(journal.add, index, found))
                self.stored.release(self._stored_in(index))
                layer.to("meta")
                if progress:
                    progress(index + 1, len(layers), f"{self.skeleton.layers_name}.{index}")
            with self.stopwatch.waiting("write"):
                for name in kept:
                    writer.write(name, self.stored.read(name))
                writer.finish()
        return reports

    def _quantize_layer(
        self,
        index: int,
        layer: nn.Module,
        states: CalibrationStates,
        full_states: CalibrationStates | None,
        writer: BackgroundWriter,
    ) -> list[ModuleReport]:
        name = f"{self.skeleton.layers_name}.{index}"
        walk = Walk(layer, index, self._linears_of(layer, index), states)
        walks = [walk]
        if full_states is not None:
            full_layer = copy.deepcopy(layer)
            walks.append(Walk(full_layer, index, self._linears_of(full_layer, index), full_states))
        order = layer_order(walk, sequential=self.settings.true_sequential)
        reports = []
        with ExitStack() as stack:
            for each in walks:
                stack.enter_context(each.states.replaying())
                each.prepare_replays(order.endings)
            for stage in order.stages:
                with self.stopwatch.part("forward and statistics"):
                    # The full model goes on to its next layer in the last pass over its inputs in this one.
                    statistics = collect_statistics(stage, *walks, advance_full=stage is order.stages[-1])
                for group in stage:
                    reports += self._solve_group(group, name, walk.linears, statistics.pop(0), writer)
                for each in walks:
                    each.start_replays(stage)
            for local in order.unreached:
                reports += self._quantize_group({f"{name}.{local}": walk.linears[local]}, None, writer)
            if index + 1 < len(self.skeleton.layers):
                with self.stopwatch.part("forward"):
                    walk.advance()
        for each in walks[1:]:
            each.layer.to("meta")  # modules may sit in reference cycles, which would keep their weights
        return reports

    def _solve_group(
        self,
        group: InputGroup,
        layer_name: str,
        linears: Mapping[str, Linear],
        statistics: InputStatistics,
        writer: BackgroundWriter,
    ) -> list[ModuleReport]:
        """Quantize the linears of one input, those of equal settings together."""
        parts: dict[tuple, dict[str, Linear]] = {}
        for local in group.names:
            name = f"{layer_name}.{local}"
            settings = self.module_settings[name]
            parts.setdefault((settings.bits, settings.group_size, settings.sym), {})[name] = linears[local]
        reports = []
        for number, members in enumerate(parts.values(), start=1):
            reports += self._quantize_group(members, statistics, writer, keep=number < len(parts))
        return reports

    def _restore_layer(
        self,
        index: int,
        layer: nn.Module,
        states: CalibrationStates,
        full_states: CalibrationStates | None,
        output_dir: Path,
    ) -> None:
        """Let a layer that an interrupted call had finished do its part again."""
        if full_states is not None:
            full_states.advance(layer, index)
        reader = CheckpointReader(output_dir)
        for local, linear in self._linears_of(layer, index).items():
            name = f"{self.skeleton.layers_name}.{index}.{local}"
            packed = GPTQTensors(*(reader.read(self._prefix(name) + kind).to(states.device) for kind in TENSOR_NAMES))
            put_weight(linear, dequantize(packed, self.module_settings[name].bits))
        states.advance(layer, index)

    def _quantize_group(
        self,
        linears: Mapping[str, Linear],
        statistics: InputStatistics | None,
        writer: BackgroundWriter,
        *,
        keep: bool = False,
    ) -> list[ModuleReport]:
        """Solve the linears of one input as one stacked weight, write them, and put the result in their place.

        keep: whether the statistics are needed again.
        """
        settings = self.module_settings[next(iter(linears))]
        outputs = [weight_shape(linear)[0] for linear in linears.values()]
        with self.stopwatch.part("solve"):
            try:
                # No name is bound to what the solver frees when it no longer needs it.
                solution = (
                    solve(self._stacked(linears), statistics.hessian(keep=keep), settings, statistics.drift(keep=keep))
                    if statistics is not None
                    else round_to_nearest(self._stacked(linears), settings)
                )
            except ArithmeticError as error:
                fix = "check the merged model and the calibration rows; raise quantize.damp"
                raise UserError(str(error), where=", ".join(linears), fix=fix) from error
        figures = []
        with self.stopwatch.part("pack"):
            for (name, linear), packed in zip(linears.items(), _packed(solution, outputs, settings.bits), strict=True):
                put_weight(linear, dequantize(packed, settings.bits))
                for kind in TENSOR_NAMES:
                    writer.write(self._prefix(name) + kind, getattr(packed, kind))
            for loss_N, power_N in zip(solution.loss_N.split(outputs), solution.power_N.split(outputs), strict=True):
                figures += [loss_N.sum(), power_N.sum()]
        losses = torch.stack(figures).tolist()
        return [
            ModuleReport(
                name=self._prefix(name).removesuffix("."),
                loss=loss,
                relative_loss=loss / power if power else 0.0,
                inputs=weight_shape(linears[name])[1],
                tokens=statistics.tokens if statistics is not None else 0,
                damp=solution.damp,
                damp_raised=solution.damp > settings.damp,
                dead_columns=solution.dead_columns if statistics is not None else 0,
            )
            for name, loss, power in zip(linears, losses[::2], losses[1::2], strict=True)
        ]

    def _stacked(self, linears: Mapping[str, Linear]) -> torch.Tensor:
        """fp32 [N, K]: the weights of linears with one input, one below the other."""
        return torch.cat([self._weight_in_full(name, linear) for name, linear in linears.items()])

    def _weight_in_full(self, name: str, linear: Linear) -> torch.Tensor:
        """fp32 [N, K], with the precision of the file where that is more than the layer computes in."""
        if self.stored.spec(self._weight(name)).dtype == linear.weight.dtype:
            return stored_to_NK(linear, linear.weight.detach()).float()
        return stored_to_NK(linear, self.stored.read(self._weight(name)).to(linear.weight.device)).float()

    def _linears_of(self, layer: nn.Module, index: int) -> dict[str, Linear]:
        """Local name → linear of one layer, of those that are quantized."""
        name = f"{self.skeleton.layers_name}.{index}"
        return {local: module for local, module in layer_linears(layer).items() if f"{name}.{local}" in self.linears}

    def _inside(self, layers: int) -> list[str]:
        """Full names of the linears of the first `layers` layers."""
        prefixes = tuple(f"{self.skeleton.layers_name}.{index}." for index in range(layers))
        return [name for name in self.linears if name.startswith(prefixes)]

    def _stored_in(self, index: int) -> list[str]:
        """The checkpoint's tensors of one layer."""
        prefix = self.skeleton.checkpoint_name(f"{self.skeleton.layers_name}.{index}.")
        return [name for name in self.stored.names() if name.startswith(prefix)]

    def _prefix(self, name: str) -> str:
        """What the names of a linear's tensors start with in the checkpoint."""
        return self.skeleton.checkpoint_name(f"{name}.")

    def _weight(self, name: str) -> str:
        return self._prefix(name) + "weight"


def _packed(solution: Solution, outputs: Sequence[int], bits: int) -> Iterator[GPTQTensors]:
    """The tensors of each of the linears that were solved together."""
    codes, zeros, scales = (
        tensor.split(outputs, dim=1) for tensor in (solution.codes_KN, solution.grid.zeros_GN, solution.grid.scales_GN)
    )
    for part in zip(codes, zeros, scales, strict=True):
        yield pack(*part, solution.g_idx, bits)


def _write_configs(job: _Job, output_dir: Path) -> None:
    """The source's side files, its config.json with a quantization_config, and quantize_config.json."""
    settings, skeleton = job.settings, job.skeleton
    every = [
        f"{skeleton.layers_name}.{index}.{local}"
        for index, layer in enumerate(skeleton.layers)
        for local, module in layer.named_modules()
        if isinstance(module, Linear)
    ]
    config = quantization_config(
        settings.format,
        modules_in_block=modules_in_block(job.names(every), job.names(job.linears)),
        dynamic=dynamic_config(settings.rules, job.names(job.all_linears)),
        provenance={
            "act_order": settings.act_order,
            "true_sequential": settings.true_sequential,
            "asymmetric_calibration": settings.asymmetric_calibration,
            "damp": settings.damp,
        },
    )
    copy_side_files(skeleton.reader.directory, output_dir)
    edit_config(output_dir, {"quantization_config": config})
    (output_dir / QUANTIZE_CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
