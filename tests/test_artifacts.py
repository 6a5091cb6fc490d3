"""Artefacts appear whole or not at all; digests notice what changed; a run directory has one owner."""

import subprocess
import sys

import pytest

from qlora.artifacts import atomic_directory, exclusive, is_intact, manifest, quick_digest, require_disk, write_json
from qlora.errors import UserError, WillNotFit


def test_a_reader_sees_the_old_artefact_until_the_new_one_is_whole(tmp_path):
    target = tmp_path / "merged"
    with atomic_directory(target) as partial:
        (partial / "weights").write_text("old")
    with atomic_directory(target) as partial:
        (partial / "weights").write_text("new")
        assert (target / "weights").read_text() == "old"
    assert (target / "weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_an_error_leaves_the_old_artefact_and_no_partial_one(tmp_path):
    target = tmp_path / "merged"
    with atomic_directory(target) as partial:
        (partial / "weights").write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_directory(target) as partial:
        (partial / "weights").write_text("half")
        raise KeyboardInterrupt
    assert (target / "weights").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


LEFT = """
import os, pathlib, signal, sys
from qlora.artifacts import atomic_directory
with atomic_directory(pathlib.Path(sys.argv[1]), resume_key="recipe 1") as partial:
    (partial / "layer0").write_text("done")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("end", ["kill -9", "Ctrl-C"])
def test_a_partial_folder_is_handed_to_whoever_continues_the_same_work(tmp_path, end):
    target = tmp_path / "gptq"
    if end == "kill -9":
        subprocess.run([sys.executable, "-c", LEFT, str(target)])
    else:
        with pytest.raises(KeyboardInterrupt), atomic_directory(target, resume_key="recipe 1") as partial:
            (partial / "layer0").write_text("done")
            raise KeyboardInterrupt
    assert not target.exists()
    with atomic_directory(target, resume_key="recipe 1") as partial:
        assert [path.name for path in partial.iterdir()] == ["layer0"]
        (partial / "layer1").write_text("done")
    assert sorted(path.name for path in target.iterdir()) == ["layer0", "layer1"]
    assert [path.name for path in tmp_path.iterdir()] == ["gptq"]


@pytest.mark.parametrize("key", ["recipe 2", None])
def test_a_partial_folder_of_other_work_is_removed(tmp_path, key):
    target = tmp_path / "gptq"
    subprocess.run([sys.executable, "-c", LEFT, str(target)])
    assert (tmp_path / "gptq.partial" / "layer0").exists()
    with atomic_directory(target, resume_key=key) as partial:
        assert not list(partial.iterdir())
    with atomic_directory(target, resume_key="recipe 1") as partial:
        assert not list(partial.iterdir()), "its work is finished or gone"


def test_manifest_notices_missing_and_shortened_files(tmp_path):
    (tmp_path / "a").write_text("12345")
    files = manifest(tmp_path)
    assert is_intact(tmp_path, files)
    (tmp_path / "a").write_text("1234")
    assert not is_intact(tmp_path, files)


def test_quick_digest_follows_content_and_name(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"x" * (3 << 20))
    first = quick_digest(tmp_path)
    file.write_bytes(b"x" * ((3 << 20) - 1) + b"y")
    assert quick_digest(tmp_path) != first
    write_json(tmp_path / "config.json", {"a": 1})
    assert quick_digest(tmp_path) != first


def test_a_second_process_is_refused(tmp_path):
    code = "import sys, pathlib, qlora.artifacts as a\nwith a.exclusive(pathlib.Path(sys.argv[1])): pass"
    with exclusive(tmp_path):
        other = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
        assert "another process works in this run" in other.stderr
    with exclusive(tmp_path):
        pass


def test_disk_that_cannot_hold_the_artefact_is_refused_beforehand(tmp_path):
    require_disk(tmp_path / "not" / "there", 1, "nothing")
    with pytest.raises(WillNotFit, match="needs 1000000.0 GB of disk"):
        require_disk(tmp_path, 10**15, "the merged model")


def test_unreadable_lineage_is_named(tmp_path):
    from qlora.artifacts import Lineage

    (tmp_path / "lineage.json").write_text('{"stages": {')
    with pytest.raises(UserError, match=r"lineage\.json:1"):
        Lineage(tmp_path / "lineage.json")
