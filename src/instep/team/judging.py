"""A third computation of a microbatch over which two workers differ, in a process that is neither's."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from instep.recipe import Recipe
from instep.team.client import computed
from instep.worker.noting import state_of
from instep.worker.replica import Replica


def third_result(recipe: Recipe, replica: Replica, step: int, microbatch: int, totals: Mapping[str, int]) -> bytes:
    """What the microbatch comes to in a new Python, from the weights of `replica`. Raises InstepError."""
    with tempfile.TemporaryDirectory(prefix="instep-audit-") as place:
        file = Path(place) / "state.pt"
        torch.save(state_of(replica), file)
        arguments: tuple[Any, ...] = (
            str(replica.device), str(file), (step, microbatch), dict(totals), list(replica.written.names),
            sorted(replica.trainable.off),
        )  # fmt: skip
        found: bytes = computed(
            "instep.worker.noting:computed_alone", recipe, arguments, (), (),
            if_killed="a third computation of an audit takes the memory of one more worker",
        )  # fmt: skip
    return found
