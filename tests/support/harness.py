"""Runs a team from the test process: the supervisor forks workers here, without the seconds of a fresh interpreter."""

from __future__ import annotations

import mmap
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from instep.recipe import Recipe, Team, dumps, engine_of
from instep.record import checkpoint
from instep.record.folder import About, RunFolder
from instep.team import session
from instep.team.agent import Agent
from instep.team.channel import Channel
from instep.team.messages import HeldUp, PlainEvents, Request, StopRun
from instep.team.pickling import dump
from instep.team.processes import import_before_forks
from instep.team.session import Session

AWAITED = ("released", "pushed", "merged", "checkpointed")
"""Kinds of events that the process which leads is not ahead of, where a client acts on them."""


class Client:
    """The supervisor's client: keeps the events, and can act on them, in time: the process that leads goes on when it
    has acted. With `free` it does not wait, and may be steps ahead, or have ended.
    """

    def __init__(self, on_event: Any = None, *, free: bool = False):
        self._ours, self._theirs = Channel.pair()
        self.events: list[dict[str, Any]] = []
        self.waits: list[HeldUp] = []
        self._on_event = on_event
        self._awaited = on_event is not None and not free
        self._seen = np.frombuffer(mmap.mmap(-1, 8 * len(AWAITED)), dtype=np.int64)  # in common with what is forked

    def fileno(self) -> int:
        return self._theirs.fileno()

    def send(self, message: PlainEvents | HeldUp) -> None:
        if isinstance(message, HeldUp):
            self.waits.append(message)
            return
        for event in message.events:
            self.events.append(event)
            if self._on_event:
                self._on_event(event)
            if event["kind"] in AWAITED:
                self._seen[AWAITED.index(event["kind"])] += 1

    def awaited(self) -> Any:
        """Has the process that leads wait as is said above, if it is forked meanwhile."""
        if not self._awaited:
            return nullcontext()
        send, seen = Session.send_events, self._seen

        def send_and_wait(session: Session, *, held: bool = False) -> None:
            sent = Counter(event.kind for event in session._events if event.kind in AWAITED)
            until = {AWAITED.index(kind): seen[AWAITED.index(kind)] + count for kind, count in sent.items()}
            send(session, held=held)
            while session.leads and any(seen[place] < count for place, count in until.items()):
                time.sleep(0.0005)

        return mock.patch.object(Session, "send_events", send_and_wait)

    def recv(self) -> Any:
        return self._theirs.recv()

    def close(self) -> None:
        self._theirs.close()

    def ask_to_stop(self) -> None:
        self._ours.send(StopRun())

    def leave(self) -> None:
        self._ours.hang_up()  # forked workers hold this end too, so closing it would end nothing


@dataclass
class Outcome:
    """A finished run and its tape."""

    result: dict[str, Any]
    events: list[dict[str, Any]]
    path: Path
    digests: dict[int, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        return str(self.result["digest"])


def told(run: Outcome | Client, kind: str) -> list[dict[str, Any]]:
    """The events of this kind."""
    return [event for event in run.events if event["kind"] == kind]


def digests(run: Outcome) -> dict[str, str]:
    """Of the weights and, by decay, of their averages."""
    return {"": run.digest, **{decay: each["digest"] for decay, each in run.result["ema"].items()}}


def saved(run: Outcome, version: int) -> checkpoint.Loaded:
    return checkpoint.load(checkpoint.path_of(run.path / "checkpoints", version))


def train_here(
    recipe: Recipe, team: Team, path: Path, *, resume: bool = False, client: Client | None = None, tried: bool = False
) -> Outcome:
    """As `instep.train`, in this process. `digests` are those of the checkpoints, by version.

    Only with `tried` does it try the optimizer and a checkpoint first, see `instep.worker.trial`: that changes no bit,
    as is shown where it is the subject, and it takes as much time again.
    """
    if not resume:
        RunFolder.create(path, dumps(recipe, team), About())
    request = Request(
        recipe=dump(recipe),
        recipe_table=recipe.to_table(),
        recipe_file=dumps(recipe, team),
        fingerprint=recipe.fingerprint(),
        team=team,
        rule=recipe.rule,
        engine=engine_of(recipe, team),
        folder=path,
        resumed=resume,
        import_paths=(),
        began=time.monotonic(),
        fingerprints=recipe.fingerprints(),
    )
    client = client or Client()
    import_before_forks()
    session.HOLD_S = 0.0  # so that a client can act on each step
    with nullcontext() if tried else untried(), client.awaited():
        result = Agent(request, client).supervise()  # type: ignore[arg-type]
    digests = {e["version"]: e["digest"] for e in client.events if e["kind"] == "checkpointed"}
    return Outcome(result, client.events, path, digests)


def untried() -> Any:
    """Leaves those tries out, and sends events at once, in what is forked meanwhile too."""
    return mock.patch.multiple(session, HOLD_S=0.0, try_optimizer=lambda *_, **__: None, try_checkpoint=lambda *_: None)


def act_on(kind: str, act: Callable[[int], None], version: int | None = None) -> Callable[[dict[str, Any]], None]:
    """Calls `act` with worker 1's pid at the first event of `kind` (and `version`)."""
    pids: dict[int, int] = {}
    done: list[bool] = []

    def see(event: dict[str, Any]) -> None:
        if event["kind"] == "joined":
            pids[event["worker"]] = event["pid"]
        if event["kind"] == kind and version in (None, event.get("version")) and 1 in pids and not done:
            done.append(True)
            act(pids[1])

    return see


def stopping_at(version: int) -> Client:
    """A client that asks to stop when it hears of `version`."""
    client = Client(lambda event: client.ask_to_stop() if event.get("version") == version else None)
    return client
