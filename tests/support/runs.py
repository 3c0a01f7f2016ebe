"""Folders of runs whose tapes are written by hand: what a report reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from instep.recipe import Recipe, Team, dumps
from instep.record.events import SCHEMA
from instep.record.folder import About, RunFolder
from instep.rules.presets import parse

RECIPE = Recipe(model="a:b", objective="c:d", data="e:f", batch=8, microbatches=4, steps=100, name="tiny")


def started(**fields: Any) -> dict[str, Any]:
    """A ``run_started`` of a synchronous run with two workers."""
    rule = parse(fields.pop("rule", "synchronous"))
    seed = fields.pop("seed", 0)
    recipe = RECIPE.to_table() | {"rule": {**vars(rule)}, "seed": seed}
    recipe["rule"] = {key: value for key, value in recipe["rule"].items() if value is not None}
    base = {
        "t_s": 1.0, "clock": "wall", "kind": "run_started", "schema": SCHEMA, "folder": "runs/tiny", "run": "0" * 32,
        "recipe": recipe, "team": {"workers": 2, "device": "cpu", "restarts": 3, "slow": ""}, "fingerprint": "f",
        "data_digest": "d" * 64, "samples": 80, "engine": "lockstep" if rule.synchronous else "server", "cut": 2,
        "parameters": 10, "version": 0, "digest": "0" * 64, "step": 0, "steps": 100, "resumed": False,
        "libraries": {"torch": "2.13.0", "instep": "0.1.0"}, "import_paths": [],
    }  # fmt: skip
    return base | fields


def event(kind: str, t_s: float, **fields: Any) -> dict[str, Any]:
    return {"t_s": t_s, "clock": "wall", "kind": kind, **fields}


def joined(t_s: float, *workers: int) -> list[dict[str, Any]]:
    return [event("joined", t_s, worker=worker, pid=1, host="here") for worker in workers]


def merged(version: int, t_s: float, objective: float | None, *, staleness: tuple[int, ...] = (0, 0)) -> dict[str, Any]:
    contributions = [{"worker": worker, "version": version - 1 - old} for worker, old in enumerate(staleness)]
    return event(
        "merged", t_s, version=version, step=version, contributions=contributions,
        weights=[1.0] * len(staleness), staleness=list(staleness), objective=objective, terms={}, items=8, lr=0.1,
        grad_norm=1.0, train_s=t_s,
    )  # fmt: skip


def step(version: int, t_s: float, objective: float | None, *, slow: float = 0.1) -> list[dict[str, Any]]:
    """A step in lockstep from `t_s` on that leads to `version`: worker 1 computes `slow` seconds, worker 0 0.1."""
    done = []
    for worker, took in ((0, 0.1), (1, slow)):
        done.append(
            event(
                "computed",
                t_s + took,
                worker=worker,
                version=version - 1,
                from_s=t_s,
                to_s=t_s + took,
                microbatches=[0, 2],
            )
        )
        done.append(event("pushed", t_s + took, worker=worker, version=version - 1, bytes=40, items=4))
    return [*done, merged(version, t_s + max(0.1, slow) + 0.05, objective)]


def ended(version: int, t_s: float, **result: Any) -> dict[str, Any]:
    told = {"digest": "a" * 64, "bytes_sent": 0, "interrupted": False, "sample": None, "artifacts": None, **result}
    return event("run_ended", t_s, version=version, digest="a" * 64, result=told, interrupted=told["interrupted"])


def folder(path: Path, events: list[dict[str, Any]], *, tail: str = "", recipe: Recipe = RECIPE) -> Path:
    """A run folder with such a tape."""
    run = RunFolder.create(path, dumps(recipe, Team(workers=2)), About())
    run.tape_path.write_text("".join(json.dumps(each) + "\n" for each in events) + tail)
    return path


def curve(path: Path, rule: str, objectives: list[float], *, seed: int = 0, step_s: float = 0.2, **start: Any) -> Path:
    """A run of so many updates, with an evaluation after each."""
    events = [started(rule=rule, seed=seed, **start), *joined(1.5, 0, 1)]
    for version, objective in enumerate(objectives, 1):
        at = 1.5 + step_s * version
        events += [
            event("pushed", at - 0.02, worker=0, version=version - 1, bytes=40, items=8),
            merged(version, at, objective, staleness=(0,)),
            event("evaluated", at, version=version, objective=objective, terms={}, items=5),
        ]
    return folder(path, [*events, ended(len(objectives), 1.5 + step_s * (len(objectives) + 1))])
