"""What a user sees: commands, and the message and exit code of everything that can be wrong."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import warm

from qlora import cli
from qlora.errors import UserError
from qlora.pipeline import Pipeline
from qlora.recipe_file import load_recipe

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
# The command, for itself alone as `unshare -rm` and `mount -t tmpfs -o size=SIZE none DISK` have it.
ON_A_SMALL_DISK = """
import ctypes, os, sys
from pathlib import Path
disk, size, *sys.argv[1:] = sys.argv[1:]
maps = {"setgroups": "deny", "uid_map": f"0 {os.getuid()} 1", "gid_map": f"0 {os.getgid()} 1"}
libc = ctypes.CDLL(None)
assert libc.unshare(0x10020000) == 0, "CLONE_NEWUSER | CLONE_NEWNS"
for name, content in maps.items():
    Path("/proc/self", name).write_text(content)
assert libc.mount(b"none", disk.encode(), b"tmpfs", 0, f"size={size}".encode()) == 0
from qlora.cli import main
main()
"""


def qlora(*arguments: object, **options) -> subprocess.CompletedProcess:
    """The command; in a process of its own where options, `env` and `cwd`, ask for one."""
    command = list(map(str, arguments))
    if not options:
        with redirect_stdout(StringIO()) as stdout, redirect_stderr(StringIO()) as stderr:
            code = cli._exit_code(lambda: cli.qlora.main(command, standalone_mode=False))
        return subprocess.CompletedProcess(command, code, stdout.getvalue(), stderr.getvalue())
    return warm.run(*command, **{"env": ENVIRONMENT, **options})


def fails(code: int, *arguments: object, **options) -> str:
    result = qlora(*arguments, **options)
    assert result.returncode == code, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr


def test_help_names_every_command_and_imports_nothing_heavy():
    heavy = "torch", "transformers", "pydantic", "yaml", "rich"
    code = f"import sys, qlora.cli; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
    output = qlora("--help").stdout
    stages = ("run", "train", "merge", "quantize", "evaluate", "publish")
    results = ("report", "compare", "chat", "bench", "verify", "export")
    for name in (*stages, *results, "check", "recipes", "doctor"):
        assert f"\n  {name} " in output


def test_unknown_command_and_missing_recipe():
    assert "No such command" in fails(2, "rum", "x")
    assert "Missing argument" in fails(2, "run")
    assert "no recipe nowhere.yaml" in fails(2, "run", "nowhere.yaml")


def test_typo_in_a_key_names_file_line_and_the_key_that_was_meant(tiny_recipe):
    path = tiny_recipe(train={"learning_rat": 1})
    message = fails(2, "run", path)
    assert f"{path}:" in message and "did you mean learning_rate?" in message


def test_wrong_paths_are_all_named(tiny_recipe, tmp_path):
    path = tiny_recipe(data={"train": [{"path": str(tmp_path / "fatcs.jsonl")}]})
    assert "fatcs.jsonl" in fails(2, "train", path)
    assert "does not exist" in fails(2, "train", tiny_recipe(), f"model.base={tmp_path}/none.gguf")
    path = tiny_recipe(data={"train": [{"path": str(tmp_path / "fatcs.jsonl")}]})
    checked = qlora("check", path, "model.base=/no/such/model")  # check says everything at once
    assert checked.returncode == 2
    assert "fatcs.jsonl" in checked.stdout + checked.stderr and "/no/such/model" in checked.stdout + checked.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "empty"),
        ('{"messages": []}\n{"messages": [\n', "facts.jsonl:2"),
        ('{"question": "a"}\n', "question"),
        ('{"messages": [{"role": "user", "content": "only a question"}]}\n', "facts.jsonl:1"),
    ],
)
def test_empty_and_malformed_data(tiny_recipe, tmp_path, content, message):
    file = tmp_path / "facts.jsonl"
    file.write_text(content)
    with pytest.raises(UserError) as caught:
        Pipeline(load_recipe(tiny_recipe(data={"train": [{"path": str(file)}]}))).run_stage("train")
    assert message in str(caught.value) and caught.value.exit_code == 2


def test_group_size_that_does_not_divide_proposes_those_that_do(tiny_recipe):
    path = tiny_recipe(quantize={"group_size": 128})  # 64 inputs
    message = fails(2, "check", path)
    assert "64" in message and "32" in message and "128" in message
    message = fails(2, "run", path)
    assert "q_proj" in message and "32" in message


def test_missing_extra_names_the_command_that_installs_it(tiny_recipe, tmp_path):
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    code = (  # an interpreter in which gguf cannot be found
        "import sys, importlib.machinery as m; assert 'gguf' not in sys.modules;"
        "find = m.PathFinder.find_spec;"
        "m.PathFinder.find_spec = lambda name, *rest: None if name == 'gguf' else find(name, *rest);"
        "from qlora.cli import main; main()"
    )
    environment = ENVIRONMENT | {"QLORA_CACHE": str(tmp_path)}
    result = warm.python("-c", code, "train", tiny_recipe(model={"base": str(gguf)}), env=environment)
    assert result.returncode == 2, result.stdout + result.stderr
    assert 'pip install "qlora[gguf]"' in result.stderr and "Traceback" not in result.stderr


def test_gpu_asked_for_where_there_is_none(tiny_recipe):
    message = fails(2, "train", tiny_recipe(device="cuda"), env=ENVIRONMENT | {"CUDA_VISIBLE_DEVICES": ""})
    assert "no GPU" in message and "doctor" in message


@pytest.mark.parametrize("size", ["200k", "900k"])
def test_no_space_left_ends_with_4_and_the_run_can_continue(tiny_recipe, tmp_path, size):
    """A real full disk: a small tmpfs in a mount namespace. The first size fills up in training, the second later."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("needs unprivileged mount namespaces (unshare -rm)")
    disk = tmp_path / "disk"
    disk.mkdir()
    result = warm.python("-c", ON_A_SMALL_DISK, disk, size, "run", tiny_recipe(), f"output_dir={disk}", env=ENVIRONMENT)
    assert result.returncode == 4, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    assert "disk" in result.stderr and "free some space" in result.stderr


def test_recipes_list_show_copy_schema(tmp_path):
    names = [line.split()[0] for line in qlora("recipes", "list").stdout.splitlines()]
    assert {"quickstart", "llama-3.1-8b", "qwen3-8b", "mistral-7b", "gemma-3-1b"} <= set(names)
    assert "name: quickstart" in qlora("recipes", "show", "quickstart").stdout
    assert qlora("recipes", "copy", "quickstart", cwd=tmp_path).returncode == 0
    assert (tmp_path / "quickstart.yaml").is_file() and (tmp_path / "quickstart" / "train.jsonl").is_file()
    assert "exists already" in fails(2, "recipes", "copy", "quickstart", cwd=tmp_path)
    assert "learning_rate" in json.loads(qlora("recipes", "schema").stdout)["$defs"]["Train"]["properties"]


def test_check_and_doctor_run(tiny_recipe):
    result = qlora("check", tiny_recipe())
    assert result.returncode == 0, result.stdout + result.stderr
    assert "vLLM" in result.stdout and "learned from" in result.stdout
    output = qlora("doctor").stdout
    assert "torch" in output and "bitsandbytes" in output


def test_a_copied_recipe_checks(tmp_path, tiny_model):
    assert qlora("recipes", "copy", "quickstart", cwd=tmp_path).returncode == 0
    result = qlora("check", "quickstart.yaml", f"model.base={tiny_model}", "quantize.group_size=32", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr


def test_version():
    from qlora import __version__

    assert __version__ in qlora("--version").stdout
    assert Path(__file__).parents[1].joinpath("LICENSE").read_text().lstrip().startswith("Apache License")


@pytest.mark.parametrize(
    ("set_by_user", "expected"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, "None"),
    ],
)
def test_the_allocator_is_set_before_torch_is_imported_unless_the_user_did(set_by_user, expected):
    code = (
        "import atexit, os, sys; from qlora.cli import main; sys.argv[1:] = ['--version'];"
        "atexit.register(lambda: print('torch' in sys.modules, os.environ.get('PYTORCH_ALLOC_CONF'))); main()"
    )
    environment = {key: value for key, value in os.environ.items() if "ALLOC_CONF" not in key} | set_by_user
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"False {expected}"


def test_training_does_not_import_gptqmodel(tiny_recipe):
    """Where it is installed, PEFT would: ten seconds, a banner, and settings of torch that are not ours."""
    code = "import atexit, sys; from qlora.cli import main; sys.argv[1:] = ['train', {!r}];"
    code += "said = lambda: print('imported', *(name in sys.modules for name in ('gptqmodel', 'peft')));"
    code += "atexit.register(said); main()"
    done = warm.python("-c", code.format(str(tiny_recipe())), env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert "imported False True" in done.stdout and "GPT-QModel" not in done.stdout + done.stderr
