"""A microbatch of one sample, at the ragged end of an epoch, on which BatchNorm fails: said before the first step."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from instep.data.cursor import Cursor
from instep.errors import RecipeError
from instep.restore import kept_module_state, kept_random_state

if TYPE_CHECKING:
    from instep.worker.replica import Replica

_REFUSED = "Expected more than 1 value per channel"


def check_single_samples(replica: Replica, first: int) -> None:
    """Raises RecipeError where BatchNorm will refuse a microbatch of one sample, in some step from `first` on.

    Where the model has none, or no microbatch is of one sample, nothing is computed; else one forward of such a one,
    without a trace on the model.
    """
    normed = [name for name, part in replica.module.named_modules() if isinstance(part, _BatchNorm) and part.training]
    place = _single(replica.cursor, first, replica.recipe.steps) if normed else None
    if place is None:
        return
    batch = replica.batch(*place)
    module = getattr(replica.module, "_orig_mod", replica.module)
    try:
        with torch.no_grad(), kept_random_state(), kept_module_state(module), replica.autocast():
            replica.objective.sums(module, batch)
    except Exception as error:  # any other is the first forward's to meet
        if _REFUSED in str(error):
            step, microbatch = place
            raise RecipeError(
                f"a microbatch of one sample, {microbatch} of step {step + 1} with its {replica.cursor.size(step)} "
                f"samples in all, is refused by BatchNorm ('{normed[0]}'), which takes the variance over a microbatch; "
                f"{_remedy(replica.cursor)}."
            ) from error


def _single(cursor: Cursor, first: int, stop: int) -> tuple[int, int] | None:
    """Step and microbatch, in steps [first, stop), of a microbatch of one sample; those of an epoch's end differ."""
    end = (cursor.epoch(first) + 1) * cursor.steps_per_epoch - 1
    for step in (first, end):
        for microbatch in range(cursor.microbatches if step < stop else 0):
            if cursor.microbatch_size(step, microbatch) == 1:
                return step, microbatch
    return None


def _remedy(cursor: Cursor) -> str:
    if cursor.skipped:
        return (
            "leave another sample of that step out too, with skip_samples (--skip-samples), so that its microbatches "
            "are larger"
        )
    epoch = cursor.steps_per_epoch
    if cursor.ragged == "spread" and _single(dataclasses.replace(cursor, ragged="even"), 0, epoch) is None:
        return "set recipe.ragged to 'even', which cuts a smaller batch into fewer microbatches"
    for microbatches in range(cursor.microbatches - 1, 0, -1):
        if cursor.batch % microbatches == 0:
            other = dataclasses.replace(cursor, microbatches=microbatches, ragged="even")
            if _single(other, 0, epoch) is None:
                return f"set recipe.microbatches to {microbatches}"
    if not cursor.drop_last and cursor.usual_size > 1:
        return "set recipe.drop_last to true, which leaves out that smaller batch"
    return "take a larger recipe.batch"
