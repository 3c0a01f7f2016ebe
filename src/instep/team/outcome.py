"""What the tape tells of a team's start, and what a run came to: the fields of ``run_started`` and ``result.json``."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from typing import Any

from instep.record.tape import SCHEMA
from instep.tables import to_table
from instep.team.messages import Ended, Request


def start_of(run: Request, run_id: str | None, facts: Mapping[str, Any], *, resumed: bool) -> dict[str, Any]:
    """The fields of ``run_started``. `facts`: what the team starts from."""
    return {
        "schema": SCHEMA,
        "folder": str(run.folder),
        "run": run_id,
        "recipe": dict(run.recipe_table),
        "team": to_table(run.team),
        "fingerprint": run.fingerprint,
        "data_digest": facts["data"],
        "samples": facts["samples"],
        "engine": run.engine,
        "cut": facts.get("cut", run.team.workers),
        "parameters": facts["parameters"],
        "version": facts["version"],
        "digest": facts["weights"],
        "step": facts.get("step", facts["version"]),
        "steps": run.recipe_table["steps"],
        "resumed": resumed,
        "libraries": _libraries(),
        "import_paths": list(run.import_paths),
        **({"written": facts["written"]} if facts.get("written") else {}),
    }


def result_of(
    run: Request, facts: Mapping[str, Any], leader: Ended, costs: Sequence[Mapping[str, Any]], restarts: int
) -> dict[str, Any]:
    """The fields of ``result.json``. `leader`: what it has told at its end; `costs`: what each member has."""
    progress, left = leader.progress, leader.left
    held_out = progress["held_out"]
    return {
        "recipe": run.recipe_table["name"],
        "digest": leader.digest,
        "rule": run.rule.name,
        "engine": run.engine,
        "steps": progress["steps"],
        "versions": progress["version"],
        "items": progress["items"],
        "workers": run.team.workers,
        "microbatches": run.recipe_table["microbatches"],
        "parameters": facts["parameters"],
        "objective_first": progress["objective_first"],
        "objective_last": progress["objective_last"],
        "held_out": held_out.get("objective"),
        "held_out_terms": held_out.get("terms"),
        "bits_per_byte": held_out.get("bits_per_byte"),
        "gathered": held_out.get("gathered"),
        "items_per_s": progress["items"] / progress["train_s"] if progress["train_s"] else None,
        "wall_s": round(time.monotonic() - run.began, 3),
        "restarts": restarts,
        **(dict(leader.costs) if run.engine == "server" else _costs_in_lockstep(costs)),
        "interrupted": leader.interrupted,
        "stopped": progress["stopped"] or None,
        "skipped": progress["skipped"],
        "bad_batches": progress["bad_batches"],
        "data_digest": facts["data"],
        "sample": left.get("sample"),
        "artifacts": left.get("artifacts"),
    }


def _costs_in_lockstep(costs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the rule cost in this start of the team; `costs` are each worker's."""
    return {
        "bytes_sent": costs[0]["bytes_sent"],
        "staleness_mean": 0.0,
        "staleness_max": 0,
        "delayed_max": 0,
        "lead_max": 0,
        "idle_share": [share for each in costs for share in each["idle_share"]],
        "dropped": 0,
    }


def _libraries() -> dict[str, str]:
    import numpy
    import torch

    import instep

    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a TorchVersion would make the client import torch to read it
        "numpy": numpy.__version__,
        "instep": instep.__version__,
    }
