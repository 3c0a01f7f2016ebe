"""A third computation of a microbatch over which two workers differ, in a process that is neither's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from instep.recipe import Recipe
from instep.team.client import computed
from instep.worker.noting import state_of
from instep.worker.replica import Replica


def third_result(recipe: Recipe, replica: Replica, step: int, microbatch: int, totals: Mapping[str, int]) -> bytes:
    """What the microbatch comes to in a new Python, from the weights of `replica`. Raises InstepError."""
    arguments: tuple[Any, ...] = (
        str(replica.device), state_of(replica), (step, microbatch), dict(totals), list(replica.written.names),
        sorted(replica.trainable.off), replica.scaler.value,
    )  # fmt: skip
    # It counts as busy: the others wait for it, and are told for what.
    replica.doing = f"having a process of its own compute step {step + 1}, microbatch {microbatch} again"
    found: bytes = computed(
        "instep.worker.noting:computed_alone", recipe, arguments, (), (),
        if_killed="a third computation of an audit takes the memory of one more worker",
    )  # fmt: skip
    return found
