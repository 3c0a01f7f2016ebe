"""A run that goes on, asked by its owner: who does what, who waits for whom; and who is told that the others wait."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from instep.recipe import Team
from instep.team.asking import standing_of
from instep.team.messages import HeldUp
from support.agents import train_on
from support.harness import Client, train_here
from support.kinds import quick
from support.patience import LONG_S
from support.regression import regression, waiting_in

pytestmark = pytest.mark.processes


SLOW = "computing step 2, microbatch"


class Asking:
    """Asks about the run at `path`, in a thread, until somebody waits in step 2 and the client was told of it; makes
    `file` then.
    """

    def __init__(self, path: Path, file: Path, client: Client):
        self.answer: dict[str, Any] = {}
        self._path, self._file, self._client = path, file, client
        self._thread = threading.Thread(target=self._ask)

    def _ask(self) -> None:
        until = time.monotonic() + LONG_S
        while time.monotonic() < until:
            try:
                self.answer = standing_of(self._path)
            except Exception as error:
                self.answer = {"state": str(error), "members": []}
            told = any(each.doing.startswith(SLOW) for each in self._client.waits)
            found = self.answer["members"]
            if told and any(m["waits_for"] for m in found) and any(m["doing"].startswith(SLOW) for m in found):
                break
            time.sleep(0.02)
        self._file.touch()

    def __enter__(self) -> Asking:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of `regression` undisturbed."""
    return train_here(regression(steps=3), Team(), tmp_path_factory.mktemp("alone") / "run").digest


def test_who_is_asked_tells_who_computes_what_and_who_waits_for_whom(tmp_path: Path, alone: str) -> None:
    path, file, client = tmp_path / "run", tmp_path / "go on", Client(free=True)
    with Asking(path, file, client) as asking:
        run = train_here(waiting_in(1, 2, file), Team(workers=2), path, client=client)
    table = asking.answer
    zero, one = table["members"]
    assert (table["state"], table["engine"], table["steps"], table["schema"]) == ("training", "lockstep", 3, 1)
    assert one["doing"] == "computing step 2, microbatch 2"
    assert (zero["waits_for"], one["waits_for"], one["waits_for_s"]) == (["worker 1"], [], None)
    assert zero["pid"] != one["pid"]
    assert 0 < one["doing_for_s"] < one["for_s"] < table["t_s"]
    assert ("worker 1", "computing step 2, microbatch 2") in {(each.who, each.doing) for each in client.waits}
    assert client.waits[-1] == HeldUp(), "it is over"
    assert run.digest == alone
    assert not (path / "control").exists()
    after = standing_of(path)
    assert (after["state"], after["step"], after["version"], after["members"]) == ("ended", 3, 3, [])


def test_under_a_server_who_waits_waits_for_it_and_it_for_who_computes(tmp_path: Path, alone: str) -> None:
    path, file, client = tmp_path / "run", tmp_path / "go on", Client(free=True)
    with Asking(path, file, client) as asking:
        run = train_here(waiting_in(1, 2, file), Team(workers=2, engine="server"), path, client=client)
    zero, one, server = asking.answer["members"]
    assert (server["worker"], server["name"], server["waits_for"]) == (None, "the server", ["worker 1"])
    assert (zero["waits_for"], one["doing"]) == (["the server"], "computing step 2, microbatch 2")
    assert ("worker 1", "computing step 2, microbatch 2") in {(each.who, each.doing) for each in client.waits}
    assert run.digest == alone


@pytest.mark.usefixtures("agents_meet_here")
@pytest.mark.parametrize("microbatch", quick([0, 2], 2))
def test_workers_of_other_hosts_are_shown_and_named_too(microbatch: int, tmp_path: Path, alone: str) -> None:
    path, file, client = tmp_path / "run", tmp_path / "go on", Client(free=True)
    recipe, team = waiting_in(1, microbatch, file), Team(workers=2, lease_s=60.0)
    with Asking(path, file, client) as asking:
        run, _ = train_on((1, 1), recipe, team, path, client=client)
    names = ["worker 0", "worker 1 on host 1"]
    slow, other = names if microbatch == 0 else names[::-1]
    found = {each["name"]: each for each in asking.answer["members"]}
    assert sorted(found) == names
    assert found[other]["waits_for"] == [slow]
    assert found[slow]["doing"] == f"computing step 2, microbatch {microbatch}"
    assert (slow, found[slow]["doing"]) in {(each.who, each.doing) for each in client.waits}
    assert client.waits[-1] == HeldUp()
    assert run.digest == alone
