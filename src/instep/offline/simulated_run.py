"""What a run on the virtual clock came to. No torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class SimulatedRun:
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
    delayed_max: int
    """The most versions that a piece was merged after those that its first worker started from."""
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
