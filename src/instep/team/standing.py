"""How a team stands: who is there, what each does, who waits for whom, who has left. Events and looks in; no I/O."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from instep.record.events import (
    ComputedEvent,
    Event,
    JoinedEvent,
    LeftEvent,
    MergedByServerEvent,
    MergedEvent,
    RunStartedEvent,
)
from instep.team.wire_messages import LoaderShown, Shown

SCHEMA = 1
"""Of the document that `TeamStanding.table` gives: docs/team.md says what is in it."""

LATELY = 20
"""Contributions of a worker that its speed is taken from."""

MOST_LEFT = 100
"""Workers that have left that are kept in mind, the last ones."""

WAITS_S = 1.0
"""Seconds that somebody waits before it is said for whom."""


class TeamStanding:
    """Of one run, over all starts of its team. serving: whether it has a server, whose number is the last."""

    def __init__(self, *, serving: bool):
        self._serving = serving
        self._server: int | None = None
        self._started: RunStartedEvent | None = None
        self._version = self._step = 0
        self._left: deque[dict[str, Any]] = deque(maxlen=MOST_LEFT)
        self._computed: dict[int, deque[tuple[int, float]]] = {}  # microbatches and seconds, by worker
        self._joined: dict[int, str] = {}  # where: names of machines

    def note(self, event: Event) -> None:
        """Takes in what has happened."""
        match event:
            case ComputedEvent():
                start, stop = event.microbatches
                count = (stop - start) * (event.local_steps if isinstance(event.local_steps, int) else 1)
                spent = self._computed.setdefault(event.worker, deque(maxlen=LATELY))
                spent.append((count, event.to_s - event.from_s))
            case MergedEvent() | MergedByServerEvent():
                self._version, self._step = event.version, event.step
            case RunStartedEvent():
                self._started, self._version, self._step = event, event.version, event.step
                self._computed.clear()
            case JoinedEvent():
                self._computed.pop(event.worker, None)
                if isinstance(event.host, str):
                    self._joined[event.worker] = event.host
            case LeftEvent():
                self._left.append({"worker": event.worker, "t_s": event.t_s, "why": event.why})

    def begin(self, workers: int) -> None:
        """A team of so many starts."""
        self._server = workers if self._serving else None

    def table(
        self, shown: Sequence[Shown], now_s: float, restarts: int, loaders: Sequence[LoaderShown] = ()
    ) -> dict[str, Any]:
        """The document that `instep team --json` prints of a run that goes on. shown, loaders: of all hosts."""
        started = self._started
        recipe = started.recipe if started is not None else {}
        rate = recipe["batch"] / recipe["microbatches"] if recipe else None
        return {
            "schema": SCHEMA,
            "state": "training" if started is not None else "starting",
            "t_s": round(now_s, 3),
            "engine": started.engine if started is not None else None,
            "step": self._step,
            "steps": recipe.get("steps"),
            "version": self._version,
            "restarts": restarts,
            "members": [self._member(each, shown, now_s, rate) for each in sorted(shown, key=_number)],
            "loaders": [self._loader(each, shown) for each in sorted(loaders, key=lambda each: each.number)],
            "left": list(self._left),
        }

    def _loader(self, one: LoaderShown, shown: Sequence[Shown]) -> dict[str, Any]:
        names = (self._joined.get(each.member.number) for each in shown if each.member.host == one.host)
        return {
            "loader": one.number,
            "name": f"loader {one.number}{f' on host {one.host}' if one.host else ''}",
            "host": one.host,
            "host_name": next((name for name in names if name is not None), None),
            "pid": one.pid,
            "read": one.read,
            "ahead": one.ahead,
            "ahead_bytes": one.ahead_bytes,
            "died": one.died,
            "doing": one.doing,
            "stopped": one.stopped,
        }

    def _member(self, one: Shown, shown: Sequence[Shown], now_s: float, samples: float | None) -> dict[str, Any]:
        number, is_server = one.member.number, one.member.number == self._server
        spent = self._computed.get(number, ())
        seconds = sum(each for _, each in spent)
        rate = sum(count for count, _ in spent) / seconds if seconds > 0 else None
        waits = self._waits(one)
        return {
            "number": number,
            "worker": None if is_server else number,
            "name": self.name(one),
            "host": one.member.host,
            "host_name": self._joined.get(number),
            "pid": one.pid,
            "since_s": round(one.since_s, 3),
            "for_s": round(max(0.0, now_s - one.since_s), 3),
            "microbatches_per_s": rate and float(f"{rate:.4g}"),
            "samples_per_s": rate and samples and float(f"{rate * samples:.4g}"),
            "doing": "done" if one.done else one.doing,
            "doing_for_s": round(max(0.0, now_s - one.doing_s), 3),
            "stopped": one.stopped,
            "waits_for": [self.name(each) for each in self._awaited(one, shown)],
            "waits_for_s": round(max(0.0, now_s - one.waits_s), 3) if waits and one.waits_s is not None else None,
        }

    def name(self, one: Shown) -> str:
        """What a member is called: "worker 2", "worker 2 on host 1" or "the server"."""
        if one.member.number == self._server:
            return "the server"
        return f"worker {one.member.number}{f' on host {one.member.host}' if one.member.host else ''}"

    def _waits(self, one: Shown) -> bool:
        """Whether it waits. The server looks around meanwhile, and says so itself."""
        if one.done or one.stopped:
            return False
        return one.waits_s is not None or (one.member.number == self._server and one.doing.startswith("waiting"))

    def _awaited(self, one: Shown, shown: Sequence[Shown]) -> list[Shown]:
        """For whom it waits: in lockstep for all who do not; under a server for that, which waits for who computes."""
        if not self._waits(one):
            return []
        if self._server is not None and one.member.number != self._server:
            return [each for each in shown if each.member.number == self._server]
        return [each for each in shown if not self._waits(each) and not each.done]

    def holds_up(self, shown: Sequence[Shown]) -> Shown | None:
        """Who has others wait for more than `WAITS_S`: of several, who is at what it does for the longest."""
        workers = [each for each in shown if each.member.number != self._server]
        if not any(self._waits(each) and each.seen_s - (each.waits_s or 0.0) >= WAITS_S for each in workers):
            return None
        busy = [each for each in shown if not self._waits(each) and not each.done]
        leads = [each for each in busy if each.member.number == self._server]
        return min(leads or busy, key=lambda each: each.doing_s, default=None)


def _number(one: Shown) -> int:
    return one.member.number


def ended(events: Iterable[Mapping[str, Any]], result: Mapping[str, Any] | None) -> dict[str, Any]:
    """The document of a run that does not go on, from its tape and `result.json`: how it has ended."""
    found: dict[str, Any] = {
        "schema": SCHEMA, "state": "nothing", "t_s": 0.0, "engine": None, "step": 0, "steps": None, "version": 0,
        "restarts": result["restarts"] if result is not None else None, "members": [], "loaders": [], "left": [],
        "why": None,
    }  # fmt: skip
    left: deque[dict[str, Any]] = deque(maxlen=MOST_LEFT)
    for event in events:
        found["t_s"] = event["t_s"]
        match event["kind"]:
            case "run_started":
                found |= {"state": "killed", "why": None, "engine": event["engine"], "steps": event["steps"]}
                found |= {"version": event["version"], "step": event["step"]}
            case "merged":
                found |= {"version": event["version"], "step": event["step"]}
            case "left":
                left.append({"worker": event["worker"], "t_s": event["t_s"], "why": event["why"]})
            case "run_ended":
                found["state"] = "interrupted" if event.get("interrupted") else "ended"
            case "failed":
                found |= {"state": "failed", "why": event["why"]}
    return {**found, "left": list(left)}
