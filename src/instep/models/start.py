"""Models that are to start from the same weights wherever they are built."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from instep.randomness import seed_all
from instep.restore import kept_random_state


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """What `build` gives after all random generators were seeded with `seed`; their state is put back.

    So a model and a frozen reference can be one and the same at the start, in a recipe file too::

        {use = "instep.models.start:seeded", args = {seed = 1, build = {use = "instep.models:GPT", args = {...}}}}
    """
    with kept_random_state():
        seed_all(seed)
        return build()
