"""The virtual engine: real gradients along a schedule."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from instep.api import replay as replay_alone
from instep.api import simulate as simulate_alone
from instep.api import train
from instep.clock.network import Network
from instep.clock.times import Failures, RecordedTimes, WorkerTimes
from instep.components import Component
from instep.errors import CheckpointError, RecipeError, RecordError, WorkerError
from instep.offline.cluster import Cluster
from instep.offline.simulation import simulate
from instep.offline.tape_replay import replay
from instep.recipe import Recipe, Team, dumps
from instep.record import checkpoint, tape
from instep.record.folder import About, RunFolder, digest
from instep.rules import PRESETS, UpdateRule
from support.kinds import quick
from support.reference import reference_digests
from support.regression import regression
from support.workloads import ALL, convnet, gpt

pytestmark = pytest.mark.processes

SMALL: dict[str, dict[str, int]] = {
    "local_sgd": {"local_steps": 2},
    "post_local_sgd": {"local_steps": 2, "after": 2},
    "diloco": {"local_steps": 3},
    "async_diloco": {"local_steps": 2, "buffer": 4},
}
TIMES = WorkerTimes.lognormal(0.1, 0.05, seed=1)


def rule(name: str) -> UpdateRule:
    return PRESETS[name](**SMALL.get(name, {}))


def run(recipe: Recipe, folder: Path | None = None, *, gradients: bool = True, **cluster: Any) -> dict[str, Any]:
    if folder is not None:
        RunFolder.create(folder)
    fields = {"workers": 3, "times": TIMES, "merge_s": 0.01, **cluster}
    return simulate(recipe, Cluster(**fields), gradients, folder, lambda event: None)


@pytest.mark.parametrize("name", quick(PRESETS, "asynchronous", "backup_workers", "post_local_sgd", "async_diloco"))
def test_a_simulated_run_can_be_replayed(name: str, tmp_path: Path) -> None:
    recipe = gpt(rule=rule(name))
    failures = WorkerTimes.lognormal(0.1, 0.05, seed=1, failures=Failures(3.0, 0.5))
    result = run(recipe, tmp_path / "run", times=failures, network=Network(1e6, 0.001))
    found = replay(recipe, tape.read(tmp_path / "run" / "tape.jsonl"))
    assert found.same, found.divergence
    assert found.digest == result["digest"] == digest(tmp_path / "run")
    assert result["steps"] == recipe.steps


@pytest.mark.parametrize("workload", ALL)
@pytest.mark.parametrize("workers", quick([1, 3, 8], 3))
@pytest.mark.parametrize("collective", [True, False])
def test_synchronous_has_the_digest_of_lockstep(workload: str, workers: int, collective: bool) -> None:
    recipe = ALL[workload](steps=4)
    assert run(recipe, workers=workers, collective=collective)["digest"] == reference_digests(recipe)[4]


@pytest.mark.parametrize("name", quick(PRESETS, "asynchronous", "backup_workers", "diloco"))
def test_times_and_bytes_do_not_depend_on_gradients(name: str) -> None:
    recipe = convnet(rule=rule(name))
    with_them, without = run(recipe), run(recipe, gradients=False)
    keys = (
        "wall_s",
        "versions",
        "bytes_sent",
        "staleness_mean",
        "staleness_max",
        "delayed_max",
        "lead_max",
        "idle_share",
        "dropped",
    )
    assert {key: with_them[key] for key in keys} == {key: without[key] for key in keys}
    assert without["digest"] is None


def test_the_same_seed_gives_the_same_run() -> None:
    recipe = gpt(rule=rule("asynchronous"), steps=3)
    first, again = run(recipe), run(recipe)
    assert first["digest"] == again["digest"]
    other = run(recipe, times=WorkerTimes.lognormal(0.1, 0.05, seed=2))
    assert other["digest"] != first["digest"]


def test_recorded_times_are_lived_through_again() -> None:
    times = RecordedTimes.of({0: [0.1, 0.2], 1: [0.3]}, 2)
    draw = times.draws(2)
    assert [draw(0), draw(0), draw(1), draw(0), draw(1)] == [0.1, 0.2, 0.3, 0.1, 0.3]
    result = run(gpt(rule=rule("asynchronous"), steps=4), workers=2, times=times, merge_s=0.0)
    # Pieces of 4 microbatches: worker 0 pushes at 0.4, 1.2, 1.6, 2.4, 2.8, worker 1 at 1.2, 2.4 and, the eighth, 3.6.
    assert result["wall_s"] == pytest.approx(3.6)


def test_a_worker_without_times_is_named() -> None:
    with pytest.raises(RecordError, match="no time of worker 1"):
        RecordedTimes.of({0: [0.1]}, 2)


def test_buffers_are_means_with_more_workers_than_microbatches_too(tmp_path: Path) -> None:
    recipe = convnet(rule=rule("synchronous"), steps=6)
    found = {}
    for workers in (8, 16):
        run(recipe, tmp_path / str(workers), workers=workers)
        path, _ = checkpoint.newest_sound(tmp_path / str(workers) / "checkpoints")
        assert path is not None
        state = checkpoint.load(path).model_state
        found[workers] = {name: value for name, value in state.items() if "running_var" in name}
    for name, value in found[8].items():
        assert float(found[16][name].mean() / value.mean()) == pytest.approx(1, rel=0.3)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"workers": 0}, "'cluster.workers' is 0; it must be a whole number from 1"),
        ({"workers": 2.5}, "'cluster.workers' is 2.5"),
        ({"times": 0.1}, "'cluster.times' is 0.1; give instep.clock.times.WorkerTimes"),
        ({"merge_s": -1.0}, "'cluster.merge_s' is -1.0; it must be a finite time from 0"),
        ({"slow": "1:5x"}, "'cluster.slow' is '1:5x', and 'cluster.times' name other workers"),
        ({"slow": "2:5x", "times": None}, "'2:5x' names no worker of a team of 2"),
        (
            {"slow": "1:5x@1..9", "times": None},
            "'1:5x@1..9' names steps, which workers on a virtual clock are not slow by",
        ),
    ],
)
def test_a_cluster_that_cannot_be_is_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(sentence)):
        Cluster(**{"workers": 2, "times": TIMES, **fields})


@pytest.mark.usefixtures("forked_pythons")
def test_a_simulation_that_is_killed_says_so(tmp_path: Path) -> None:
    (tmp_path / "greedy.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    recipe = convnet(model=Component("greedy:Net"))
    with pytest.raises(WorkerError, match="was killed by SIGKILL, as the kernel does when memory runs out"):
        simulate_alone(recipe, Cluster(workers=1, times=TIMES), import_paths=[str(tmp_path)])


@pytest.mark.usefixtures("forked_pythons")
def test_a_replay_that_is_killed_is_not_told_as_a_simulation(tmp_path: Path) -> None:
    (tmp_path / "greedy.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    recipe = convnet(model=Component("greedy:Net"))
    about = About(import_paths=(str(tmp_path),))
    folder = RunFolder.create(tmp_path / "run", dumps(recipe, Team()), about)
    started = {"t_s": 0, "clock": "wall", "kind": "run_started", "schema": 2, "fingerprint": recipe.fingerprint()}
    started |= {"engine": "lockstep", "cut": 1, "steps": 6, "team": {}, "version": 0}
    folder.tape_path.write_text(json.dumps(started) + "\n")
    with pytest.raises(WorkerError, match="was killed by SIGKILL, as the kernel .*; a replay takes the memory of one"):
        replay_alone(folder.path, recipe)


def test_failures_with_contributions_between_them_end_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("instep.offline.schedule._HOPELESS", 5)
    failing = WorkerTimes.lognormal(0.1, 0.05, seed=1, failures=Failures(1.0, 0.5))
    assert run(gpt(rule=rule("asynchronous"), steps=30), gradients=False, times=failing)["restarts"] > 5


def test_a_simulation_cannot_be_resumed(tmp_path: Path) -> None:
    run(gpt(), tmp_path / "run")
    with pytest.raises(CheckpointError, match="is the folder of a simulation, which cannot be resumed; train its"):
        train(gpt(), resume=tmp_path / "run")


def test_a_simulation_without_gradients_cannot_be_computed_again(tmp_path: Path) -> None:
    run(gpt(), tmp_path / "run", gradients=False)
    with pytest.raises(RecordError) as caught:
        replay(gpt(), tape.read(tmp_path / "run" / "tape.jsonl"))
    assert caught.value.message == (
        "the tape is of a simulation without gradients, so there is nothing to compute again; simulate without "
        "--no-gradients, or replay it under a --rule, which takes its times alone."
    )


def test_a_tape_in_columns_names_another_schema_than_readers_of_before_take(tmp_path: Path) -> None:
    for gradients, schema in (False, 3), (True, 2):
        run(gpt(), tmp_path / str(schema), gradients=gradients)
        first = next(tape.read(tmp_path / str(schema) / "tape.jsonl"))
        assert (first["kind"], first["schema"]) == ("run_started", schema)


def test_more_workers_than_microbatches_take_one_each() -> None:
    result = run(gpt(rule=rule("asynchronous"), steps=4), workers=20)
    assert result["versions"] == 4 * 8
    assert len(result["idle_share"]) == 20


@pytest.mark.usefixtures("forked_pythons")
def test_an_error_of_the_system_in_a_monitor_is_not_taken_for_the_end_of_the_process(tmp_path: Path) -> None:
    def full(event: dict[str, Any]) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        simulate_alone(regression(), Cluster(workers=2), gradients=False, out=tmp_path / "run", monitors=[full])
    assert not (tmp_path / "run").exists()
