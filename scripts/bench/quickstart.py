"""Time and memory of the whole quickstart, installs aside: one process, from nothing to the ladder.

    python scripts/bench/quickstart.py --out DIR [section.key=value ...]

The model must be in the cache (scripts/fetch_model.sh). The conversion of the GGUF to safetensors, done once per
machine, is timed apart when it is still to do. Prints a Markdown table and writes it with all figures to
DIR/quickstart.json.
"""

from __future__ import annotations

import argparse
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

from qlora.artifacts import read_json, write_json
from qlora.models.base import resolve_base
from qlora.recipe_file import load_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    recipe = load_recipe("quickstart", [f"output_dir={arguments.out}", *arguments.overrides])

    start = time.monotonic()
    resolve_base(recipe.model.base)
    conversion = time.monotonic() - start
    start = time.monotonic()
    command = [sys.executable, "-m", "qlora", "run", "quickstart", f"output_dir={arguments.out}", *arguments.overrides]
    subprocess.run(command, check=True)
    seconds = time.monotonic() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9

    stages = read_json(recipe.run_dir / "lineage.json")["stages"]
    ladder = read_json(recipe.run_dir / "evaluation" / "ladder.json")["rungs"]
    rows = [("GGUF to safetensors, once (with imports)", conversion)]
    rows += [(name, entry["seconds"]) for name, entry in stages.items()]
    rows += [("`qlora run`, from start to end", seconds)]
    print(f"\n{machine()} · peak host memory {peak:.2f} GB\n\n| part | seconds |\n| --- | --- |")
    for name, value in rows:
        print(f"| {name} | {value:.1f} |")
    write_json(
        arguments.out / "quickstart.json",
        {"machine": machine(), "peak_host_gb": round(peak, 2), "seconds": dict(rows), "ladder": ladder},
    )


def machine() -> str:
    import os

    import torch

    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return f"{gpu}{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}"


if __name__ == "__main__":
    main()
