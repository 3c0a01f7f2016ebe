"""Gradient checkpointing for a replica: from a team's budget to a plan on its model, and what it then took."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from instep import gradient_checkpointing
from instep.budget import parse_budget
from instep.engines.replica import Replica
from instep.gradient_checkpointing.structure import Plan, Profile
from instep.recipe import Recipe


def fit_memory(replica: Replica, text: str, emit: Callable[..., None] | None = None) -> Plan | None:
    """Plans for the budget `text`, such as "40%", and puts the plan on the replica's model; "" does nothing.

    Recomputed values are checked in the first step. `emit("planned", ...)` tells what was predicted and then measured
    (`measured_bytes` is None for a compiled model, whose kernels hide what they keep). Raises CheckpointingError.
    """
    if not text:
        return None
    budget = parse_budget(text, "'team.memory'")
    replica.doing = "profiling the model for gradient checkpointing"
    profile, batch = profile_of(replica)
    wanted = budget.of(profile.peak_bytes)
    found = gradient_checkpointing.plan(profile, budget_bytes=wanted, price=price_in(replica.recipe))
    replica.doing = "trying the gradient checkpointing plan"
    measured = put_on(replica, found, batch)
    if emit is not None:
        emit("planned", **facts(found, None if replica.recipe.compile else measured))
    return found


def price_in(recipe: Recipe) -> Literal["seconds", "flops"]:
    """What plans for a recipe save: a compiler fuses what costs no FLOPs into other kernels, where it takes next to no
    time."""
    return "flops" if recipe.compile else "seconds"


def profile_of(replica: Replica) -> tuple[Profile, Any]:
    """The profile of the largest microbatch of the first step, and that microbatch."""
    places = [m for m in range(replica.recipe.microbatches) if replica.cursor.microbatch(0, m)]
    batch = max((replica.batch(0, place) for place in places), key=_elements)
    return gradient_checkpointing.profile(replica.module, objective_of(replica), batch), batch


def put_on(replica: Replica, plan: Plan, batch: Any) -> tuple[int, float]:
    """Puts `plan` on the model, checked in the first step; the peak in bytes and the seconds of a trial on `batch`."""
    replica.checkpointing = gradient_checkpointing.apply(replica.module, plan)
    if replica.recipe.compile:  # it warns of operations in place, of which the plan takes care
        logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    measured = gradient_checkpointing.measure(replica.module, objective_of(replica), batch)
    replica.checkpointing.verify = not replica.recipe.compile
    return measured


def objective_of(replica: Replica) -> Callable[[nn.Module, Any], dict[str, Tensor]]:
    """The objective as the replica computes it, in its precision."""

    def objective(model: nn.Module, batch: Any) -> dict[str, Tensor]:
        with replica.autocast():
            return replica.objective.sums(model, batch)

    return objective


def facts(plan: Plan, measured: tuple[int, float] | None) -> dict[str, Any]:
    """What the tape says of a plan."""
    return {
        "budget_bytes": plan.budget_bytes,
        "nothing_recomputed_bytes": plan.nothing_bytes,
        "predicted_bytes": plan.peak_bytes,
        "measured_bytes": measured[0] if measured else None,
        "extra_flops": round(plan.extra_flops, 6),
        "extra_time": round(plan.extra_time, 6),
        "blocks": len(plan.blocks),
        "checkpointed": plan.checkpointed,
    }


def _elements(batch: Any) -> int:
    return sum(leaf.numel() for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor))
