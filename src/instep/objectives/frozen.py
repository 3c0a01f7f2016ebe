"""Models that an objective only asks: teachers and references."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from instep.errors import ComponentError


def frozen(source: Any, whose: str) -> nn.Module:
    """A model in eval mode whose weights never change: a copy of the module `source`, or what calling it gives.

    In a recipe file, ``{use = "package.module:function", args = {...}}`` stands for such a callable. `whose` is how the
    objective calls the model in messages. Raises ComponentError where no module comes of it.
    """
    made = copy.deepcopy(source) if isinstance(source, nn.Module) else source() if callable(source) else source
    if not isinstance(made, nn.Module):
        raise ComponentError(
            f"{whose} is a {type(made).__name__}; give a torch.nn.Module, or a callable that builds one."
        )
    return made.requires_grad_(False).eval()


def on_device(model: nn.Module, device: torch.device) -> nn.Module:
    """`model`, moved to `device` if it is elsewhere."""
    first = next(model.parameters(), None)
    return model if first is None or first.device == device else model.to(device)
