"""A ledger as plain values that JSON can hold, and made of them again: it knows the inside of `Ledger`, as no other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from instep.rules.actions import Contribution, Merge
from instep.rules.ledger import Ledger
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
        "seq": ledger._seq,
        "pending": [list(c) for pending in [waiting, *ledger._pending.values()] for c in pending],
        "waiting_since_s": ledger._waiting_since_s,
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
    ledger._next_piece, ledger._returned, ledger._seq = state["next_piece"], list(state["returned"]), state["seq"]
    ledger._finished = ledger.merged_pieces == ledger._count
    ledger._waiting_since_s = state["waiting_since_s"]
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
