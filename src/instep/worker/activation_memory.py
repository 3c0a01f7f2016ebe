"""Gradient checkpointing for a replica: from a team's budget to a plan on its model, and what it then took."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from instep import gradient_checkpointing
from instep.budget import parse_budget
from instep.errors import CheckpointingError
from instep.gradient_checkpointing import Applied
from instep.gradient_checkpointing.structure import Plan, Profile
from instep.recipe import Recipe, Team
from instep.record.events import Event, PlannedEvent
from instep.turns import Turns
from instep.worker.replica import Replica
from instep.worker.spot_checks import ChecksByTurn, SpotChecks


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
    recipe, budget = replica.recipe, parse_budget(team.memory, "'team.memory'")
    batch = largest_batch(replica)
    profiles = profiles_of(replica, batch)
    wanted = budget.of(max(profile.peak_bytes for profile in profiles.values()))
    found: dict[int, tuple[Applied, SpotChecks | None]] = {}
    for step, profile in profiles.items():
        plan = gradient_checkpointing.plan(profile, budget_bytes=wanted, price=price_in(recipe))
        replica.doing = "trying the gradient checkpointing plan"
        applied, measured = put_on(replica, plan, batch, step)
        checks = None if recipe.compile else SpotChecks(
            applied, microbatches=recipe.microbatches, steps=recipe.steps, checkpoint_every=team.checkpoint_every,
            workers=workers,
        )  # fmt: skip
        found[step] = applied, checks
        if emit is not None:
            emit(planned(plan, None if recipe.compile else measured))
    if isinstance(recipe.objective, Turns):
        replica.checks = ChecksByTurn(recipe.objective, list(found.values()))
    else:
        replica.checks = found[0][1]
    return max((applied.plan for applied, _ in found.values()), key=lambda plan: plan.peak_bytes)


def price_in(recipe: Recipe) -> Literal["seconds", "flops"]:
    """What plans for a recipe save: a compiler fuses what costs no FLOPs into other kernels, where it takes next to no
    time."""
    return "flops" if recipe.compile else "seconds"


def largest_batch(replica: Replica) -> Any:
    """The largest microbatch of the first step."""
    places = [m for m in range(replica.recipe.microbatches) if replica.cursor.microbatch(0, m)]
    return max((replica.batch(0, place) for place in places), key=_elements)


def profiles_of(replica: Replica, batch: Any) -> dict[int, Profile]:
    """The profile of a microbatch as step 0 computes it; or, of several objectives, the first step of each."""
    order = replica.recipe.objective
    steps = order.firsts(0) if isinstance(order, Turns) else [0]
    found = {}
    for step in steps:
        _require(replica, step)
        try:
            found[step] = gradient_checkpointing.profile(replica.module, objective_of(replica, step), batch)
        except CheckpointingError as error:
            raise CheckpointingError(_of_turn(replica, step, error.message), detail=error.detail) from error
    return found


def put_on(replica: Replica, plan: Plan, batch: Any, step: int = 0) -> tuple[Applied, tuple[int, float]]:
    """Puts `plan` on the model; also gives the peak in bytes and the seconds of a trial on `batch`, as in `step`."""
    _require(replica, step)
    applied = gradient_checkpointing.apply(replica.module, plan)
    if replica.recipe.compile:  # it warns of operations in place, of which the plan takes care
        logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    return applied, gradient_checkpointing.measure(replica.module, objective_of(replica, step), batch)


def objective_of(replica: Replica, step: int = 0) -> Callable[[nn.Module, Any], dict[str, Tensor]]:
    """The objective as the replica computes it in `step`, in its precision."""

    def objective(model: nn.Module, batch: Any) -> dict[str, Tensor]:
        with replica.autocast():
            return replica.objective.at(step).sums(model, batch)

    return objective


def _require(replica: Replica, step: int) -> None:
    """Has those parameters require a gradient that do in some step of the turn that `step` is of."""
    replica.trainable.require_all()  # in some step, or none is frozen
    if isinstance(replica.recipe.objective, Turns):
        replica.trainable.begin(step)


def _of_turn(replica: Replica, step: int, why: str) -> str:
    order = replica.recipe.objective
    if not isinstance(order, Turns):
        return why
    return f"in the turn of the objective '{order.parts[order.place(step)].name}', {why}"


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
