"""What `qlora bench` measures: a directory in one of the forms in which it can be run, by one of the kernels for that.

16bit, nf4, nf4-double and int8 are of a 16-bit checkpoint, as transformers runs them; gptq and awq are of checkpoints
that are packed already. `qlora` is this package's own kernels (`qlora.models.packed_decoding`), the others gptqmodel's.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora.artifacts import DAMAGED, read_json
from qlora.errors import Problem, UserError, missing_extra

FORMS = {
    "16bit": "16 bits",
    "nf4": "bitsandbytes NF4",
    "nf4-double": "bitsandbytes NF4, double",
    "int8": "bitsandbytes int8",
    "gptq": "GPTQ",
    "awq": "AWQ",
}
DEFAULT_FORMS = ("16bit", "nf4", "int8", "gptq", "awq")
PACKED = ("gptq", "awq")
KERNELS = {"qlora": "qlora", "marlin": "Marlin", "exllamav2": "ExLlamaV2", "triton": "Triton", "torch": "Torch"}
ON_CPU = ("qlora", "torch")
GPTQMODEL_BACKENDS = {
    "gptq": {"marlin": "gptq_marlin", "exllamav2": "gptq_exllama_v2", "triton": "gptq_triton", "torch": "gptq_torch"},
    "awq": {"marlin": "awq_marlin", "exllamav2": "awq_exllama_v2", "torch": "awq_torch"},
}
"""gptqmodel's names of the kernels for each form. Its Triton kernel for AWQ takes float16 alone."""
EAGER = {
    ("int8", None): "LLM.int8 reads from the GPU which inputs are outliers, which a graph cannot",
    ("awq", "torch"): "gptqmodel's plain kernel for AWQ copies from the host, which a graph cannot",
}
"""(form, kernel) → why no CUDA graph holds its steps. Not tried, since a failed capture can leave state behind."""
EXTENSIONS = {("gptq", "exllamav2"): "exllamav2", ("awq", "exllamav2"): "exllamav2_awq"}
"""What gptqmodel builds for a kernel, beside Marlin's, which are one for each dtype."""


class NotMeasurable(UserError):
    """Directories, forms or kernels that `qlora bench` cannot measure."""

    title = "This cannot be measured"


@dataclass(frozen=True)
class Subject:
    """One model that is loaded once and measured."""

    directory: str
    form: str
    kernel: str | None = None
    """Of gptq and awq."""

    @property
    def label(self) -> str:
        kernel = "" if self.kernel is None else f", {KERNELS.get(self.kernel, self.kernel)}"
        return f"{FORMS[self.form]}{kernel}"


@dataclass(frozen=True)
class Loaded:
    model: Any
    seconds: float
    """Of loading, libraries imported and kernels built before."""
    build_seconds: float
    """Of building CUDA extensions at first use."""
    eager_because: str | None
    """Why steps of this model are known not to fit in a CUDA graph."""


def subjects(directories: Sequence[Path], forms: Sequence[str], kernels: Sequence[str], device: str) -> list[Subject]:
    """Every directory in each of the forms that it has. kernels: of packed ones; `auto` is all that there are, but for
    those that no graph holds.

    Raises NotMeasurable with everything that cannot be measured as asked.
    """
    problems = [Problem(f"no form {form}", "--as", f"one of {', '.join(FORMS)}") for form in forms if form not in FORMS]
    problems += [
        Problem(f"no kernel {kernel}", "--kernel", f"auto, or of {', '.join(KERNELS)}")
        for kernel in kernels
        if kernel not in ("auto", *KERNELS)
    ]
    if problems:
        raise NotMeasurable(problems)
    found: list[Subject] = []
    for directory in directories:
        try:
            method = _method(directory)
        except UserError as error:
            problems += error.problems
            continue
        own = [form for form in forms if (form == method if method else form not in PACKED)]
        if not own:
            what = f"a {method.upper()} checkpoint" if method else "a 16-bit checkpoint"
            problems.append(Problem(f"{what} has none of the forms {', '.join(forms)}", str(directory), "see --as"))
        for form in own:
            chosen = _kernels(form, kernels, device) if form in PACKED else [None]
            found += [Subject(str(directory), form, kernel) for kernel in chosen]
            if not chosen:
                what = f"{FORMS[form]} has none of the kernels {', '.join(kernels)}"
                fix = f"auto, or of qlora, {', '.join(GPTQMODEL_BACKENDS[form])}"
                problems.append(Problem(what, f"--kernel, for {directory}", fix))
    if problems:
        raise NotMeasurable(problems)
    return found


def _method(directory: Path) -> str | None:
    """gptq or awq; None for 16 bits."""
    path = directory / "config.json"
    if not path.is_file():
        adapter = (directory / "adapter_config.json").is_file()
        fix = "merge it first: `qlora merge`" if adapter else "name a folder that has a config.json and safetensors"
        raise UserError("an adapter is no model of its own" if adapter else "no model here", str(directory), fix)
    config = read_json(path, DAMAGED).get("quantization_config")
    if not config:
        return None
    method = str(config.get("quant_method", "gptq"))
    if method not in PACKED:
        raise UserError(f"quantized with {method}", str(path), "name a GPTQ, AWQ or 16-bit checkpoint")
    return method


def _kernels(form: str, asked: Sequence[str], device: str) -> list[str]:
    of_form = ("qlora", *GPTQMODEL_BACKENDS[form])
    if "auto" not in asked:
        return [kernel for kernel in asked if kernel in of_form]
    if importlib.util.find_spec("gptqmodel") is None:
        return ["qlora"]
    if not device.startswith("cuda"):
        return [kernel for kernel in of_form if kernel in ON_CPU]
    return [kernel for kernel in of_form if (form, kernel) not in EAGER]


def load(subject: Subject, dtype: str, device: str) -> Loaded:
    """Raises whatever the libraries do: a row of the table says so."""
    import torch

    if subject.kernel not in (None, "qlora") and importlib.util.find_spec("gptqmodel") is None:
        raise missing_extra("gptqmodel", "gptq", f"the kernel {subject.kernel}")
    if device.startswith("cuda"):
        torch.zeros(1, device=device)  # the context
    started = time.perf_counter()
    built = _build(subject, getattr(torch, dtype))
    building = time.perf_counter() - started if built else 0.0
    loader = _plain if subject.kernel is None else _packed_by_qlora if subject.kernel == "qlora" else _by_gptqmodel
    _import_libraries(subject)
    started = time.perf_counter()
    model = loader(subject, getattr(torch, dtype), device)
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    eager = EAGER.get((subject.form, subject.kernel)) if device.startswith("cuda") else None
    return Loaded(model.eval(), seconds, building, eager)


def _import_libraries(subject: Subject) -> None:
    """Those that loading would import, seconds of them: the model's own module too, by an empty model of its kind."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(subject.directory)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(config)
    if subject.form in ("nf4", "nf4-double", "int8"):
        import transformers.integrations.bitsandbytes  # noqa: F401
    elif subject.kernel == "qlora":
        import qlora.models.packed_base
        import qlora.models.packed_decoding  # noqa: F401
    elif subject.kernel is not None:
        import gptqmodel  # noqa: F401


def _plain(subject: Subject, dtype: Any, device: str) -> Any:
    """By transformers, which has bitsandbytes quantize while it loads."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {"dtype": dtype, "device_map": {"": device}, "attn_implementation": "sdpa"}
    if subject.form == "int8":
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    elif subject.form in ("nf4", "nf4-double"):
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=subject.form == "nf4-double",
            bnb_4bit_compute_dtype=dtype,
        )
    return AutoModelForCausalLM.from_pretrained(subject.directory, **options)


def _packed_by_qlora(subject: Subject, dtype: Any, device: str) -> Any:
    from qlora.models.packed_base import load_packed
    from qlora.models.packed_decoding import speed_up
    from qlora.recipe import Model

    settings = Model(base=subject.directory, quantization="checkpoint")
    model = load_packed(Path(subject.directory), settings, dtype, device)
    speed_up(model)
    return model


def _by_gptqmodel(subject: Subject, dtype: Any, device: str) -> Any:
    from gptqmodel import BACKEND, GPTQModel

    assert subject.kernel is not None
    backend = BACKEND(GPTQMODEL_BACKENDS[subject.form][subject.kernel])
    return GPTQModel.load(subject.directory, backend=backend, device=device, dtype=dtype).model


def _build(subject: Subject, dtype: Any) -> bool:
    """Have gptqmodel build the CUDA extension of a kernel, unless its cache has it. Raises with the builder's words."""
    import torch

    marlin = "marlin_bf16" if dtype == torch.bfloat16 else "marlin_fp16"
    name = marlin if subject.kernel == "marlin" else EXTENSIONS.get((subject.form, subject.kernel or ""))
    if name is None:
        return False
    from gptqmodel import extension

    if not extension.is_available(name):
        raise RuntimeError(f"gptqmodel cannot build {name}: {' '.join(str(extension.error(name)).split())[-600:]}")
    return True
