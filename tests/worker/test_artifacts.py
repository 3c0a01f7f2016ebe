"""What models and recipes make on the way: of which weights, and that it leaves no trace in the run."""

from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from instep.errors import killed_by
from instep.recipe import Team
from instep.record import checkpoint
from instep.record.averages import give_average
from instep.worker.trial import CopyLost, in_a_copy
from support import workloads
from support.harness import train_here
from support.regression import regression


def curious_artifacts(model: nn.Module, data: Any, folder: Path) -> dict[str, float]:
    """Leaves a text and a figure of the weights that it is shown, and then spoils all that it can reach."""
    sum_ = float(sum(parameter.double().sum() for parameter in model.parameters()))
    (folder / "sum.txt").write_text(repr(sum_))
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
    for each in model.modules():
        each._forward_hooks.clear()
    model.register_forward_hook(lambda *_: torch.zeros(()))
    torch.manual_seed(99)
    torch.set_num_threads(2)
    return {"sum": sum_}


@pytest.mark.processes
@pytest.mark.parametrize(("engine", "workers"), [("lockstep", 1), ("lockstep", 2), ("lockstep", 3), ("server", 2)])
def test_artifacts_on_the_way_show_each_version_and_change_no_bit(engine: Any, workers: int, tmp_path: Path) -> None:
    plain = train_here(workloads.convnet(steps=6, microbatches=4), Team(), tmp_path / "plain")
    recipe = workloads.convnet(steps=6, microbatches=4, artifacts=curious_artifacts, artifacts_every=2)
    run = train_here(recipe, Team(workers=workers, engine=engine, checkpoint_every=1, keep=0), tmp_path / "run")
    assert run.digest == plain.digest
    told = [event for event in run.events if event["kind"] == "sampled"]
    assert [event["version"] for event in told] == [2, 4]
    assert not [event for event in run.events if event["kind"] == "warned"]
    saved = checkpoint.by_version(tmp_path / "run" / "checkpoints")
    for event in told:
        state = checkpoint.load(saved[event["version"]]).model_state
        names = [name for name, _ in workloads.convnet().model.build().named_parameters()]
        assert event["figures"]["sum"] == pytest.approx(float(sum(state[name].double().sum() for name in names)))
        assert event["files"] == [f"artifacts-at/{event['version']}/sum.txt"]
        assert (tmp_path / "run" / event["files"][0]).read_text() == repr(event["figures"]["sum"])
    assert run.result["artifacts"]["files"] == ["artifacts/sum.txt"]


@pytest.mark.processes
@pytest.mark.parametrize(("engine", "workers"), [("lockstep", 1), ("lockstep", 2), ("server", 2)])
def test_they_are_made_of_each_average_of_the_weights_too(engine: Any, workers: int, tmp_path: Path) -> None:
    plain = train_here(workloads.convnet(steps=5, microbatches=4), Team(), tmp_path / "plain")
    decays = (0.5, 0.9)
    recipe = workloads.convnet(steps=5, microbatches=4, artifacts=curious_artifacts, artifacts_every=2, ema=decays)
    run = train_here(recipe, Team(workers=workers, engine=engine, checkpoint_every=1, keep=0), tmp_path / "run")
    assert run.digest == plain.digest
    assert not [event for event in run.events if event["kind"] == "warned"]
    told = {event["version"]: event for event in run.events if event["kind"] == "sampled"}
    told[5] = run.result["artifacts"]
    for version, event in told.items():
        folder = "artifacts" if version == 5 else f"artifacts-at/{version}"
        expected = [f"{folder}/ema-0.5/sum.txt", f"{folder}/ema-0.9/sum.txt", f"{folder}/sum.txt"]
        assert event["files"] == expected
        path = checkpoint.path_of(tmp_path / "run" / "checkpoints", version)
        for decay in decays:
            saved = checkpoint.load(path)
            model = workloads.convnet().model.build()
            model.load_state_dict(saved.model_state)
            give_average(model, saved, decay)
            sum_ = float(sum(parameter.detach().double().sum() for parameter in model.parameters()))
            assert event["figures"][f"sum.ema.{decay}"] == pytest.approx(sum_)
            assert (tmp_path / "run" / folder / f"ema-{decay}" / "sum.txt").read_text() == repr(
                event["figures"][f"sum.ema.{decay}"]
            )
        assert len({round(value, 6) for value in event["figures"].values()}) == 3


@pytest.mark.processes
def test_what_fails_for_an_average_names_it_and_leaves_the_rest(tmp_path: Path) -> None:
    def only_of_weights(model: nn.Module, data: Any, folder: Path) -> None:
        if "ema" in folder.name:
            raise ValueError("not of these")
        (folder / "note.txt").write_text("here")

    run = train_here(regression(artifacts=only_of_weights, ema=(0.9,)), Team(), tmp_path / "run")
    (why,) = [event["why"] for event in run.events if event["kind"] == "warned"]
    assert why.startswith("the artifacts of the average 0.9 could not be written: ValueError: not of these (")
    assert run.result["artifacts"] == {"files": ["artifacts/note.txt"], "figures": {}}


@pytest.mark.processes
def test_artifacts_on_the_way_that_fail_or_kill_themselves_are_warned_of(tmp_path: Path) -> None:
    def fatal(model: nn.Module, data: Any, folder: Path) -> None:
        if "artifacts-at" in folder.parts:
            os.kill(os.getpid(), signal.SIGKILL)

    plain = train_here(workloads.convnet(steps=3), Team(), tmp_path / "plain")
    recipe = workloads.convnet(steps=3, artifacts=fatal, artifacts_every=1)
    run = train_here(recipe, Team(workers=2), tmp_path / "run")
    assert run.digest == plain.digest
    why = [event["why"] for event in run.events if event["kind"] == "warned"]
    assert why == [f"the artifacts of version {n} could not be written: it was {killed_by(-9)}." for n in (1, 2)]
    assert run.result["restarts"] == 0


@pytest.mark.pure
def test_a_process_that_the_system_does_not_copy_is_told_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> int:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(os, "fork", refuse)
    with pytest.raises(CopyLost, match=r"^the process could not be copied \(.*Cannot allocate memory"):
        in_a_copy(lambda: None)


@pytest.mark.processes
def test_a_copy_of_a_process_may_start_others() -> None:
    def counted() -> int:
        rows = DataLoader(TensorDataset(torch.zeros(8, 1)), batch_size=4, num_workers=1)
        return sum(len(points) for (points,) in rows)

    assert in_a_copy(counted) == 8


@pytest.mark.processes
def test_a_copy_of_a_process_that_does_not_end_is_given_up() -> None:
    began = time.monotonic()
    with pytest.raises(CopyLost, match=r"^it did not end within 0.2 s$"):
        in_a_copy(lambda: time.sleep(3600), within_s=0.2)
    assert time.monotonic() - began < 600


@pytest.mark.processes
def test_where_nothing_is_made_on_the_way_a_run_says_so(tmp_path: Path) -> None:
    run = train_here(regression(steps=2, artifacts_every=1), Team(workers=2), tmp_path / "run")
    assert [event["why"] for event in run.events if event["kind"] == "warned"] == [
        "recipe.artifacts_every is 1, and nothing is made: the recipe has no artifacts and, for text, no sample_length."
    ]
    assert not [event for event in run.events if event["kind"] == "sampled"]
    assert not (tmp_path / "run" / "artifacts-at").exists()
