"""Products of few rows with 4-bit weights: this package's kernel, however it is cut up, bitsandbytes' and cuBLAS'.

    python scripts/bench/gemv.py [--rows 1,8,32] [--tiles default|all] [--shapes 4096x4096,4096x12288,...]

For each shape (inputs by outputs; the linears of a 7B Llama, merged as decoding has them) and number of rows: µs of a
product and GB/s of the weight it reads. Products go over copies of the weight that no cache holds, in a CUDA graph.
Every way of cutting up is compared with plain PyTorch first. Prints Markdown.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import product

import torch

from qlora.kernels.gptq_gemv import (
    FEW_ROWS,
    LEAST_ROOM,
    MORE_ROWS,
    Arrivals,
    StripedWeight,
    Tiles,
    few_rows_product,
    reference,
    striped,
)
from qlora.kernels.packed_linear import PackedWeight

SHAPES = "4096x12288,4096x4096,4096x22016,11008x4096"
GROUP = 128
CACHES = 300e6
"""Bytes of weights that products go over: more than any cache."""
REPEATS = 5


def main() -> None:
    options = parse()
    print("| shape | rows | kernel | µs | GB/s |\n| --- | --- | --- | ---: | ---: |")
    for inputs, outputs in options.shapes:
        packed_bytes = inputs * outputs * (0.5 + 4 / GROUP)
        weights = [striped(packed(inputs, outputs, seed)) for seed in range(max(2, round(CACHES / packed_bytes)))]
        for rows in options.rows:
            x = torch.randn(rows, inputs, device="cuda", dtype=torch.bfloat16)
            found = {}
            for tiles in candidates(rows, options.tiles):
                found[describe(tiles)] = ours(x, weights, tiles)
            for name, seconds in sorted(found.items(), key=lambda item: item[1]):
                show(inputs, outputs, rows, name, seconds, packed_bytes)
            show(inputs, outputs, rows, "bitsandbytes NF4", bitsandbytes(x, outputs), inputs * outputs * (0.5 + 4 / 64))
            show(inputs, outputs, rows, "cuBLAS bf16", dense(x, outputs), 2.0 * inputs * outputs)


def candidates(rows: int, which: str) -> list[Tiles]:
    if which == "default":
        return [FEW_ROWS if rows <= LEAST_ROOM else MORE_ROWS]
    shapes = [(64, 2), (64, 4), (128, 4), (128, 8), (256, 8)]
    return [Tiles(*shape, stages, each) for shape, stages, each in product(shapes, (3, 4, 5), (2, 3, 4, 6, 8, 12))]


def describe(tiles: Tiles) -> str:
    shape = f"{tiles.columns} columns, {tiles.warps} warps, {tiles.stages} stages"
    return f"qlora {shape}, {tiles.per_processor} a processor"


def ours(x: torch.Tensor, weights: list[StripedWeight], tiles: Tiles) -> float:
    arrivals = Arrivals(weights[0].shape[0], x.device)
    try:
        error = few_rows_product(x, weights[0], None, arrivals, tiles).float() - reference(x, weights[0], None).float()
        relative = float(error.norm() / reference(x, weights[0], None).float().norm())
        assert relative < 0.01, f"wrong by {relative}"
        return seconds_of([lambda w=weight: few_rows_product(x, w, None, arrivals, tiles) for weight in weights])
    except Exception as failure:  # a tile that does not fit, say
        print(f"<!-- {describe(tiles)}: {' '.join(str(failure).split())[:200]} -->")
        return float("inf")


def bitsandbytes(x: torch.Tensor, outputs: int) -> float:
    from bitsandbytes.nn import Linear4bit

    inputs = x.shape[1]
    copies = max(2, round(CACHES / (inputs * outputs * 0.56)))
    linears = [
        Linear4bit(inputs, outputs, bias=False, compute_dtype=x.dtype, compress_statistics=False, quant_type="nf4")
        .to(x.dtype)
        .cuda()
        for _ in range(copies)
    ]
    with torch.no_grad():
        return seconds_of([lambda linear=linear: linear(x) for linear in linears])


def dense(x: torch.Tensor, outputs: int) -> float:
    copies = max(2, round(CACHES / (2 * x.shape[1] * outputs)))
    weights = [torch.randn(outputs, x.shape[1], device="cuda", dtype=x.dtype) for _ in range(copies)]
    return seconds_of([lambda weight=weight: torch.nn.functional.linear(x, weight) for weight in weights])


def seconds_of(products: list[Callable[[], torch.Tensor]]) -> float:
    """Of one product, in a graph of all of them."""
    for each in products:
        each()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for each in products:
            each()
    graph.replay()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(REPEATS):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000 / REPEATS / len(products)


def packed(inputs: int, outputs: int, seed: int) -> PackedWeight:
    generator = torch.Generator("cuda").manual_seed(seed)
    words = torch.randint(-(2**31), 2**31, (inputs // 8, outputs), generator=generator, device="cuda")
    zeros_GN = torch.full((inputs // GROUP, outputs), 8, device="cuda", dtype=torch.uint8)
    scales_GN = torch.rand(inputs // GROUP, outputs, generator=generator, device="cuda").mul(0.01).to(torch.float16)
    return PackedWeight(words.to(torch.int32), zeros_GN, scales_GN, 4)


def show(inputs: int, outputs: int, rows: int, name: str, seconds: float, size: float) -> None:
    print(f"| {inputs}×{outputs} | {rows} | {name} | {1e6 * seconds:.1f} | {size / seconds / 1e9:,.0f} |", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=lambda text: [int(part) for part in text.split(",")], default="1,8,32")
    parser.add_argument("--tiles", choices=("default", "all"), default="all", help="all: every way of cutting up")
    parser.add_argument(
        "--shapes", type=lambda text: [tuple(map(int, part.split("x"))) for part in text.split(",")], default=SHAPES
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
