"""A ledger as plain values that JSON can hold, and made of them again: it knows the inside of `Ledger`, as no other."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from instep.errors import CheckpointError
from instep.rules.actions import Contribution, Merge
from instep.rules.ledger import Action, Ledger
from instep.rules.rule import UpdateRule
from instep.rules.work import Pieces
from instep.rules.workers import ActiveWorker


def ledger_state(ledger: Ledger, unmade: Sequence[Merge] = ()) -> dict[str, Any]:
    """All of it, as plain values.

    `unmade`: the last updates that it asked for, which were not made: their contributions still wait.
    """
    waiting = [contribution for merge in unmade for contribution in merge.contributions]
    sizes = map(ledger.pieces.microbatches_of, (c.piece for c in waiting))
    return {
        "version": ledger.version - len(unmade),
        "round": ledger.round - len(unmade) * ledger._by_round,
        "merged_pieces": ledger.merged_pieces - len(waiting),
        "merged_microbatches": ledger.merged_microbatches - sum(sizes),
        "next_piece": ledger._next_piece,
        "returned": sorted(ledger._returned),
        "seq": ledger.next_seq,
        "pending": [list(c) for pending in [waiting, *ledger._pending.values()] for c in pending],
        "waiting_since_s": ledger._waiting_since_s,
        **({} if ledger._grace_s is None else {"quorum_since_s": ledger._quorum_since_s}),
        "workers": [
            {"number": s.number, "rounds": s.rounds, "piece": s.piece, "base": s.base, "doomed": s.doomed}
            for s in ledger._workers.values()
        ],
        "order": [state.number for state in [*ledger._idle, *ledger._blocked] if state.active],
        "held": [state.number for state in ledger._held if state.active],
        **ledger.delays.state(),
    }


def ledger_of(rule: UpdateRule, pieces: Pieces, state: Mapping[str, Any]) -> Ledger:
    """The ledger whose `ledger_state` this was, under the same rule and pieces."""
    state = {"held": [], "first": [], "late": [], **state}  # which states of before lack
    ledger = Ledger(rule, pieces)
    ledger.delays.load(state)
    ledger.version = state["version"]
    ledger.merged_pieces, ledger.merged_microbatches = state["merged_pieces"], state["merged_microbatches"]
    ledger._next_piece, ledger._returned, ledger.next_seq = state["next_piece"], list(state["returned"]), state["seq"]
    ledger.finished = ledger.merged_pieces == ledger._count
    ledger._waiting_since_s, ledger._quorum_since_s = state["waiting_since_s"], state.get("quorum_since_s")
    for values in state["pending"]:
        contribution = Contribution(*values)
        key = pieces.round_of(contribution.piece) if ledger._by_round else 0
        ledger._pending.setdefault(key, []).append(contribution)
    for fields in state["workers"]:
        worker = ActiveWorker(**fields)
        ledger._workers[worker.number] = worker
        if not worker.doomed:
            ledger._count_in(worker)
        if worker.piece >= 0:
            ledger._start(worker)
    ledger.round = state["round"]
    ledger._look_ahead()
    for number in state["order"]:
        ledger._rest(ledger._workers[number])
    ledger._held.extend(map(ledger._workers.__getitem__, state["held"]))
    ledger.lead_max = 0
    return ledger


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
    cut_anew = max(0, min(steps, now) - rule.local_after) % rule.stride
    if steps != now and rule.stride > 1 and cut_anew:
        raise CheckpointError(
            f"the run was planned for {steps} steps, in groups of {rule.stride} local steps, and {now} would cut "
            f"the last of them in another way; resume with {steps} steps, or plan for a multiple of "
            f"{rule.stride}."
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
