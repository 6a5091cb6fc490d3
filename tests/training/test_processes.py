"""Several processes, on CPUs: they train what one does, where they share the base too; what is saved is whole."""

import os
import shutil
import socket
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from qlora.artifacts import read_json, write_json
from qlora.errors import QloraError, UserError
from qlora.models.loading import attach_adapter
from qlora.models.patches import on_one_gpu
from qlora.models.sharding import Sharding
from qlora.pipeline import Pipeline
from qlora.recipe import Lora, Recipe
from qlora.recipe_file import load_recipe
from qlora.stages import Run
from qlora.training import sft
from qlora.training.arguments import PLAN, training_arguments
from qlora.training.launch import require_plain_launch, require_processes
from qlora.training.plan import Division
from qlora.training.recompute import recompute_first
from qlora.training.saved import WEIGHTS, require_whole_adapter

REPOSITORY = Path(__file__).parents[2]
CONFIGURATIONS = sorted((REPOSITORY / "recipes" / "accelerate").glob("*.yaml"))
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")],
    ),
]
STEPS = 4
LAYERS = 5  # of deep_model
PARTS = ["lora.init=pissa", "lora.train_tokens=['<|im_start|>']"]


def test_processes_train_the_same_adapter_as_one(deep_model, tiny_recipe, warm_python, tmp_path):
    """Same rows per step on one process, on two under SLURM, and on two that share the base; in fp32.

    Those under SLURM have what the first of them took from the weights. Only one process writes. One process goes on
    from a checkpoint of two that shared the base.
    """
    path = tiny_recipe(
        model={"base": str(deep_model), "compute_dtype": "float32"},
        train={"max_steps": STEPS, "micro_batch_tokens": 64, "learning_rate": 1e-3, "evaluate_every": 2},
        evaluate={"batch_size": 1},
    )
    Pipeline(load_recipe(path, (f"output_dir={tmp_path / 'alone'}",))).run_stage("train")
    Pipeline(load_recipe(path, (*PARTS, f"output_dir={tmp_path / 'parts'}"))).run_stage("train")
    slurm = ["bash", "recipes/accelerate/slurm.sh", str(path), *PARTS]
    launch(slurm, tmp_path / "machines", two_machines(tmp_path / "bin", warm_python))
    same_training(tmp_path / "parts", tmp_path / "machines", processes=2)
    kept = tmp_path / "sharing/tiny/checkpoints"
    kept.mkdir(parents=True)
    shutil.copy(tmp_path / "alone/tiny/checkpoints/fingerprint.json", kept)
    # As if interrupted: of these layers some are computed again, and others keep what their backward needs.
    write_json(kept / PLAN, asdict(Division(forwards=1, recomputed=2, offloaded=False, dense=3)))
    command = [warm_python, "-m", "qlora", "train", str(path), "train.processes=2", "train.shard=true"]
    launch(command, tmp_path / "sharing")
    metrics = same_training(tmp_path / "alone", tmp_path / "sharing", processes=2)
    assert f"2 of {LAYERS} layers recomputed, the base shared by 2 processes" in metrics["plan"]
    shutil.copytree(kept, tmp_path / "on/tiny/checkpoints", ignore=shutil.ignore_patterns(f"checkpoint-{STEPS}"))
    Pipeline(load_recipe(path, (f"output_dir={tmp_path / 'on'}",))).run_stage("train")
    metrics = same_training(tmp_path / "alone", tmp_path / "on", processes=1, since=2)
    assert metrics["resumed_from"] == "checkpoint-2"


def test_a_process_that_sees_several_gpus_trains_on_its_own(tiny_recipe, tmp_path):
    arguments = training_arguments(load_recipe(tiny_recipe()), "cpu", tmp_path, has_eval=False)
    arguments._n_gpu = 2  # as transformers counts them, where nothing was launched
    on_one_gpu(arguments)
    assert arguments.n_gpu == 1 and arguments.train_batch_size == arguments.per_device_train_batch_size


def launch(command: list[str], output_dir: Path, environment: dict[str, str] | None = None) -> None:
    variables = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [*command, f"output_dir={output_dir}"],
        capture_output=True,
        text=True,
        env=variables | (environment or {}),
        timeout=300,
        cwd=REPOSITORY,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("train      …") == 1


def same_training(one: Path, other: Path, processes: int, since: int = 0) -> dict:
    """Adapter, base and losses of two runs; returns the metrics of the second."""
    adapters = [load_file(place / "tiny/adapter" / WEIGHTS) for place in (one, other)]
    assert adapters[0].keys() == adapters[1].keys()
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], tensor, rtol=2e-3, atol=2e-4)
    assert read_json(one / "tiny/adapter/base.json") == read_json(other / "tiny/adapter/base.json")
    expected, found = (read_json(place / "tiny/lineage.json")["stages"]["train"]["metrics"] for place in (one, other))
    assert (found["processes"], found["steps"]) == (processes, STEPS)
    for key in ("loss", "eval_loss", "grad_norm"):
        curves = [
            [entry[key] for entry in metrics["curve"] if key in entry and entry["step"] > since]
            for metrics in (expected, found)
        ]
        assert curves[1] == pytest.approx(curves[0], rel=1e-4), key
    return found


def two_machines(directory: Path, python: str) -> dict[str, str]:
    """The environment of a job on two machines of one GPU each, of which both are this one; `python` runs commands."""
    directory.mkdir()
    commands = {
        "scontrol": "echo 127.0.0.1; echo 127.0.0.1",
        "srun": 'set -e; SLURM_NODEID=0 "${@:2}" & first=$!; SLURM_NODEID=1 "${@:2}"; wait $first',
        "accelerate": f'exec {python} -m accelerate.commands.accelerate_cli "$@"',
        "qlora": f'exec {python} -m qlora "$@"',
    }
    for name, body in commands.items():
        (directory / name).write_text(f"#!/bin/bash\n{body}\n")
        (directory / name).chmod(0o755)
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    path = os.pathsep.join([str(directory), os.environ["PATH"]])
    job = {"SLURM_JOB_NODELIST": "here[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "1"}
    return job | {"PATH": path, "PORT": str(port)}


@pytest.mark.parametrize("device", DEVICES)
def test_layers_that_take_turns_in_two_buffers_have_the_gradients_of_a_whole_base(
    deep_model, tiny_recipe, tmp_path, monkeypatch, device
):
    """One process that shares with nobody gathers as several do; whatever part of the layers is computed again."""
    path = tiny_recipe(
        device=device,
        model={"base": str(deep_model), "compute_dtype": "float32"},
        train={"batch_size": 8, "micro_batch_tokens": 60},
    )
    run = Run(load_recipe(path))

    def sharing(recipe: Recipe, arguments: object) -> Sharding:
        store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
        torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo", store=store, rank=0, world_size=1)
        return Sharding(0, 1)

    found = []
    try:
        for shared_base in (lambda *_: None, sharing):
            monkeypatch.setattr(sft, "shared_base", shared_base)
            trainer = sft.build_trainer(
                run.recipe, run.base, run.tokenizer, run.train_rows.rows, [],
                device="cuda:0" if device == "cuda" else "cpu", checkpoints=tmp_path / "checkpoints",
            )  # fmt: skip
            found.append([gradients(trainer, recomputed) for recomputed in (0, 2, LAYERS)])
    finally:
        torch.distributed.destroy_process_group()
    for whole, shared in zip(*found, strict=True):
        for name, gradient in whole.items():
            atol = 1e-4 * float(gradient.abs().max())
            torch.testing.assert_close(shared[name], gradient, rtol=1e-4, atol=atol)


def gradients(trainer, recomputed: int) -> dict[str, torch.Tensor]:
    """Of an epoch, of an adapter with random numbers, after an evaluation."""
    recompute_first(trainer.model.get_base_model(), recomputed)
    torch.manual_seed(1)
    learning = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    for parameter in learning.values():
        parameter.data.normal_(std=0.05)
    trainer.model.zero_grad()
    count = torch.tensor(100)
    batches = [
        {key: value for key, value in batch.items() if key != "rows"} for batch in trainer.get_train_dataloader()
    ]
    assert len(batches) > 1
    with torch.no_grad():
        trainer.model.eval()
        trainer.compute_loss(trainer.model, trainer._prepare_inputs(dict(batches[0])), num_items_in_batch=count)
    trainer.model.train()
    for batch in batches:
        trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch), num_items_in_batch=count).backward()
    return {name: parameter.grad.clone() for name, parameter in learning.items()}


def recipe_of(**train) -> Recipe:
    return Recipe.model_validate(
        {"name": "t", "model": {"base": "a/b"}, "data": {"train": [{"path": "x"}]}, "train": train}
    )


def accelerate_environment(*options: str) -> dict[str, str]:
    """What `accelerate launch` with these options gives its processes."""
    arguments = _validate_launch_command(launch_command_parser().parse_args([*options, "scripts/train.py"]))[0]
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ""
        return prepare_deepspeed_cmd_env(arguments)[1]
    return prepare_multi_gpu_env(arguments)


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=lambda path: path.stem)
def test_our_configurations_start_what_we_train(monkeypatch, configuration):
    environment = accelerate_environment("--config_file", str(configuration))
    monkeypatch.setattr(os, "environ", environment | {"RANK": "0"})
    require_plain_launch(recipe_of())
    assert str(configuration.relative_to(REPOSITORY)) in configuration.read_text()  # its own command


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--use_fsdp", "--fsdp_version", "2"], "(?s)--use_fsdp: .*train.shard: true"),
        (["--use_deepspeed"], "(?s)--use_deepspeed: .*train.shard: true"),
        (["--dynamo_backend", "inductor"], "--dynamo_backend: the model is not compiled"),
        (["--mixed_precision", "fp16"], "--mixed_precision: fp16, but the recipe computes in bfloat16"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_accelerate_would_train_differently_is_refused(monkeypatch, flags, problem):
    configuration = REPOSITORY / "recipes/accelerate/gpus.yaml"
    environment = accelerate_environment("--config_file", str(configuration), *flags)
    monkeypatch.setattr(os, "environ", environment | {"RANK": "0"})
    with pytest.raises(UserError, match=problem):
        require_plain_launch(recipe_of())


def test_train_args_cannot_bring_them_in_either():
    for key in ("fsdp", "deepspeed"):
        with pytest.raises(ValueError, match=f"cannot set {key} .*train.shard"):
            recipe_of(args={key: "x"})


def test_one_process_does_not_share(tiny_recipe):
    with pytest.raises(UserError, match="there is one process, which needs the whole base"):
        Pipeline(load_recipe(tiny_recipe(), ("train.shard=true",))).run_stage("train")
    require_processes(recipe_of(shard=True), 2)
    with pytest.raises(UserError, match="lora.dora"):
        load_recipe(tiny_recipe(), ("train.shard=true", "lora.dora=true"))
    with pytest.raises(UserError, match="model.quantization is none"):
        load_recipe(tiny_recipe(), ("train.shard=true", "model.quantization=none"))


def test_an_adapter_that_is_not_whole_is_an_error(tmp_path):
    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, vocab_size=32, num_attention_heads=2
    )
    base = LlamaForCausalLM(config)
    model = attach_adapter(base, Lora(r=4))
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    require_whole_adapter(model, tmp_path)
    whole = load_file(tmp_path / WEIGHTS)
    first, second, third, *_ = whole
    damaged = {name: tensor for name, tensor in whole.items() if name != first} | {"another": torch.zeros(1)}
    damaged |= {second: whole[second][: len(whole[second]) // 2].contiguous(), third: whole[third] + 1}
    save_file(damaged, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(QloraError) as error:
        require_whole_adapter(model, tmp_path)
    found = [(problem.where.rpartition(" ")[2], problem.what) for problem in error.value.problems]
    half = (len(whole[second]) // 2, *whole[second].shape[1:])
    assert sorted(found) == sorted(
        [
            (first, "is missing"),
            (second, f"has shape {half}, not {tuple(whole[second].shape)}"),
            (third, "has other values than were trained"),
            ("another", "belongs to no adapter"),
        ]
    )
