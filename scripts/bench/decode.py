"""Decoding speed and memory of a model's shape in 16 bits, by bitsandbytes, and as GPTQ and AWQ under each kernel.

    python scripts/bench/decode.py --out scripts/bench/results/decode-h200 [--shape llama-2-7b] [--layers 32]
        [--batch 1,8,32] [--prompt 128,1024] [--new 128] [--as 16bit,nf4,int8,gptq,awq] [--kernel auto]
        [--work /tmp/decode]
    python scripts/bench/decode.py --out /tmp/trial --shape tiny --device cpu --batch 1,2 --prompt 16 --new 8

Weights are random and rounded to the nearest of 16 levels: what a code says does not change how fast it is read, and
AWQ has the codes of GPTQ. Checkpoints are written once to --work. Rows are measured by the code of `qlora bench`, one
process for each model, and kept in OUT/bench.json: the same command goes on where an earlier one stopped, and tries
again what failed. Prints where the time went and a Markdown table, which OUT/bench.md has too.

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
from qlora.models.awq_format import CODE_ORDER
from qlora.models.gptq_format import QUANTIZE_CONFIG_NAME, GPTQFormat, pack, quantization_config
from qlora.models.side_files import edit_config
from qlora.reporting.bench_tables import markdown

FORMAT = GPTQFormat(bits=4, group_size=128)
AWQ_CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    device = options.device if options.device == "cpu" else "cuda:0"
    started = time.perf_counter()
    checkpoints = write_checkpoints(options.shape, options.layers, options.work, device)
    print(f"checkpoints: {time.perf_counter() - started:.0f} s", flush=True)
    models = [
        model
        for form in options.forms
        for model in subjects([checkpoints.get(form, checkpoints["16bit"])], [form], options.kernel, device)
    ]
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


def write_checkpoints(shape: str, layers: int | None, work: Path, device: str) -> dict[str, Path]:
    """The random checkpoint in bf16 and the same as GPTQ and AWQ, in `work` unless they are there; their folders."""
    sizes = SHAPES[shape]
    layers = layers or sizes["num_hidden_layers"]
    folders = {form: work / f"{shape}-{layers}" / form for form in ("16bit", *PACKED)}
    if all((folder / INDEX).is_file() for folder in folders.values()):
        return folders
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
        write_side_files(sizes, layers, folder)
    edit_config(folders["gptq"], {"quantization_config": quantization_config(FORMAT)})
    write_json(folders["gptq"] / QUANTIZE_CONFIG_NAME, quantization_config(FORMAT))
    edit_config(folders["awq"], {"quantization_config": AWQ_CONFIG})
    maps: dict[str, dict[str, str]] = {form: {} for form in folders}
    for name, tensors in shards(sizes, layers, torch.Generator(device).manual_seed(0)):
        for form, own in {"16bit": tensors, **quantized(tensors)}.items():
            save_file({key: each.cpu() for key, each in own.items()}, folders[form] / name, metadata={"format": "pt"})
            maps[form] |= dict.fromkeys(own, name)
    for form, folder in folders.items():
        write_index(folder, maps[form])
    return folders


def quantized(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """As GPTQ and as AWQ: linears of a decoder layer packed, rounded to nearest; everything else as it is."""
    found: dict[str, dict[str, torch.Tensor]] = {form: {} for form in PACKED}
    for name, tensor in tensors.items():
        parts = packed_linear(tensor) if name.endswith("_proj.weight") else {}
        for form in PACKED:
            prefix = name.removesuffix("weight")
            found[form] |= {f"{prefix}{part}": each for part, each in parts[form].items()} if parts else {name: tensor}
    return found


def packed_linear(weight_NK: torch.Tensor) -> dict[str, dict[str, torch.Tensor]]:
    groups_GSN = weight_NK.float().T.unflatten(0, (-1, FORMAT.group_size))
    half = 2 ** (FORMAT.bits - 1)
    scales_GN = (groups_GSN.abs().amax(1) / (half - 0.5)).to(torch.float16)
    codes_KN = (groups_GSN / scales_GN.float()[:, None] + half).round().clamp(0, 2 * half - 1).flatten(0, 1)
    codes_KN = codes_KN.to(torch.int32)
    group_K = torch.arange(len(codes_KN), device=codes_KN.device) // FORMAT.group_size
    zeros_GN = torch.full(scales_GN.shape, half, dtype=torch.int32, device=scales_GN.device)
    gptq = {
        name: tensor.contiguous()
        for name, tensor in vars(pack(codes_KN, zeros_GN, scales_GN, group_K, FORMAT.bits)).items()
    }
    awq = {"qweight": awq_words(codes_KN), "qzeros": awq_words(zeros_GN), "scales": scales_GN.contiguous()}
    return {"gptq": gptq, "awq": awq}


def awq_words(codes_RN: torch.Tensor) -> torch.Tensor:
    """Codes of 8 neighbouring outputs in a word, in the order of `qlora.models.awq_format`."""
    words = torch.zeros_like(codes_RN[:, ::8])
    for place, output in enumerate(CODE_ORDER):
        words |= codes_RN[:, output::8] << FORMAT.bits * place
    return words.contiguous()


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
    parser.add_argument("--as", dest="forms", type=words, default="16bit,nf4,int8,gptq,awq")
    parser.add_argument("--kernel", type=words, default="auto")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--work", type=Path, default=Path("/tmp/decode"), help="folder of the checkpoints")
    parser.add_argument("--timeout", type=float, default=400, help="seconds that the process of a model may take")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
