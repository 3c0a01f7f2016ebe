"""More or fewer workers while a run goes on, as its owner asks: the same digest, no restart, no step twice."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from instep.cli import main
from instep.errors import RecordError, ResourceError
from instep.recipe import Team
from instep.team import crew
from instep.team.asking import resized, standing_of
from instep.transport.memory import reserve as transport_reserve
from support.agents import train_on
from support.harness import Outcome, told, train_here
from support.kinds import quick
from support.patience import LONG_S
from support.regression import regression, waiting_in
from support.threads import meanwhile

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of `regression` undisturbed."""
    return train_here(regression(steps=3), Team(), tmp_path_factory.mktemp("alone") / "run").digest


def when_going(path: Path) -> None:
    """Returns once somebody waits in step 2."""
    until = time.monotonic() + LONG_S
    while time.monotonic() < until:
        try:
            if any(each["doing"] == "computing step 2, microbatch 0" for each in standing_of(path)["members"]):
                return
        except Exception:  # it is not there yet
            pass
        time.sleep(0.02)


def check_changed_in_step_2(run: Outcome, before: int, after: int) -> None:
    """The team was changed then, and nothing else happened."""
    (event,) = told(run, "resized")
    assert (event["before"], event["workers"]) == (before, after)
    assert ", process " in event["by_whom"]
    starts = [(each["version"], each["team"]["workers"]) for each in told(run, "run_started")]
    at = starts[-1][0] if run.result["engine"] == "server" else 2  # which waits for nobody who computes: 1 or 2
    assert starts == [(0, before), (at, after)]
    assert at in (1, 2)
    assert [each["version"] for each in told(run, "merged")] == [1, 2, 3], "no step is done twice"
    assert (run.result["restarts"], told(run, "left"), run.result["workers"]) == (0, [], after)


CASES = [(engine, *team) for engine in ("lockstep", "server") for team in ((1, 3), (3, 1), (2, 4))]


@pytest.mark.parametrize("case", quick(CASES, ("lockstep", 1, 3), ("lockstep", 3, 1), ("server", 2, 4)), ids=str)
def test_a_team_that_is_changed_in_a_step_goes_on_after_it_with_the_same_digest(
    case: tuple[Any, int, int], tmp_path: Path, alone: str
) -> None:
    engine, before, after = case
    path, file = tmp_path / "run", tmp_path / "go on"

    def ask() -> None:
        when_going(path)
        assert resized(path, after)["before"] == before
        assert resized(path, after)["before"] == after, "which changes nothing more"

    with meanwhile(ask, file.touch):
        run = train_here(waiting_in(1, 0, file), Team(workers=before, engine=engine), path)
    assert run.digest == alone
    check_changed_in_step_2(run, before, after)


@pytest.mark.usefixtures("agents_meet_here")
def test_hosts_share_the_workers_anew(tmp_path: Path, alone: str) -> None:
    path, file = tmp_path / "run", tmp_path / "go on"

    def ask() -> None:
        when_going(path)
        resized(path, 4)

    with meanwhile(ask, file.touch):
        run, _ = train_on((1, 1), waiting_in(1, 0, file), Team(workers=2, lease_s=60.0), path)
    assert run.digest == alone
    check_changed_in_step_2(run, 2, 4)
    assert [host["workers"] for host in told(run, "run_started")[-1]["hosts"]] == [2, 2]


def test_what_a_team_cannot_be_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, file = tmp_path / "run", tmp_path / "go on"
    said: list[str] = []

    def command(workers: int) -> None:
        assert main(["team", str(path), "--workers", str(workers)]) == 2
        said.append(capsys.readouterr().err)

    def ask() -> None:
        when_going(path)
        for workers in (0, 5):
            command(workers)
        with pytest.raises(RecordError):
            resized(path, 5)
        assert main(["team", str(path), "--workers", "2"]) == 0
        said.append(capsys.readouterr().out)

    with meanwhile(ask, file.touch):
        run = train_here(waiting_in(1, 0, file), Team(workers=2), path)
    command(3)
    zero, five, same, ended = said
    assert zero.startswith("instep: --workers is 0; a team has from 1 to ")
    assert five == (
        f"instep: {path}: 5 workers are more than the 4 microbatches of a step, which are never split; take at most 4 "
        f"workers, or raise recipe.microbatches.\n"
    )
    assert same == f"{path} has 2 workers already.\n"
    assert ended == (
        f"instep: {path} does not go on, so its team cannot change; resume it with 3 workers, or start it again.\n"
    )
    assert not told(run, "resized")


@pytest.mark.parametrize("way", quick(["no room", "killed at its start", "killed in its first step"], "no room"))
def test_a_number_that_there_is_no_room_for_is_undone_with_a_sentence_and_the_run_goes_on(
    way: str, tmp_path: Path, alone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, file, calls = tmp_path / "run", tmp_path / "go on", list[int]()

    def reserve(*args: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise ResourceError("the team needs 9 MiB of shared memory, and 1 MiB is free.")
        transport_reserve(*args)

    def killed_if_fourth(what: Any) -> Any:
        def call(*args: Any) -> Any:
            if multiprocessing.current_process().name == "worker-3":
                os.kill(os.getpid(), signal.SIGKILL)
            return what(*args)

        return call

    recipe, why = waiting_in(1, 0, file), ") was killed by SIGKILL"
    if way == "no room":
        monkeypatch.setattr(crew, "reserve", reserve)
        why = "the team needs 9 MiB of shared memory"
    elif way == "killed at its start":
        recipe = replace(recipe, model=killed_if_fourth(lambda: nn.Linear(3, 1)))
    else:
        recipe = replace(recipe, objective=killed_if_fourth(recipe.objective.use))

    def ask() -> None:
        when_going(path)
        resized(path, 4)

    with meanwhile(ask, file.touch):
        run = train_here(recipe, Team(workers=2, restarts=0), path)
    assert run.digest == alone
    assert [(each["before"], each["workers"]) for each in told(run, "resized")] == [(2, 4), (4, 2)]
    warned = [each["why"] for each in told(run, "warned")]
    assert len(warned) == 1
    assert warned[0].startswith("the team cannot have 4 workers, and goes on with 2: ")
    assert why in warned[0]
    assert (run.result["restarts"], run.result["workers"]) == (0, 2)
    assert [each["version"] for each in told(run, "merged")] == [1, 2, 3], "no step is done twice"
