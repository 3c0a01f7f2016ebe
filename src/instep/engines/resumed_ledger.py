"""The ledger that a run goes on with from a checkpoint, after the death of all its workers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from instep.errors import CheckpointError
from instep.rules.ledger import Action, Ledger
from instep.rules.ledger_state import ledger_of, ledger_state
from instep.rules.rule import UpdateRule
from instep.rules.work import Pieces


def resumed_ledger(pieces: Pieces, meta: Mapping[str, Any], version: int) -> tuple[Ledger, list[Action]]:
    """The ledger of the checkpoint of `version`, of which `meta` tells, and what the restart has cost.

    Raises CheckpointError where it does not go with the run as it is planned now, or is none.
    """
    _check_length(pieces, meta)
    state = meta.get("ledger") or _state_after(pieces, version)
    _check_begun(pieces, state, meta)
    return _recovered(pieces.rule, pieces, state)


def _recovered(rule: UpdateRule, pieces: Pieces, state: Mapping[str, Any]) -> tuple[Ledger, list[Action]]:
    """The ledger of this state, after the death of all, and what is lost by it. Raises CheckpointError."""
    try:
        ledger = ledger_of(rule, pieces, state)
        return ledger, ledger.recover()
    except (LookupError, TypeError, ValueError, ArithmeticError, AssertionError) as error:
        raise CheckpointError(
            f"the ledger in the checkpoint is not as it was written ({type(error).__name__}: {error}); use an earlier "
            f"checkpoint."
        ) from error


def _check_length(pieces: Pieces, meta: Mapping[str, Any]) -> None:
    """Raises CheckpointError where the run was cut into groups of local steps in another way than it would be now."""
    steps, now, rule = meta.get("steps", pieces.steps), pieces.steps, pieces.rule
    cut_anew = max(0, min(steps, now) - rule.local_after) % rule.local_steps
    if steps != now and rule.local_steps > 1 and cut_anew:
        raise CheckpointError(
            f"the run was planned for {steps} steps, in groups of {rule.local_steps} local steps, and {now} would cut "
            f"the last of them in another way; resume with {steps} steps, or plan for a multiple of "
            f"{rule.local_steps}."
        )


def _check_begun(pieces: Pieces, state: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
    """Raises CheckpointError where work was given out already that lies beyond the run's end as it is planned now."""
    if state["next_piece"] > pieces.count:
        planned = dataclasses.replace(pieces, steps=meta.get("steps", state["version"]))
        last = planned.work(state["next_piece"] - 1)
        begun = last.batch + last.local_steps
        raise CheckpointError(
            f"{begun} global batches are begun, and the run is now to end after {pieces.steps}; resume with at least "
            f"{begun} steps."
        )


def _state_after(pieces: Pieces, version: int) -> dict[str, Any]:
    """The ledger of a run that the lockstep engine has brought to `version`."""
    done = version * pieces.parts
    return {
        **ledger_state(Ledger(pieces.rule, pieces)),
        "version": version,
        "round": version,
        "merged_pieces": done,
        "merged_microbatches": version * pieces.microbatches,
        "next_piece": done,
        "seq": done,
    }
