"""Random numbers keyed by what they are for, never by who draws them."""

from __future__ import annotations

import hashlib


def key(seed: int, *parts: int | str) -> int:
    """63 bits that depend on `seed` and `parts` alone, such as (step, microbatch, "compute")."""
    text = "/".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


_AHEAD = 16
"""Steps whose keys are made together: that takes a third of the time of making each when it is needed."""


def key_of_step(seed: int, step: int, microbatch: int, what: str) -> int:
    """``key(seed, step, microbatch, what)``."""
    block, place = divmod(step, _AHEAD)
    made = _made.get((seed, microbatch, what))
    if made is None or made[0] != block:
        steps = range(block * _AHEAD, (block + 1) * _AHEAD)
        made = _made[seed, microbatch, what] = block, [key(seed, each, microbatch, what) for each in steps]
    return made[1][place]


_made: dict[tuple[int, int, str], tuple[int, list[int]]] = {}


def seed_all(value: int) -> None:
    """Seeds Python's, numpy's and torch's generators, all devices."""
    import random

    import numpy as np
    import torch

    random.seed(value)
    np.random.seed(value & 0xFFFFFFFF)
    torch.default_generator.manual_seed(value)  # a tenth of the time of torch.manual_seed, which looks for devices
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(value)
