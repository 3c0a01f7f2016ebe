"""What ``instep memory`` finds: a recipe's trade of memory against extra work, without training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from instep.budget import Budget
from instep.gradient_checkpointing.structure import Plan, Profile
from instep.recipe import Recipe


@dataclass(frozen=True)
class Trade:
    """The profile of a microbatch, the plans to choose from, and with a budget the plan for it and its trial.

    measured_bytes, measured_s: the peak and the seconds of a step with the plan; `bare_s` without. compiled: whether
    runs of the recipe compile, so that plans are for the least FLOPs; all figures are those of eager mode.
    """

    profile: Profile
    plans: Sequence[Plan]
    plan: Plan | None = None
    measured_bytes: int = 0
    measured_s: float = 0.0
    bare_s: float = 0.0
    compiled: bool = False
    name: str = ""
    """Of the recipe."""


def memory_trade(recipe: Recipe, device: str, budget: Budget | None) -> Trade:
    """Builds the recipe in this process and profiles its largest microbatch. Raises InstepError."""
    from instep import gradient_checkpointing as gc
    from instep.reduce.written import FirstWrite
    from instep.worker.activation_memory import largest_batch, objective_of, price_in, profiles_of, put_on
    from instep.worker.replica import Replica

    replica = Replica(recipe, device)
    try:
        replica.learn_terms(0)
    except FirstWrite as late:
        replica = Replica(recipe, device, written=late.names)
        replica.learn_terms(0)
    batch = largest_batch(replica)
    profiles = profiles_of(replica, batch)
    step, profile = max(profiles.items(), key=lambda each: each[1].peak_bytes)
    price = price_in(recipe)
    plans = gc.plans(profile, most=12, price=price)
    if budget is None:
        return Trade(profile, plans, compiled=recipe.compile, name=recipe.name)
    plan = gc.plan(profile, budget_bytes=budget.of(profile.peak_bytes), price=price)
    bare = gc.measure(replica.module, objective_of(replica, step), batch)
    _, measured = put_on(replica, plan, batch, step)
    return Trade(profile, plans, plan, measured[0], measured[1], bare[1], recipe.compile, recipe.name)
