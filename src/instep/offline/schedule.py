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

import numpy as np

from instep.clock.link import Link
from instep.clock.loop import Loop, uncollected
from instep.clock.network import Network, gather_bytes, reduce_bytes
from instep.clock.times import WorkerTimes
from instep.errors import RecipeError
from instep.offline.ahead import Ahead
from instep.offline.simulated_run import SimulatedRun
from instep.offline.trace import Listener, Notes
from instep.reduce.tree import nodes_of
from instep.rules.ledger import Action, Drop, Ledger, Merge, Release
from instep.rules.rule import UpdateRule
from instep.rules.work import Pieces

_HOPELESS = 100_000
"""Failures without a contribution between them after which a run counts as one that never ends."""


def simulate(
    rule: UpdateRule,
    pieces: Pieces,
    times: WorkerTimes,
    network: Network | None = None,
    *,
    contribution_bytes: int | Sequence[int] = 0,
    weights_bytes: int | Sequence[int] = 0,
    first_bytes: int | None = None,
    merge_s: float = 0.0,
    collective: bool = False,
    items_of: Callable[[int], int] | None = None,
    listener: Listener | None = None,
) -> SimulatedRun:
    """Runs `pieces` under `rule` on the virtual clock, to the end.

    network: None where messages take no time.
    contribution_bytes, weights_bytes: the size of a contribution's vector for one node of the tree, and of a pull;
        several, of each fragment in turn.
    first_bytes: the size of a pull of a worker that has just joined; the sum of `weights_bytes` if None.
    merge_s: seconds that the server needs for an update, in which it does nothing else.
    collective: under a rule in lockstep, workers reduce among themselves: a round ends with a ring all-reduce of
        `contribution_bytes` over those present, there is no server and no pull. Other rules take no notice.
    items_of: items that a piece holds of the objective's first term; its microbatches if None.
    listener: hears of what a tape would hold.

    Raises RecipeError where the rule, the slow workers or the failures do not fit the team.
    """
    rule.check_workers(pieces.workers)
    up, down = ((each,) if isinstance(each, int) else tuple(each) for each in (contribution_bytes, weights_bytes))
    sizes_bytes = up, down, sum(down) if first_bytes is None else first_bytes
    run = _Simulation(rule, pieces, times, network, sizes_bytes, merge_s, items_of, listener)
    if collective and rule.lockstep:
        run.reduce_among_workers(network or Network())
    return run.run()


class _Simulation:
    """The state of one simulation. Lists by worker: [W]."""

    # With slots: of an object with more than 30 attributes, Python looks up each in a dictionary.
    __slots__ = (
        "_ahead", "_alarm", "_alarm_s", "_away", "_busy_s", "_contribution_bytes", "_direct", "_down", "_down_bytes",
        "_draw", "_drops", "_even", "_failed", "_failures", "_finished_s", "_first_bytes", "_hopeless", "_in_turn",
        "_items_of", "_latency_s", "_ledger", "_listener", "_loop", "_merge_s", "_microbatches", "_microbatches_of",
        "_more_vectors", "_newcomers", "_notes", "_occupied", "_present", "_present_s", "_pulled_bytes", "_pulls",
        "_pushed_bytes", "_queue", "_reduce_s", "_round_of", "_since_s", "_staleness_max", "_staleness_sum", "_then",
        "_timed", "_up", "_up_bytes", "_uptimes", "_vectors_of", "_weights_bytes", "_workers",
    )  # fmt: skip

    def __init__(
        self,
        rule: UpdateRule,
        pieces: Pieces,
        times: WorkerTimes,
        network: Network | None,
        sizes_bytes: tuple[tuple[int, ...], tuple[int, ...], int],
        merge_s: float,
        items_of: Callable[[int], int] | None,
        listener: Listener | None,
    ):
        workers = pieces.workers
        self._loop = loop = Loop()
        self._ledger, self._workers, self._timed = Ledger(rule, pieces), workers, rule.waits
        self._items_of = items_of
        self._up_bytes, self._down_bytes, self._first_bytes = sizes_bytes
        self._contribution_bytes, self._weights_bytes = self._up_bytes[0], self._down_bytes[0]
        self._in_turn = len(self._up_bytes) > 1
        self._newcomers = set[int]()
        self._merge_s = merge_s
        self._reduce_s: Callable[[int, float, int], float] | None = None
        self._latency_s = network.latency_s if network else 0.0
        self._then = self._pushed  # what comes after a computation
        self._down: Link | None = None
        self._up: Link | None = None
        if network and network.bandwidth_bytes_per_s < math.inf:
            self._down = Link(loop, network.bandwidth_bytes_per_s, self._pulled)
            self._up = Link(loop, network.bandwidth_bytes_per_s, self._pushed)
            self._then = self._computed

        self._round_of = pieces.round_of
        self._even, self._microbatches_of = pieces.even_microbatches, pieces.microbatches_of
        vectors = [len(nodes_of(pieces.work(part), pieces)) for part in range(pieces.parts)]
        self._vectors_of = vectors if max(vectors) > 1 else None

        self._draw = times.draws(workers)
        self._failures = times.failures
        self._uptimes = [times.uptimes(worker) for worker in range(workers)] if times.failures else []
        # C numbers by worker: at 10,000 workers, what is not in the cache is what takes time.
        self._microbatches = array("q", bytes(8 * workers))
        self._present_s, self._busy_s = array("d", bytes(8 * workers)), array("d", bytes(8 * workers))
        self._since_s = array("d", bytes(8 * workers))  # when it came
        self._away = bytearray(b"\1" * workers)
        self._direct = self._down is None and times.failures is None  # whether a release is the start of computation
        self._ahead = Ahead(pieces, self._draw) if rule.overlap else None
        seen = listener is not None or items_of is not None or times.failures is not None
        bare = not seen and self._vectors_of is None and self._ahead is None
        self._notes = None if bare and not self._in_turn else Notes(workers, listener)
        self._listener = listener

        self._occupied = False  # the server makes an update; who has something for it waits
        self._queue: deque[tuple[Callable[[int], None], int]] = deque()
        self._alarm, self._alarm_s = 0, math.inf  # its name in the loop, 0 for none, and when it is to ring
        self._finished_s = -1.0
        self._pulls = self._drops = self._present = self._failed = self._hopeless = 0
        self._staleness_sum = self._staleness_max = self._pushed_bytes = self._pulled_bytes = 0
        self._more_vectors = 0  # that were pushed, beyond one a contribution

    def reduce_among_workers(self, network: Network) -> None:
        """Puts collectives in the place of the server."""
        self._down = self._up = None
        self._first_bytes, self._in_turn = self._weights_bytes, False  # there are no pulls
        self._then = self._pushed
        self._direct, self._latency_s = self._failures is None, 0.0
        self._reduce_s = network.ring_all_reduce_s

    def run(self) -> SimulatedRun:
        """The whole simulation."""
        loop, ledger = self._loop, self._ledger
        for worker in range(self._workers):
            loop.at(0.0, self._joined, worker)
        with uncollected():
            loop.run()
        wall_s = self._finished_s
        assert wall_s >= 0, "the ledger gave nobody work and did not finish"
        for worker in range(self._workers):
            if not self._away[worker]:
                self._present_s[worker] += max(0.0, wall_s - self._since_s[worker])
        if self._reduce_s is None:
            if not self._in_turn:
                self._pushed_bytes = (ledger.next_seq + self._more_vectors) * self._contribution_bytes
            self._pulled_bytes += self._pulls * self._weights_bytes
        return SimulatedRun(
            wall_s=wall_s,
            versions=ledger.version,
            contributions=ledger.next_seq,
            dropped=self._drops,
            failures=self._failed,
            bytes_pushed=self._pushed_bytes,
            bytes_pulled=self._pulled_bytes,
            staleness_mean=self._staleness_sum / max(1, ledger.merged_pieces),
            staleness_max=self._staleness_max,
            delayed_max=max(self._staleness_max, ledger.delays.longest),
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
            token = self._down.send(self._pull_bytes(worker), worker)
            if self._notes is not None:
                self._notes.waits(worker, self._down, token)

    def _pulled(self, worker: int) -> None:
        """The weights have left the server: they travel, the worker computes, and its push travels."""
        if self._in_turn or (self._newcomers and worker in self._newcomers):
            self._pulled_bytes += self._pull_bytes(worker)
            self._newcomers.discard(worker)
        else:
            self._pulls += 1
        loop, latency_s = self._loop, self._latency_s
        from_s = loop.now_s + latency_s
        if self._ahead is None:
            draw = self._draw
            seconds = draw(worker) * self._microbatches[worker]
            self._busy_s[worker] += seconds
            to_s = from_s + seconds
        else:
            from_s, to_s = self._go_on(self._ahead, worker, from_s)
        token = loop.at(to_s + latency_s, self._then, worker)
        if self._notes is not None:
            self._notes.computes(worker, from_s, to_s)
            self._notes.waits(worker, loop, token)

    def _go_on(self, ahead: Ahead, worker: int, from_s: float) -> tuple[float, float]:
        """When the worker, which has the update, computes the rest of its piece. Then it begins with its next."""
        assert self._notes is not None
        piece = self._notes.piece[worker]
        from_s, to_s = ahead.goes_on(worker, piece, from_s)
        self._busy_s[worker] += to_s - from_s + ahead.begins(worker, piece, to_s)
        return from_s, to_s

    def _computed(self, worker: int) -> None:
        """The push reaches the server's link. When it is through, the server hears of it."""
        assert self._up is not None
        if self._notes is None:
            self._up.send(self._contribution_bytes, worker)
        else:
            size_bytes = self._push_bytes(self._notes.piece[worker])
            self._notes.waits(worker, self._up, self._up.send(size_bytes, worker))

    def _fails(self, worker: int) -> None:
        """The worker breaks off what it does."""
        assert self._failures is not None
        assert self._notes is not None
        now_s, from_s, to_s = self._loop.now_s, self._notes.from_s[worker], self._notes.to_s[worker]
        self._notes.cancel(worker)
        if to_s > now_s:
            self._busy_s[worker] -= to_s - max(now_s, from_s)
            self._notes.computes(worker, from_s, 0.0)
        if self._ahead is not None:
            self._busy_s[worker] -= self._ahead.fails(worker, now_s)
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
            if self._notes is not None:
                self._notes.arrived(worker)
            self._queue.append((self._pushed, worker))
            return
        items = self._microbatches[worker] if self._notes is None else self._note_push(self._notes, worker)
        self._obey(self._ledger.pushed(worker, items, self._loop.now_s))

    def _note_push(self, notes: Notes, worker: int) -> int:
        """The items of the contribution."""
        piece, now_s = notes.piece[worker], self._loop.now_s
        items = self._microbatches[worker] if self._items_of is None else self._items_of(piece)
        size_bytes = self._push_bytes(piece)
        self._hopeless = 0
        self._more_vectors += self._vectors(piece) - 1
        self._pushed_bytes += size_bytes if self._in_turn else 0
        notes.arrived(worker)
        ahead = None if self._ahead is None else self._ahead.of_piece[worker]
        notes.pushed(worker, now_s, self._ledger.next_seq, items, size_bytes, ahead)
        return items

    def _joined(self, worker: int) -> None:
        if self._occupied:
            self._queue.append((self._joined, worker))
            return
        now_s = self._loop.now_s
        self._away[worker] = False
        self._since_s[worker] = now_s
        self._present += 1
        if self._first_bytes != self._weights_bytes:
            self._newcomers.add(worker)
        if self._failures is not None:
            self._loop.at(now_s + next(self._uptimes[worker]), self._fails, worker)
        if self._listener is not None:
            self._listener.joined(now_s, worker)
        self._obey(self._ledger.joined(worker, now_s))

    def _left(self, worker: int) -> None:
        if self._occupied:
            self._queue.append((self._left, worker))
            return
        now_s = self._loop.now_s
        self._present -= 1
        if self._listener is not None:
            self._listener.left(now_s, worker, "it failed")
        self._obey(self._ledger.left(worker, now_s))

    def _passed(self, _: None) -> None:
        """The ledger's deadline. It has none after an update, so the server does not make one now."""
        self._alarm, self._alarm_s = 0, math.inf
        ledger, now_s = self._ledger, self._loop.now_s
        if self._listener is not None and (waiting := ledger.graced(now_s)):
            self._listener.grace_ended(now_s, ledger.version, waiting)
        self._obey(ledger.passed(now_s))

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
        loop, notes, listener = self._loop, self._notes, self._listener
        now_s = at_s = loop.now_s
        for action in actions:
            if type(action) is Release:
                worker, piece, version = action
                self._microbatches[worker] = self._even or self._microbatches_of(piece)
                if notes is not None:
                    notes.released(worker, piece, version, at_s)
                if at_s > now_s:
                    token = loop.at(at_s, self._start, worker)
                    if notes is not None:
                        notes.waits(worker, loop, token)
                elif self._direct:
                    self._pulled(worker)
                else:
                    self._start(worker)
            elif type(action) is Merge:
                self._staleness_sum += sum(action.staleness)
                stalest = max(action.staleness)
                if stalest > self._staleness_max:  # noqa: PLR1730  # millions of times: no call of max
                    self._staleness_max = stalest
                at_s += self._merge_s
                if self._reduce_s is not None:
                    at_s += self._reduce(self._reduce_s, action)
                if listener is not None:
                    listener.merged(at_s, action)
            elif type(action) is Drop:
                self._drops += 1
                if listener is not None:
                    listener.dropped(at_s, action)
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
        workers, size_bytes = self._present, self._up_bytes[(action.version - 1) % len(self._up_bytes)]
        more = [self._vectors(each.piece) - 1 for each in action.contributions]
        self._pushed_bytes += reduce_bytes(workers, size_bytes, workers + sum(more))
        self._pulled_bytes += gather_bytes(workers, size_bytes)
        return reduce_s(workers, size_bytes, 1 + max(more))

    def _pull_bytes(self, worker: int) -> int:
        """Of the message that the worker pulls."""
        if worker in self._newcomers:
            return self._first_bytes
        if not self._in_turn:
            return self._weights_bytes
        assert self._notes is not None
        return self._down_bytes[(self._round_of(self._notes.piece[worker]) - 1) % len(self._down_bytes)]

    def _push_bytes(self, piece: int) -> int:
        """Of the contribution made of a piece."""
        return self._vectors(piece) * self._up_bytes[self._round_of(piece) % len(self._up_bytes)]

    def _vectors(self, piece: int) -> int:
        """The vectors of the size of a gradient that a contribution has."""
        return 1 if self._vectors_of is None else self._vectors_of[piece % len(self._vectors_of)]

    def _set_alarm(self) -> None:
        """Has the ledger told when time has passed that it waits for."""
        deadline_s = self._ledger.deadline_s
        wanted_s = math.inf if deadline_s is None else deadline_s
        if wanted_s != self._alarm_s:
            if self._alarm:
                self._loop.cancel(self._alarm)
            self._alarm = self._loop.at(wanted_s, self._passed, None) if wanted_s < math.inf else 0
            self._alarm_s = wanted_s
