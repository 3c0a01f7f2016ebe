"""The ways of training that a plan considers where a person names none. No torch."""

from __future__ import annotations

from instep.planning.described import Description
from instep.recipe import Recipe
from instep.rules.presets import parse
from instep.rules.rule import UpdateRule

_CLEARLY = 1.5
"""A worker that takes so many times as long as the fastest one is slow."""


def usual_rules(recipe: Recipe) -> list[UpdateRule]:
    """Of each kind one or two: quorums, bounds, and local steps of which the recipe has 40 or 10 rounds at most."""
    short, long = max(2, recipe.steps // 40), max(4, recipe.steps // 10)
    texts = [
        "synchronous", "backup_workers:1", "bounded_staleness:4", "softsync:2", "asynchronous",
        "delay_compensated:0.04", f"local_sgd:{short}", f"local_sgd:{long}",
        f"post_local_sgd:{short},after={max(1, recipe.steps // 10)}", f"diloco:{short}", f"diloco:{long}",
        f"async_diloco:{short}",
    ]  # fmt: skip
    return list(dict.fromkeys(map(parse, texts)))


def usual_workers(described: Description, microbatches: int) -> list[int]:
    """All, all but the slow ones, and half of them; no more than there are microbatches."""
    factors = described.factors
    quick = sum(factor < _CLEARLY * min(factors) for factor in factors)
    counts = [described.workers, quick, -(-described.workers // 2)]
    return list(dict.fromkeys(min(count, microbatches) for count in counts))
