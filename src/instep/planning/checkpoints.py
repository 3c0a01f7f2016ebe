"""How often a checkpoint pays. Pure."""

from __future__ import annotations

import math


def interval_s(checkpoint_s: float, mean_s: float) -> float:
    """Seconds of training between checkpoints that take `checkpoint_s` each, where the run goes back to the last one
    every `mean_s` on average.

    Daly's estimate (Future Generation Computer Systems 22, 2006, equation 37), whose first term is Young's square root
    (Communications of the ACM 17, 1974).
    """
    if checkpoint_s >= 2 * mean_s:
        return mean_s
    part = checkpoint_s / (2 * mean_s)
    young_s = math.sqrt(2 * checkpoint_s * mean_s)
    return max(young_s * (1 + math.sqrt(part) / 3 + part / 9) - checkpoint_s, 0.0)


def lost_share(every_s: float, checkpoint_s: float, mean_s: float) -> float:
    """The share of the time that checkpoints every `every_s` cost: writing them, and what is done again after a
    failure, half of an interval on average.
    """
    return checkpoint_s / every_s + (every_s / 2 + checkpoint_s) / mean_s
