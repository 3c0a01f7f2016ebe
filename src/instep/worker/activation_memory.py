"""Gradient checkpointing for a replica: from a team's budget to a plan on its model, and what it then took."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from instep import gradient_checkpointing
from instep.budget import parse_budget
from instep.gradient_checkpointing import Applied
from instep.gradient_checkpointing.structure import Plan, Profile
from instep.recipe import Recipe, Team
from instep.record.events import Event, PlannedEvent
from instep.worker.replica import Replica
from instep.worker.spot_checks import SpotChecks


def fit_memory(
    replica: Replica, team: Team, emit: Callable[[Event], None] | None = None, *, workers: int = 1
) -> Plan | None:
    """Plans for the team's budget, such as "40%", and puts the plan on the replica's model; "" does nothing.

    Recomputed values are checked in the first step, and by samples later; `workers` wait for each other.
    `emit` gets `PlannedEvent`: what was predicted and then measured (`measured_bytes` is None for a compiled model,
    whose kernels hide what they keep). Raises CheckpointingError.
    """
    if not team.memory:
        return None
    replica.doing = "profiling the model for gradient checkpointing"
    with replica.written.probing():
        return _fitted(replica, team, emit, workers)


def _fitted(replica: Replica, team: Team, emit: Callable[[Event], None] | None, workers: int) -> Plan:
    budget = parse_budget(team.memory, "'team.memory'")
    replica.trainable.require_all()  # in some step, or none is frozen
    profile, batch = profile_of(replica)
    wanted = budget.of(profile.peak_bytes)
    plan = gradient_checkpointing.plan(profile, budget_bytes=wanted, price=price_in(replica.recipe))
    replica.doing = "trying the gradient checkpointing plan"
    applied, measured = put_on(replica, plan, batch)
    recipe = replica.recipe
    if not recipe.compile:
        replica.checks = SpotChecks(
            applied, microbatches=recipe.microbatches, steps=recipe.steps, checkpoint_every=team.checkpoint_every,
            workers=workers,
        )  # fmt: skip
    if emit is not None:
        emit(planned(plan, None if recipe.compile else measured))
    return plan


def price_in(recipe: Recipe) -> Literal["seconds", "flops"]:
    """What plans for a recipe save: a compiler fuses what costs no FLOPs into other kernels, where it takes next to no
    time."""
    return "flops" if recipe.compile else "seconds"


def profile_of(replica: Replica) -> tuple[Profile, Any]:
    """The profile of the largest microbatch of the first step, and that microbatch."""
    places = [m for m in range(replica.recipe.microbatches) if replica.cursor.microbatch(0, m)]
    batch = max((replica.batch(0, place) for place in places), key=_elements)
    return gradient_checkpointing.profile(replica.module, objective_of(replica), batch), batch


def put_on(replica: Replica, plan: Plan, batch: Any) -> tuple[Applied, tuple[int, float]]:
    """Puts `plan` on the model; also gives the peak in bytes and the seconds of a trial on `batch`."""
    applied = gradient_checkpointing.apply(replica.module, plan)
    if replica.recipe.compile:  # it warns of operations in place, of which the plan takes care
        logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    return applied, gradient_checkpointing.measure(replica.module, objective_of(replica), batch)


def objective_of(replica: Replica) -> Callable[[nn.Module, Any], dict[str, Tensor]]:
    """The objective as the replica computes it, in its precision."""

    def objective(model: nn.Module, batch: Any) -> dict[str, Tensor]:
        with replica.autocast():
            return replica.objective.sums(model, batch)

    return objective


def planned(plan: Plan, measured: tuple[int, float] | None) -> PlannedEvent:
    """What the tape says of a plan."""
    return PlannedEvent(
        budget_bytes=plan.budget_bytes,
        nothing_recomputed_bytes=plan.nothing_bytes,
        predicted_bytes=plan.peak_bytes,
        measured_bytes=measured[0] if measured else None,
        extra_flops=round(plan.extra_flops, 6),
        extra_time=round(plan.extra_time, 6),
        blocks=len(plan.blocks),
        checkpointed=plan.checkpointed,
    )


def _elements(batch: Any) -> int:
    return sum(leaf.numel() for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor))
