"""The TensorBoard tracker: what it writes is what the tape says, read back by TensorBoard's own reader."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from instep.artifacts.digits import write_png
from instep.errors import ResourceError
from instep.monitors.tensorboard import TensorBoard
from instep.recipe import Team
from instep.record import tape
from support import workloads
from support.events import a_run, ended, merged, started
from support.full_disk import full_disk
from support.harness import Client, train_here
from support.patience import LONG_S
from support.processes import INSTEP, write_project
from support.serving import at, kill

accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """By tag and version."""
    reader = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    reader.Reload()
    found: dict[str, dict[int, float]] = {}
    for tag in reader.Tags()["scalars"]:
        points = reader.Scalars(tag)
        found[tag] = {point.step: point.value for point in points}
        assert len(found[tag]) == len(points), "one value a version"
    return found


def same(found: dict[int, float], expected: dict[int, float]) -> None:
    assert found.keys() == expected.keys()
    assert all(math.isclose(found[v], expected[v], rel_tol=1e-6) for v in found), "they are float32"


@pytest.mark.processes
def test_a_run_with_a_death_is_tracked_as_its_tape_tells(tmp_path: Path) -> None:
    with TensorBoard(tmp_path / "board") as tracker:
        killing = at("merged", 5, kill(1))

        def see(event: dict[str, Any]) -> None:
            tracker(event)
            killing(event)

        recipe = workloads.convnet(evaluate_every=3)
        run = train_here(recipe, Team(workers=2, checkpoint_every=2), tmp_path / "run", client=Client(see))
    assert run.result["restarts"] == 1
    found = scalars(tmp_path / "board")
    merges = tape.latest(run.events)
    same(found["objective/train"], {e["version"]: e["objective"] for e in merges})
    same(found["terms/pull"], {e["version"]: e["terms"]["pull"] for e in merges if "pull" in e["terms"]})
    same(found["optimizer/learning_rate"], {e["version"]: e["lr"] for e in merges})
    same(found["optimizer/gradient_norm"], {e["version"]: e["grad_norm"] for e in merges})
    same(found["objective/held_out"], {e["version"]: e["objective"] for e in tape.latest(run.events, "evaluated")})
    with TensorBoard(tmp_path / "again") as tracker:
        for event in tape.read(run.path / "tape.jsonl"):
            tracker(event)
    assert scalars(tmp_path / "again") == found


def test_events_are_in_the_file_at_once_and_numbers_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    tracker = TensorBoard(tmp_path)
    assert not list(tmp_path.iterdir()), "a run folder must be empty when the run begins"
    tracker(started())
    tracker(merged(3.0, 1, objective=2.5, lr=None))
    tracker(merged(4.0, 2, objective=None, staleness=[0, 3]))
    assert scalars(tmp_path) == {"objective/train": {1: 2.5}, "rule/staleness": {2: 3.0}}
    tracker.close()
    tracker(merged(5.0, 3))
    assert 3 not in scalars(tmp_path)["objective/train"]


def test_every_kind_of_event_is_taken(tmp_path: Path) -> None:
    with TensorBoard(tmp_path) as tracker:
        for event in a_run(died=True):
            tracker(event)
    assert set(scalars(tmp_path)["objective/train"]) == set(range(1, 21))


def test_a_folder_that_cannot_be_written_to_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match=r"TensorBoard's folder .*file/x cannot be written to"):
        TensorBoard(tmp_path / "file" / "x")(started())


@pytest.mark.processes
def test_a_full_disk_ends_the_tracking_and_not_the_run(tmp_path: Path) -> None:
    with full_disk(tmp_path, 8192) as disk:
        with TensorBoard(disk) as tracker:
            tracker(started())
            for version in range(1, 300):
                tracker(merged(3.0, version))
        assert sum(path.stat().st_size for path in disk.iterdir()) <= 8192


def test_without_the_package_it_is_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto", None)
    with pytest.raises(ResourceError, match=r"not installed; install it with: pip install 'instep\[tensorboard\]'"):
        TensorBoard(tmp_path)


# --------------------------------------------------------------------------------------------------- the command line


def train_command(folder: Path, *flags: str, path: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [path, os.environ.get("PYTHONPATH", "")]))}
    command = [*INSTEP, "train", *flags]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=LONG_S, check=False
    )


@pytest.mark.processes
@pytest.mark.slow
def test_a_flag_tracks_a_run_in_its_folder_and_goes_on_after_a_resume(tmp_path: Path) -> None:
    write_project(tmp_path)
    for flags in (["my.toml", "--out", "run", "--steps", "7", "--tensorboard"], ["--resume", "run", "--steps", "12"]):
        done = train_command(tmp_path, *flags, "--workers", "1")
        assert done.returncode == 0, done.stderr
    merges = tape.latest(list(tape.read(tmp_path / "run" / "tape.jsonl")))
    assert [event["version"] for event in merges] == list(range(1, 13))
    found = scalars(tmp_path / "run" / "tensorboard")
    same(found["objective/train"], {event["version"]: event["objective"] for event in merges})
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 2, "a file for each time it was started"
    assert train_command(tmp_path, "my.toml", "--out", "plain", "--steps", "2", "--workers", "1").returncode == 0
    assert not (tmp_path / "plain" / "tensorboard").exists(), "nothing is tracked by default"


@pytest.mark.processes
def test_the_flag_without_the_package_is_one_sentence_before_the_run(tmp_path: Path) -> None:
    write_project(tmp_path)
    (tmp_path / "shadow" / "tensorboard").mkdir(parents=True)
    (tmp_path / "shadow" / "tensorboard" / "__init__.py").touch()
    done = train_command(tmp_path, "my.toml", "--out", "run", "--tensorboard", path=str(tmp_path / "shadow"))
    assert done.returncode == 1
    assert done.stderr == "instep: TensorBoard is not installed; install it with: pip install 'instep[tensorboard]'.\n"
    assert not (tmp_path / "run").exists()


def test_what_a_run_makes_is_shown_by_version(tmp_path: Path) -> None:
    picture = tmp_path / "artifacts-at" / "2" / "samples.png"
    picture.parent.mkdir(parents=True)
    write_png(picture, torch.zeros(3, 5, dtype=torch.uint8))
    sampled = {
        "t_s": 3.0, "kind": "sampled", "version": 2, "sample": "def f", "took_s": 0.1,
        "files": ["artifacts-at/2/samples.png", "gone.png"], "figures": {"recognised": 0.5},
    }  # fmt: skip
    with TensorBoard(tmp_path / "board") as tracker:
        for event in (started() | {"folder": str(tmp_path)}, sampled, ended(4.0, 3, sample="the end")):
            tracker(event)
    reader = accumulator.EventAccumulator(str(tmp_path / "board"))
    reader.Reload()
    (shown,) = reader.Images("samples.png")
    assert (shown.step, shown.width, shown.height) == (2, 5, 3)
    assert shown.encoded_image_string == picture.read_bytes()
    assert [(each.step, each.tensor_proto.string_val[0]) for each in reader.Tensors("sample")] == [
        (2, b"def f"), (3, b"the end"),
    ]  # fmt: skip
    assert [(each.step, each.value) for each in reader.Scalars("artifacts/recognised")] == [(2, 0.5)]
