"""What workers hand to worker 0 outside of steps: bytes of any length, in pieces, through memory that all share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from instep.transport.exchange import Exchange

ROOM = 1 << 20
"""Bytes of a piece."""


class Parcels:
    """Sends them; all workers do so together. `barrier(marks, value)` sets the worker's mark and waits for all."""

    def __init__(self, exchange: Exchange, worker: int, barrier: Callable[[Any, int], None]):
        self._exchange, self._worker, self._barrier = exchange, worker, barrier
        self._meetings = 0

    def send(self, parcel: bytes) -> list[bytes]:
        """Sends a parcel that is not empty. Worker 0 gets those of all workers, the others nothing."""
        rooms, lengths = self._exchange.parcel_rooms, self._exchange.parcel_bytes
        lengths[self._worker] = len(parcel)
        self._meet()
        sizes = [int(length) for length in lengths]
        found = [bytearray() for _ in sizes]
        for start in range(0, max(sizes), ROOM):
            piece = parcel[start : start + ROOM]
            rooms[self._worker, : len(piece)] = np.frombuffer(piece, np.uint8)
            self._meet()  # the pieces are there
            if self._worker == 0:
                for worker, size in enumerate(sizes):
                    found[worker] += rooms[worker, : max(0, size - start)].tobytes()
            self._meet()  # and read
        return [bytes(each) for each in found] if self._worker == 0 else []

    def _meet(self) -> None:
        self._meetings += 1
        self._barrier(self._exchange.parcels_met, self._meetings)
