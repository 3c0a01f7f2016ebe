"""Exponential moving averages of the weights (`Recipe.ema`): which decays there may be, and what one is by update."""

from __future__ import annotations

from collections.abc import Sequence

from instep.errors import RecipeError


def check_decays(decays: Sequence[float], *, warmup: bool) -> None:
    """Raises RecipeError for decays that are none, or come twice, and for a warm-up of no decay."""
    for decay in decays:
        if not 0 < decay < 1:
            raise RecipeError(
                f"'recipe.ema' has the decay {decay}; it is the share of the average that each update leaves, above 0 "
                f"and below 1, such as 0.999."
            )
    twice = next((decay for place, decay in enumerate(decays) if decay in decays[:place]), None)
    if twice is not None:
        raise RecipeError(f"'recipe.ema' has the decay {twice} twice; give each once.")
    if warmup and not decays:
        raise RecipeError(
            "'recipe.ema_warmup' is true, and 'recipe.ema' has no decay; give one, such as [0.999], or leave the "
            "warm-up out."
        )


def name_of(decay: float) -> str:
    """What its average is called in files: "0.999"."""
    return repr(decay)


def decay_at(decay: float, updates: int, *, warmup: bool) -> float:
    """The decay in the update after so many. With `warmup` it rises from 0.1 as (1 + updates) / (10 + updates), as
    ``tf.train.ExponentialMovingAverage`` has it with `num_updates`.
    """
    return min(decay, (1 + updates) / (10 + updates)) if warmup else decay
