"""`qlora doctor`: what is installed, which GPU and kernels are there, and which versions are known to clash."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qlora.errors import Problem, UserError
from qlora.paths import cache_dir

PACKAGES = (
    "qlora", "torch", "transformers", "peft", "bitsandbytes", "trl", "datasets", "accelerate", "safetensors",
    "tokenizers", "triton", "numpy", "wandb", "gptqmodel", "optimum", "liger-kernel", "flash-attn", "lm-eval", "gguf",
    "auto-gptq", "autoawq", "compressed-tensors", "llmcompressor", "sglang", "unsloth", "vllm",
)  # fmt: skip


@dataclass(frozen=True)
class BadPair:
    """Two versions that break each other: a package with its versions, another with its versions, why, what to do."""

    package: str
    versions: str
    other: str
    other_versions: str
    reason: str
    fix: str

    def applies(self, installed: dict[str, str]) -> bool:
        """Whether both are installed in such versions."""
        return all(
            name in installed and SpecifierSet(spec).contains(installed[name], prereleases=True)
            for name, spec in ((self.package, self.versions), (self.other, self.other_versions))
        )


_GPTQMODEL = 'pip install "gptqmodel>=7.4,<7.7"'
_USE_GPTQMODEL = f"remove it; its successor: {_GPTQMODEL}"
_OWN_ENVIRONMENT = "give each an environment of its own: a GPTQ checkpoint needs no package of its writer"

# Requirements that the packages declare, and breakage seen or reported in their issue trackers.
BAD_PAIRS = (
    BadPair("gptqmodel", ">=7.7", "torch", "<2.14.1", "gptqmodel 7.7 needs torch 2.14.1", _GPTQMODEL),
    BadPair("gptqmodel", ">=7.7", "transformers", "<5.20.2", "gptqmodel 7.7 needs transformers 5.20.2", _GPTQMODEL),
    BadPair(
        "gptqmodel", ">=7.0,<7.7", "numpy", "!=2.2.6", "gptqmodel 7.0 to 7.6 pins numpy 2.2.6",
        "pip install numpy==2.2.6",
    ),
    BadPair(
        "gptqmodel", ">=7.4,<7.7", "transformers", "<5.14", "gptqmodel 7.4 to 7.6 needs transformers 5.14",
        'pip install "transformers>=5.15"',
    ),
    BadPair("gptqmodel", "<7.0", "transformers", ">=5.0", "transformers 5 breaks gptqmodel before 7", _GPTQMODEL),
    BadPair(
        "auto-gptq", ">=0", "transformers", ">=5.0",
        "auto-gptq was archived in 2025 and does not import (no_init_weights is gone from transformers)",
        _USE_GPTQMODEL,
    ),
    BadPair(
        "autoawq", ">=0", "transformers", ">=5.0", "autoawq is deprecated; it was last tested with transformers 4.51",
        _USE_GPTQMODEL,
    ),
    BadPair(
        "bitsandbytes", "<0.46", "torch", ">=2.0", "4-bit layers break the graphs of torch.compile before 0.46",
        'pip install "bitsandbytes>=0.50"',
    ),
    BadPair("trl", ">=1.16", "datasets", "<4.7", "trl 1.16 needs datasets 4.7", 'pip install "datasets>=4.7"'),
    BadPair(
        "liger-kernel", ">=0.8.5", "transformers", "<5.0", "liger-kernel 0.8.5 needs transformers 5",
        'pip install "transformers>=5.15"',
    ),
    BadPair("unsloth", "==2026.10.*", "transformers", ">5.17.0", "it needs 5.17 at most", _OWN_ENVIRONMENT),
    BadPair("unsloth", "==2026.10.*", "trl", ">1.15.0", "it needs 1.15 at most", _OWN_ENVIRONMENT),
    BadPair("vllm", "==0.33.*", "torch", "!=2.14.0", "vLLM 0.33 needs torch 2.14.0", _OWN_ENVIRONMENT),
    BadPair("vllm", "==0.33.*", "transformers", ">=5.21", "vLLM 0.33 needs transformers below 5.21", _OWN_ENVIRONMENT),
    BadPair("vllm", "==0.33.*", "compressed-tensors", "!=0.17.0", "vLLM 0.33 pins 0.17.0", _OWN_ENVIRONMENT),
    BadPair("vllm", "==0.33.*", "llmcompressor", "==0.14.*", "they pin different compressed-tensors", _OWN_ENVIRONMENT),
    BadPair("llmcompressor", "==0.14.*", "compressed-tensors", "!=0.19.0", "it pins 0.19.0", _OWN_ENVIRONMENT),
    BadPair(
        "llmcompressor", "==0.14.*", "transformers", ">5.17.0", "llmcompressor 0.14 needs transformers 5.17 at most",
        _OWN_ENVIRONMENT,
    ),
    BadPair("sglang", "==0.5.23", "torch", "!=2.14.1", "SGLang 0.5.23 needs torch 2.14.1", _OWN_ENVIRONMENT),
)  # fmt: skip


@dataclass(frozen=True)
class Gpu:
    name: str
    memory_bytes: int
    free_bytes: int
    compute_capability: str


@dataclass(frozen=True)
class DoctorReport:
    """What was found. `versions` holds installed packages only; `kernels` maps a kernel to what is known about it."""

    python: str
    system: str
    versions: dict[str, str]
    gpus: list[Gpu]
    driver: str | None
    cuda: str | None
    cpu_cores: int
    cpu_avx512_bf16: bool
    kernels: dict[str, str]
    free_disk: dict[str, int]
    """Folder → free bytes."""
    notes: list[Problem]
    problems: list[Problem]

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON."""
        return asdict(self)


def diagnose() -> DoctorReport:
    """Look at this installation and machine. Problems are collected, not raised."""
    import torch

    versions = installed_versions()
    kernels, kernel_problems = _kernels(versions)
    cores = os.cpu_count() or 1
    avx512_bf16 = _has_avx512_bf16()
    return DoctorReport(
        python=platform.python_version(),
        system=platform.platform(),
        versions=versions,
        gpus=_gpus(),
        driver=_first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        cuda=torch.version.cuda,
        cpu_cores=cores,
        cpu_avx512_bf16=avx512_bf16,
        kernels=kernels,
        free_disk=_free_disk(),
        notes=_notes(versions, cores, avx512_bf16),
        problems=[*unmet_requirements(versions), *bad_pairs(versions), *kernel_problems],
    )


def print_diagnosis(report: DoctorReport, console: Console) -> None:
    """Print the report, then raise `UserError` (exit 2) with every problem found."""
    console.print(escape(f"Python {report.python} on {report.system}"))
    table = Table(box=None, pad_edge=False, show_header=False)
    for name, version in report.versions.items():
        table.add_row(name, version)
    console.print(table)
    for gpu in report.gpus:
        console.print(
            escape(
                f"GPU {gpu.name}, {gpu.free_bytes / 2**30:.1f} of {gpu.memory_bytes / 2**30:.1f} GiB free, compute "
                f"capability {gpu.compute_capability}, driver {report.driver or 'unknown'}, CUDA {report.cuda}"
            )
        )
    if not report.gpus:
        console.print("no GPU that torch can use")
    console.print(f"CPU {report.cpu_cores} cores{', AVX-512 bf16' if report.cpu_avx512_bf16 else ''}")
    for kernel, state in report.kernels.items():
        console.print(escape(f"{kernel}: {state}"))
    for folder, free in report.free_disk.items():
        console.print(escape(f"{free / 2**30:.1f} GiB free for {folder}"))
    for note in report.notes:
        console.print(f"[yellow]note[/yellow] {escape(str(note))}")
    if report.problems:
        raise UserError(report.problems)
    console.print("[green]No known problem.[/green]")


def installed_versions() -> dict[str, str]:
    """Package → version, of those that matter here and are installed. Imports none of them."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def bad_pairs(versions: dict[str, str]) -> list[Problem]:
    """The pairs of `BAD_PAIRS` that are installed."""
    return [
        Problem(
            f"{pair.package} {versions[pair.package]} with {pair.other} {versions[pair.other]}: {pair.reason}",
            fix=pair.fix,
        )
        for pair in BAD_PAIRS
        if pair.applies(versions)
    ]


def unmet_requirements(versions: dict[str, str]) -> list[Problem]:
    """Requirements of qlora itself, as its installed metadata states them, that are missing or too old."""
    if "qlora" not in versions:
        return [Problem("qlora is not installed, only importable", fix="pip install -e .")]
    problems = []
    for line in importlib.metadata.requires("qlora") or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            problems.append(Problem(f"{requirement.name} is not installed", fix=f'pip install "{requirement}"'))
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wanted = f"{requirement.name} {version} is installed, qlora needs {requirement.specifier}"
            problems.append(Problem(wanted, fix=f'pip install "{requirement}"'))
    return problems


def _gpus() -> list[Gpu]:
    import torch

    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        gpus.append(Gpu(properties.name, total, free, f"{properties.major}.{properties.minor}"))
    return gpus


def _kernels(versions: dict[str, str]) -> tuple[dict[str, str], list[Problem]]:
    """What each kernel package is good for here, and problems with those that training cannot do without."""
    import torch

    kernels: dict[str, str] = {}
    problems = []
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        failure = _four_bit_failure(device)
        kernels[f"bitsandbytes 4-bit on {device}"] = failure or "works"
        if failure:
            problems.append(
                Problem(f"bitsandbytes cannot quantize on {device}: {failure}", fix="python -m bitsandbytes says why")
            )
    for name, module in (
        ("triton", "triton"), ("flash-attn", "flash_attn"), ("liger-kernel", "liger_kernel"), ("gptqmodel", "gptqmodel")
    ):  # fmt: skip
        found = importlib.util.find_spec(module) is not None
        kernels[name] = versions.get(name, "found") if found else "not installed"
    kernels["nvcc"] = _first_line("nvcc", "--version", containing="release") or "not found"
    return kernels, problems


def _four_bit_failure(device: str) -> str | None:
    """Quantize and dequantize one small matrix; None when the result is as near as NF4 allows."""
    import torch

    try:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        w_NK = torch.linspace(-1, 1, 64 * 64, device=device).reshape(64, 64)
        error = (dequantize_4bit(*quantize_4bit(w_NK, blocksize=64, quant_type="nf4")) - w_NK).abs().max().item()
    # Libraries that do not load fail in as many ways as there are loaders.
    except Exception as failure:
        return str(failure).splitlines()[0] if str(failure) else type(failure).__name__
    return None if error < 0.2 else f"wrong results (largest error {error:.2f})"


def _has_avx512_bf16() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.is_file() and "avx512_bf16" in cpuinfo.read_text(encoding="utf-8", errors="replace")


def _free_disk() -> dict[str, int]:
    folders = {"runs (here)": Path.cwd(), f"the cache ({cache_dir()})": cache_dir().absolute()}
    existing = {name: next(p for p in (path, *path.parents) if p.exists()) for name, path in folders.items()}
    return {name: shutil.disk_usage(path).free for name, path in existing.items()}


def _notes(versions: dict[str, str], cores: int, avx512_bf16: bool) -> list[Problem]:
    notes = []
    if avx512_bf16:
        notes.append(
            Problem(
                "on this CPU bitsandbytes repacks 4-bit weights at the first evaluation and then trains wrongly; "
                "qlora switches the repacking off"
            )
        )
    if "gptqmodel" in versions and cores <= 2 and "GPTQMODEL_CPU_WORKERS" not in os.environ:
        notes.append(Problem("gptqmodel fails to quantize with two cores", fix="export GPTQMODEL_CPU_WORKERS=2"))
    if "gptqmodel" in versions and "optimum" not in versions:
        notes.append(
            Problem("transformers needs optimum beside gptqmodel to load GPTQ", fix='pip install "optimum>=2.3"')
        )
    return notes


def _first_line(*command: str, containing: str = "") -> str | None:
    """The first line of a command's output (that contains a word), None where there is no such command."""
    if shutil.which(command[0]) is None:
        return None
    output = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20).stdout
    return next((line.strip() for line in output.splitlines() if containing in line), None)
