"""What a run under an update rule costs: bytes, staleness, lead, idle time. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from instep.record.result import Costs


class Tally:
    """Counts while the run goes on. `clock()` is seconds since the run's start."""

    def __init__(self, workers: int, clock: Callable[[], float]):
        self._clock = clock
        self._merged = self._dropped = self._bytes = 0
        self._staleness_sum = self._staleness_max = self._lead_max = 0
        self._busy_s = [0.0] * workers
        self._there_s = [0.0] * workers
        self._since_s: list[float | None] = [None] * workers

    def joined(self, worker: int) -> None:
        """The worker is there from now on."""
        self._since_s[worker] = self._clock()

    def left(self, worker: int) -> None:
        """The worker is gone."""
        since_s = self._since_s[worker]
        if since_s is not None:
            self._there_s[worker] += self._clock() - since_s
            self._since_s[worker] = None

    def released(self, worker: int, lead: int, weights_bytes: int) -> None:
        """The worker pulls weights."""
        self._lead_max = max(self._lead_max, lead)
        self._bytes += weights_bytes

    def computed(self, worker: int, from_s: float, to_s: float) -> None:
        """The worker computed from `from_s` to `to_s`."""
        self._busy_s[worker] += to_s - from_s

    def pushed(self, sent_bytes: int) -> None:
        """A worker sent a contribution."""
        self._bytes += sent_bytes

    def merged(self, staleness: Sequence[int]) -> None:
        """An update."""
        self._merged += len(staleness)
        self._staleness_sum += sum(staleness)
        self._staleness_max = max(self._staleness_max, *staleness)

    def dropped(self) -> None:
        """A contribution was dropped."""
        self._dropped += 1

    def result(self, longest: int) -> Costs:
        """What this session cost. `longest`: versions, of pieces that were given out again."""
        for worker, since_s in enumerate(self._since_s):
            if since_s is not None:
                self.left(worker)
        return Costs(
            bytes_sent=self._bytes,
            staleness_mean=self._staleness_sum / self._merged if self._merged else 0.0,
            staleness_max=self._staleness_max,
            delayed_max=max(self._staleness_max, longest),
            lead_max=self._lead_max,
            idle_share=[
                round(max(0.0, 1 - busy / there), 4) if there else 0.0
                for busy, there in zip(self._busy_s, self._there_s, strict=True)
            ],
            dropped=self._dropped,
        )
