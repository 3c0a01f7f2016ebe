"""The recipe's model as every worker builds it: refused where it cannot be trained, and compiled where it is to be."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from instep.components import Component
from instep.errors import ComponentError, RecipeError
from instep.restore import is_expanded
from instep.worker.optimizer import call


def build_model(component: Component) -> nn.Module:
    """The recipe's model, on the CPU. Raises ComponentError."""
    target = component.load()
    model = copy.deepcopy(target) if isinstance(target, nn.Module) else call(component)
    if not isinstance(model, nn.Module):
        raise ComponentError(
            f"the model {component.describe()} gave a {type(model).__name__}; it must give a torch.nn.Module."
        )
    return model


def own_memory_for_buffers(module: nn.Module) -> None:
    """Gives an expanded buffer memory of its own for every element: one that is shared cannot be set back."""
    for owner in module.modules():
        for name, buffer in owner.named_buffers(recurse=False):
            if is_expanded(buffer):
                owner._buffers[name] = buffer.contiguous()


def check_parameters(names: Sequence[str], parameters: Sequence[nn.Parameter]) -> None:
    """Raises RecipeError where there are none to train, or one that has no shape or is complex."""
    if not parameters:
        raise RecipeError("the model has no parameter that requires a gradient, so there is nothing to train.")
    for name, parameter in zip(names, parameters, strict=True):
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise RecipeError(
                f"parameter '{name}' has no shape yet (a lazy module); run the model once in the callable that "
                f"builds it, so that every worker starts from the same shapes."
            )
        if parameter.is_complex():
            raise RecipeError(f"parameter '{name}' is complex; hold it as two real parameters.")


def compiled(module: nn.Module) -> Any:
    """`module` through `torch.compile`, and its method `hidden`, if it has one."""
    from torch._inductor.async_compile import AsyncCompile

    AsyncCompile.pool.cache_clear()  # a forked process has none of the threads that compiled before, and would wait
    # One kernel a shape, never one that depends on which shapes a worker happened to see before.
    torch._dynamo.config.recompile_limit = 256
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    compiled = torch.compile(module, dynamic=False)
    hidden: Any = getattr(module, "hidden", None)
    if callable(hidden):  # what losses over a large vocabulary call instead of the module
        compiled.__dict__["hidden"] = torch.compile(hidden, dynamic=False)
    return compiled
