"""Whether a run can begin, what the tape tells of a team's start, and what a run came to: ``result.json``."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from msgspec import UNSET, UnsetType

from instep.errors import InstepError, RecipeError, RecordError
from instep.record import checkpoint
from instep.record.computed_by import libraries, processor
from instep.record.events import SCHEMA, CheckpointedEvent, Event, RunEndedEvent, RunStartedEvent
from instep.record.hardware import hardware
from instep.record.held import Held
from instep.record.result import Costs, Result
from instep.record.team import BytesOfHost, HostInTeam
from instep.tables import to_table
from instep.team.messages import Ended, Request


def check_steps(run: Request, resume_from: Path | None) -> None:
    """Raises RecipeError where the run has done more steps than it is to have."""
    steps = run.recipe_table["steps"]
    done = checkpoint.steps_done(resume_from) if resume_from is not None else 0
    if done > steps:
        raise RecipeError(
            f"{run.folder} has done {done} steps already, and 'recipe.steps' is {steps}; give {done} or more."
        )


def cause_of(error: InstepError, held: Held) -> InstepError:
    """What is to be told: where the run folder is gone, that is why something else failed."""
    try:
        held.check()
    except RecordError as gone:
        return gone
    return error


def saved_amid(event: Event, run: Request) -> bool:
    """Whether it tells of a checkpoint after which there is more to train, and before which all is saved: of one that
    was written in the background the tape tells updates later.
    """
    if not isinstance(event, CheckpointedEvent) or event.step_s is not UNSET:
        return False
    return bool(event.version < run.recipe_table["steps"])


def start_of(
    run: Request, run_id: str | None, facts: Mapping[str, Any], *, resumed: bool, hosts: list[HostInTeam] | None
) -> RunStartedEvent:
    """The team's start. `facts`: what it starts from; `hosts`: where there are several agents."""
    return RunStartedEvent(
        schema=SCHEMA,
        folder=str(run.folder),
        run=run_id,
        recipe=dict(run.recipe_table),
        team=to_table(run.team),
        fingerprint=run.fingerprint,
        data_digest=facts["data"],
        samples=facts["samples"],
        engine=run.engine,
        cut=facts.get("cut", run.team.workers),
        parameters=facts["parameters"],
        version=facts["version"],
        digest=facts["weights"],
        step=facts.get("step", facts["version"]),
        steps=run.recipe_table["steps"],
        resumed=resumed,
        remembered=facts.get("remembered", UNSET),
        libraries=libraries(),
        processor=processor(),
        hardware=hardware().table(),
        import_paths=list(run.import_paths),
        written=facts.get("written") or UNSET,
        optimizers=facts["optimizers"] if len(facts["optimizers"]) > 1 else UNSET,
        whole_update=facts.get("whole_update") or UNSET,
        hosts=UNSET if hosts is None else hosts,
    )


def result_of(
    run: Request,
    facts: Mapping[str, Any],
    leader: Ended,
    costs: Sequence[Costs],
    restarts: int,
    stood_in: int,
    wire_bytes: Sequence[BytesOfHost] | UnsetType,
    wrong: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """The fields of ``result.json``. `leader`: what it has told at its end; `costs`: what each member has that counts
    them; `stood_in`: of the restarts, those of workers whose part others did; `wire_bytes`: of each host, where there
    are several agents; `wrong`: what audits have found.
    """
    progress, left = leader.progress, leader.left
    return Result.of(
        progress,
        replace(costs[0], idle_share=[share for each in costs for share in each.idle_share]),
        left.get("ema"),
        recipe=run.recipe_table["name"],
        digest=leader.digest,
        rule=run.rule.name,
        engine=run.engine,
        steps=progress["steps"],
        versions=progress["version"],
        items=progress["items"],
        workers=run.team.workers,
        microbatches=run.recipe_table["microbatches"],
        parameters=facts["parameters"],
        items_per_s=progress["items"] / progress["train_s"] if progress["train_s"] else None,
        wall_s=round(time.monotonic() - run.began, 3),
        checksum_s=round(progress["checksum_s"], 6),
        restarts=restarts,
        stood_in=stood_in or UNSET,
        wire_bytes=wire_bytes,
        interrupted=leader.interrupted,
        stopped=progress["stopped"] or None,
        data_digest=facts["data"],
        sample=left.get("sample"),
        artifacts=left.get("artifacts"),
        audit={**left["audit"], "wrong": list(wrong)} if "audit" in left else UNSET,
    ).table()


def end_of(result: Mapping[str, Any]) -> RunEndedEvent:
    """The run's end, on the tape."""
    return RunEndedEvent(
        version=result["versions"],
        digest=result["digest"],
        result=dict(result),
        interrupted=result["interrupted"],
        wire_bytes=result.get("wire_bytes", UNSET),
    )
