"""Decoding speed and memory of a model's shape in 16 bits, by bitsandbytes, and as GPTQ under each kernel.

    python scripts/bench/decode.py --out scripts/bench/results/decode-h200 [--shape llama-2-7b] [--layers 32]
        [--batch 1,8,32] [--prompt 128,1024] [--new 128] [--as 16bit,nf4,int8,gptq] [--kernel auto] [--work /tmp/decode]
    python scripts/bench/decode.py --out /tmp/trial --shape tiny --device cpu --batch 1,2 --prompt 16 --new 8

Weights are random and rounded to the nearest of 16 levels: what a code says does not change how fast it is read. Both
checkpoints are written once to --work. Rows are measured by the code of `qlora bench`, one process for each model, and
kept in OUT/bench.json: the same command goes on where an earlier one stopped, and tries again what failed. Prints
where the time went and a Markdown table, which OUT/bench.md has too.

gptqmodel builds the kernels of Marlin and ExLlamaV2 with nvcc at first use, minutes each: build_seconds of a row, no
part of its load_seconds.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from random_llama import INDEX, SHAPES, shards, write_index, write_side_files
from safetensors.torch import save_file

from qlora.artifacts import write_json
from qlora.evaluation.bench import Plan, bench, machine_of, write_results
from qlora.evaluation.bench_models import PACKED, subjects
from qlora.models.gptq_format import QUANTIZE_CONFIG_NAME, GPTQFormat, pack, quantization_config
from qlora.models.side_files import edit_config
from qlora.reporting.bench_tables import markdown

FORMAT = GPTQFormat(bits=4, group_size=128)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    device = options.device if options.device == "cpu" else "cuda:0"
    started = time.perf_counter()
    plain, packed = write_checkpoints(options.shape, options.layers, options.work, device)
    print(f"checkpoints: {time.perf_counter() - started:.0f} s", flush=True)
    of_plain = [form for form in options.forms if form not in PACKED]
    models = subjects([plain], of_plain, [], device) if of_plain else []
    models += subjects([packed], ["gptq"], options.kernel, device) if "gptq" in options.forms else []
    options.out.mkdir(parents=True, exist_ok=True)
    path, rows = options.out / "bench.json", []
    plan = Plan(options.batch, options.prompt, options.new, options.dtype, device, options.timeout)
    for model in models:
        started = time.perf_counter()
        try:
            rows += bench([model], plan, path)
        except Exception as error:  # one model's matter
            print(f"{model.label}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            continue
        print(f"{model.label}: {time.perf_counter() - started:.0f} s", flush=True)
        write_results(rows, options.out)
    print("\n" + markdown(rows, machine_of(rows)))


def write_checkpoints(shape: str, layers: int | None, work: Path, device: str) -> tuple[Path, Path]:
    """The random checkpoint in bf16 and the same as GPTQ, in `work` unless they are there; their folders."""
    sizes = SHAPES[shape]
    layers = layers or sizes["num_hidden_layers"]
    plain, packed = (work / f"{shape}-{layers}" / kind for kind in ("bf16", "gptq"))
    if (plain / INDEX).is_file() and (packed / INDEX).is_file():
        return plain, packed
    for folder in (plain, packed):
        folder.mkdir(parents=True, exist_ok=True)
        write_side_files(sizes, layers, folder)
    edit_config(packed, {"quantization_config": quantization_config(FORMAT)})
    write_json(packed / QUANTIZE_CONFIG_NAME, quantization_config(FORMAT))
    maps: tuple[dict[str, str], dict[str, str]] = ({}, {})
    for name, tensors in shards(sizes, layers, torch.Generator(device).manual_seed(0)):
        for folder, own, weight_map in zip((plain, packed), (tensors, quantized(tensors)), maps, strict=True):
            save_file({key: tensor.cpu() for key, tensor in own.items()}, folder / name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(own, name)
    write_index(plain, maps[0])
    write_index(packed, maps[1])
    return plain, packed


def quantized(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Linears of a decoder layer packed, rounded to nearest; everything else as it is."""
    found = {}
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            found |= {f"{name.removesuffix('weight')}{part}": each for part, each in packed_linear(tensor).items()}
        else:
            found[name] = tensor
    return found


def packed_linear(weight_NK: torch.Tensor) -> dict[str, torch.Tensor]:
    groups_GSN = weight_NK.float().T.unflatten(0, (-1, FORMAT.group_size))
    half = 2 ** (FORMAT.bits - 1)
    scales_GN = (groups_GSN.abs().amax(1) / (half - 0.5)).to(torch.float16)
    codes_KN = (groups_GSN / scales_GN.float()[:, None] + half).round().clamp(0, 2 * half - 1).flatten(0, 1)
    group_K = torch.arange(len(codes_KN), device=codes_KN.device) // FORMAT.group_size
    zeros_GN = torch.full(scales_GN.shape, half, device=scales_GN.device)
    tensors = vars(pack(codes_KN.to(torch.int32), zeros_GN, scales_GN, group_K, FORMAT.bits))
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    def words(text: str) -> list[str]:
        return text.split(",")

    def numbers(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in text.split(","))

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of bench.json, bench.md and bench.png")
    parser.add_argument("--shape", choices=SHAPES, default="llama-2-7b")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--batch", type=numbers, default="1,8,32")
    parser.add_argument("--prompt", type=numbers, default="128,1024")
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--as", dest="forms", type=words, default="16bit,nf4,int8,gptq")
    parser.add_argument("--kernel", type=words, default="auto")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--work", type=Path, default=Path("/tmp/decode"), help="folder of the checkpoints")
    parser.add_argument("--timeout", type=float, default=400, help="seconds that the process of a model may take")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
