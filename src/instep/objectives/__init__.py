"""What is minimised: functions of (model, batch) that give sums, and how many items each sum runs over.

An *objective* is a callable ``f(model, batch)`` whose answer is a scalar tensor, the term "objective", or a mapping
from names of terms to scalar tensors. Each is a **sum** over items: tokens, samples, pixels, whatever the term counts.
An objective never divides. The engine divides each sum by the number of items in the whole global batch, over all
microbatches and workers, and minimises the weighted sum of these quotients; so uneven microbatches weigh what they
should.

Some attributes, or methods, may stand beside it; the decorator `objective` gives them to a function.

``counts(batch)``
    How many items there are, which must be known before the first forward, from the batch alone: a whole number, for
    every term, or a mapping from the same names to whole numbers. Without it, each term counts samples: the length of
    the batch's first tensor, or the sequences of a `PackedSequence`.
``weights``
    A mapping from names of terms to their weights in the objective: numbers, or functions of the step, from 0, such as
    `Warmup`. A term that is not named weighs 1.
``metrics``
    Names of terms that are counted and reported like the others and never minimised, such as accuracies.
``gathers``
    For metrics that are no sums, such as AUROC, on held-out data: a mapping from their names to objects with
    ``update`` and ``compute``, as those of torchmetrics, to classes of such, or to functions. One process calls them
    with the outputs of all held-out samples, in their order, so there is one value for any team.
``outputs(model, batch)``
    What ``gathers`` needs of a held-out batch: a mapping from the names that the metrics take to tensors.
``share(model, batch)``
    What all other microbatches of the same global batch need to see of this one: tensors. The objective is then called
    as ``f(model, batch, shared)``, see `Shared`. Only synchronous rules give a whole batch a meaning.

An objective must depend on its arguments and the random generators alone. One that keeps state, or reads a clock or a
global that changes, is refused before the first step where two calls in a row differ by it (`checks`). What changes
later, more slowly, or between workers (a rank, an environment variable) cannot be seen.
"""

from __future__ import annotations

from instep.objectives.any_loss import Cut, LossCheck, check
from instep.objectives.bound import Bound, bind, exact_sum, learn_terms
from instep.objectives.checks import check_is_sum, check_protocol, check_repeats
from instep.objectives.in_turns import of_recipe
from instep.objectives.protocol import (
    TERM,
    Count,
    Counts,
    Objective,
    Shared,
    Sums,
    Warmup,
    Weight,
    from_component,
    objective,
)

__all__ = [
    "TERM",
    "Bound",
    "Count",
    "Counts",
    "Cut",
    "LossCheck",
    "Objective",
    "Shared",
    "Sums",
    "Warmup",
    "Weight",
    "bind",
    "check",
    "check_is_sum",
    "check_protocol",
    "check_repeats",
    "exact_sum",
    "from_component",
    "learn_terms",
    "objective",
    "of_recipe",
]
