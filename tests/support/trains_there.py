"""What each agent of `support.over_hosts` runs: a program that trains one recipe after the other, and prints of each a
line of JSON.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from typing import Any

import instep
from instep.errors import RecordError
from instep.record import tape
from support import workloads
from support.forks import forking


def train(name: str, workers: int, folder: str, resumed: bool) -> dict[str, Any]:
    """`digests`, by version, only where the folder is."""
    recipe, team = workloads.ALL[name](), instep.Team(workers=workers, checkpoint_every=1, keep=0)
    run = instep.train(recipe, team=team, **({"resume": folder} if resumed else {"out": folder}))
    found: dict[str, Any] = {"folder": folder, "digest": run.digest, "items": run.result["items"], "steps": []}
    try:
        path = run.path
    except RecordError:
        return found
    events = list(tape.read(path / "tape.jsonl"))
    last = max(place for place, event in enumerate(events) if event["kind"] == "run_started")
    checkpoints = [event for event in events[last:] if event["kind"] == "checkpointed"]
    return {**found, "steps": [[event["version"], event["digest"]] for event in checkpoints]}


if __name__ == "__main__":
    wanted = json.loads(sys.argv[1])
    with forking() if wanted["forked"] else nullcontext():
        for each in wanted["runs"]:
            print(json.dumps(train(*each)), flush=True)
