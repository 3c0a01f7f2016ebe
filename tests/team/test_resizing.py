"""More or fewer workers while a run goes on, as its owner asks: the same digest, no restart, no step twice."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from instep.cli import main
from instep.engines.between_steps import BetweenSteps
from instep.errors import RecordError, ResourceError
from instep.randomness import key_of_step
from instep.recipe import Team
from instep.team import crew
from instep.team.asking import resized, standing_of
from instep.transport.memory import reserve as transport_reserve
from support.agents import train_on
from support.harness import Client, Outcome, told, train_here
from support.kinds import quick
from support.paced import Paced, changed, check_in_place, pid_of
from support.patience import LONG_S
from support.processes import wait_until
from support.regression import regression, squares, waiting_in
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
    assert [each["version"] for each in told(run, "merged")] == [1, 2, 3], "no step is done twice"
    assert (run.result["restarts"], run.result["workers"]) == (0, after)
    if run.result["engine"] == "server":
        assert starts in ([(0, before), (1, after)], [(0, before), (2, after)]), "it waits for nobody who computes"
        assert told(run, "left") == []
        return
    assert starts == [(0, before)], "all others go on"
    assert [each["version"] for each in told(run, "checkpointed")] == [3]
    (group,) = told(run, "regrouped")
    assert (group["version"], len(group["workers"])) == (2, after)
    assert len(told(run, "joined")) == max(before, after), "nobody has started twice"
    leave = sorted({*range(before)} - {*group["workers"]})
    assert sorted(each["worker"] for each in told(run, "left")) == leave
    assert {each["why"] for each in told(run, "left")} <= {f"the team goes on with {after} worker{'s' * (after > 1)}."}


TEAMS = ((1, 3), (3, 1), (2, 4), (4, 2), (3, 4), (4, 3))
CASES = [(engine, *team) for engine in ("lockstep", "server") for team in TEAMS[: 3 if engine == "server" else 6]]


@pytest.mark.parametrize(
    "case", quick(CASES, ("lockstep", 1, 3), ("lockstep", 3, 1), ("lockstep", 4, 2), ("server", 2, 4)), ids=str
)
def test_a_team_that_is_changed_in_a_step_goes_on_after_it_with_the_same_digest(
    case: tuple[Any, int, int], tmp_path: Path, alone: str, ordered: Callable[[], None]
) -> None:
    engine, before, after = case
    path, file = tmp_path / "run", tmp_path / "go on"

    def ask() -> None:
        when_going(path)
        assert resized(path, after)["before"] == before
        assert resized(path, after)["before"] == after, "which changes nothing more"
        if engine == "lockstep":
            ordered()

    with meanwhile(ask, file.touch):
        run = train_here(waiting_in(1, 0, file), Team(workers=before, engine=engine), path)
    assert run.digest == alone
    check_changed_in_step_2(run, before, after)


@pytest.mark.usefixtures("agents_meet_here")
@pytest.mark.parametrize(("before", "after"), [(2, 4), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_hosts_share_the_workers_anew(
    before: int, after: int, tmp_path: Path, alone: str, ordered: Callable[[], None]
) -> None:
    path, file = tmp_path / "run", tmp_path / "go on"

    def ask() -> None:
        when_going(path)
        resized(path, after)
        ordered()

    with meanwhile(ask, file.touch):
        run, _ = train_on((1, 1), waiting_in(1, 0, file), Team(workers=before, lease_s=60.0), path)
    assert run.digest == alone
    check_changed_in_step_2(run, before, after)
    assert told(run, "regrouped")[0]["workers"] == ([0, 2, 1, 3] if after == 4 else [0, 2]), "two on each host"


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


@pytest.mark.parametrize("way", quick(["no room", "killed at its start", "raises"], "no room"))
def test_a_number_that_there_is_no_room_for_is_undone_with_a_sentence_and_the_run_goes_on(
    way: str, tmp_path: Path, alone: str, ordered: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, file, calls = tmp_path / "run", tmp_path / "go on", list[int]()

    def reserve(*args: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise ResourceError("the team needs 9 MiB of shared memory, and 1 MiB is free.")
        transport_reserve(*args)

    def model() -> nn.Module:
        if multiprocessing.current_process().name == "worker-3" and way == "raises":
            raise ValueError("it has no place here")
        if multiprocessing.current_process().name == "worker-3":
            os.kill(os.getpid(), signal.SIGKILL)
        return nn.Linear(3, 1)

    recipe = waiting_in(1, 0, file)
    if way == "no room":
        monkeypatch.setattr(crew, "reserve", reserve)
        why = "the team needs 9 MiB of shared memory"
    else:
        recipe = replace(recipe, model=model)
        why = ") was killed by SIGKILL" if way == "killed at its start" else "it has no place here"

    def ask() -> None:
        when_going(path)
        resized(path, 4)
        if way == "no room":  # which is known once they have left their group
            ordered()
        else:
            wait_until(lambda: len(standing_of(path)["left"]) == 2, LONG_S, "the end of who came")

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
    assert (len(told(run, "run_started")), [each["version"] for each in told(run, "checkpointed")]) == (1, [3])


@pytest.mark.slow
def test_who_dies_in_its_first_step_is_stood_in_for_and_the_others_have_their_number_again(
    tmp_path: Path, ordered: Callable[[], None]
) -> None:
    path, file, steps = tmp_path / "run", tmp_path / "go on", 6
    waits, killed = key_of_step(0, 1, 0, "compute"), {key_of_step(0, step, 3, "compute") for step in range(2, steps)}

    def objective(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        while torch.initial_seed() == waits and not file.exists():
            time.sleep(0.002)
        if torch.initial_seed() in killed and multiprocessing.current_process().name == "worker-3":
            os.kill(os.getpid(), signal.SIGKILL)
        return squares(model, batch)

    def ask() -> None:
        when_going(path)
        resized(path, 4)
        ordered()

    recipe = regression(steps=steps, objective=objective)
    with meanwhile(ask, file.touch):
        run = train_here(recipe, Team(workers=2, restarts=0), path)
    assert run.digest == train_here(recipe, Team(), tmp_path / "alone").digest
    assert [(each["before"], each["workers"]) for each in told(run, "resized")] == [(2, 4), (4, 2)]
    assert (run.result["restarts"], len(told(run, "run_started"))) == (0, 1)
    assert [each["version"] for each in told(run, "merged")] == list(range(1, steps + 1)), "no step is done twice"
    assert [each["version"] for each in told(run, "checkpointed")] == [steps]


def test_after_a_change_workers_stand_in_for_each_other_and_another_change_follows(tmp_path: Path) -> None:
    """Two, four, the death of an old one and of a newcomer, and three."""
    path, paced, client = tmp_path / "run", Paced(tmp_path), Client()

    def act() -> None:
        paced.until(lambda: bool(told(client, "merged")), "a step")
        resized(path, 4)
        paced.until(lambda: changed(client, 1), "four")
        for count, worker in enumerate((1, 3), 1):
            os.kill(pid_of(client, worker), signal.SIGKILL)
            paced.until(lambda count=count: len(told(client, "took_place")) == count, "a successor")  # type: ignore[misc]
        resized(path, 3)
        paced.until(lambda: changed(client, 2), "three")
        os.kill(pid_of(client, 0), signal.SIGKILL)
        paced.until(lambda: len(told(client, "took_place")) == 3, "a successor")

    with meanwhile(act, paced.go_on):
        run = train_here(paced.recipe, Team(workers=2, restarts=3, checkpoint_every=paced.steps), path, client=client)
    check_in_place(run, paced, tmp_path / "alone")
    assert [each["workers"] for each in told(run, "regrouped")] == [[0, 1, 2, 3], [0, 1, 2]]
    assert (run.result["restarts"], run.result["workers"]) == (3, 3)


@pytest.mark.parametrize("worker", quick([0, 1], 1))
def test_who_dies_when_all_are_told_to_leave_is_stood_in_for_and_the_change_comes_after_its_successor(
    worker: int, tmp_path: Path, ordered: Callable[[], None]
) -> None:
    path, paced, client = tmp_path / "run", Paced(tmp_path), Client()

    def act() -> None:
        paced.until(lambda: bool(told(client, "merged")), "a step")
        paced.hold(client)
        resized(path, 3)
        ordered()  # in the midst of a step
        os.kill(pid_of(client, worker), signal.SIGKILL)
        ordered()  # to stay
        paced.until(lambda: len(told(client, "took_place")) == 1, "a successor")
        paced.until(lambda: changed(client, 1), "three")

    with meanwhile(act, paced.go_on):
        run = train_here(paced.recipe, Team(workers=2, restarts=1, checkpoint_every=paced.steps), path, client=client)
    check_in_place(run, paced, tmp_path / "alone")
    assert [each["workers"] for each in told(run, "regrouped")] == [[0, 1, 2]]
    assert [each["worker"] for each in told(run, "left")] == [worker]
    assert (run.result["restarts"], run.result["workers"]) == (1, 3)


@pytest.mark.parametrize("have_left", quick([False, True], True))
def test_a_newcomer_that_dies_when_all_are_told_to_leave_costs_the_others_nothing(
    have_left: bool, tmp_path: Path, ordered: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, paced, client = tmp_path / "run", Paced(tmp_path), Client()
    leaves, may_tell, part = tmp_path / "worker 1 leaves", tmp_path / "it may tell", BetweenSteps.part

    def and_wait(self: BetweenSteps, word: int) -> None:
        try:
            part(self, word)
        finally:
            if multiprocessing.current_process().name == "worker-1":
                leaves.touch()
                wait_until(may_tell.exists, LONG_S, "the newcomer's death")

    monkeypatch.setattr(BetweenSteps, "part", and_wait)

    def act() -> None:
        paced.until(lambda: bool(told(client, "merged")), "a step")
        paced.hold(client)
        resized(path, 4)
        ordered()
        if have_left:
            paced.until(leaves.exists, "the group is left")
        os.kill(pid_of(client, 3), signal.SIGKILL)
        ordered()  # to stay
        may_tell.touch()
        if have_left:
            paced.until(lambda: changed(client, 1), "a group of the two")

    with meanwhile(act, paced.go_on):
        run = train_here(paced.recipe, Team(workers=2, restarts=0, checkpoint_every=paced.steps), path, client=client)
    check_in_place(run, paced, tmp_path / "alone")
    assert [(each["before"], each["workers"]) for each in told(run, "resized")] == [(2, 4), (4, 2)]
    assert [each["workers"] for each in told(run, "regrouped")] == [[0, 1]] * have_left
    assert (run.result["restarts"], run.result["workers"]) == (0, 2)
