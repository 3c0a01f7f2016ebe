"""Events of a run as monitors see them, and a whole run of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from instep.record.events import MergedEvent

DIGEST = "ab" * 32
Event = dict[str, Any]


def started(t_s: float = 2.0, version: int = 0, *, resumed: bool = False) -> Event:
    return {
        "t_s": t_s, "kind": "run_started", "version": version, "step": version, "steps": 20, "resumed": resumed,
        "engine": "lockstep",
        "recipe": {"name": "gpt", "batch": 32, "microbatches": 8, "rule": {"name": "synchronous"}},
        "samples": 85123, "parameters": 4812032,
        "team": {"workers": 2, "device": "cpu", "restarts": 3},
    }  # fmt: skip


def merged(t_s: float, version: int, **rest: Any) -> Event:
    return {
        "t_s": t_s, "kind": "merged", "version": version, "step": version, "objective": 4 - version / 10, "items": 1000,
        "terms": {"objective": 4 - version / 10}, **rest,
    }  # fmt: skip


def evaluated(t_s: float, version: int, **rest: Any) -> Event:
    return {"t_s": t_s, "kind": "evaluated", "version": version, "objective": 3.25, "terms": {}, "items": 9, **rest}


def ended(t_s: float, version: int = 20, *, interrupted: bool = False, **result: Any) -> Event:
    result = {
        "objective_first": 3.9, "objective_last": 2.0, "held_out": 3.25, "bits_per_byte": None, "items_per_s": 1234.5,
        "wall_s": 12.34, "restarts": 0, "sample": None, "steps": version, "rule": "synchronous", **result,
    }  # fmt: skip
    return {
        "t_s": t_s, "kind": "run_ended", "version": version, "digest": DIGEST, "result": result,
        "interrupted": interrupted,
    }  # fmt: skip


def update(version: int) -> MergedEvent:
    """Of nobody's contributions, as a worker tells it."""
    return MergedEvent(
        version=version, step=version, contributions=[], weights=[], staleness=[], objective=1.0, terms={}, items=1,
        lr=0.1, grad_norm=1.0, train_s=1.0,
    )  # fmt: skip


def joined(t_s: float, worker: int) -> Event:
    return {"t_s": t_s, "kind": "joined", "worker": worker, "pid": 1, "host": "here"}


def a_run(*, died: bool = False) -> Iterator[Event]:
    """20 steps of a second, evaluated at 10 and 20; with `died`, a worker dies at 12 and the team restarts from 10."""
    yield joined(1.5, 0)
    yield joined(1.5, 1)
    yield started()
    t_s = 2.0
    for version in range(1, 13):
        t_s += 1
        yield {"t_s": t_s, "kind": "computed", "worker": 0, "version": version - 1}
        yield merged(t_s, version)
        if version == 10:
            t_s += 1.5
            yield evaluated(t_s, version, bits_per_byte=2.5)
    if died:
        yield {"t_s": t_s + 4, "kind": "left", "worker": 1, "why": "worker 1 (pid 7) was killed by SIGKILL."}
        t_s += 10
        yield joined(t_s, 0)
        yield joined(t_s, 1)
        yield started(t_s, 10, resumed=True)
    for version in range(11 if died else 13, 21):
        t_s += 1
        yield merged(t_s, version)
    t_s += 1.5
    yield evaluated(t_s, 20, bits_per_byte=2.5)
    yield ended(t_s, bits_per_byte=2.5, restarts=int(died), sample="def f():\n\treturn 1\x1b[31m\r\n\u202e")
