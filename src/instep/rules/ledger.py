"""The ledger: the state machine that obeys an update rule. Events in, actions out; no torch, no clock, no I/O.

Every engine drives the same ledger: it tells it who joined, left and pushed, and carries out what comes back, in
order. What is promised, in any order of events:

- A piece is merged exactly once. One whose worker left, or whose contribution was dropped, is given out again.
- A piece is dropped once at most while its worker lives: when it is given out again, to another worker where there is
  other work for the one that was late, updates that would make it too old wait for it, and who has sent something for
  such an update waits too.
- Under order "arrival", no worker starts on a contribution while it is more than `max_lead` rounds ahead of the
  slowest one whose contribution can still be merged; under order "round", none starts on a round that is more than
  `max_lead` after the one that merges next, nor on one that would be too old when it merges.
- No contribution merges with more than `max_staleness`.
- While a worker is active and the run is not finished, some worker has work.
- Under a rule with `overlap`, whoever is active when a round begins gets `Pieces.own` of it first: it has begun it.

What an event makes possible comes in this order: updates first, then releases, so that a worker starts from weights
that have its own last contribution in them wherever that is merged.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from operator import attrgetter

from instep.rules.actions import Action, Contribution, Drop, Finish, Merge, Release
from instep.rules.delays import Delays
from instep.rules.rule import UpdateRule
from instep.rules.work import Pieces
from instep.rules.workers import ActiveWorker, Pace

__all__ = ["Action", "Contribution", "Drop", "Finish", "Ledger", "Merge", "Release"]

_BY_PIECE = attrgetter("piece")
_BY_NUMBER = attrgetter("number")

_new = tuple.__new__  # what a call of a NamedTuple comes to, in half the time; used where millions are made


class Ledger:
    """The state of one run under a rule.

    Times are seconds since any moment that the caller likes; they matter under a rule that `waits` alone.
    """

    # With slots: of an object with more than 30 attributes, Python looks up each in a dictionary.
    __slots__ = (
        "_bare", "_blocked", "_busy_at", "_by_round", "_count", "_due", "_grace_s", "_held", "_idle", "_in_flight",
        "_lead", "_limit", "_next_piece", "_open", "_overlaps", "_pace", "_pending", "_per_round", "_quorum_since_s",
        "_returned", "_size", "_size_of", "_waiting_since_s", "_wanted", "_whole", "_workers", "delays", "finished",
        "lead_max", "merged_microbatches", "merged_pieces", "next_seq", "pieces", "round", "rule", "version",
    )  # fmt: skip

    def __init__(self, rule: UpdateRule, pieces: Pieces):
        self.rule, self.pieces = rule, pieces
        self.version = 0
        """Updates so far."""
        self.merged_pieces = 0
        self.merged_microbatches = 0
        self.round = 0
        """The round that merges next; under order "arrival" the count of the slowest worker."""
        self.lead_max = 0
        """The largest `lead_of` of any worker when it was released, since the ledger was built."""
        self.next_seq = 0
        """The `seq` of the contribution that is pushed next."""
        self.finished = False
        """Whether every piece is merged."""
        self._by_round, self._overlaps = rule.order == "round", rule.overlap > 0
        self._lead, self._limit = rule.max_lead, rule.max_staleness
        if self._by_round and self._limit is not None:  # here a round is a version: what is ahead by n will be n old
            self._lead = self._limit if self._lead is None else min(self._lead, self._limit)
            self._limit = None
        self.delays = Delays(self._limit)
        """How long pieces that were given out again have waited, and which of them are waited for."""
        self._grace_s = rule.grace_s
        self._quorum_since_s: float | None = None  # when as many waited as the next update takes
        self._whole = pieces.in_tree_order
        self._bare = rule.weight == "items"
        self._count = pieces.count
        self._size, self._size_of = pieces.even_microbatches, pieces.microbatches_of
        self._per_round = pieces.workers
        self._next_piece = 0
        self._returned: list[int] = []  # a heap
        self._pending: dict[int, list[Contribution]] = {}  # by round; all under 0 where order is arrival
        self._waiting_since_s: float | None = None  # when the first of those came, where order is arrival
        self._workers: dict[int, ActiveWorker] = {}
        self._due = 0  # the key in `_pending` of what merges next,
        self._wanted = 1  # how many contributions make that update,
        self._open = 0  # and the first piece that may not be started on before it is made, or is none
        self._idle: deque[ActiveWorker] = deque()
        self._blocked: deque[ActiveWorker] = deque()  # held back by max_lead: all are one round too far ahead
        self._held: deque[ActiveWorker] = deque()  # held back with an update that waits for a late piece
        # These two are kept under order "arrival" alone.
        self._pace = Pace()  # of those who are not doomed
        self._busy_at: dict[int, set[int]] = {}  # who computes from which version and is not doomed, with a limit
        self._in_flight = 0
        self._look_ahead()

    # Events

    def joined(self, worker: int, now_s: float = 0.0) -> list[Action]:
        """A worker is there and wants work. It counts as as far as the slowest."""
        assert worker not in self._workers, f"worker {worker} is active already"
        state = ActiveWorker(worker, self.round)
        self._workers[worker] = state
        self._look_ahead()
        self._count_in(state)
        self._rest(state)
        return self._settle([], now_s)

    def left(self, worker: int, now_s: float = 0.0) -> list[Action]:
        """A worker is gone. What it pushed stays; what it was computing is given out again."""
        state = self._workers.pop(worker)
        self._look_ahead()
        state.active = False
        if state.piece >= 0:
            self._stop(state)
            self._give_back(state.piece, state.base)
        if not state.doomed:
            self._count_out(state)
        return self._settle([], now_s)

    def pushed(self, worker: int, items: int, now_s: float = 0.0) -> list[Action]:
        """A worker has finished the piece it was released for; `items` it held of the objective's first term."""
        state = self._workers[worker]
        assert state.piece >= 0, f"worker {worker} has no work"
        contribution = _new(Contribution, (self.next_seq, worker, state.piece, state.base, items))
        self.next_seq += 1
        self._stop(state)
        state.piece = -1
        actions: list[Action] = []
        if state.doomed:  # it does not count as a round
            state.doomed = False
            state.rounds = max(state.rounds, self.round)
            self._count_in(state)
            staleness = self.version - contribution.base
            why = f"its staleness, {staleness}, is above max_staleness, {self._limit}"
            self.delays.late(contribution.piece, worker)
            actions.append(self._drop(contribution, why))
        elif self._by_round:
            self._pending.setdefault(contribution.piece // self._per_round, []).append(contribution)
        else:
            rounds = state.rounds
            state.rounds = rounds + 1
            self._pace.add(rounds + 1)
            if self._pace.remove(rounds):
                self.round = self._pace.slowest(self.round)
            if self._waiting_since_s is None:
                self._waiting_since_s = now_s
            self._pending.setdefault(0, []).append(contribution)
            if self.delays.hold(self.version):
                self._held.append(state)
                return self._settle(actions, now_s)
        self._rest(state)
        return self._settle(actions, now_s)

    def passed(self, now_s: float) -> list[Action]:
        """It is `now_s`. To be called at `deadline_s`; at any other moment it does no harm."""
        return self._settle([], now_s)

    def recover(self) -> list[Action]:
        """After a restart of everything: nobody is active, and what was not merged is given out again."""
        for state in self._workers.values():
            if state.piece >= 0:
                self._give_back(state.piece, state.base)
            state.active = False
        self._workers, self._pace, self._busy_at = {}, Pace(), {}
        self._idle.clear()
        self._blocked.clear()
        self._held.clear()
        self.delays.nobody_computes()
        self._in_flight = 0
        self._look_ahead()
        lost = [contribution for pending in self._pending.values() for contribution in pending]
        self._pending, self._waiting_since_s, self._quorum_since_s = {}, None, None
        return [self._drop(contribution, "it was not merged before the run ended") for contribution in lost]

    # State

    @property
    def active(self) -> list[int]:
        """The active workers, in order."""
        return sorted(self._workers)

    @property
    def deadline_s(self) -> float | None:
        """When `passed` must be called, unless another event changes it before; None while nothing waits for time."""
        if self._waiting_since_s is None or self.delays.hold(self.version):
            return None
        ends_s, wait_s = self._grace_ends_s, self.rule.max_wait_s
        last_s = None if wait_s is None else self._waiting_since_s + wait_s
        return last_s if ends_s is None else ends_s if last_s is None else min(last_s, ends_s)

    def graced(self, now_s: float) -> int:
        """How many contributions wait for an update whose grace ends now or has ended; 0 where it is none of that."""
        ends_s = self._grace_ends_s
        return 0 if ends_s is None or now_s < ends_s else len(self._pending[self._due])

    @property
    def _grace_ends_s(self) -> float | None:
        """Until when an update whose quorum is there waits for further contributions; None while none does."""
        since_s, ready = self._quorum_since_s, self._pending.get(self._due, ())
        return None if since_s is None or len(ready) < self._wanted else since_s + (self._grace_s or 0.0)

    @property
    def bases(self) -> set[int]:
        """The versions that contributions in hand, computed or waiting, started from."""
        computing = {state.base for state in self._workers.values() if state.piece >= 0}
        return computing | {c.base for pending in self._pending.values() for c in pending}

    def in_hand(self, worker: int) -> tuple[int, int]:
        """The piece that a worker computes, and the version it computes from; piece -1 if it has none."""
        state = self._workers[worker]
        return state.piece, state.base

    def lead_of(self, worker: int) -> int:
        """How many rounds the worker is ahead: of the slowest, or under order "round" of the one that merges next."""
        state = self._workers[worker]
        if self._by_round:
            return self.pieces.round_of(state.piece) - self.round if state.piece >= 0 else 0
        return max(0, state.rounds - self.round)  # below 0 where what it computes is too old

    # What follows from an event

    def _settle(self, actions: list[Action], now_s: float) -> list[Action]:
        """Updates and releases until nothing more can be done."""
        pending, delays = self._pending, self.delays
        while (ready := pending.get(self._due)) and (len(ready) >= self._wanted or self._waits_no_more(now_s)):
            if delays.hold(self.version) or (self._grace_s is not None and self._in_grace(ready, now_s)):
                break
            del pending[self._due]
            self._merge(ready, actions)
        self._release(actions)
        return actions

    def _merge(self, ready: list[Contribution], actions: list[Action]) -> None:
        """Makes one update."""
        version = self.version
        if len(ready) == 1:
            staleness: tuple[int, ...] = (version - ready[0].base,)
        else:
            if self._by_round:
                ready.sort(key=_BY_PIECE)  # the order of the tree, which no arrival changes: so the bits are one
            staleness = tuple([version - c.base for c in ready])
        self.version = version = version + 1
        self.merged_pieces += len(ready)
        self.merged_microbatches += self._size * len(ready) or sum([self._size_of(c.piece) for c in ready])
        self.delays.merged(ready, version - 1)
        actions.append(_new(Merge, (version, tuple(ready), self._weights(ready, staleness), staleness)))
        if self._by_round:
            self.round += 1
            self._look_ahead()
        else:
            self._waiting_since_s = self._quorum_since_s = None
            self._let_go()
            if self._limit is not None:  # what started from there would now merge one version beyond the limit
                self._doom(version - self._limit - 1)
        if self.merged_pieces == self._count:
            self.finished = True
            actions.append(Finish(version))

    def _look_ahead(self) -> None:
        """Brings up to date what the next update takes, and which pieces may be started on."""
        if self._by_round:
            self._due, self._wanted, self._open = self.round, self.pieces.size_of(self.round), self._count
            if self._lead is not None:
                self._open = min(self._count, (self.round + self._lead + 1) * self._per_round)
        else:  # of those who are there: a quorum of the team at the start would wait for the dead
            self._wanted, self._open = self.rule.quorum_of(len(self._workers)), self._count

    def _waits_no_more(self, now_s: float) -> bool:
        """Whether what is ready, too little as it is, makes an update: the wait is over, or nothing else can come.

        The latter is where nobody computes and no piece is left: at the end of a run, in the middle of a round.
        """
        if self._in_flight == 0 and not self._returned and self._next_piece == self._count:
            return True
        deadline_s = self.deadline_s
        return deadline_s is not None and now_s >= deadline_s

    def _in_grace(self, ready: Sequence[Contribution], now_s: float) -> bool:
        """Whether what is ready, enough for an update, waits for further contributions that may come."""
        if self._waits_no_more(now_s) or self._workers.keys() <= {each.worker for each in ready}:
            return False
        if self._quorum_since_s is None:
            self._quorum_since_s = now_s
        return True

    def _weights(self, ready: Sequence[Contribution], staleness: Sequence[int]) -> tuple[float, ...]:
        if self._whole or (self._bare and len(ready) == 1):  # whole: divided by the items of the whole batch already
            return (1.0,) * len(ready)
        return self.rule.weights([c.items for c in ready], staleness)

    def _release(self, actions: list[Action]) -> None:
        """Gives work to those who wait, if the gate lets them and there is some."""
        if self._held and not self.delays.hold(self.version):
            self._let_go()
        blocked = self._blocked
        if blocked and self._within_lead(blocked[0]):
            self._idle.extend(blocked)
            blocked.clear()
        idle, version = self._idle, self.version
        if self._by_round and len(idle) > 1 and self._next() < self._open:
            self._idle = idle = deque(sorted(idle, key=_BY_NUMBER))  # so that a run in lockstep repeats itself
        while idle:
            piece = self._next()
            if piece >= self._open:
                return
            state = idle.popleft()
            if state.active:
                if self._overlaps:
                    piece = self._own(state.number, piece)
                elif not self._returned:
                    self._next_piece = piece + 1
                elif self.delays.late_by(piece) != state.number:
                    heapq.heappop(self._returned)
                else:
                    piece = self.delays.take_another(state.number, self._returned, more=self._next_piece < self._count)
                    if piece < 0:
                        piece = self._next_piece
                        self._next_piece += 1
                state.piece, state.base = piece, version
                self._start(state)
                actions.append(_new(Release, (state.number, piece, version)))

    def _own(self, worker: int, first: int) -> int:
        """Takes the worker's own piece of the round of `first`, the next one; that itself where it is taken."""
        piece, returned = self.pieces.own(worker, self.round), self._returned
        if piece < self._next_piece and piece not in returned:  # none is -1
            piece = first
        if piece in returned:
            returned.remove(piece)
        else:
            returned += range(self._next_piece, piece)
            self._next_piece = piece + 1
        heapq.heapify(returned)
        return piece

    def _next(self) -> int:
        """The piece that is given out next."""
        return self._returned[0] if self._returned else self._next_piece

    def _rest(self, state: ActiveWorker) -> None:
        """The worker waits for work, or for slower ones."""
        (self._idle if self._within_lead(state) else self._blocked).append(state)

    def _let_go(self) -> None:
        """Those who were held back with an update wait for work as others do."""
        while self._held:
            self._rest(self._held.popleft())

    def _within_lead(self, state: ActiveWorker) -> bool:
        """Whether the worker may start on something, which under order "round" is asked of pieces instead."""
        return self._by_round or self._lead is None or state.rounds - self.round <= self._lead

    def _start(self, state: ActiveWorker) -> None:
        """The worker computes."""
        self._in_flight += 1
        ahead = (state.piece // self._per_round if self._by_round else state.rounds) - self.round
        if ahead > self.lead_max:  # noqa: PLR1730  # millions of times: no call of max
            self.lead_max = ahead
        if self._limit is not None and not state.doomed:
            self._busy_at.setdefault(state.base, set()).add(state.number)
            self.delays.started(state.piece, state.base)

    def _stop(self, state: ActiveWorker) -> None:
        """The worker no longer computes."""
        self._in_flight -= 1
        if self._limit is not None and not state.doomed:
            self._busy_at[state.base].discard(state.number)
            self.delays.stopped(state.piece, state.base)

    def _doom(self, base: int) -> None:
        """Those who compute from version `base`, now too old, no longer hold anybody back."""
        for number in self._busy_at.pop(base, ()):
            state = self._workers[number]
            state.doomed = True
            self._pace.remove(state.rounds)
        self.round = self._pace.slowest(self.round)

    def _drop(self, contribution: Contribution, why: str) -> Drop:
        self._give_back(contribution.piece, contribution.base)
        return Drop(contribution, why)

    def _give_back(self, piece: int, base: int) -> None:
        heapq.heappush(self._returned, piece)
        self.delays.returned(piece, base)

    def _count_in(self, state: ActiveWorker) -> None:
        """`round` never falls: who comes late starts from it."""
        if not self._by_round:
            self._pace.add(state.rounds)
            self.round = self._pace.slowest(self.round)

    def _count_out(self, state: ActiveWorker) -> None:
        if not self._by_round:
            self._pace.remove(state.rounds)
            self.round = self._pace.slowest(self.round)
