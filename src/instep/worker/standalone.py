"""A replica as workers have it before some step, to compute parts of that step once more, outside of the run."""

from __future__ import annotations

from collections.abc import Callable, Collection

from instep.recipe import Recipe
from instep.worker.replica import Replica


def replica_before(
    step: int, recipe: Recipe, device: str, written: Collection[str], load: Callable[[Replica], None]
) -> Replica:
    """It knows the objective's terms. written: as `Replica` has it; `load` gives it the weights of then."""
    replica = Replica(recipe, device, written=written)
    load(replica)
    replica.enter(step)
    replica.learn_terms(step)
    return replica
