"""The run folder: nothing is overwritten, and a digest comes from the weights that lie there or not at all."""

from __future__ import annotations

import math
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from instep.api import train
from instep.errors import CheckpointError, RecordError, ResourceError
from instep.record import checkpoint
from instep.record.checkpoint import MANIFEST, MODEL, TRAINING
from instep.record.folder import About, RunFolder, digest, remove
from instep.record.held import identity_of
from support.full_disk import full_disk


def save(run: RunFolder, version: int) -> checkpoint.SavedCheckpoint:
    state = {"w": torch.full((5,), float(version))}
    return checkpoint.save(
        run.checkpoints, version=version, model_state=state, training_state={}, meta={}, fingerprint="f", keep=0
    )


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder.create(tmp_path / "runs" / "gpt")
    run.recipe_path.write_text("")
    return run


def test_a_run_folder_is_made_and_found(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "gpt"
    run = RunFolder.create(path)
    assert sorted(p.name for p in path.iterdir()) == ["checkpoints", "logs"]
    assert (run.recipe_path.name, run.tape_path.name, run.result_path.name) == (
        "recipe.toml",
        "tape.jsonl",
        "result.json",
    )
    with pytest.raises(RecordError, match="a run was ended before its recipe was there, .* start it with --out"):
        RunFolder.open(path)
    with pytest.raises(RecordError, match=r"is not the folder of a run: it has no recipe\.toml"):
        RunFolder.open(tmp_path)
    run.recipe_path.write_text("")
    assert RunFolder.open(str(path)).path == run.path
    with pytest.raises(RecordError, match="there is no folder"):
        RunFolder.open(tmp_path / "none")


def test_an_empty_folder_is_taken_and_a_full_one_is_not(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    RunFolder.create(tmp_path / "empty")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "deep", tmp_path / "full"):
        with pytest.raises(RecordError, match=r"exists and is not an empty folder; choose another one with --out\.$"):
            RunFolder.create(path)
    assert (tmp_path / "file").read_text() == (tmp_path / "full" / "mine").read_text() == "mine"
    assert os.listdir(tmp_path / "full") == ["mine"]


def test_of_two_runs_at_once_only_one_gets_the_folder(tmp_path: Path) -> None:
    (tmp_path / "gpt").mkdir()
    with RunFolder(tmp_path / "gpt").locked(), pytest.raises(RecordError, match="by another process"):
        RunFolder.create(tmp_path / "gpt")  # while the first makes what it holds
    RunFolder.create(tmp_path / "gpt", "name = 'gpt'")
    with pytest.raises(RecordError, match=r"is not an empty folder; .* or go on with the run in it with --resume"):
        RunFolder.create(tmp_path / "gpt", "name = 'gpt'")
    RunFolder.create(tmp_path / "virtual", "name = 'gpt'", About("simulation"))
    with pytest.raises(RecordError, match=r"is not an empty folder; choose another one with --out\.$"):
        RunFolder.create(tmp_path / "virtual")


def test_default_paths_count_up(tmp_path: Path) -> None:
    made = [RunFolder.claim("gpt", tmp_path / "runs").name for _ in range(3)]
    assert made == ["gpt", "gpt-2", "gpt-3"]
    RunFolder.create(tmp_path / "runs" / "gpt-2")  # an empty folder is taken
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordError, match="file is a file, so no run folder fits in it"):
        RunFolder.claim("gpt", tmp_path / "file")


def test_runs_that_start_at_once_without_a_folder_each_get_the_next_name(tmp_path: Path) -> None:
    with ThreadPoolExecutor(16) as pool:
        paths = list(pool.map(lambda _: RunFolder.create(RunFolder.claim("gpt", tmp_path)).path.name, range(48)))
    assert sorted(paths) == sorted(["gpt", *(f"gpt-{number}" for number in range(2, 49))])


def test_what_cannot_be_looked_at_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = "n" * 300
    for look in (RunFolder.open, digest):
        with pytest.raises(RecordError, match=r"^n{197}\.\.\. cannot be read: File name too long; check the path"):
            look(path)
    with pytest.raises(ResourceError, match="cannot be made: File name too long; .*; or give --out"):
        RunFolder.claim(path)


def test_results_come_back(run: RunFolder) -> None:
    with pytest.raises(RecordError, match=r"has no result\.json, for it has not ended; go on with it with --resume"):
        run.read_result()
    run.write_result({"steps": 1, "held_out": math.inf, "recipe": "é"})
    run.write_result({"steps": 2, "held_out": math.nan, "recipe": "é"})
    assert run.read_result() == {"steps": 2, "held_out": None, "recipe": "é"}
    assert sorted(p.name for p in run.path.iterdir()) == ["checkpoints", "logs", "recipe.toml", "result.json"]


@pytest.mark.parametrize("text", [b"", b'{"steps": 3', b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_result_is_a_sentence(text: bytes, run: RunFolder) -> None:
    run.result_path.write_bytes(text)
    with pytest.raises(RecordError, match=r"result\.json cannot be read as a JSON table"):
        run.read_result()


@pytest.mark.processes
def test_a_full_disk_keeps_the_old_result(tmp_path: Path) -> None:
    with full_disk(tmp_path, size_bytes=1 << 20) as disk:
        run = RunFolder.create(disk / "gpt")
        run.write_result({"steps": 1})
        with pytest.raises(ResourceError, match=r"result\.json cannot be written: No space left on device; free some"):
            run.write_result({"text": "x" * (2 << 20)})
        assert run.read_result() == {"steps": 1}
        assert sorted(p.name for p in run.path.iterdir()) == ["checkpoints", "logs", "result.json"]


def test_folders_that_cannot_be_made_are_sentences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ResourceError, match=r"the run folder .* cannot be made: Permission denied; make the folder w"):
        RunFolder.create(tmp_path / "gpt")


def test_a_folder_that_is_held_tells_where_it_is_now(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run")
    with run.locked() as held:
        held.check()
        run.path.rename(tmp_path / "moved")
        with pytest.raises(RecordError, match=f"{run.path} was moved to {tmp_path / 'moved'} while .*; resume it from"):
            held.check()
        RunFolder.create(run.path)  # another one in its place
        with pytest.raises(RecordError, match=f"was moved to {tmp_path / 'moved'}"):
            held.check()
        shutil.rmtree(tmp_path / "moved")
        with pytest.raises(RecordError, match=f"{run.path} was deleted while .* nothing of it is left; start it again"):
            held.check()


def test_only_the_folder_that_was_made_is_removed(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run")
    identity = identity_of(run.path)
    run.path.rename(tmp_path / "moved")
    remove(run.path, identity)
    RunFolder.create(run.path)
    remove(run.path, identity)
    assert run.path.exists()
    shutil.rmtree(run.path)
    (tmp_path / "moved").rename(run.path)
    remove(run.path, identity)
    assert not run.path.exists()


def test_what_run_json_says_comes_back_or_is_a_sentence(run: RunFolder) -> None:
    assert run.about() is None  # as of an earlier version
    about = About(import_paths=("/a",))
    for damaged in ("", "[]", "{}", '{"kind": "x", "import_paths": [], "id": "a"}', '{"kind": "training", "id": 3}'):
        run.about_path.write_text(damaged)
        with pytest.raises(RecordError, match=r"run\.json is not what Instep wrote there; restore it, or take it away"):
            run.about()
    again = RunFolder.create(run.path.with_name("again"), "x", about)
    assert again.about() == about
    assert about.id != About().id


def test_a_path_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    with pytest.raises(RecordError, match=r"has a path that is not UTF-8, which .* choose another one with --out"):
        RunFolder.create(path)
    assert not path.exists()
    path.mkdir()
    (path / "recipe.toml").write_text("")
    with pytest.raises(RecordError, match=r"has a path that is not UTF-8, .* or move the folder of the run"):
        train(resume=path)


# The digest of what lies somewhere


def test_a_run_a_checkpoint_and_a_file_have_one_digest(run: RunFolder) -> None:
    first, second = save(run, 1), save(run, 2)
    assert digest(run.path) == digest(str(second.path)) == digest(second.path / MODEL) == second.digest
    assert digest(first.path) == first.digest != second.digest
    run.write_result({"steps": 2, "digest": second.digest})
    assert digest(run.path) == second.digest
    run.write_result({"steps": 1, "digest": first.digest})  # an earlier ending; the run went on and was cut off
    assert digest(run.path) == second.digest


def test_the_digest_of_a_run_cut_off_is_that_of_its_newest_sound_checkpoint(run: RunFolder) -> None:
    first, second = save(run, 1), save(run, 2)
    (second.path / TRAINING).unlink()
    assert digest(run.path) == first.digest
    (first.path / MODEL).write_bytes(b"")
    with pytest.raises(CheckpointError, match="has no sound checkpoint to take a digest of") as caught:
        digest(run.path)
    assert caught.value.detail.count("is damaged") == 2


def test_a_run_that_ended_has_its_last_digest_or_none(run: RunFolder) -> None:
    _, second = save(run, 1), save(run, 2)
    run.write_result({"steps": 2, "digest": "0" * 64})
    with pytest.raises(
        CheckpointError, match=f"ended at version 2 with the digest 0+, .* is step-00000002 with {second.digest}"
    ):
        digest(run.path)
    run.write_result({"steps": 2, "digest": second.digest})
    os.truncate(second.path / MODEL, 20)
    with pytest.raises(CheckpointError, match=r"version 2 .* newest sound checkpoint is step-00000001") as caught:
        digest(run.path)
    assert "model.safetensors has 20 bytes" in caught.value.detail


def test_weights_and_manifest_must_agree(run: RunFolder) -> None:
    """The manifest is whole and fits the file, but the digest that it claims is another one's."""
    saved = save(run, 1)
    manifest = checkpoint.read_manifest(saved.path)
    files = {name: {"bytes": size, "sha256": sha256} for name, (size, sha256) in manifest.files.items()}
    table = {"format": 1, "version": 1, "digest": "0" * 64, "fingerprint": "f", "meta": {}, "files": files}
    (saved.path / MANIFEST).write_bytes(checkpoint._manifest_bytes(table))
    checkpoint.verify(saved.path)
    for path in (saved.path, run.path):
        with pytest.raises(CheckpointError, match=f"have the digest {saved.digest}, and its manifest says 0+;"):
            digest(path)


@pytest.mark.parametrize("name", [MANIFEST, MODEL, TRAINING])
def test_a_checkpoint_without_one_of_its_files_has_no_digest(name: str, run: RunFolder) -> None:
    saved = save(run, 1)
    (saved.path / name).unlink()
    with pytest.raises(CheckpointError, match=f"is damaged: {name} cannot be read"):
        digest(saved.path)


def test_what_is_no_run_has_no_digest(run: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"there is no .*; give a run folder, a checkpoint folder or a"):
        digest(tmp_path / "none")
    with pytest.raises(RecordError, match="is neither the folder of a run nor of a checkpoint"):
        digest(tmp_path)
    with pytest.raises(CheckpointError, match="is not a sound safetensors file"):
        digest(run.recipe_path)
    with pytest.raises(CheckpointError, match="has no sound checkpoint"):
        digest(run.path)
    shutil.rmtree(run.checkpoints)
    with pytest.raises(CheckpointError, match="has no sound checkpoint"):
        digest(run.path)
