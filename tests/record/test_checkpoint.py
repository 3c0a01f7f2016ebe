"""Checkpoints: exact, and safe from bit flips, full disks and kills at any moment."""

from __future__ import annotations

import collections
import errno
import hashlib
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from instep.errors import CheckpointError, RecordError, ResourceError
from instep.record import checkpoint
from instep.record.checkpoint import MANIFEST, MODEL, TRAINING, check_recipe, load, newest_sound, read_manifest, verify
from instep.record.digest import digest_of_file, digest_of_state
from support.full_disk import full_disk

FILES = [MODEL, TRAINING, MANIFEST]
quick = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def save(folder: Path, version: int, *, size: int = 10, keep: int = 0, **fields: Any) -> checkpoint.SavedCheckpoint:
    """A small checkpoint whose weights tell its version."""
    state = {"w": torch.full((size,), float(version)), "n": torch.tensor(version)}
    defaults = {"model_state": state, "training_state": {"step": version}, "meta": {}, "fingerprint": "f"}
    return checkpoint.save(folder, version=version, keep=keep, **defaults | fields)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("sound"), 7, meta={"cursor": [1, 2], "objective": 0.1}).path


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    save(folder, 1)
    save(folder, 2)
    return folder


@pytest.fixture
def copy(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / sound.name))


def test_a_training_goes_on_exactly(tmp_path: Path) -> None:
    def build() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 4))
        model[2].weight = model[0].weight  # tied
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        model(inputs).square().sum().backward()
        optimizer.step()

    model, optimizer = build()
    for seed in range(3):
        step(model, optimizer, seed)
    saved = save(
        tmp_path,
        3,
        model_state=model.state_dict(),
        training_state={"optimizer": optimizer.state_dict(), "at": (1, None)},
    )
    step(model, optimizer, 3)

    loaded = load(saved.path)
    again, its_optimizer = build()
    again.load_state_dict(loaded.model_state)
    its_optimizer.load_state_dict(loaded.training_state["optimizer"])
    assert loaded.training_state["at"] == (1, None)
    step(again, its_optimizer, 3)
    assert digest_of_state(again.state_dict()) == digest_of_state(model.state_dict())


def test_a_folder_that_is_gone_is_not_born_again(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="cannot be saved: No such file or directory"):
        save(tmp_path / "gone" / "checkpoints", 1)
    assert not (tmp_path / "gone").exists()


def test_what_is_saved_is_what_is_read(tmp_path: Path) -> None:
    state = {"w": torch.randn(3, 2).T, "b": torch.tensor(True)}
    meta = {2: "two", 10: [1.5, None], "nan": math.nan, "é": {"deep": (1, 2)}}
    (tmp_path / "a").mkdir()
    saved = save(tmp_path / "a" / "checkpoints", 123, model_state=state, meta=meta, fingerprint="print")
    assert saved.path == tmp_path / "a" / "checkpoints" / "step-00000123"
    assert names(saved.path) == sorted(FILES)
    assert saved.bytes == sum(path.stat().st_size for path in saved.path.iterdir())
    assert saved.digest == digest_of_state(state) == digest_of_file(saved.path / MODEL)
    manifest, loaded = read_manifest(saved.path), load(saved.path)
    for found in (manifest, loaded):
        assert (found.version, found.digest, found.fingerprint) == (123, saved.digest, "print")
        assert found.meta == {"2": "two", "10": [1.5, None], "nan": None, "é": {"deep": [1, 2]}}
    assert digest_of_state(loaded.model_state) == saved.digest
    assert loaded.training_state == {"step": 123}


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=4)
    | st.binary(min_size=1, max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner)
        | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(state=st.dictionaries(st.text(max_size=3), values, max_size=3))
@quick
def test_plain_training_states_come_back(state: dict[str, Any], tmp_path: Path) -> None:
    state["ordered"] = collections.OrderedDict(a=torch.ones(2))
    loaded = load(save(tmp_path, 1, training_state=state).path).training_state
    assert torch.equal(loaded.pop("ordered")["a"], torch.ones(2))
    state.pop("ordered")
    assert loaded == state


class Own:
    """A class of the user's."""


@pytest.mark.parametrize("value", [Own(), np.float64(1), Path("x"), print])
def test_a_training_state_that_could_not_be_loaded_is_refused(value: object, tmp_path: Path) -> None:
    save(tmp_path, 1)
    with pytest.raises(RecordError, match=r"the training state holds .*; keep only tensors, numbers"):
        save(tmp_path, 2, training_state={"deep": [value]})
    with pytest.raises(RecordError, match="'extra' in the model's state_dict"):
        save(tmp_path, 2, model_state={"extra": value})
    assert names(tmp_path) == ["step-00000001"]


# Damage


@given(data=st.data(), name=st.sampled_from(FILES), bits=st.integers(1, 255))
@quick
def test_a_changed_byte_is_seen(data: st.DataObject, name: str, bits: int, copy: Path) -> None:
    whole = (copy / name).read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    damaged = bytearray(whole)
    damaged[at] ^= bits
    (copy / name).write_bytes(damaged)
    try:
        expect_damage(copy, name)
    finally:
        (copy / name).write_bytes(whole)


@given(data=st.data(), name=st.sampled_from(FILES))
@quick
def test_a_file_of_another_length_is_seen(data: st.DataObject, name: str, copy: Path) -> None:
    whole = (copy / name).read_bytes()
    end = data.draw(st.integers(0, len(whole) - 1))
    for other in (whole[:end], whole[:end] + b"\0" * (len(whole) - end), whole + b"\0", whole + b"\n"):
        (copy / name).write_bytes(other)
        try:
            if other != whole:
                expect_damage(copy, name)
        finally:
            (copy / name).write_bytes(whole)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_seen(name: str, copy: Path) -> None:
    (copy / name).unlink()
    expect_damage(copy, name, "cannot be read: No such file or directory")
    (copy / name).mkdir()
    expect_damage(copy, name)


def expect_damage(path: Path, name: str, why: str = "") -> None:
    with pytest.raises(CheckpointError, match="is damaged") as caught:
        verify(path)
    message = caught.value.message
    assert all(part in message for part in (str(path), name, why))
    assert "\n" not in message
    with pytest.raises(CheckpointError, match="is damaged"):
        load(path)
    assert newest_sound(path.parent) == (None, [message])


@pytest.mark.parametrize("text", [b"", b"[]", b"3", b"{}", b"null", b"\xff", b"[" * 100_000])
def test_a_manifest_that_is_something_else_is_seen(text: bytes, copy: Path) -> None:
    (copy / MANIFEST).write_bytes(text)
    expect_damage(copy, MANIFEST, "not as it was written")


def test_a_later_format_is_refused(copy: Path) -> None:
    table = json.loads((copy / MANIFEST).read_bytes())
    del table["sha256"]
    (copy / MANIFEST).write_bytes(checkpoint._manifest_bytes(table | {"format": 2}))
    with pytest.raises(CheckpointError, match="has format 2, and this version of Instep reads 1"):
        verify(copy)


def test_damaged_ones_are_passed_over_and_named(tmp_path: Path) -> None:
    assert newest_sound(tmp_path / "none") == (None, [])
    for version in (1, 2, 3, 100_000_000):
        save(tmp_path, version)
    (tmp_path / "step-00000002x").mkdir()
    (tmp_path / "step-00000009").write_text("a file")
    with (tmp_path / "step-100000000" / TRAINING).open("ab") as file:
        file.truncate(10)
    (tmp_path / "step-00000003" / MODEL).unlink()
    path, problems = newest_sound(tmp_path)
    assert path == tmp_path / "step-00000002"
    assert len(problems) == 2
    assert "step-100000000 is damaged: training.pt has 10 bytes of" in problems[0]
    assert "step-00000003 is damaged: model.safetensors cannot be read" in problems[1]


def test_the_fingerprint_decides(tmp_path: Path) -> None:
    check_recipe(tmp_path, saved="a", current="a")
    with pytest.raises(CheckpointError, match=r"belongs to another recipe; resume with"):
        check_recipe(tmp_path, saved="a", current="b")


# What is kept


def test_the_last_ones_are_kept(tmp_path: Path) -> None:
    for version in range(5):
        save(tmp_path, version, keep=0)
    assert len(names(tmp_path)) == 5
    save(tmp_path, 5, keep=3)
    assert names(tmp_path) == ["step-00000003", "step-00000004", "step-00000005"]
    save(tmp_path, 6, keep=1)
    assert names(tmp_path) == ["step-00000006"]
    save(tmp_path, 4, keep=2)  # a history taken back: the later one is not older, and stays
    save(tmp_path, 5, keep=1)
    assert names(tmp_path) == ["step-00000005", "step-00000006"]


@given(versions=st.sets(st.integers(0, 20), max_size=5), keep=st.integers(0, 7))
@settings(max_examples=30)
def test_exactly_as_many_as_asked_are_kept(versions: set[int], keep: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for version in versions:
            (folder / f"step-{version:08d}").mkdir()
        save(folder, 21, keep=keep)
        expected = sorted([*versions, 21])[-keep if keep else 0 :]
        assert names(folder) == [f"step-{version:08d}" for version in expected]


@pytest.mark.parametrize("keep", [0, 1, 2])
def test_the_same_version_is_replaced(keep: int, tmp_path: Path) -> None:
    save(tmp_path, 3)
    (tmp_path / "step-00000003" / MODEL).write_bytes(b"damaged")
    save(tmp_path, 3, keep=keep, meta={"attempt": 2})
    assert names(tmp_path) == ["step-00000003"]
    assert verify(tmp_path / "step-00000003").meta == {"attempt": 2}


def test_what_a_crash_left_is_tidied(tmp_path: Path) -> None:
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / ".replaced-step-00000001")
    (tmp_path / "step-00000001").rename(tmp_path / ".saving-step-00000001")
    assert newest_sound(tmp_path) == (tmp_path / ".replaced-step-00000001", [])
    save(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
    verify(tmp_path / "step-00000001")
    shutil.copytree(tmp_path / "step-00000001", tmp_path / ".replaced-step-00000001")
    assert newest_sound(tmp_path)[0] == tmp_path / "step-00000002"
    save(tmp_path, 3)
    assert names(tmp_path) == ["step-00000001", "step-00000002", "step-00000003"]


# Disks


@pytest.mark.processes
def test_a_full_disk_takes_nothing(tmp_path: Path) -> None:
    with full_disk(tmp_path, size_bytes=1 << 20) as disk:
        for version in (1, 2):
            save(disk, version)
        before = {path: path.read_bytes() for path in disk.rglob("*.*") if path.is_file()}
        too_much = torch.zeros(1 << 18)
        for fields in (
            {"model_state": {"w": too_much}},
            {"training_state": {"moments": too_much}},
            {"training_state": {"many": [torch.zeros(1000) for _ in range(300)]}},
            {"meta": {"text": "x" * (1 << 20)}},
        ):
            for version in (2, 3):
                with pytest.raises(ResourceError) as caught:
                    save(disk, version, keep=1, **fields)
                assert caught.value.message == (
                    f"the checkpoint {disk}/step-{version:08d} cannot be saved: No space left on device; free some "
                    "space there, or use a folder on another disk; step-00000002 is kept."
                )
                assert {path: path.read_bytes() for path in disk.rglob("*.*") if path.is_file()} == before
                assert names(disk) == ["step-00000001", "step-00000002"]
        save(disk, 3)
        assert newest_sound(disk) == (disk / "step-00000003", [])


@pytest.mark.processes
def test_a_full_disk_at_the_first_checkpoint(tmp_path: Path) -> None:
    with full_disk(tmp_path, size_bytes=1 << 20) as disk:
        with pytest.raises(ResourceError, match="there was no checkpoint before it"):
            save(disk, 1, size=1 << 20)
        assert names(disk) == []


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot be saved: File exists; check the folder"):
        save(tmp_path / "file", 1)
    with pytest.raises(ResourceError, match="cannot be saved: Not a directory"):
        save(tmp_path / "file" / "deep", 1)


class Disk:
    """Watches every change of the file system, and acts at one of them, or at that and all that follow."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.act: Callable[[], object] | None = None
        self.moment = self.seen = 0
        self.lasting = False
        for name in ("mkdir", "open", "fsync", "rename", "unlink", "rmdir"):
            monkeypatch.setattr(os, name, self._watched(getattr(os, name)))

    def at(self, moment: int, act: Callable[[], object], *, lasting: bool = False) -> None:
        self.moment, self.act, self.lasting, self.seen = moment, act, lasting, 0

    def _watched(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            if self.act:
                self.seen += 1
                if self.seen == self.moment or (self.lasting and self.seen > self.moment):
                    self.act()
            return call(*args, **kwargs)

        return watched

    @property
    def reached(self) -> bool:
        return self.seen >= self.moment


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def expect_sound(folder: Path, versions: tuple[int, ...]) -> checkpoint.Manifest:
    """The newest checkpoint is sound and of one of `versions`, and saving goes on from here and cleans up."""
    path, problems = newest_sound(folder)
    assert not problems
    assert path is not None
    manifest = read_manifest(path)
    assert manifest.version in versions
    save(folder, 4, keep=1)
    assert names(folder) == ["step-00000004"]
    return manifest


@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.parametrize("version", [2, 3])
def test_an_error_of_the_disk_at_any_moment_takes_nothing(
    version: int, lasting: bool, two: Path, tmp_path: Path, disk: Disk
) -> None:
    def fail() -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    failures = 0
    for moment in range(1, 1000):
        folder = shutil.copytree(two, tmp_path / str(moment))
        disk.at(moment, fail, lasting=lasting)
        try:
            save(folder, version, keep=1, meta={"new": True})
            message = ""
        except ResourceError as error:
            message = error.message
        disk.act = None
        manifest = expect_sound(folder, (2, version))
        if message:
            failures += 1
            # On a disk that stays broken, the one being replaced cannot be given its name back.
            kept = r"(\.replaced-)?step-0000000." if lasting else r"step-0000000."
            assert re.search(rf"Input/output error; check the disk, .*; {kept} is kept\.$", message)
        else:
            assert manifest.meta == {"new": True}
        if not disk.reached:
            break
    assert failures >= 9


@pytest.mark.processes
@pytest.mark.parametrize("version", [2, 3])
def test_a_kill_at_any_moment_takes_nothing(version: int, two: Path, tmp_path: Path, disk: Disk) -> None:
    """Every change of the file system in turn is the one before which the process dies."""
    for moment in range(1, 1000):
        folder = shutil.copytree(two, tmp_path / str(moment))
        child = os.fork()
        if not child:
            disk.at(moment, lambda: os.kill(os.getpid(), signal.SIGKILL))
            save(folder, version, keep=1, meta={"new": True})
            os._exit(0)
        killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        manifest = expect_sound(folder, (2, version))
        if not killed:
            assert manifest.meta == {"new": True}
            assert moment > 10
            break


def _save_for_ever(folder: Path) -> None:
    torch.set_num_threads(1)
    for count in range(10**6):
        save(folder, 1 + count // 2, size=50_000, keep=1 + count % 2)


@pytest.mark.processes
def test_kill_9_at_random_moments(tmp_path: Path) -> None:
    generator = random.Random(0)
    save(tmp_path, 1)
    for _ in range(12):
        process = multiprocessing.get_context("fork").Process(target=_save_for_ever, args=(tmp_path,))
        process.start()
        time.sleep(generator.uniform(0.01, 0.15))
        process.kill()
        process.join()
        path, problems = newest_sound(tmp_path)
        assert not problems
        assert path is not None
        loaded = load(path)
        assert loaded.model_state["n"].item() == loaded.version == loaded.training_state["step"]


class Foreign:
    """What runs code as it is read."""

    def __reduce__(self) -> Any:
        return os.system, ("true",)


@pytest.mark.parametrize("plain", [True, False])
def test_a_pickle_in_the_training_state_is_told_as_what_it_is(plain: bool, tmp_path: Path) -> None:
    saved = save(tmp_path, 1)
    with (saved.path / TRAINING).open("wb") as file:
        pickle.dump({"optimizer": Foreign()}, file) if plain else torch.save({"optimizer": Foreign()}, file)
    table = json.loads((saved.path / MANIFEST).read_bytes())
    data = (saved.path / TRAINING).read_bytes()
    table["files"][TRAINING] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    del table["sha256"]
    (saved.path / MANIFEST).write_bytes(checkpoint._manifest_bytes(table))
    verify(saved.path)
    with pytest.raises(CheckpointError, match=r"training\.pt holds objects that could run code \(.*system\)"):
        load(saved.path)
