"""Train and eval mode, as a model is built and as a loop that calls `model.train()` would have it."""

from __future__ import annotations

import inspect

from torch import nn


def into_training(module: nn.Module) -> None:
    """Calls `train()` on the model, as a loop does: an override may keep parts in eval mode, or freeze them.

    Where the root was in training mode already, parts in eval mode are frozen on purpose, and are put back. Not so the
    base of an adapted model, which peft leaves in eval mode under a root that says training.
    """
    frozen = _frozen(module) if module.training else []
    try:
        inspect.signature(module.train).bind()
    except TypeError:  # another method of that name
        nn.Module.train(module)
    else:
        module.train()
    for part in frozen:
        part.training = False


def idle_dropouts(module: nn.Module) -> list[str]:
    """The names of dropout layers that drop nothing while the model trains, for they are in eval mode."""
    if not module.training:
        return []
    layers = ((n, p) for n, p in module.named_modules() if isinstance(p, nn.modules.dropout._DropoutNd))
    return [name for name, layer in layers if layer.p > 0 and not layer.training]


def _frozen(module: nn.Module) -> list[nn.Module]:
    wrappers = (part for part in module.modules() if part.training and hasattr(part, "peft_config"))
    adapted = {id(part) for wrapper in wrappers for part in wrapper.modules()}
    return [part for part in module.modules() if not part.training and id(part) not in adapted]
