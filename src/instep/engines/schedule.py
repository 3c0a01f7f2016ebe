"""Who does what when: a run under any update rule on the virtual clock, without its gradients. No torch.

The ledger that decides is the one that real runs obey. A contribution's way: the server releases a worker, which pulls
the weights over the server's link outwards, computes for as long as its times say, and pushes over the server's link
inwards; the ledger hears of it, and the server carries out what the ledger answers, one thing after the other.
"""

from __future__ import annotations

import math
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from instep.clock.link import Link
from instep.clock.loop import Loop, uncollected
from instep.clock.network import Network, gather_bytes, reduce_bytes
from instep.clock.times import WorkerTimes
from instep.errors import RecipeError
from instep.reduce.tree import nodes_of
from instep.rules.ledger import Action, Drop, Ledger, Merge, Release
from instep.rules.rule import UpdateRule
from instep.rules.work import Pieces

OnEvent = Callable[[str, dict[str, Any]], None]
"""Called with an event's kind and its other fields, as they stand on a tape."""

_HOPELESS = 100_000
"""Failures without a contribution between them after which a run counts as one that never ends."""


@dataclass(frozen=True, eq=False)
class Schedule:
    """What a run came to, in virtual seconds. W workers."""

    wall_s: float
    """From the start until the last update is made."""
    versions: int
    contributions: int
    """Those that arrived; of them `dropped` were not merged."""
    dropped: int
    failures: int
    bytes_pushed: int
    """Of contributions, or in collectives of their reduction."""
    bytes_pulled: int
    """Of weights, or in collectives of the total on its way back."""
    staleness_mean: float
    """Over merged contributions."""
    staleness_max: int
    lead_max: int
    """Rounds that a worker was ahead when it started on a contribution: of the slowest, or under order "round" of the
    round that merged next."""
    busy_s: NDArray[np.float64]
    """[W]: seconds that each worker computed, lost work included."""
    present_s: NDArray[np.float64]
    """[W]: seconds that each worker was there."""

    @property
    def bytes_sent(self) -> int:
        """Pushed and pulled."""
        return self.bytes_pushed + self.bytes_pulled

    @property
    def idle_share(self) -> NDArray[np.float64]:
        """[W]: the share of its presence in which a worker did not compute: it waited, pulled or pushed."""
        present_s = np.maximum(self.present_s, np.finfo(np.float64).tiny)
        return np.clip(1 - self.busy_s / present_s, 0, 1)


def simulate(
    rule: UpdateRule,
    pieces: Pieces,
    times: WorkerTimes,
    network: Network | None = None,
    *,
    contribution_bytes: int = 0,
    weights_bytes: int = 0,
    merge_s: float = 0.0,
    collective: bool = False,
    all_reduce: Literal["ring", "tree"] = "ring",
    joins_s: Sequence[float] | None = None,
    items_of: Callable[[int], int] | None = None,
    on_event: OnEvent | None = None,
) -> Schedule:
    """Runs `pieces` under `rule` on the virtual clock, to the end.

    network: None where messages take no time.
    contribution_bytes, weights_bytes: the size of a contribution's vector for one node of the tree, and of a pull.
    merge_s: seconds that the server needs for an update, in which it does nothing else.
    collective: under a rule in lockstep, workers reduce among themselves: a round ends with an `all_reduce` of
        `contribution_bytes` over those present, there is no server and no pull. Other rules take no notice.
    joins_s: when each worker comes, [W]; at 0 if None.
    items_of: items that a piece holds of the objective's first term; its microbatches if None.
    on_event: gets what a tape would hold: joined, released, computed, pushed, merged, dropped, left.

    Raises RecipeError where the rule, the slow workers or the failures do not fit the team.
    """
    rule.check_workers(pieces.workers)
    run = _Run(rule, pieces, times, network, contribution_bytes, weights_bytes, merge_s, items_of, on_event)
    if collective and rule.lockstep:
        run.reduce_among_workers(network or Network(), all_reduce)
    joins = [0.0] * pieces.workers if joins_s is None else [float(time_s) for time_s in joins_s]
    if len(joins) != pieces.workers or not all(0 <= time_s < math.inf for time_s in joins):
        raise RecipeError(f"'joins_s' is {joins}; give a finite time from 0 for each of {pieces.workers} workers.")
    return run.run(joins)


class _Run:
    """The state of one simulation. Lists by worker: [W]."""

    def __init__(
        self,
        rule: UpdateRule,
        pieces: Pieces,
        times: WorkerTimes,
        network: Network | None,
        contribution_bytes: int,
        weights_bytes: int,
        merge_s: float,
        items_of: Callable[[int], int] | None,
        on_event: OnEvent | None,
    ):
        workers = pieces.workers
        self._loop = loop = Loop()
        self._ledger, self._workers, self._timed = Ledger(rule, pieces), workers, rule.max_wait_s is not None
        self._items_of, self._on_event = items_of, on_event
        self._contribution_bytes, self._weights_bytes = contribution_bytes, weights_bytes
        self._merge_s = merge_s
        self._reduce_s: Callable[[int, float, int], float] | None = None
        self._latency_s = network.latency_s if network else 0.0
        self._down: Link | None = None
        self._up: Link | None = None
        if network and network.bandwidth_bytes_per_s < math.inf:
            self._down = Link(loop, network.bandwidth_bytes_per_s, self._pulled)
            self._up = Link(loop, network.bandwidth_bytes_per_s, self._pushed)

        self._parts = pieces.parts
        works = [pieces.work(part) for part in range(self._parts)]
        self._microbatches_of = [work.stop - work.start for work in works]
        vectors = [len(nodes_of(work, pieces)) for work in works]
        self._vectors_of = vectors if max(vectors) > 1 else None
        self._batches_of = [pieces.batches_of(group)[1] for group in range(pieces.groups)]

        self._draw = times.draws(workers)
        self._failures = times.failures
        self._uptimes = [times.uptimes(worker) for worker in range(workers)] if times.failures else []
        # C numbers by worker: at 10,000 workers, what is not in the cache is what takes time.
        self._microbatches = array("q", bytes(8 * workers))
        self._present_s, self._busy_s = array("d", bytes(8 * workers)), array("d", bytes(8 * workers))
        self._since_s = array("d", bytes(8 * workers))  # when it came
        self._away = bytearray(b"\1" * workers)
        self._direct = self._down is None and times.failures is None  # whether a release is the start of computation
        bare = on_event is None and items_of is None and times.failures is None and self._vectors_of is None
        self._noted = not bare  # these are kept too:
        self._piece, self._base = [-1] * workers, [0] * workers
        self._from_s, self._to_s = array("d", bytes(8 * workers)), array("d", bytes(8 * workers))
        self._holder: list[Loop | Link | None] = [None] * workers  # where the worker's next event waits, and
        self._token = [0] * workers  # its name there

        self._occupied = False  # the server makes an update; who has something for it waits
        self._queue: deque[tuple[Callable[[int], None], int]] = deque()
        self._alarm, self._alarm_s = 0, math.inf  # its name in the loop, 0 for none, and when it is to ring
        self._finished_s = -1.0
        self._pulls = self._drops = self._present = self._failed = self._hopeless = 0
        self._staleness_sum = self._staleness_max = self._pushed_bytes = self._pulled_bytes = 0
        self._more_vectors = 0  # that were pushed, beyond one a contribution

    def reduce_among_workers(self, network: Network, all_reduce: Literal["ring", "tree"]) -> None:
        """Puts collectives in the place of the server."""
        self._down = self._up = None
        self._direct, self._latency_s = self._failures is None, 0.0
        self._reduce_s = network.ring_all_reduce_s if all_reduce == "ring" else network.tree_all_reduce_s

    def run(self, joins_s: list[float]) -> Schedule:
        """The whole simulation."""
        loop, ledger = self._loop, self._ledger
        for worker, time_s in enumerate(joins_s):
            loop.at(time_s, self._joined, worker)
        with uncollected():
            loop.run()
        wall_s = self._finished_s
        assert wall_s >= 0, "the ledger gave nobody work and did not finish"
        for worker in range(self._workers):
            if not self._away[worker]:
                self._present_s[worker] += max(0.0, wall_s - self._since_s[worker])
        if self._reduce_s is None:
            self._pushed_bytes = (ledger.next_seq + self._more_vectors) * self._contribution_bytes
            self._pulled_bytes = self._pulls * self._weights_bytes
        return Schedule(
            wall_s=wall_s,
            versions=ledger.version,
            contributions=ledger.next_seq,
            dropped=self._drops,
            failures=self._failed,
            bytes_pushed=self._pushed_bytes,
            bytes_pulled=self._pulled_bytes,
            staleness_mean=self._staleness_sum / max(1, ledger.merged_pieces),
            staleness_max=self._staleness_max,
            lead_max=ledger.lead_max,
            busy_s=np.array(self._busy_s),
            present_s=np.array(self._present_s),
        )

    # A worker's way

    def _start(self, worker: int) -> None:
        """Released: it pulls the weights."""
        if self._away[worker]:  # it failed, and the server has not heard of it
            return
        if self._down is None:
            self._pulled(worker)
        else:
            token = self._down.send(self._weights_bytes, worker)
            if self._noted:
                self._holder[worker], self._token[worker] = self._down, token

    def _pulled(self, worker: int) -> None:
        """The weights have left the server: they travel, the worker computes, and its push travels."""
        self._pulls += 1
        loop, latency_s = self._loop, self._latency_s
        seconds = self._draw(worker) * self._microbatches[worker]
        self._busy_s[worker] += seconds
        from_s = loop.now_s + latency_s
        to_s = from_s + seconds
        token = loop.at(to_s + latency_s, self._pushed if self._up is None else self._computed, worker)
        if self._noted:
            self._from_s[worker], self._to_s[worker] = from_s, to_s
            self._holder[worker], self._token[worker] = loop, token

    def _computed(self, worker: int) -> None:
        """The push reaches the server's link. When it is through, the server hears of it."""
        assert self._up is not None
        token = self._up.send(self._vectors(self._piece[worker]) * self._contribution_bytes, worker)
        if self._noted:
            self._holder[worker], self._token[worker] = self._up, token

    def _fails(self, worker: int) -> None:
        """The worker breaks off what it does."""
        assert self._failures is not None
        now_s = self._loop.now_s
        holder = self._holder[worker]
        if holder is not None:
            holder.cancel(self._token[worker])
            self._holder[worker] = None
        if self._to_s[worker] > now_s:
            self._busy_s[worker] -= self._to_s[worker] - max(now_s, self._from_s[worker])
            self._to_s[worker] = 0.0
        self._away[worker] = True
        self._present_s[worker] += now_s - self._since_s[worker]
        self._failed += 1
        self._hopeless += 1
        if self._hopeless > _HOPELESS:
            raise RecipeError(
                f"no worker has finished anything in {_HOPELESS} failures: the mean time between failures, "
                f"{self._failures.mean_time_between_s:g} s, is too short for this work; raise it, or cut the work into "
                f"smaller pieces."
            )
        self._loop.at(now_s + self._failures.restart_s, self._joined, worker)
        self._left(worker)

    # What the server hears, one thing after the other

    def _pushed(self, worker: int) -> None:
        if self._occupied:
            self._holder[worker] = None  # it is there, and safe whatever becomes of the worker
            self._queue.append((self._pushed, worker))
            return
        now_s = self._loop.now_s
        items = self._microbatches[worker] if self._items_of is None else self._items_of(self._piece[worker])
        if self._noted:
            self._note_push(worker, items)
        self._obey(self._ledger.pushed(worker, items, now_s))

    def _joined(self, worker: int) -> None:
        if self._occupied:
            self._queue.append((self._joined, worker))
            return
        now_s = self._loop.now_s
        self._away[worker] = False
        self._since_s[worker] = now_s
        self._present += 1
        if self._failures is not None:
            self._loop.at(now_s + next(self._uptimes[worker]), self._fails, worker)
        if self._on_event:
            self._on_event("joined", {"t_s": now_s, "clock": "virtual", "worker": worker})
        self._obey(self._ledger.joined(worker, now_s))

    def _left(self, worker: int) -> None:
        if self._occupied:
            self._queue.append((self._left, worker))
            return
        now_s = self._loop.now_s
        self._present -= 1
        if self._on_event:
            self._on_event("left", {"t_s": now_s, "clock": "virtual", "worker": worker, "why": "it failed"})
        self._obey(self._ledger.left(worker, now_s))

    def _passed(self, _: None) -> None:
        """The ledger's deadline. It has none after an update, so the server does not make one now."""
        self._alarm, self._alarm_s = 0, math.inf
        self._obey(self._ledger.passed(self._loop.now_s))

    def _free(self, _: None) -> None:
        """The server has made its update, and turns to those who wait."""
        self._occupied = False
        queue = self._queue
        while queue and not self._occupied and self._finished_s < 0:
            heard, worker = queue.popleft()
            heard(worker)

    # What the server does

    def _obey(self, actions: list[Action]) -> None:
        """Carries out actions, in order. An update takes its time, and what follows comes after it."""
        loop = self._loop
        now_s = at_s = loop.now_s
        for action in actions:
            if type(action) is Release:
                worker, piece, version = action
                group, part = divmod(piece, self._parts)
                microbatches = self._batches_of[group] * self._microbatches_of[part]
                self._microbatches[worker] = microbatches
                if self._noted:
                    self._note_release(worker, piece, version, at_s)
                if at_s > now_s:
                    token = loop.at(at_s, self._start, worker)
                    if self._noted:
                        self._holder[worker], self._token[worker] = loop, token
                elif self._direct:
                    self._pulled(worker)
                else:
                    self._start(worker)
            elif type(action) is Merge:
                self._staleness_sum += sum(action.staleness)
                self._staleness_max = max(self._staleness_max, *action.staleness)
                at_s += self._merge_s
                if self._reduce_s is not None:
                    at_s += self._reduce(self._reduce_s, action)
                if self._on_event:
                    self._on_event("merged", {"t_s": at_s, "clock": "virtual", **action.facts()})
            elif type(action) is Drop:
                self._drops += 1
                if self._on_event:
                    fields = {**action.contribution.facts(), "why": action.why}
                    self._on_event("dropped", {"t_s": at_s, "clock": "virtual", **fields})
            else:
                self._finished_s = at_s
                loop.stop()
        if at_s > now_s:
            self._occupied = True
            loop.at(at_s, self._free, None)
        if self._timed:
            self._set_alarm()

    def _reduce(self, reduce_s: Callable[[int, float, int], float], action: Merge) -> float:
        """Seconds of a collective, whose bytes are counted."""
        workers, size_bytes = self._present, self._contribution_bytes
        more = [self._vectors(each.piece) - 1 for each in action.contributions]
        self._pushed_bytes += reduce_bytes(workers, size_bytes, workers + sum(more))
        self._pulled_bytes += gather_bytes(workers, size_bytes)
        return reduce_s(workers, size_bytes, 1 + max(more))

    def _vectors(self, piece: int) -> int:
        """The vectors of the size of a gradient that a contribution has."""
        return 1 if self._vectors_of is None else self._vectors_of[piece % self._parts]

    def _set_alarm(self) -> None:
        """Has the ledger told when time has passed that it waits for."""
        deadline_s = self._ledger.deadline_s
        wanted_s = math.inf if deadline_s is None else deadline_s
        if wanted_s != self._alarm_s:
            if self._alarm:
                self._loop.cancel(self._alarm)
            self._alarm = self._loop.at(wanted_s, self._passed, None) if wanted_s < math.inf else 0
            self._alarm_s = wanted_s

    # What is noted where somebody wants to know, or workers may fail

    def _note_push(self, worker: int, items: int) -> None:
        self._holder[worker] = None
        self._hopeless = 0
        vectors = self._vectors(self._piece[worker])
        self._more_vectors += vectors - 1
        if self._on_event:
            where = {"t_s": self._loop.now_s, "clock": "virtual", "worker": worker, "version": self._base[worker]}
            where["piece"] = self._piece[worker]
            self._on_event("computed", {**where, "from_s": self._from_s[worker], "to_s": self._to_s[worker]})
            pushed = {"seq": self._ledger.next_seq, "items": items, "bytes": vectors * self._contribution_bytes}
            self._on_event("pushed", {**where, **pushed})

    def _note_release(self, worker: int, piece: int, version: int, at_s: float) -> None:
        self._piece[worker], self._base[worker] = piece, version
        if self._on_event:
            fields = {"t_s": at_s, "clock": "virtual", "worker": worker, "version": version, "piece": piece}
            self._on_event("released", fields)
