"""What can be seen of an objective that breaks its protocol, before the first step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from instep.errors import ObjectiveError
from instep.objectives.bound import Bound
from instep.objectives.protocol import TERM
from instep.randomness import seed_all
from instep.restore import kept_module_state, kept_random_state


def check(bound: Bound, model: nn.Module, batch: Any) -> None:
    """Both checks. Raises ObjectiveError."""
    check_is_sum(bound, model, batch)
    check_repeats(bound, model, batch)


def check_repeats(bound: Bound, model: nn.Module, batch: Any) -> None:
    """Raises ObjectiveError where a second call with the same arguments and random seed gives another value.

    Such an objective keeps state, or reads a clock or a global that changes. The calls are in eval mode; `model` and
    the random state are left as they were. Values that differ by less than 1e-5 of their size count as equal.
    """
    model = getattr(model, "_orig_mod", model)
    found: list[dict[str, float]] = []
    with torch.no_grad(), kept_random_state():
        for _ in range(2):
            with kept_module_state(model, training=False):
                seed_all(0)
                found.append({name: value.item() for name, value in bound.sums(model, batch).items()})
    for name, first in found[0].items():
        second = found[1][name]
        if math.isfinite(first) and not math.isclose(first, second, rel_tol=1e-5, abs_tol=1e-12):
            raise ObjectiveError(
                f"term {name!r} of the objective is {first:.8g} in one call and {second:.8g} in the next, with the "
                f"same model, batch and random numbers: it keeps state, or reads a clock or a global; what changes by "
                f"step belongs into its weights, the rest into the model's buffers or the batch."
            )


def check_is_sum(bound: Bound, model: nn.Module, batch: Any) -> None:
    """Raises ObjectiveError where a term looks like a mean: the batch twice over leaves it as it is.

    The batch and the batch doubled along dimension 0 are evaluated in eval mode with the same random seed. A sum
    doubles, a mean stays. A term is blamed where its count doubled and its value changed by under 2 %, with three
    seeds. A batch that cannot be doubled, or an objective that cannot take it, is let pass, and so is one that compares
    samples, since each then meets its double. `model` and the random state are left as they were. A compiled model runs
    as it was written, so that no other shape is compiled.
    """
    doubled = _doubled(batch)
    if doubled is None or bound.shares:
        return
    model = getattr(model, "_orig_mod", model)
    suspects: list[dict[str, tuple[float, float]]] = []
    with torch.no_grad(), kept_random_state(), kept_module_state(model, training=False):
        for seed in range(3):
            try:
                suspects.append(_unmoved(bound, model, batch, doubled, seed))
            except Exception:  # a check must not fail where training might not
                return
            if not suspects[-1]:
                return
    for name, (once, twice) in suspects[0].items():
        if all(name in found for found in suspects):
            raise ObjectiveError(
                f"term {name!r} of the objective is a mean, not a sum: it is {once:.6g} for a batch and {twice:.6g} "
                f"for the same samples twice over; return the sum over its items (reduction='sum'), which the engine "
                f"divides by their count."
            )


def _unmoved(bound: Bound, model: nn.Module, batch: Any, doubled: Any, seed: int) -> dict[str, tuple[float, float]]:
    """The terms whose count doubles while the value stays, with the values for `batch` and `doubled`."""
    counts, counts_doubled = bound.counts(batch), bound.counts(doubled)
    values = []
    for each in (batch, doubled):
        seed_all(seed)
        values.append({name: value.item() for name, value in bound.sums(model, each).items()})
    found: dict[str, tuple[float, float]] = {}
    for name, once in values[0].items():
        twice = values[1][name]
        count = counts.get(name, counts.get(TERM, 0))
        count_doubled = counts_doubled.get(name, counts_doubled.get(TERM, 0))
        stays = once != 0 and math.isfinite(once) and abs(twice - once) <= 0.02 * abs(once)
        if stays and count > 0 and count_doubled == 2 * count:
            found[name] = (once, twice)
    return found


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
