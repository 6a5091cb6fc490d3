"""Attention of one token a row to a cache: this package's kernel, however it is cut up, and PyTorch's.

    python scripts/bench/one_token.py [--tiles default|all] [--cases 1x32x32x256x192,...]

A case is rows x heads x heads of keys x slots x slots that are in use, of heads of 128. For each: µs, and GB/s of the
keys and values in use. Calls go over copies that no cache holds, in a CUDA graph, as does PyTorch's scaled dot product
attention with the mask in numbers that decoding gives it. Prints Markdown.
"""

from __future__ import annotations

import argparse
from itertools import product

import torch
from gemv import CACHES, seconds_of
from torch.nn.functional import scaled_dot_product_attention

from qlora.kernels.one_token import TILES, Tiles, attend, reference

CASES = "1x32x32x256x192,1x32x32x1152x1088,8x32x32x256x192,32x32x32x1152x1088,1x32x8x1152x1088,32x32x8x1152x1088"
WIDTH = 128


def main() -> None:
    options = parse()
    print("| rows, heads, of keys | in use of | kernel | µs | GB/s |\n| --- | --- | --- | ---: | ---: |")
    for case in options.cases:
        measure(*case, [TILES] if options.tiles == "default" else candidates())


def measure(rows: int, heads: int, groups: int, slots: int, used: int, every: list[Tiles]) -> None:
    query = torch.randn(rows, heads, 1, WIDTH, device="cuda", dtype=torch.bfloat16)
    mask = torch.zeros(1, 1, 1, slots, device="cuda", dtype=query.dtype)
    mask[..., used:] = -torch.inf
    copies = max(2, round(CACHES / (4 * rows * groups * slots * WIDTH)))
    caches = [torch.randn(2, rows, groups, slots, WIDTH, device="cuda", dtype=query.dtype) for _ in range(copies)]
    expected = reference(query, *caches[0], mask, 0.1).float()
    found: dict[str, float] = {}
    for tiles in every:
        name = f"qlora {tiles.slots} slots, {tiles.stages} stages, {tiles.per_processor} a processor"
        try:
            error = (attend(query, *caches[0], mask, 0.1, tiles).float() - expected).norm() / expected.norm()
            assert error < 0.02, f"wrong by {error}"
            found[name] = seconds_of([lambda c=c, t=tiles: attend(query, *c, mask, 0.1, t) for c in caches])
        except Exception as failure:  # tiles that do not fit, say
            print(f"<!-- {name}: {' '.join(str(failure).split())[:200]} -->")
    found = dict(sorted(found.items(), key=lambda item: item[1]))
    shared = {"enable_gqa": True} if heads > groups else {}
    found["PyTorch"] = seconds_of(
        [lambda c=c: scaled_dot_product_attention(query, *c, attn_mask=mask, scale=0.1, **shared) for c in caches]
    )
    size = 4 * rows * groups * used * WIDTH
    for name, seconds in found.items():
        what = f"| {rows}, {heads}, {groups} | {used} of {slots} | {name} "
        print(what + f"| {1e6 * seconds:.1f} | {size / seconds / 1e9:,.0f} |", flush=True)


def candidates() -> list[Tiles]:
    return [Tiles(*each) for each in product((32, 64, 128), (2, 3, 4), (4, 8))]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", choices=("default", "all"), default="all", help="all: every way of cutting up")
    parser.add_argument(
        "--cases", type=lambda text: [tuple(map(int, part.split("x"))) for part in text.split(",")], default=CASES
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
