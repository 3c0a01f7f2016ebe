"""The recipe's model: built, set to train as a loop would, and what makes one doubt it, though it trains."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn

from instep.components import Component
from instep.errors import ComponentError, DataError, ObjectiveError, RecipeError
from instep.restore import is_expanded
from instep.worker.trainable import Trainable


def build_model(component: Component) -> nn.Module:
    """The recipe's model, on the CPU. Raises ComponentError."""
    target = component.load()
    model = copy.deepcopy(target) if isinstance(target, nn.Module) else component.built()
    if not isinstance(model, nn.Module):
        raise ComponentError(
            f"the model {component.describe()} gave a {type(model).__name__}; it must give a torch.nn.Module."
        )
    return model


def build_for_training(component: Component, device: torch.device) -> nn.Module:
    """The same, on the device and as a loop would train it, see `into_training`."""
    module = build_model(component).to(device)
    into_training(module)
    for owner in module.modules():
        for name, buffer in owner.named_buffers(recurse=False):
            if is_expanded(buffer):  # whose elements share memory, and so could not be set back
                owner._buffers[name] = buffer.contiguous()
    _refuse_own_losses(module)
    return module


def check_tokenizer(module: nn.Module, codec: object) -> None:
    """Raises DataError where the model comes with a tokenizer, and the data's tokens are of another one."""
    own, others = getattr(module, "tokenizer_digest", None), getattr(codec, "digest", None)
    if isinstance(own, str) and isinstance(others, str) and own != others:
        raise DataError(
            f"the data's tokens are of another tokenizer (digest {others[:12]}) than the one in the model's folder "
            f"({own[:12]}), so they would mean nothing to it; give data of the model's own tokenizer, such as "
            f"instep.data.chats with the model's folder as 'tokenizer'."
        )


def _refuse_own_losses(module: nn.Module) -> None:
    """Has models of transformers refuse labels, from which they would compute a loss of their own."""
    of_transformers: Any = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)
    for part in module.modules() if of_transformers is not None else ():
        if isinstance(part, of_transformers) and "labels" in inspect.signature(part.forward).parameters:
            part.register_forward_pre_hook(_without_labels, with_kwargs=True)


def _without_labels(module: nn.Module, args: Any, named: dict[str, Any]) -> None:
    if named.get("labels") is not None:
        raise ObjectiveError(
            f"{type(module).__name__} was given 'labels', of which transformers makes a mean over the microbatch, so "
            f"that microbatches with fewer tokens would weigh as much as others; leave 'labels' out and sum over its "
            f".logits, as the objective instep.objectives.language:NextToken does."
        )


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
    if torch.are_deterministic_algorithms_enabled() and next(module.parameters()).is_cuda:
        # Else kernels are picked by their time, and with them orders of adding.
        torch._inductor.config.deterministic = True
    compiled = torch.compile(module, dynamic=False)
    hidden: Any = getattr(module, "hidden", None)
    if callable(hidden):  # what losses over a large vocabulary call instead of the module
        compiled.__dict__["hidden"] = torch.compile(hidden, dynamic=False)
    return compiled


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


def model_doubts(module: nn.Module, built: Collection[str], trainable: Trainable) -> list[str]:
    """Sentences on a model that goes its own way, so that the run is not quite what it seems.

    built: the names of its state_dict as it was built.
    """
    doubts = []
    compiled = next((name for name in sorted(built) if "_orig_mod." in name), None)
    if compiled is not None:
        doubts.append(
            f"the model, or a part of it, is wrapped by torch.compile, so a plain one cannot load its weights: one "
            f"is named '{compiled}' instead of '{compiled.replace('_orig_mod.', '')}'; set "
            f"recipe.compile, or compile in place with module.compile()."
        )
    idle = idle_dropouts(module)
    if idle:
        also = f", and so are {len(idle) - 1} others" if idle[1:] else ""
        doubts.append(
            f"dropout layer '{idle[0]}' is in eval mode while the model trains, and drops nothing{also}; if it is "
            f"to drop, call train() on it where the model is built, else set its p to 0."
        )
    replaced = trainable.replaced()
    if replaced:
        doubts.append(
            f"parameter '{replaced[0]}' is another object than when the model was built, so that the optimizer "
            f"trains one which the model no longer uses; change its values in place, under torch.no_grad()."
        )
    others = sorted(set(built) ^ module.state_dict().keys())
    if others:
        doubts.append(
            f"the model gained or lost '{others[0]}' since it was built, so no new one can load its checkpoints: "
            f"no resume or restart will go on; have it all from the start."
        )
    return doubts
