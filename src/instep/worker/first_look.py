"""What a run is refused for before its first step, as far as it can be seen: its data's and its objective's faults.

One process looks for all: worker 0, the server, or the one that simulates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from instep.data.cursor import load
from instep.data.repeats import check_repeats
from instep.objectives import check_protocol
from instep.objectives.gathers import check_gathers
from instep.randomness import key, seed_all
from instep.restore import kept_module_state, kept_random_state
from instep.worker.replica import Replica


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

    with replica.written.probing(learn=False):  # one process does it, and what it learnt the others would not know
        check_protocol(replica.objective, replica.module, batch, doubled, replica.written.kept)
        _look_at_gathers(replica)


def _look_at_gathers(replica: Replica) -> None:
    """Raises ObjectiveError where a metric does not take the outputs of the first held-out batch."""
    data = replica.data
    if replica.objective.gathers and data.held_out is not None:
        replica.doing = "looking at the objective's outputs"
        with (
            kept_random_state(),
            kept_module_state(replica.module, training=False),
            torch.no_grad(),
            replica.autocast(),
        ):
            seed_all(key(replica.recipe.seed, "outputs", 0))
            first = load(data.held_out, range(min(replica.cursor.usual_size, len(data.held_out))), data.collate)
            check_gathers(replica.objective.objective, replica.module, replica.to_device(first))
