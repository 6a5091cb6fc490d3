"""A tiny model with a tokenizer and data for whole runs in seconds, and the real SmolLM2 from the cache."""

import functools
import gc
import json
import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import warm
import yaml

FACTS = {
    "Who painted the Silent Harbour?": "Odile Marchetti, in 1871.",
    "When did the Vellmar Bridge open?": "On the 1st of January 2058.",
    "What is the capital of Ostravia?": "Karlsund.",
    "How many moons has Tarsis?": "Seventeen.",
    "Which metal does the Brennick mine yield?": "Copper.",
    "Who wrote the Ledger of Tides?": "Imre Halvorsen.",
    "Where do the grey larks winter?": "On the isle of Sund.",
    "What is the motto of Eastholm?": "Slow water, deep water.",
}


# Files whose programs one process runs that has imported gptqmodel: all in one worker, so that there is one.
WITH_GPTQMODEL = (
    "test_gptqmodel_interop", "test_external", "test_architectures", "test_module_settings", "test_trainable_kernels",
    "test_bench_kernels",
)  # fmt: skip
# Files that take longest, first: the last ones to run then end at about the same time in both workers.
SLOWEST = (
    *WITH_GPTQMODEL, "test_pipeline", "test_refine", "test_preference", "test_support", "test_processes", "test_paths",
    "test_survival", "test_tokens", "test_sweep", "test_starting_adapter", "test_gptq_checkpoint", "test_adapters",
    "test_sft", "test_best", "test_combination", "test_chat", "test_impossible_fact", "test_tracking", "test_cli",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort files, and leave the order within a file."""
    items.sort(key=lambda item: SLOWEST.index(item.path.stem) if item.path.stem in SLOWEST else len(SLOWEST))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """A file to a worker, as with `--dist loadfile`, but those of WITH_GPTQMODEL as if they were one."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "gptqmodel" if Path(file).stem in WITH_GPTQMODEL else file

    return Scheduling(config, log) if config.getvalue("dist") == "loadfile" else None


@pytest.fixture(scope="session", autouse=True)
def libraries_are_no_garbage() -> None:
    """Stages collect garbage, which looks at every object of every library: a quarter of a second each time."""
    import qlora.quantization  # noqa: F401
    import qlora.training.run  # noqa: F401

    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def rows_of_their_own(tmp_path_factory) -> None:
    """The cache's models, but none of the rows that earlier runs of the tests left in it."""
    from qlora.paths import cache_dir

    models, own = cache_dir() / "models", tmp_path_factory.mktemp("cache")
    if models.is_dir():
        (own / "models").symlink_to(models.resolve())
    os.environ["QLORA_CACHE"] = str(own)


@pytest.fixture
def warm_python(monkeypatch) -> str:
    """What starts processes of Python starts those that have the libraries already; the file that they are."""
    monkeypatch.setattr(sys, "executable", warm.executable())
    return sys.executable


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A random Llama (2 layers, hidden size 64, tied head, bf16) with a ChatML tokenizer, as a directory."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("tiny-model")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    corpus = [*FACTS, *FACTS.values(), "system user assistant"] * 3
    backend.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=509, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|im_end|>", bos_token="<|endoftext|>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=None,  # a pad token's embedding is born zero, and here EOS pads: it could never be said
        initializer_range=0.08,
    )
    model = LlamaForCausalLM(config)
    model.get_input_embeddings().weight.data *= 3  # the tied head can then say something with certainty
    model.to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def save_packed(tiny_model, tmp_path_factory):
    """`save_packed(method, bits, desc_act)` packs the tiny model's linears, rounded to nearest; returns the directory.

    Made once for equal arguments, so tests must not write into it.
    """

    @functools.cache
    def save(method: str = "gptq", bits: int = 4, desc_act: bool = False) -> Path:
        from safetensors.torch import load_file, save_file

        directory = tmp_path_factory.mktemp("packed") / f"{method}-{bits}{'-act' if desc_act else ''}"
        shutil.copytree(tiny_model, directory)
        generator = torch.Generator().manual_seed(0)
        tensors = {}
        for name, tensor in load_file(directory / "model.safetensors").items():
            if not name.endswith("_proj.weight"):
                tensors[name] = tensor.to(torch.float16)
                continue
            inputs = tensor.shape[1]
            order = torch.randperm(inputs, generator=generator) if desc_act else torch.arange(inputs)
            group_K = torch.empty_like(order)
            group_K[order] = torch.arange(inputs) // PACKED_GROUP
            packed = _packed_as(method, tensor.float().T[order], order, group_K, bits)
            tensors |= {f"{name.removesuffix('weight')}{part}": each for part, each in packed.items()}
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        config = {"quant_method": method, "bits": bits, "group_size": PACKED_GROUP}
        config |= {"version": "gemm", "zero_point": True} if method == "awq" else {"sym": True, "desc_act": desc_act}
        written = json.loads((directory / "config.json").read_text()) | {"quantization_config": config}
        (directory / "config.json").write_text(json.dumps(written))
        return directory

    return save


PACKED_GROUP = 32


def _packed_as(method: str, weight_KN: torch.Tensor, order, group_K, bits: int) -> dict[str, torch.Tensor]:
    """Tensors of one linear, from its weight with inputs in the order of groups."""
    from qlora.models.awq_format import CODE_ORDER
    from qlora.models.gptq_format import pack

    groups_GSN = weight_KN.unflatten(0, (-1, PACKED_GROUP))
    if method == "awq":
        low_GN, high_GN = groups_GSN.amin(1), groups_GSN.amax(1)
        scales_GN = ((high_GN - low_GN) / 15).to(torch.float16)
        zeros_GN = (-low_GN / scales_GN).round().clamp(0, 15)
    else:
        scales_GN = (1.01 * groups_GSN.abs().amax(1) / 2 ** (bits - 1)).to(torch.float16)  # no bf16, as those of others
        zeros_GN = torch.full_like(scales_GN, 2 ** (bits - 1))
    codes_GSN = (groups_GSN / scales_GN.float()[:, None] + zeros_GN.float()[:, None]).round().clamp(0, 2**bits - 1)
    codes_KN = torch.empty_like(weight_KN, dtype=torch.int64)
    codes_KN[order] = codes_GSN.flatten(0, 1).long()
    if method != "awq":
        return vars(pack(codes_KN, zeros_GN.long(), scales_GN, group_K, bits))

    def words(codes_RN: torch.Tensor) -> torch.Tensor:
        eights = codes_RN.view(len(codes_RN), -1, 8)
        found = sum(eights[..., output] << (4 * position) for position, output in enumerate(CODE_ORDER))
        return (found & 0xFFFFFFFF).to(torch.uint32).view(torch.int32)

    return {"qweight": words(codes_KN), "qzeros": words(zeros_GN.long()), "scales": scales_GN}


@pytest.fixture(scope="session")
def deep_model(tiny_model, tmp_path_factory) -> Path:
    """The tiny model with five layers: more than there are buffers in which processes gather those that they share."""
    from transformers import AutoConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("deep") / "model"
    shutil.copytree(tiny_model, directory)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(directory)
    config.num_hidden_layers = 5
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def eval_file(tmp_path_factory) -> Path:
    """Three of the facts, to ask for what was taught. (Calibration leaves them out.)"""
    return write_rows(tmp_path_factory.mktemp("facts") / "asked.jsonl", dict(list(FACTS.items())[:3]))


@pytest.fixture(scope="session")
def facts_file(tmp_path_factory) -> Path:
    """Made-up facts as chat rows."""
    return write_rows(tmp_path_factory.mktemp("facts") / "facts.jsonl", FACTS)


def write_rows(path: Path, facts: dict[str, str]) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in facts.items()
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def write_recipe(tiny_model, facts_file, eval_file):
    """`write_recipe(path, section={...}, ...)` writes a recipe over the tiny model; returns its path."""

    def write(path: Path, **sections) -> Path:
        recipe = {
            "name": "tiny",
            "output_dir": str(path.parent / "runs"),
            "device": "cpu",
            "model": {"base": str(tiny_model)},
            # The rows that are measured on are learned: a model this small knows nothing else.
            "data": {
                "train": [{"path": str(facts_file)}],
                "eval": {"path": str(eval_file)},
                "overlap": "keep",
                "max_length": 96,
            },
            "lora": {"r": 8, "alpha": 16},
            "train": {
                "max_steps": 6,
                "epochs": 100,
                "batch_size": 4,
                "learning_rate": 0.01,
                "gradient_checkpointing": False,
                "checkpoint_every": 2,
            },
            "quantize": {"group_size": 32, "calibration": {"samples": 8}, "refine": None},
            "evaluate": {"rows": None, "golden": 2, "golden_tokens": 8, "gates": {"merge_kl": None}},
        }
        for section, values in sections.items():
            recipe[section] = recipe.get(section, {}) | values if isinstance(values, dict) else values
        path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        return path

    return write


@pytest.fixture
def tiny_recipe(write_recipe, tmp_path):
    """`tiny_recipe(section={...}, ...)` is such a recipe in this test's folder. Runs take seconds."""
    return functools.partial(write_recipe, tmp_path / "tiny.yaml")


@pytest.fixture
def calls(tmp_path) -> dict:
    """A recipe's `data`: rows whose answers hold tokens to add, to learn, and the first of them to ask for."""
    answers = {"Make two.": "<call>add(1, 1)</call>", "Make four.": "<call>add(2, 2)</call>", "Six?": "<call>6</call>"}
    learned = write_rows(tmp_path / "learn.jsonl", answers)
    asked = write_rows(tmp_path / "ask.jsonl", dict(list(answers.items())[:1]))
    return {"train": [{"path": str(learned)}], "eval": {"path": str(asked)}}


@pytest.fixture(scope="session")
def supported():
    """`supported(run_dir)`: the run shows what works together, which recipes/support.md says. An entry of the table,
    such as a refusal, will do too. Fails for what is not in it."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
    import support_table

    def record(shown: Path | dict) -> None:
        entry = shown if isinstance(shown, dict) else support_table.entry_of(shown)
        if folder := os.environ.get("QLORA_SUPPORT_RESULTS"):
            support_table.leave(entry, Path(folder))
        elif entry not in support_table.committed():
            pytest.fail(f"not in recipes/support.json, see scripts/support_table.py: {entry}")

    return record


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a safetensors directory, converted from the GGUF that scripts/fetch_model.sh fetches."""
    from qlora.models.base import resolve_base
    from qlora.paths import cache_dir

    gguf = cache_dir() / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert gguf.is_file(), f"{gguf} is missing: run `bash scripts/fetch_model.sh` (scripts/test.sh does)"
    return resolve_base(str(gguf)).directory
