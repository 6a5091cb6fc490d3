"""Publishing to a stand-in of the Hub: what is sent, what is not sent twice, what is refused, and no token anywhere."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import warm
import yaml

from qlora.publishing.manifest import check_folder

sys.path.insert(0, str(Path(__file__).parent))
from hub_stand_in import TOKEN, Hub

WITH_THE_HUB = """
import sys
import huggingface_hub.constants as constants
constants.ENDPOINT, constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_XET = sys.argv.pop(1), False, True
from qlora.cli import main
main()
"""


@pytest.fixture
def hub(monkeypatch):
    """The Hub that this process talks to, in the way that it has without hf_xet."""
    import huggingface_hub.constants as constants

    with Hub() as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def front_matter(card: bytes) -> dict:
    return yaml.safe_load(card.decode().split("---\n")[1])


def no_token(folder: Path, *results: subprocess.CompletedProcess) -> None:
    assert all(TOKEN not in result.stdout + result.stderr for result in results)
    found = [path for path in folder.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert not found


def test_a_dry_run_lists_files_and_sizes_and_sends_nothing(recipe_file, hub, qlora, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    result = qlora("publish", recipe_file, "--dry-run")
    assert result.returncode == 0, result.stderr
    for text in ("ada/facts-adapter (private, main)", "ada/facts-merged", "model.safetensors", "kB", "dry run"):
        assert text in result.stdout
    assert hub.repos == {} and not hub.sent


def test_a_run_is_published_and_nothing_is_sent_twice(recipe_file, run_dir, hub, qlora, tmp_path):
    first = qlora("publish", recipe_file, "--yes")
    assert first.returncode == 0, first.stdout + first.stderr
    assert set(hub.repos) == {"ada/facts", "ada/facts-adapter", "ada/facts-merged"}
    assert all(repo.private and repo.commits == 1 for repo in hub.repos.values())
    card = front_matter(hub.content("ada/facts", "README.md"))
    assert card["base_model"] == "ada/facts-merged" and card["base_model_relation"] == "quantized"
    assert card["license"] == "apache-2.0" and "gptq" in card["tags"] and card["pipeline_tag"] == "text-generation"
    assert "vllm serve ada/facts\n" in hub.content("ada/facts", "README.md").decode()
    assert front_matter(hub.content("ada/facts-adapter", "README.md"))["library_name"] == "peft"
    # What is downloaded is whole, and is the checkpoint.
    for name in hub.repos["ada/facts"].branches["main"]:
        (tmp_path / name).write_bytes(hub.content("ada/facts", name))
    assert not check_folder(tmp_path, lambda *_: None).problems
    weights = "model.safetensors"
    assert (tmp_path / weights).read_bytes() == (run_dir / "gptq" / weights).read_bytes()
    sent = list(hub.sent)
    second = qlora("publish", recipe_file, "--yes")
    assert second.returncode == 0, second.stderr
    assert hub.sent == sent and all(repo.commits == 1 for repo in hub.repos.values())
    assert not (run_dir / ".publish").exists()
    no_token(recipe_file.parent, first, second)


def test_what_an_interrupted_run_sent_is_not_sent_again(recipe_file, run_dir, hub, qlora):
    """kill -9 while a weight file of the second repository is on its way."""
    hub.hold = 2
    process = warm.start_python("-c", WITH_THE_HUB, hub.url, "publish", recipe_file, "--yes")
    while not hub.held.wait(0.1) or len(hub.sent) < 2:
        assert process.poll() is None, "it ended before it could be killed"
    process.kill()
    process.wait()
    assert hub.repos["ada/facts-adapter"].commits == 1, "the first repository is complete"
    assert hub.repos["ada/facts-merged"].branches["main"] == {}, "nobody sees half of the second one"
    sent = list(hub.sent)
    hub.hold = None
    result = qlora("publish", recipe_file, "--yes")
    assert result.returncode == 0, result.stderr
    shards = len(list((run_dir / "merged").glob("*.safetensors")))
    assert shards > 1 and len(hub.sent) == len(set(hub.sent)) == 1 + shards + 1
    assert hub.sent[:2] == sent
    assert all(repo.commits == 1 for repo in hub.repos.values())
    no_token(recipe_file.parent, result)


def test_weights_of_an_earlier_checkpoint_do_not_stay(recipe_file, hub, qlora):
    assert qlora("publish", recipe_file, "--yes", "publish.what=[gptq]").returncode == 0
    files = hub.repos["ada/facts"].branches["main"]
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "notes.md", ".gitattributes"):
        files[name] = b"of an earlier one"
    assert qlora("publish", recipe_file, "--yes", "publish.what=[gptq]").returncode == 0
    files = hub.repos["ada/facts"].branches["main"]
    assert "model-00001-of-00002.safetensors" not in files and "model.safetensors.index.json" not in files
    assert {"notes.md", ".gitattributes", "model.safetensors"} <= files.keys()


def test_a_branch_is_made_and_main_stays(recipe_file, hub, qlora):
    result = qlora("publish", recipe_file, "--yes", "publish.what=[adapter]", "publish.revision=v2")
    assert result.returncode == 0, result.stderr
    branches = hub.repos["ada/facts-adapter"].branches
    assert branches["main"] == {} and "adapter_model.safetensors" in branches["v2"]


def test_a_failed_gate_is_refused_and_forced_says_so_first(recipe_file, hub, qlora):
    gate = "evaluate.gates.kl=1e-9"
    refused = qlora("publish", recipe_file, "--yes", gate)
    assert refused.returncode == 3 and "the gate wants" in refused.stderr and "--force" in refused.stderr
    assert hub.repos == {}
    forced = qlora("publish", recipe_file, "--yes", "--force", gate, "publish.what=[gptq]")
    assert forced.returncode == 0, forced.stderr
    text = hub.content("ada/facts", "README.md").decode().split("---\n", 2)[2]
    first = [line for line in text.splitlines() if line and not line.startswith("# ")][:3]
    assert "Published with `--force`" in first[0] and "the gate wants at most 1e-09" in first[2]
    assert "Verdict: **ship**" not in text


def test_public_repositories_are_refused_where_private_is_asked(recipe_file, hub, qlora):
    assert qlora("publish", recipe_file, "--yes", "publish.private=false", "publish.what=[gptq]").returncode == 0
    assert not hub.repos["ada/facts"].private
    result = qlora("publish", recipe_file, "--yes", "publish.what=[gptq]")
    assert result.returncode == 2 and "is public" in result.stderr


def test_what_is_missing_says_what_to_do(recipe_file, hub, qlora, monkeypatch, tiny_recipe):
    result = qlora("publish", tiny_recipe())
    assert result.returncode == 2 and "publish.repo=OWNER/NAME" in result.stderr
    result = qlora("publish", tiny_recipe(), "publish.repo=ada/x")
    assert result.returncode == 2 and "qlora train RECIPE" in result.stderr
    result = qlora("publish", recipe_file, "--yes", "quantize.bits=8")
    assert result.returncode == 2 and "because quantize.bits changed" in result.stderr
    result = qlora("publish", recipe_file, "publish.repo=nonsense")
    assert result.returncode == 2 and "publish.repo" in result.stderr
    result = qlora("publish", recipe_file, "--yes", "publish.repo=eve/facts")
    assert result.returncode == 2 and "the token needs write access" in result.stderr
    result = qlora("publish", recipe_file)
    assert result.returncode == 2 and "--yes" in result.stderr
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    result = qlora("publish", recipe_file, "--yes")
    assert result.returncode == 2 and "hf auth login" in result.stderr and "hf_of_nobody" not in result.stderr
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(recipe_file.parent / "none"))
    result = qlora("publish", recipe_file, "--yes")
    assert result.returncode == 2 and "there is no token" in result.stderr
    assert hub.repos == {}


def test_files_that_are_no_longer_what_the_run_wrote_are_not_published(recipe_file, run_dir, hub, qlora, tmp_path):
    shutil.copytree(run_dir, tmp_path / "facts")
    weights = tmp_path / "facts" / "gptq" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    result = qlora("publish", recipe_file, "--yes", f"output_dir={tmp_path}")
    assert result.returncode == 3 and "gptq/model.safetensors" in result.stderr and "other bytes" in result.stderr
    assert hub.repos == {}


def test_publishing_changes_no_stage(recipe_file, run_dir, qlora):
    before = json.loads((run_dir / "lineage.json").read_text())
    result = qlora("run", recipe_file, "publish.repo=ada/other", "publish.private=false")
    assert result.returncode == 0 and result.stdout.count("up to date") == 4
    assert json.loads((run_dir / "lineage.json").read_text()) == before
