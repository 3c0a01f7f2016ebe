"""The network between workers and server, and what collectives cost on it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from instep.clock.units import duration_s, number, rate_bytes_per_s
from instep.errors import RecipeError


@dataclass(frozen=True)
class Network:
    """What each machine's link carries in either direction, and how long a message is on its way.

    Simultaneous pushes share the server's link inwards equally, simultaneous pulls its link outwards; the workers'
    own links are never narrower than that. Raises RecipeError.
    """

    bandwidth_bytes_per_s: float = math.inf
    latency_s: float = 0.0

    def __post_init__(self) -> None:
        bandwidth_bytes_per_s, latency_s = number(self.bandwidth_bytes_per_s), number(self.latency_s)
        if not bandwidth_bytes_per_s > 0:
            raise RecipeError(
                f"the bandwidth is {bandwidth_bytes_per_s:g} bytes/s, over which nothing would ever arrive; give "
                f"one above 0, or leave it out for no limit."
            )
        if not 0 <= latency_s < math.inf:
            raise RecipeError(f"the latency is {latency_s:g} s; it must be a finite time from 0.")

    @classmethod
    def from_text(cls, bandwidth: str | None = None, latency: str | None = None) -> Network:
        """From texts such as "1Gb/s" (bits), "100MB/s" (bytes), "1ms" and "20us". Raises RecipeError."""
        return cls(
            math.inf if bandwidth is None else rate_bytes_per_s(bandwidth, "the bandwidth"),
            0.0 if latency is None else duration_s(latency, "the latency"),
        )

    def ring_all_reduce_s(self, workers: int, size_bytes: float, vectors: int = 1) -> float:
        """Seconds of a ring all-reduce of `size_bytes` over W `workers`, the additions left out.

        ``2 (W - 1) / W * bytes / bandwidth + 2 (W - 1) * latency``: a reduce-scatter and an all-gather, each of W - 1
        steps with a W-th of the bytes (Thakur, Rabenseifner and Gropp, "Optimization of collective communication
        operations in MPICH", 2005; optimal in bytes: Patarasuk and Yuan, 2009). Where a worker has more than one
        vector to be reduced, the reduce-scatter takes as many times as long as the largest number of `vectors`.
        """
        steps = workers - 1
        return (vectors + 1) * steps / workers * size_bytes / self.bandwidth_bytes_per_s + 2 * steps * self.latency_s


def reduce_bytes(workers: int, size_bytes: int, vectors: int) -> int:
    """Bytes that all W `workers` together send to have `vectors` added, each worker a W-th of them.

    ``(W - 1) * bytes`` where each has one vector, over a ring or a tree alike.
    """
    return size_bytes * vectors * (workers - 1) // workers


def gather_bytes(workers: int, size_bytes: int) -> int:
    """Bytes that all workers together send until each has the whole of the total."""
    return size_bytes * (workers - 1)
