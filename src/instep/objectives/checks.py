"""What can be seen of an objective that breaks its protocol, before the first step."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from instep.errors import ObjectiveError
from instep.objectives.bound import Bound
from instep.objectives.protocol import TERM
from instep.randomness import seed_all
from instep.restore import kept_module_state, kept_random_state

_DRAWS = 128
"""Draws of a random term's values at most; of a small microbatch's more, up to `_DRAWN_SAMPLES` samples in all."""

_DRAWN_SAMPLES = 1024

_DRAWING_S = 8.0
"""Seconds after which a random term that is not decided is let pass."""

Around = Callable[[], AbstractContextManager[None]]
"""Makes what goes around each call of the model: it puts back what the call writes into parameters."""


def check_protocol(
    bound: Bound, model: nn.Module, batch: Any, double: Callable[[], Any] | None = None, around: Around = nullcontext
) -> None:
    """Both checks, see `check_is_sum` for `double`. Raises ObjectiveError."""
    check_is_sum(bound, model, batch, double, around)
    check_repeats(bound, model, batch, around)


def check_repeats(bound: Bound, model: nn.Module, batch: Any, around: Around = nullcontext) -> None:
    """Raises ObjectiveError where a second call with the same arguments and random seed gives another value.

    Such an objective keeps state, or reads a clock or a global that changes. The calls are in eval mode; `model` and
    the random state are left as they were. Values that differ by less than 1e-5 of their size count as equal.
    """
    model = getattr(model, "_orig_mod", model)
    calls: list[dict[str, float]] = []
    with torch.no_grad(), kept_random_state():
        for _ in range(2):
            with kept_module_state(model, training=False):  # each time: the second call finds what the first one found
                calls.append(_sums(bound, model, batch, 0, around))
    for name, first in calls[0].items():
        second = calls[1][name]
        if math.isfinite(first) and not math.isclose(first, second, rel_tol=1e-5, abs_tol=1e-12):
            raise ObjectiveError(
                f"term {name!r} of the objective is {first:.8g} in one call and {second:.8g} in the next, with the "
                f"same model, batch and random numbers: it keeps state, or reads a clock or a global; what changes by "
                f"step belongs into its weights, the rest into the model's buffers or the batch."
            )


def check_is_sum(
    bound: Bound, model: nn.Module, batch: Any, double: Callable[[], Any] | None = None, around: Around = nullcontext
) -> None:
    """Raises ObjectiveError where a term looks like a mean: the batch twice over leaves it as it is.

    The batch and the batch doubled along dimension 0 are evaluated in eval mode with the same random seed. A sum
    doubles, a mean stays. A term is blamed where its count doubled and its value changed by under 2 %, with three
    seeds. One that random numbers change by more is judged over many draws, see `_is_mean`: about 10 for a sum, and
    never more than some seconds, after which it is let pass. So is a batch that cannot be doubled, neither by its
    tensors nor by `double`, which gives the same samples twice over; an objective that cannot take it; and one that
    compares samples, since each then meets its double. `model` and the random state are left as they were. A compiled
    model runs as it was written, so that no other shape is compiled.
    """
    if bound.shares:
        return
    model = getattr(model, "_orig_mod", model)
    with torch.no_grad(), kept_random_state(), kept_module_state(model, training=False):
        try:
            doubled = _doubled(batch)
            if doubled is None:
                doubled = double() if double is not None else None
            if doubled is None:
                return
            blamed = _first_mean(bound, model, batch, doubled, around)
        except Exception:  # a check must not fail where training might not
            return
    if blamed is not None:
        name, once, twice, drawn = blamed
        values = f"{once:.6g} for a batch and {twice:.6g} for the same samples twice over"
        raise ObjectiveError(
            f"term {name!r} of the objective is a mean, not a sum: it is {values}"
            f"{f', in the mean of {drawn} draws' if drawn > 1 else ''}; return the sum over its items "
            f"(reduction='sum'), which the engine divides by their count: by that of samples, unless counts= of "
            f"instep.objective says what its items are, such as tokens."
        )


def _first_mean(
    bound: Bound, model: nn.Module, batch: Any, doubled: Any, around: Around
) -> tuple[str, float, float, int] | None:
    """A term that is a mean, its values for `batch` and `doubled`, and over how many draws these are means; or None."""
    counts, counts_doubled = bound.counts(batch), bound.counts(doubled)
    twice_the_items = [name for name, count in counts.items() if 0 < 2 * count == counts_doubled.get(name)]

    def values(samples: Any, seed: int) -> dict[str, float]:
        sums = _sums(bound, model, samples, seed, around)
        counted = set(sums) if TERM in twice_the_items and TERM not in sums else set(twice_the_items)
        return {name: value for name, value in sums.items() if name in counted}

    began = time.monotonic()
    once, twice = [values(batch, 0)], [values(doubled, 0)]
    names = [name for name, value in once[0].items() if math.isfinite(value) and math.isfinite(twice[0][name])]
    if not any(_stays(once[0][name], twice[0][name]) for name in names):
        another = values(batch, 1)
        names = [name for name in names if not math.isclose(another[name], once[0][name], rel_tol=1e-6)]
    samples = next((len(leaf) for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()), 1)
    draws = max(_DRAWS, _DRAWN_SAMPLES // max(1, samples))
    for seed in range(1, draws):
        if not names or (seed >= 3 and time.monotonic() - began > _DRAWING_S):
            return None
        once.append(values(batch, seed))
        twice.append(values(doubled, seed))
        for name in list(names):
            pairs = [(a[name], b[name]) for a, b in zip(once, twice, strict=True)]
            if len(pairs) == 3 and all(_stays(a, b) for a, b in pairs):
                return name, *pairs[0], 1
            verdict = _is_mean(pairs)
            if verdict:
                return name, statistics.fmean(a for a, _ in pairs), statistics.fmean(b for _, b in pairs), len(pairs)
            if verdict is False:
                names.remove(name)
    return None


def _sums(bound: Bound, model: nn.Module, samples: Any, seed: int, around: Around) -> dict[str, float]:
    """What one call gives under this random seed, in the mode that the model is in."""
    seed_all(seed)
    with around():
        return {name: value.item() for name, value in bound.sums(model, samples).items()}


def _stays(once: float, twice: float) -> bool:
    return once != 0 and math.isfinite(once) and abs(twice - once) <= 0.02 * abs(once)


def _is_mean(pairs: Sequence[tuple[float, float]]) -> bool | None:
    """Whether a random term is a mean, from its values for a batch, a, and for that batch twice over, b, by draw.

    In the mean over draws b is 2 a for a sum and a for a mean. So b - 1.5 a, with the sign of a, is above 0 for a sum
    and below for a mean: from 6 draws on it is taken for a sum by 4 standard errors, from 8 on for a mean by 5, if
    b - a is within 3 of nothing as well. None where more draws are needed. Outliers widen the error, and so decide
    nothing.
    """
    if not all(math.isfinite(value) for pair in pairs for value in pair):
        return False
    if len(pairs) < 6:
        return None
    if all(math.isclose(a, pairs[0][0], rel_tol=1e-6) for a, _ in pairs):
        return False  # it is not random, and it did not stay
    once, twice = (statistics.fmean(values) for values in zip(*pairs, strict=True))
    sign = math.copysign(1.0, once)
    between = _standard_errors([sign * (b - 1.5 * a) for a, b in pairs])
    if between > 4:
        return False
    stays = abs(twice - once) <= 0.25 * abs(once) and abs(_standard_errors([b - a for a, b in pairs])) <= 3
    return True if len(pairs) >= 8 and between < -5 and stays else None


def _standard_errors(values: Sequence[float]) -> float:
    """The mean of `values` in its standard errors, the t statistic."""
    mean, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    return mean / error if error else math.copysign(math.inf, mean) if mean else 0.0


def _doubled(batch: Any) -> Any:
    """`batch` with every tensor concatenated with itself along dimension 0, or None where that has no clear meaning."""
    leaves, structure = pytree.tree_flatten(batch)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim() > 0]
    if not tensors or len({len(tensor) for tensor in tensors}) > 1:
        return None
    if not all(leaf is None or isinstance(leaf, Tensor) for leaf in leaves):
        return None  # names, lengths or a batch class of the user's: what else counts samples is unknown
    try:
        doubled = [torch.cat((leaf, leaf)) if leaf is not None and leaf.dim() else leaf for leaf in leaves]
    except (RuntimeError, TypeError):  # sparse or nested layouts
        return None
    return pytree.tree_unflatten(doubled, structure)
