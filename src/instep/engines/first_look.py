"""What a run is refused for before its first step, as far as it can be seen: its data's and its objective's faults.

One process looks for all: worker 0, the server, or the one that simulates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from instep.data.cursor import load
from instep.data.repeats import check_repeats
from instep.engines.replica import Replica
from instep.objectives import check
from instep.randomness import key, seed_all


def look_at_data(replica: Replica, warn: Callable[[str], None]) -> Any | None:
    """Raises DataError where samples do not repeat, see `check_repeats`.

    Returns the first microbatch of step 0 where it was read for that.
    """
    replica.doing = "reading samples twice, to see whether they are the same"
    batch, doubt = check_repeats(replica.data, replica.cursor, replica.recipe.seed)
    if doubt:
        warn(doubt)
    return None if batch is None else replica.to_device(batch)


def look_at_objective(replica: Replica, batch: Any) -> None:
    """Raises ObjectiveError where the objective keeps state, or a term looks like a mean.

    batch: what `replica` learnt its terms from.
    """
    replica.doing = "looking at the objective"

    def doubled() -> Any:
        indices = replica.cursor.microbatch(0, 0)
        seed_all(key(replica.recipe.seed, 0, 0, "data"))
        return replica.to_device(load(replica.data.train, [*indices, *indices], replica.data.collate))

    check(replica.objective, replica.module, batch, doubled)
