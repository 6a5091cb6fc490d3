"""The GPTQ v1 checkpoint layout: packing, unpacking, dequantizing, and the `quantization_config` that announces it.

A linear layer with K inputs, N outputs and b bits is stored in G groups of inputs as `qweight` int32 [K·b/32, N],
`qzeros` int32 [G, N·b/32], `scales` fp16 [G, N] and `g_idx` int32 [K], and stands for

    W[n, k] = scales[g_idx[k], n] · (q[k, n] − z[g_idx[k], n]),    z = (stored zero + 1) mod 2^b.

Packing is a little-endian bit stream: element i takes bits [i·b, (i+1)·b) of the run of 32-bit words, along K for
`qweight` and along N for `qzeros`. This is the layout of AutoGPTQ 0.7 (`checkpoint_format: gptq`); v2 stores z itself.

Shapes: K inputs, N outputs, G groups, R rows of codes, C columns, W rows of words.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qlora import __version__
from qlora.errors import Problem, UserError
from qlora.models.checkpoint import TensorSpec
from qlora.models.module_rules import ModuleRule, first_match, read_dynamic

SUPPORTED_BITS = (2, 3, 4, 8)
SUPPORTED_GROUP_SIZES = (-1, 32, 64, 128)
QUANTIZE_CONFIG_NAME = "quantize_config.json"
TENSOR_NAMES = ("qweight", "qzeros", "scales", "g_idx")
RULE_KEYS = ("bits", "group_size", "sym", "desc_act")
"""Settings that a rule of `dynamic` may change."""
WORD_BITS = 32


@dataclass(frozen=True)
class GPTQFormat:
    """What a reader must know to decode a checkpoint, and what its `quantization_config` says."""

    bits: int
    group_size: int
    """Inputs that share a scale and zero point; −1 for all inputs of a layer."""
    sym: bool = True
    desc_act: bool = False
    """Whether `g_idx` may be any assignment of inputs to groups. Checkpoints written here never need it."""
    rules: tuple[ModuleRule, ...] = ()
    """Modules with other settings than these, or not quantized (the `dynamic` of a checkpoint)."""

    def for_module(self, name: str) -> GPTQFormat | None:
        """What holds for the module of this full name, without rules; None if it is not quantized."""
        rule = first_match(self.rules, name)
        if rule is None:
            return replace(self, rules=())
        return None if rule.changes is None else replace(self, rules=(), **rule.changes)


@dataclass(frozen=True)
class GPTQTensors:
    """One packed linear layer, shapes and dtypes as in the module's docstring."""

    qweight: torch.Tensor
    qzeros: torch.Tensor
    scales: torch.Tensor
    g_idx: torch.Tensor


def pack_rows(codes_RC: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack integer codes in [0, 2^bits) along dimension 0 into int32 words [R·bits/32, C].

    Raises ValueError when R codes do not fill whole words. Codes out of range would spill into their neighbours.
    """
    run, words = _run_length(bits)
    rows, columns = codes_RC.shape
    if rows % run:
        raise ValueError(f"{rows} codes of {bits} bits do not fill whole 32-bit words; pack a multiple of {run}")
    codes = codes_RC.reshape(rows // run, run, columns)
    if words == 1:  # no code straddles words: a few large operations instead of many small ones
        shifts = torch.arange(0, WORD_BITS, bits, dtype=torch.int32, device=codes.device)
        return (codes.to(torch.int32) << shifts[:, None]).sum(1, dtype=torch.int32)
    packed = torch.zeros(rows // run, words, columns, dtype=torch.int32, device=codes.device)
    for i in range(run):
        word, shift = divmod(i * bits, WORD_BITS)
        code = codes[:, i].to(torch.int32)
        packed[:, word] |= code << shift
        if shift + bits > WORD_BITS:
            packed[:, word + 1] |= code >> (WORD_BITS - shift)
    return packed.reshape(rows * bits // WORD_BITS, columns)


def unpack_rows(packed_WC: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of `pack_rows`: uint8 codes [W·32/bits, C]. Raises ValueError when W words hold no whole run of codes."""
    run, words = _run_length(bits)
    rows, columns = packed_WC.shape
    if rows % words:
        raise ValueError(f"{rows} words do not hold whole runs of {bits}-bit codes; expected a multiple of {words}")
    if words == 1:
        shifts = torch.arange(0, WORD_BITS, bits, dtype=torch.int32, device=packed_WC.device)
        codes = (packed_WC.unsqueeze(1) >> shifts[:, None]).bitwise_and_((1 << bits) - 1)
        return codes.to(torch.uint8).reshape(rows * run, columns)
    packed = packed_WC.reshape(rows // words, words, columns)
    codes = torch.empty(rows // words, run, columns, dtype=torch.uint8, device=packed.device)
    mask = (1 << bits) - 1
    for word in range(words):
        first, end = (math.ceil(each * WORD_BITS / bits) for each in (word, word + 1))  # codes that begin in this word
        shifts = torch.arange(first * bits - word * WORD_BITS, WORD_BITS, bits, dtype=torch.int32, device=packed.device)
        begun = (packed[:, word, None] >> shifts[:, None]).bitwise_and_(mask)
        if missing := end * bits - (word + 1) * WORD_BITS:
            # int32 shifts right with the sign; masking to the bits that this word holds drops the copies of it.
            begun[:, -1] &= mask >> missing
            begun[:, -1] |= (packed[:, word + 1] << (bits - missing)) & mask
        codes[:, first:end] = begun
    return codes.reshape(rows * WORD_BITS // bits, columns)


def pack_zeros(zeros_GN: torch.Tensor, bits: int) -> torch.Tensor:
    """Zero points in [0, 2^bits) as v1 `qzeros` int32 [G, N·bits/32]: minus one (0 wraps to 2^bits − 1), along N."""
    stored = (zeros_GN.to(torch.int32) - 1) & ((1 << bits) - 1)
    return pack_rows(stored.T, bits).T.contiguous()


def unpack_zeros(qzeros: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of `pack_zeros`: uint8 zero points [G, N] in [0, 2^bits)."""
    stored = unpack_rows(qzeros.T, bits).T
    return (stored + 1) & ((1 << bits) - 1)


def pack(
    codes_KN: torch.Tensor, zeros_GN: torch.Tensor, scales_GN: torch.Tensor, g_idx: torch.Tensor, bits: int
) -> GPTQTensors:
    """Pack one layer: integer codes and zero points in [0, 2^bits), fp16 scales, the group of each input.

    Raises ValueError when K or N codes do not fill whole words, or the scales are not fp16 (rounding them here would
    make the packed weights differ from what the solver chose).
    """
    if scales_GN.dtype != torch.float16:
        raise ValueError(f"scales are {scales_GN.dtype}; round them to float16 before choosing codes")
    return GPTQTensors(
        qweight=pack_rows(codes_KN, bits),
        qzeros=pack_zeros(zeros_GN, bits),
        scales=scales_GN.contiguous(),
        g_idx=g_idx.to(torch.int32),
    )


def packed_specs(prefix: str, inputs: int, outputs: int, settings: GPTQFormat) -> dict[str, TensorSpec]:
    """The tensors of one packed layer as they stand in a checkpoint, without data. `prefix` ends with a dot."""
    groups = 1 if settings.group_size < 0 else math.ceil(inputs / settings.group_size)
    return {
        f"{prefix}qweight": TensorSpec(torch.int32, (inputs * settings.bits // WORD_BITS, outputs)),
        f"{prefix}qzeros": TensorSpec(torch.int32, (groups, outputs * settings.bits // WORD_BITS)),
        f"{prefix}scales": TensorSpec(torch.float16, (groups, outputs)),
        f"{prefix}g_idx": TensorSpec(torch.int32, (inputs,)),
    }


def dequantize(tensors: GPTQTensors, bits: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The weight [N, K] that packed tensors stand for: one fp32 product per element, then rounded to `dtype`."""
    codes_KN = unpack_rows(tensors.qweight, bits).to(torch.float32)
    group = tensors.g_idx.long()
    codes_KN -= unpack_zeros(tensors.qzeros, bits).to(torch.float32)[group]
    codes_KN *= tensors.scales.to(torch.float32)[group]
    return codes_KN.T.to(dtype).contiguous()


def quantization_config(
    settings: GPTQFormat,
    *,
    modules_in_block: Sequence[str] | None = None,
    dynamic: Mapping[str, Mapping[str, Any]] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The `quantization_config` of config.json, also the content of quantize_config.json.

    `modules_in_block` lists the quantized linears when they are not all of them (engines quantize every linear unless
    told), `dynamic` the settings that differ between modules: see `modules_in_block` and `dynamic_config` of
    `qlora.models.module_rules`. `provenance` joins the writer's name in `meta`, which no reader interprets.
    """
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": settings.bits,
        "group_size": settings.group_size,
        "desc_act": settings.desc_act,
        "sym": settings.sym,
        "lm_head": False,
        "checkpoint_format": "gptq",
        "meta": {"quantizer": f"qlora:{__version__}", **(provenance or {})},
    }
    if modules_in_block is not None:
        config["modules_in_block_to_quantize"] = [list(modules_in_block)]
    if dynamic:
        config["dynamic"] = {pattern: dict(changes) for pattern, changes in dynamic.items()}
    return config


def quantization_method(directory: Path) -> str:
    """`gptq`, `awq` or what else a checkpoint says it was quantized with. Raises UserError if it is not quantized."""
    return str(find_config(Path(directory))[1].get("quant_method", "gptq"))


def read_quantization_config(directory: Path) -> GPTQFormat:
    """The format that a checkpoint announces, from config.json or, failing that, quantize_config.json.

    Raises UserError when the directory holds no GPTQ checkpoint, or one in another format than v1.
    """
    path, config = find_config(Path(directory))
    problems = []
    if config.get("quant_method", "gptq") != "gptq":
        problems.append(Problem(f"quant_method is {config['quant_method']}, not gptq", str(path)))
    # AutoGPTQ before 0.7 wrote v1 without naming it, and so do other readers take it.
    if config.get("checkpoint_format", "gptq") != "gptq":
        problems.append(
            Problem(
                f"checkpoint_format is {config['checkpoint_format']}; only v1 (gptq) is read here",
                str(path),
                "quantize the 16-bit model again with `qlora quantize`",
            )
        )
    rules = read_dynamic(config.get("dynamic") or {})
    problems += [
        Problem(f"dynamic changes {key}, which is not read here", str(path))
        for key in sorted({key for rule in rules for key in rule.changes or {}} - {*RULE_KEYS})
    ]
    if config.get("bits") not in SUPPORTED_BITS:
        problems.append(Problem(f"bits is {config.get('bits')}; supported are {SUPPORTED_BITS}", str(path)))
    if not isinstance(config.get("group_size"), int):
        problems.append(Problem("group_size is missing", str(path)))
    if problems:
        raise UserError(problems)
    return GPTQFormat(
        bits=config["bits"],
        group_size=config["group_size"],
        sym=bool(config.get("sym", True)),
        desc_act=bool(config.get("desc_act", False)),
        rules=rules,
    )


def check_tensors(name: str, tensors: GPTQTensors, settings: GPTQFormat) -> None:
    """Raise UserError if the tensors of module `name` do not fit each other, or are not v1 although announced as v1.

    A symmetric checkpoint has the zero point 2^(bits−1) everywhere; where all are one more, the file holds v2 zeros
    under a v1 name and every engine that uses them makes gibberish of it.
    """
    problems = []
    for kind, wanted in packed_specs("", tensors.g_idx.shape[0], tensors.scales.shape[1], settings).items():
        tensor = getattr(tensors, kind)
        found = TensorSpec(tensor.dtype, tuple(tensor.shape))
        if found != wanted:
            problems.append(Problem(f"{kind} is {found.dtype} {found.shape}, not {wanted.dtype} {wanted.shape}", name))
    if problems:
        raise UserError(problems)
    if settings.sym and not bool((unpack_zeros(tensors.qzeros, settings.bits) == 1 << (settings.bits - 1)).all()):
        raise UserError(
            "the zero points of this symmetric checkpoint are not those of v1 (gptq); it may hold v2 zeros",
            where=name,
            fix="quantize the 16-bit model again with `qlora quantize`",
        )


def check_group_size(shapes: Mapping[str, tuple[int, int]], group_size: int, bits: int = 4) -> None:
    """Raise UserError when a weight of shape (N, K) cannot be stored, with the group sizes that fit all of them.

    K must be a multiple of the group size, and both K and N must fill whole 32-bit words. Of the modules that a group
    size does not fit, the first of each K is named.
    """
    if not shapes:
        return
    run, _ = _run_length(bits)
    problems = [
        Problem(f"{inputs} inputs and {outputs} outputs do not fill whole words of {bits}-bit codes ({run} each)", name)
        for name, (outputs, inputs) in shapes.items()
        if inputs % run or outputs % run
    ]
    misfits = {name: inputs for name, (_, inputs) in shapes.items() if group_size > 0 and inputs % group_size}
    if misfits:
        fitting = [
            size
            for size in SUPPORTED_GROUP_SIZES
            if size < 0 or all(inputs % size == 0 for _, inputs in shapes.values())
        ]
        by_inputs = {inputs: name for name, inputs in reversed(misfits.items())}
        fix = f"choose quantize.group_size from {', '.join(map(str, reversed(fitting)))} (-1 is one group per output)"
        problems += [
            Problem(f"{inputs} inputs are not divisible by the group size {group_size}", name, fix)
            for inputs, name in sorted(by_inputs.items())
        ]
    if problems:
        raise UserError(problems)


def _run_length(bits: int) -> tuple[int, int]:
    """(codes, words) of the shortest run of codes that ends on a word's boundary: (8, 1) for 4 bits, (32, 3) for 3."""
    if bits not in SUPPORTED_BITS:
        raise ValueError(f"{bits} bits; supported are {SUPPORTED_BITS}")
    common = math.lcm(bits, WORD_BITS)
    return common // bits, common // WORD_BITS


def find_config(directory: Path) -> tuple[Path, dict[str, Any]]:
    """The file that says how a checkpoint is quantized, and what it says. Raises UserError if there is none."""
    for name, key in (("config.json", "quantization_config"), (QUANTIZE_CONFIG_NAME, None)):
        path = directory / name
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise UserError(f"not valid JSON ({error})", where=str(path), fix="write it again") from error
        config = content.get(key) if key else content
        if config:
            return path, config
    raise UserError(
        "no quantization_config: not a quantized checkpoint",
        str(directory),
        "name a directory that `qlora quantize` wrote",
    )
