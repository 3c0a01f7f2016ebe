"""Optimizers with settled choices. Any other `torch.optim.Optimizer` can stand in a recipe as well."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from instep.errors import RecipeError, cut


def adamw(
    params: Iterable[Tensor],
    *,
    lr: float = 3e-4,
    betas: Sequence[float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    fused: bool = True,
) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, 2019) that decays matrices only.

    `weight_decay` goes to parameters of two dimensions or more, not to biases and the gains of norms. Both groups
    share the other arguments, which are those of `torch.optim.AdamW`. Raises RecipeError for a value out of range.
    """
    params = list(params)
    matrices = [p for p in params if p.dim() >= 2]
    vectors = [p for p in params if p.dim() < 2]
    groups = [
        {"params": group, "weight_decay": decay} for group, decay in ((matrices, weight_decay), (vectors, 0.0)) if group
    ]
    if not groups:
        raise RecipeError("the model has no parameters to train; give one with a parameter that requires a gradient.")
    if len(betas) != 2:
        raise RecipeError(f"'optimizer.args.betas' is {list(betas)}; it must be two numbers, such as [0.9, 0.95].")
    try:
        return torch.optim.AdamW(
            groups, lr=lr, betas=(betas[0], betas[1]), eps=eps, weight_decay=weight_decay, fused=fused
        )
    except ValueError as error:
        raise RecipeError(
            f"AdamW refuses its arguments ({cut(error)}); check 'optimizer.args' in the recipe."
        ) from None
