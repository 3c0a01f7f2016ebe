"""Where agent 0 is lost, the others' workers keep what they hold, and the next agent 0 goes on from there."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from msgspec.structs import replace

from instep.errors import CheckpointError
from instep.recipe import Recipe, Team
from instep.record import checkpoint
from instep.record.events import MergedContribution
from instep.record.folder import RunFolder
from instep.team import keeping, wire_format
from instep.team.channel import Channel
from instep.team.keeping import Keeping, in_parts
from instep.team.messages import Agreed, KeepingState, KeepState, Ready, StateKept
from instep.team.session import Session
from instep.team.taking_up import TakingUp
from instep.team.wire_format import encode
from instep.team.wire_messages import KeptGiven, WireError
from support import workloads
from support.agents import Followers, first_agent_killed, train_on
from support.events import update
from support.harness import train_here
from support.kinds import quick
from support.processes import wait_until

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("agents_meet_here")]


def team(**changes: Any) -> Team:
    return Team(**{"workers": 3, "checkpoint_every": 3, "keep": 0, "lease_s": 60.0, "give_up_s": 120.0, **changes})


def recipe(name: str = "gpt", **changes: Any) -> Recipe:
    return dataclasses.replace(workloads.ALL[name](), **{"steps": 8, **changes})


def at(version: int, kind: str = "merged") -> Callable[[dict[str, Any]], bool]:
    return lambda event: event["kind"] == kind and event["version"] == version


def on_tape(path: Path, *kinds: str) -> list[dict[str, Any]]:
    events = map(json.loads, (path / "tape.jsonl").read_text().splitlines())
    return [event for event in events if event["kind"] in kinds]


def versions(path: Path, kind: str) -> list[int]:
    return [event["version"] for event in on_tape(path, kind)]


def forget_updates(path: Path, count: int) -> None:
    """The tape without its last updates, as where agent 0 had no time to write them."""
    lines = (path / "tape.jsonl").read_text().splitlines(keepends=True)
    merged = [at for at, line in enumerate(lines) if json.loads(line)["kind"] == "merged"]
    (path / "tape.jsonl").write_text("".join(line for at, line in enumerate(lines) if at not in merged[-count:]))


CASES = [("gpt", (1, 1), 2), ("gpt", (1, 1), 3), ("convnet", (1, 1), 3), ("convnet", (1, 1, 1), 5)]


@pytest.mark.parametrize("case", quick(CASES, CASES[1]), ids=str)
def test_no_step_is_lost_with_the_first_agent(
    case: tuple[str, tuple[int, ...], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many events a message may hold."""
    name, agents, workers = case
    monkeypatch.setattr(keeping, "EVENTS_BYTES", 1 if workers == 3 else keeping.EVENTS_BYTES)
    path, what, who = tmp_path / "run", recipe(name), team(workers=workers)
    followers = Followers(what, who, agents, tmp_path)
    first_agent_killed(what, who, path, followers, at(5))
    forget_updates(path, 2)
    run, told = train_on(agents, what, who, path, resume=True, followers=followers)
    assert [each.error for each in told] == [""] * len(told)
    assert run.digest == train_here(what, team(workers=1), tmp_path / "alone").digest
    assert versions(path, "run_started") == [0, 5]
    assert versions(path, "merged") == list(range(1, 9)), "each step once"
    assert versions(path, "checkpointed") == [3, 5, 6, 8]
    (why,) = [event["why"] for event in on_tape(path, "warned") if "had kept" in event["why"]]
    assert re.search(r"the run goes on from version 5, which the workers of host [12] \(", why)


def killed_in_step_5(tmp_path: Path, who: Team) -> tuple[Recipe, Followers, Path]:
    """A run of two hosts without its first agent; what the other one has kept."""
    what = recipe()
    followers = Followers(what, who, (1, 1), tmp_path)
    first_agent_killed(what, who, tmp_path / "run", followers, at(5))
    kept: list[Path] = []
    wait_until(lambda: kept.extend(tmp_path.glob("*/checkpoints/step-00000005")) or kept, 60, "what is kept")
    return what, followers, kept[0]


def change_a_byte(kept: Path) -> None:
    content = (kept / checkpoint.TRAINING).read_bytes()
    (kept / checkpoint.TRAINING).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def cut_the_manifest(kept: Path) -> None:
    os.truncate(kept / checkpoint.MANIFEST, 40)


def take_a_file_away(kept: Path) -> None:
    (kept / checkpoint.MODEL).unlink()


def say(**other: Any) -> Callable[[Path], None]:
    def rewrite(kept: Path) -> None:
        table = json.loads((kept / checkpoint.MANIFEST).read_bytes())
        table.pop("sha256")
        (kept / checkpoint.MANIFEST).write_bytes(checkpoint._manifest_bytes({**table, **other}))

    return rewrite


DAMAGES = {
    "a changed byte": (change_a_byte, "it is not whole"),
    "a torn manifest": (cut_the_manifest, "manifest.json is not as it was written"),
    "a file too few": (take_a_file_away, "it is not whole"),
    "another recipe": (say(fingerprint="another"), "belongs to another recipe"),
    "another run": (say(meta={"run": "another"}), "it is of another run"),
    "another version": (say(version=6), "it is not whole"),
}


@pytest.mark.parametrize("damage", quick([*DAMAGES], "a changed byte"))
def test_what_is_torn_or_of_another_run_is_refused_and_the_last_checkpoint_used(damage: str, tmp_path: Path) -> None:
    act, why = DAMAGES[damage]
    who, path = team(), tmp_path / "run"
    what, followers, kept = killed_in_step_5(tmp_path, who)
    act(kept)
    run, _ = train_on((1, 1), what, who, path, resume=True, followers=followers)
    assert versions(path, "run_started") == [0, 3]
    assert run.digest == train_here(what, team(workers=1), tmp_path / "alone").digest
    (told,) = [event["why"] for event in on_tape(path, "warned") if "is not used" in event["why"]]
    assert told.startswith("what the workers of host 1 (")
    assert why in told
    saved = sorted(each.name for each in (path / "checkpoints").iterdir() if each.is_dir())
    assert saved == ["step-00000003", "step-00000006", "step-00000008"], "nothing is left of it"


@pytest.mark.slow
def test_a_run_of_another_id_takes_nothing_up(tmp_path: Path) -> None:
    """The first agent was started anew, elsewhere, where others still look for it."""
    what, followers, _ = killed_in_step_5(tmp_path, team(checkpoint_every=100))
    run, _ = train_on((1, 1), what, team(checkpoint_every=100), tmp_path / "other", followers=followers)
    assert versions(tmp_path / "other", "run_started") == [0]
    assert any("version 5, is not used, for it is of another run" in e.get("why", "") for e in run.events)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["while it comes", "once it is there"])
def test_a_first_agent_that_is_killed_while_it_takes_up_loses_nothing(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    who, path = team(checkpoint_every=100), tmp_path / "run"
    what, followers, _ = killed_in_step_5(tmp_path, who)
    with monkeypatch.context() as patched:
        if when == "while it comes":
            patched.setattr(TakingUp, "_take", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        first_agent_killed(what, who, path, followers, lambda event: "had kept" in event.get("why", ""))
    run, told = train_on((1, 1), what, who, path, resume=True, followers=followers)
    assert told[0].error == ""
    assert versions(path, "run_started") == [0, 5]
    assert versions(path, "merged") == list(range(1, 9))
    assert run.digest == train_here(what, team(workers=1), tmp_path / "alone").digest


def test_who_gives_up_says_where_its_workers_state_is_and_a_run_goes_on_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    what, who, path = recipe(), team(checkpoint_every=100, give_up_s=0.5), tmp_path / "run"
    followers = Followers(what, who, (1, 1), tmp_path)
    try:
        first_agent_killed(what, who, path, followers, at(5))
        (told,) = followers.told(120)
    finally:
        followers.end()
    kept = tmp_path / "run-kept-by-host-1" / "step-00000005"
    assert f"or start the run again; what its workers had, version 5, is in {kept}: moved into" in told.error
    kept.rename(path / "checkpoints" / kept.name)
    run = train_here(what, team(workers=1, checkpoint_every=100), path, resume=True)
    assert versions(path, "run_started") == [0, 5]
    assert run.digest == train_here(what, team(workers=1), tmp_path / "alone").digest


@pytest.mark.slow
def test_of_a_team_that_has_not_begun_nothing_is_kept(tmp_path: Path) -> None:
    what, who, path = recipe(), team(), tmp_path / "run"
    followers = Followers(what, who, (1, 1), tmp_path)
    first_agent_killed(what, who, path, followers, lambda event: event["kind"] == "joined")
    run, told = train_on((1, 1), what, who, path, resume=True, followers=followers)
    assert told[0].error == ""
    assert versions(path, "run_started") == [0]
    assert run.digest == train_here(what, team(workers=1), tmp_path / "alone").digest


def taking_up(version: int) -> tuple[TakingUp, list[Any]]:
    """Of a folder whose tape and newest checkpoint end at `version`; what the tape is given."""
    given: list[Any] = []
    journal = SimpleNamespace(last_update=lambda: version, make_up_for=given.extend, warn=given.append)
    run, folder = SimpleNamespace(engine="lockstep", recipe_table={"steps": 9}), SimpleNamespace(checkpoints=Path("no"))
    taking: Any = TakingUp(cast(Any, run), cast(Any, folder), cast(Any, journal), "run", None)
    taking._version = version
    return taking, given


def test_a_checkpoint_before_which_the_tape_would_lack_updates_is_refused() -> None:
    taking, written = taking_up(3)
    kept: Any = SimpleNamespace(version=6)

    def updates(*versions: int) -> Any:
        return [update(version) for version in versions]

    with pytest.raises(CheckpointError, match="the tape lacks updates before it"):
        taking._tell(kept, updates(5, 6))
    assert not written
    taking._tell(kept, updates(3, 4, 5, 6))
    assert [event.version for event in written] == [4, 5, 6]


def test_who_comes_again_while_it_gives_is_asked_anew() -> None:
    taking, _ = taking_up(3)

    def crew(agent: int) -> Any:
        kept = SimpleNamespace(run="run", version=6, name="step-00000006")
        asked: list[Any] = []
        hello = SimpleNamespace(agent=agent, kept=kept)
        return SimpleNamespace(hello=hello, lost=None, name=f"host {agent}", asked=asked, ask_for=asked.append)

    first, again = crew(1), crew(1)
    taking.offer(first)
    assert taking.busy
    taking.offer(again)
    assert taking.busy
    assert len(first.asked) == len(again.asked) == 1


@pytest.mark.parametrize(("most", "lengths"), [(1, [1, 1, 1, 1, 1]), (400, [2, 2, 1]), (1 << 20, [5])])
def test_events_are_given_in_parts(most: int, lengths: list[int]) -> None:
    events = [update(version) for version in range(1, 6)]
    assert 134 < len(msgspec.msgpack.encode(events[0])) < 200
    parts = in_parts(events, most)
    assert [len(part) for part in parts] == lengths
    assert [event for part in parts for event in part] == events
    assert in_parts([], most) == [()]


def test_the_link_takes_the_parts_of_more_than_it_takes_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sixteenth of all sizes: 1,000 updates of 300 workers are more than one message may hold."""
    monkeypatch.setattr(wire_format, "MESSAGE_BYTES", wire_format.MESSAGE_BYTES // 16)
    monkeypatch.setattr(keeping, "EVENTS_BYTES", keeping.EVENTS_BYTES // 16)
    parts = [MergedContribution(worker=worker, version=7, microbatches=[0, 2]) for worker in range(300)]
    keeper = Keeping(RunFolder(tmp_path), 1)
    keeper._events = (replace(update(8), contributions=parts, weights=[1.0] * 300, staleness=[0] * 300),) * 63
    with pytest.raises(WireError, match="can be sent"):
        encode(KeptGiven("step-00000008", keeper._events))
    (tmp_path / "checkpoints" / "step-00000008").mkdir(parents=True)
    given: Any = list(keeper._parts("step-00000008"))
    assert all(encode(each) for each in given)
    assert sum(len(each.events) for each in given) == 63
    assert [each.more for each in given] == [True] * (len(given) - 1) + [False]


class Slow:
    """A worker that says each word minutes after the one before."""

    def __init__(self, clock: list[float], *words: Any):
        self.pipe, self._clock, self._words = self, clock, list(words)
        self.handle = SimpleNamespace(death=object(), exitcode=None)
        self.ready: Any = "ready"
        self.sent: list[Any] = []

    def send(self, message: Any) -> None:
        self.sent.append(message)

    def receive(self) -> Any:
        if not self._words:
            return None
        self._clock[0] += 2 * keeping.AGREE_S
        return self._words.pop(0)


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        ([KeepingState(), None, StateKept(5, "step-00000005", "ab")], True),
        ([None, StateKept(5, "step-00000005", "ab")], False),
        ([StateKept(why="there is nothing to keep")], False),
    ],
)
def test_workers_have_a_minute_to_agree_and_as_long_to_write_as_they_take(
    words: list[Any], kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(keeping, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(keeping, "ready_of", lambda sources, senders, within_s: sources)
    crew: Any = SimpleNamespace(processes=[Slow(clock, *words)], look=lambda: None)
    found = Keeping(RunFolder(tmp_path), 1)
    found.keep(crew, "run", lambda: None)
    assert (found.kept is not None) == kept


def test_who_is_not_built_yet_or_in_no_group_yet_keeps_nobody_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A newcomer, when agent 0 is lost."""
    monkeypatch.setattr(keeping, "ready_of", lambda sources, senders, within_s: sources)
    building, built = Slow([0.0]), Slow([0.0], StateKept(5, "step-00000005", "ab"))
    building.ready = None
    crew: Any = SimpleNamespace(processes=[building, built], look=lambda: None)
    found = Keeping(RunFolder(tmp_path), 1)
    found.keep(crew, "run", lambda: None)
    assert found.kept is not None
    assert (building.sent, built.sent) == ([], [KeepState()])
    ours, theirs = Channel.pair()
    for message in (KeepState(), Agreed({}, {})):
        ours.send(message)
    newcomer: Any = SimpleNamespace(pipe=theirs, uses=list, heartbeat=SimpleNamespace(waiting=lambda flag: None))
    assert Session.ready(newcomer, {}, {}) == Agreed({}, {})
    ready, kept = ours.recv(), ours.recv()
    assert (dataclasses.replace(ready, files=()), kept) == (Ready({}, {}), StateKept(why="it is in no group yet"))
    for each in (ours, theirs):
        each.close()
