"""What workers on the virtual clock compute of their next piece before they have the last update: rules with `overlap`.

Each begins with its own piece of the next round as soon as it has computed one, and stops where it needs the update.
"""

from __future__ import annotations

from collections.abc import Callable

from instep.rules.work import Pieces

Span = tuple[float, float]
"""From, to, in seconds."""


class Ahead:
    """Lists by worker: [W]. draw: gives a worker's seconds for a microbatch, once for each contribution."""

    def __init__(self, pieces: Pieces, draw: Callable[[int], float]):
        self._pieces, self._draw = pieces, draw
        self._begun: list[tuple[int, Span, float] | None] = [None] * pieces.workers  # a piece, and what is left, in s
        self.of_piece: list[Span | None] = [None] * pieces.workers
        """When each had begun the piece that it now has in hand; None where it has not, before its order came."""

    def goes_on(self, worker: int, piece: int, ordered_s: float) -> Span:
        """The worker has the order for a piece, and the update, at `ordered_s`: when it computes what is left of it."""
        begun, ready_s = self._begun[worker], ordered_s
        self.of_piece[worker] = None
        if begun is not None:
            ready_s = max(ordered_s, begun[1][1])
        if begun is None or begun[0] != piece:
            return ready_s, ready_s + self._draw(worker) * self._pieces.microbatches_of(piece)
        self._begun[worker], self.of_piece[worker] = None, begun[1]
        return ready_s, ready_s + begun[2]

    def begins(self, worker: int, piece: int, from_s: float) -> float:
        """The worker has computed `piece` at `from_s`: the seconds for which it goes on with its next."""
        own = self._pieces.own(worker, self._pieces.round_of(piece) + 1)
        if own < 0 or self._begun[worker] is not None:
            return 0.0
        work = self._pieces.work(own)
        whole_s = self._draw(worker) * work.microbatches
        ahead_s = whole_s * min(self._pieces.rule.overlap, work.local_steps) / work.local_steps
        self._begun[worker] = own, (from_s, from_s + ahead_s), whole_s - ahead_s
        return ahead_s

    def fails(self, worker: int, now_s: float) -> float:
        """The worker breaks off what it does: the seconds that it would have gone on for."""
        begun, self._begun[worker] = self._begun[worker], None
        spans = [self.of_piece[worker], begun[1] if begun else None]
        self.of_piece[worker] = None
        return sum(max(0.0, span[1] - max(now_s, span[0])) for span in spans if span is not None)
