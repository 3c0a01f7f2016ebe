"""Random rules and histories for the ledger, and an observer that holds it to its promises after every event.

The observer keeps its own books, slowly, from the events and the actions alone; it reads no counter of the ledger.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import strategies as st

from instep.rules import PRESETS, UpdateRule
from instep.rules.ledger import Action, Contribution, Drop, Finish, Ledger, Merge, Release
from instep.rules.ledger_state import ledger_of, ledger_state
from instep.rules.work import Pieces

ARGUMENTS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "synchronous": {},
    "backup_workers": {"spare": st.integers(1, 4)},
    "bounded_staleness": {"lead": st.integers(0, 4)},
    "softsync": {"splits": st.integers(1, 4)},
    "asynchronous": {},
    "delay_compensated": {"strength": st.floats(0, 1)},
    "local_sgd": {"local_steps": st.integers(1, 4)},
    "post_local_sgd": {"local_steps": st.integers(2, 4), "after": st.integers(0, 5)},
    "diloco": {"local_steps": st.integers(1, 4), "outer_momentum": st.floats(0, 0.99)},
    "async_diloco": {"local_steps": st.integers(1, 4), "buffer": st.integers(2, 8)},
}
assert ARGUMENTS.keys() == PRESETS.keys(), "every preset is tested"

QUORUMS = st.one_of(
    st.just("all"),
    st.integers(1, 6).map(str),
    st.integers(1, 3).map(lambda less: f"all-{less}"),
    st.integers(1, 4).map(lambda parts: f"all/{parts}"),
)
BOUNDS = st.none() | st.integers(0, 3)


@st.composite
def presets(draw: st.DrawFn, names: Sequence[str] = tuple(sorted(PRESETS))) -> UpdateRule:
    """Any preset, or any of these, with small arguments, and where it may be in a few fragments, or with overlap."""
    name = draw(st.sampled_from(names))
    rule = PRESETS[name](**draw(st.fixed_dictionaries({}, optional=ARGUMENTS[name])))
    if not rule.lockstep or rule.gradients or rule.local_after:
        return rule
    count, steps = draw(st.integers(1, 3)), rule.local_steps
    overlap = draw(st.integers(0, steps)) if steps * count > 1 else 0
    return dataclasses.replace(rule, local_steps=steps * count, fragments=count, overlap=overlap)


@st.composite
def custom_rules(draw: st.DrawFn) -> UpdateRule:
    """Any rule that its fields can make, with small numbers."""
    order = draw(st.sampled_from(["round", "arrival"]))
    fields: dict[str, Any] = {"order": order, "quorum": "all"}
    if order == "arrival":
        fields |= {"quorum": draw(QUORUMS), "max_wait_s": draw(st.none() | st.floats(0.1, 5))}
        if fields["quorum"] != "all":
            fields |= {"grace_s": draw(st.none() | st.floats(0.1, 5))}
    outer = draw(st.sampled_from(["none", "sgd", "nesterov", "delayed_nesterov"]))
    if outer != "none":
        fields |= {"local_steps": draw(st.integers(1, 4)), "outer_lr": draw(st.floats(0.1, 2))}
        fields |= {"outer_momentum": draw(st.floats(0, 0.9))}
        if fields["local_steps"] > 1:
            fields |= {"local_after": draw(st.integers(0, 5))}
    else:
        fields |= {"compensation": draw(st.floats(0, 1))}
    if outer == "delayed_nesterov":
        fields |= {"outer_buffer": draw(st.integers(2, 9))}
    weight = draw(st.sampled_from(["items", "staleness"]))
    return UpdateRule(max_lead=draw(BOUNDS), max_staleness=draw(BOUNDS), outer=outer, weight=weight, **fields)


ANY_RULE = presets() | custom_rules()

KINDS = ["push"] * 15 + ["join"] * 4 + ["leave"] * 3 + ["wait"] * 3 + ["round trip", "all leave", "recover"]
Event = tuple[str, int, int]
EVENTS = st.integers(0, 60).flatmap(
    lambda count: st.lists(
        st.tuples(st.sampled_from(KINDS), st.integers(0, 11), st.integers(0, 3)), min_size=count, max_size=count
    )
)
"""What happens, to whom, and a number: of items, or of half seconds."""


@dataclass
class Seen:
    """A worker as the observer sees it."""

    rounds: int
    piece: int | None = None
    base: int = 0


@dataclass
class Observed:
    """A run: the ledger, what it was seen to do, and the checks of that."""

    rule: UpdateRule
    workers: int
    microbatches: int
    steps: int
    now_s: float = 0.0
    version: int = 0
    active: dict[int, Seen] = field(default_factory=dict)
    waiting: list[Contribution] = field(default_factory=list)
    waiting_since_s: float = 0.0
    quorum_since_s: float | None = None
    merges: list[Merge] = field(default_factory=list)
    drops: list[Drop] = field(default_factory=list)
    late: dict[int, int] = field(default_factory=dict)
    held: set[int] = field(default_factory=set)
    begun: dict[int, int] = field(default_factory=dict)
    given_out_at: dict[int, int] = field(default_factory=dict)
    delayed: list[int] = field(default_factory=list)
    history: list[list[Action]] = field(default_factory=list)
    finished: bool = False

    def __post_init__(self) -> None:
        self.pieces = Pieces(self.rule, self.workers, self.microbatches, self.steps)
        self.ledger = Ledger(self.rule, self.pieces)
        self.twin: Ledger | None = None
        self.total = len(list_pieces(self.rule, self.workers, self.microbatches, self.steps))
        self._least = 0
        self._pushes = 0

    # Events

    def happens(self, event: Event) -> None:
        """One event of any kind, to the worker that the number picks; nothing where it fits nobody."""
        kind, who, number = event
        busy = self.busy
        if kind == "push" and busy:
            self.push(busy[who % len(busy)], number)
        elif kind == "leave" and self.active:
            self.leave(sorted(self.active)[who % len(self.active)])
        elif kind == "join" and who not in self.active:
            self.join(who)
        elif kind == "wait":
            self.wait(number / 2)
        elif kind == "round trip":
            self.round_trip()
        elif kind == "all leave":
            for worker in sorted(self.active):
                self.leave(worker)
        elif kind == "recover":
            self.recover()

    def join(self, worker: int) -> None:
        self.active[worker] = Seen(self.least())
        self._see(lambda ledger: ledger.joined(worker, self.now_s))

    def leave(self, worker: int) -> None:
        del self.active[worker]
        self.held.discard(worker)
        self.begun.pop(worker, None)
        self._see(lambda ledger: ledger.left(worker, self.now_s))

    def push(self, worker: int, items: int = 1) -> None:
        seen = self.active[worker]
        assert seen.piece is not None
        contribution = Contribution(self._pushes, worker, seen.piece, seen.base, items)
        self._pushes += 1
        if self.hopeless(seen):
            seen.piece = None
            seen.rounds = max(seen.rounds, self.least(but=worker))
        else:
            seen.piece = None
            seen.rounds += 1
            if self.holds():
                self.held.add(worker)
        self.waiting_since_s = self.waiting_since_s if self.waiting else self.now_s
        self.waiting.append(contribution)
        self._see(lambda ledger: ledger.pushed(worker, items, self.now_s))

    def wait(self, seconds: float) -> None:
        self.now_s += seconds
        self._see(lambda ledger: ledger.passed(self.now_s))

    def recover(self) -> None:
        self.active.clear()
        self.held.clear()
        self.begun.clear()
        lost = list(self.waiting)
        self.quorum_since_s = None
        self._see(lambda ledger: ledger.recover())
        assert len(self.history[-1]) == len(lost)
        assert not self.waiting

    def round_trip(self) -> None:
        """From now on a ledger made from this one's state gets the same events, and must do the same."""
        self.twin = ledger_of(self.rule, self.pieces, json.loads(json.dumps(ledger_state(self.ledger))))
        self._compare()

    def run_out(self) -> None:
        """Those who are there, or one who comes, push in turn until the end."""
        if not self.active:
            self.join(0)
        turns = 0
        while not self.finished:
            busy = self.busy
            self.push(busy[turns % len(busy)], items=turns % 3)
            turns += 1
            assert turns < 50 * (self.total + 10), "it goes on for ever"

    # What the observer knows

    @property
    def busy(self) -> list[int]:
        return sorted(worker for worker, seen in self.active.items() if seen.piece is not None)

    @property
    def merged(self) -> list[int]:
        return [c.piece for merge in self.merges for c in merge.contributions]

    @property
    def free(self) -> set[int]:
        """Pieces that nobody has, has pushed or has seen merged."""
        taken = {seen.piece for seen in self.active.values()} | {c.piece for c in self.waiting}
        return set(range(self.total)) - taken - set(self.merged)

    def next_of(self, worker: int) -> int:
        """The piece that the worker gets, if it gets one."""
        if self.rule.overlap and worker < self.workers:
            own = len(self.merges) * self.workers + worker
            if own in self.free:
                return own
        return min({piece for piece in self.free if self.late.get(piece) != worker} or self.free)

    def hopeless(self, seen: Seen) -> bool:
        """Whether what the worker computes can no longer be merged."""
        limit = self.rule.max_staleness
        return limit is not None and seen.piece is not None and self.version - seen.base > limit

    def holds(self) -> bool:
        """Whether somebody computes a piece that was dropped before, and the next update would make it too old."""
        limit = self.rule.max_staleness
        awaited = [seen.base for seen in self.active.values() if seen.piece in self.late]
        return limit is not None and any(self.version + 1 - base > limit for base in awaited)

    def least(self, but: int | None = None) -> int:
        """The rounds of the slowest who counts; while nobody does, of the last who did."""
        counts = [s.rounds for worker, s in self.active.items() if worker != but and not self.hopeless(s)]
        return min(counts, default=self._least)

    def round_of(self, piece: int) -> int:
        return piece // self.workers

    def round_pieces(self, number: int) -> list[int]:
        return [piece for piece in range(self.total) if self.round_of(piece) == number]

    def lead(self, worker: int) -> int:
        """How far a worker that computes is ahead, as reports say it."""
        seen = self.active[worker]
        assert seen.piece is not None
        if self.rule.order == "round":
            return self.round_of(seen.piece) - len(self.merges)
        return max(0, seen.rounds - self.least())

    def may_start(self, worker: int, piece: int) -> bool:
        """Whether the gates of the rule let the worker start on the piece."""
        lead, limit = self.rule.max_lead, self.rule.max_staleness
        if self.rule.order == "arrival":
            return lead is None or self.active[worker].rounds - self.least() <= lead
        ahead = self.round_of(piece) - len(self.merges)
        return (lead is None or ahead <= lead) and (limit is None or ahead <= limit)

    # Checks

    def _see(self, event: Callable[[Ledger], list[Action]]) -> None:
        self._least = self.least()
        if not self.holds():
            self.held.clear()
        actions = event(self.ledger)
        self.history.append(actions)
        if self.twin is not None:
            assert event(self.twin) == actions
            self._compare()
        for place, action in enumerate(actions):
            match action:
                case Release():
                    self._released(action)
                case Merge():
                    assert not any(isinstance(before, Release) for before in actions[:place]), "updates come first"
                    self._merged(action)
                case Drop():
                    self._dropped(action)
                case Finish(version):
                    assert version == self.version
                    assert sorted(self.merged) == list(range(self.total))
                    assert not self.finished
                    self.finished = True
            self._least = self.least()
        self._check_now()

    def _released(self, release: Release) -> None:
        seen = self.active[release.worker]
        assert seen.piece is None, "it had work"
        assert release.version == self.version
        assert release.piece == self.next_of(release.worker)
        assert self.begun.pop(release.worker, release.piece) == release.piece, "it has begun with another one"
        assert self.may_start(release.worker, release.piece)
        assert release.worker not in self.held, "it has sent something for an update that waits for a late piece"
        self.given_out_at.setdefault(release.piece, self.version)
        seen.piece, seen.base = release.piece, release.version

    def _merged(self, merge: Merge) -> None:
        contributions = merge.contributions
        assert merge.version == self.version + 1
        assert merge.staleness == tuple(self.version - c.base for c in contributions)
        if self.rule.max_staleness is not None:
            assert max(merge.staleness) <= self.rule.max_staleness
        if self.rule.order == "round":
            assert [c.piece for c in contributions] == self.round_pieces(len(self.merges))
            assert set(contributions) <= set(self.waiting), "each was pushed, and neither merged nor dropped"
        else:
            assert list(contributions) == self.waiting, "all that came, as it came"
            assert self._must_merge()
        assert not self.holds(), "a piece that was dropped before is waited for"
        for piece in [c.piece for c in contributions]:
            self.late.pop(piece, None)
            self.delayed.append(self.version - self.given_out_at.pop(piece))
        assert merge.weights == pytest.approx(self._weights(merge))
        self.waiting = [c for c in self.waiting if c not in contributions]
        self.quorum_since_s = None
        self.held.clear()
        self.merges.append(merge)
        self.version += 1
        if self.rule.overlap:  # each who is there may have begun with this
            own = {worker: len(self.merges) * self.workers + worker for worker in self.active if worker < self.workers}
            self.begun = {worker: piece for worker, piece in own.items() if piece < self.total}

    def _weights(self, merge: Merge) -> list[float]:
        rule, items = self.rule, [c.items for c in merge.contributions]
        if rule.order == "round" and rule.max_lead == 0 and rule.outer == "none" and self.workers <= self.microbatches:
            return [1.0] * len(items)
        shares = [count / sum(items) if sum(items) else 1 / len(items) for count in items]
        if rule.weight == "items":
            assert sum(merge.weights) == pytest.approx(1)
            return shares
        return [share / (1 + old) for share, old in zip(shares, merge.staleness, strict=True)]

    def _dropped(self, drop: Drop) -> None:
        assert drop.why
        limit = self.rule.max_staleness
        if self.active:  # else a restart
            assert limit is not None
            assert self.version - drop.contribution.base > limit
            assert self.rule.order == "arrival"
            assert drop.contribution.piece not in self.late, "no piece is dropped twice while its worker lives"
            self.late[drop.contribution.piece] = drop.contribution.worker
        self.waiting.remove(drop.contribution)
        self.drops.append(drop)

    def _must_merge(self) -> bool:
        """Whether what waits, under order "arrival", makes an update now."""
        wait_s = self.rule.max_wait_s
        enough = self._enough() and not (
            self.rule.grace_s is not None
            and self.active.keys() - {c.worker for c in self.waiting}
            and (self.quorum_since_s is None or self.now_s < self.quorum_since_s + self.rule.grace_s)
        )
        late = wait_s is not None and self.now_s >= self.waiting_since_s + wait_s
        return bool(self.waiting) and not self.holds() and (enough or late or not (self.busy or self.free))

    def _enough(self) -> bool:
        return bool(self.waiting) and len(self.waiting) >= self.rule.quorum_of(len(self.active))

    def _deadlines(self) -> list[float]:
        if not self.waiting or self.holds():
            return []
        found = [] if self.rule.max_wait_s is None else [self.waiting_since_s + self.rule.max_wait_s]
        if self.rule.grace_s is not None and self.quorum_since_s is not None and self._enough():
            found.append(self.quorum_since_s + self.rule.grace_s)
        return found

    def _check_now(self) -> None:
        assert self.ledger.finished == self.finished
        assert self.ledger.version == self.version
        assert self.ledger.active == sorted(self.active)
        assert self.ledger.merged_pieces == len(self.merged)
        assert self.ledger.bases == {self.active[w].base for w in self.busy} | {c.base for c in self.waiting}
        for worker in self.busy:
            assert not (self.active[worker].piece in self.late and self.hopeless(self.active[worker])), "dropped twice"
        if self.rule.grace_s is not None and self._enough() and not self.holds() and self.quorum_since_s is None:
            self.quorum_since_s = self.now_s
        assert self.ledger.deadline_s == min(self._deadlines(), default=None)
        if self.rule.order == "arrival":
            assert not self._must_merge(), "an update was withheld"
        else:
            assert not set(self.round_pieces(len(self.merges))) <= {c.piece for c in self.waiting} or self.finished
        assert {worker: self.ledger.lead_of(worker) for worker in self.busy} == {w: self.lead(w) for w in self.busy}
        if self.active and not self.finished:
            assert self.busy, "deadlock: somebody is there, work is left, and nobody has any"
        for worker in self.active.keys() - set(self.busy) - self.held:
            assert not (self.free and self.may_start(worker, min(self.free))), f"worker {worker} is idle for nothing"

    def _compare(self) -> None:
        assert self.twin is not None
        assert ledger_state(self.twin) == ledger_state(self.ledger)
        assert all(self.twin.lead_of(worker) == self.ledger.lead_of(worker) for worker in self.active)


def list_pieces(rule: UpdateRule, workers: int, microbatches: int, steps: int) -> list[tuple[list[int], list[int]]]:
    """The pieces of a run as (batches, microbatches of each), slowly and plainly: the reference for `Pieces`."""
    parts = min(workers, microbatches)
    ranges = [
        [m for m in range(microbatches) if part * microbatches // parts <= m < (part + 1) * microbatches // parts]
        for part in range(parts)
    ]
    pieces = []
    batch = 0
    while batch < steps:
        together = 1 if batch < rule.local_after else rule.local_steps // rule.fragments
        batches = [batch + step for step in range(together) if batch + step < steps]
        pieces += [(batches, each) for each in ranges]
        batch += together
    return pieces


def started(rule: UpdateRule, workers: int, microbatches: int, steps: int) -> Observed:
    """A run that all workers of the team have joined."""
    run = Observed(rule, workers, microbatches, steps)
    for worker in range(workers):
        run.join(worker)
    return run
