"""The work of `benchmarks.stall`, in common to all who do it."""

from __future__ import annotations

from instep.recipe import Recipe, parse
from instep.recipe_files import read

MICROBATCHES, EVERY = 16, 10
"""Of a step; steps between torchrun's checkpoints."""


def recipe() -> Recipe:
    """The recipe `gpt`, of one sample a microbatch, at a constant rate, without evaluations and checksums."""
    own = {"batch": MICROBATCHES, "microbatches": MICROBATCHES, "steps": 1_000_000, "evaluate_every": 0}
    table = read("gpt") | own | {"schedule": {"kind": "constant"}, "checksum_every": 1_000_000, "sample_length": 0}
    return parse({key: value for key, value in table.items() if key != "team"})[0]
