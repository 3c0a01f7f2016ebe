"""Steps of torch's fused Adam and AdamW for a few parameters, without what their `step` does around the kernel.

An update in pieces makes many of them, and then that is half of the time: it is told to profilers, tensors are sorted
by device and type, arguments are looked at again. Here the kernel is called as `step` calls it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn, optim

_KERNELS = {optim.Adam: "_fused_adam_", optim.AdamW: "_fused_adamw_"}
"""Their names in torch, by class of the optimizer, where none of its groups says otherwise."""


def step_by_kernel(one: optim.Optimizer, groups: Sequence[list[nn.Parameter]]) -> bool:
    """Makes the step of these parameters, by group of it, from their `grad`, to the bit as `one.step()` would make it.

    Whether it did. Where it did not nothing is changed: `one` is another optimizer or has options that few set, or has
    no state of a parameter yet. No hook is called.
    """
    calls = []
    for group, parameters in zip(one.param_groups, groups, strict=True):
        seen = [parameter for parameter in parameters if parameter.grad is not None]
        if not seen:
            continue
        states = [one.state[parameter] for parameter in seen if one.state.get(parameter)]
        if not _as_usual(one, group) or len(states) < len(seen) or any(p.dtype != torch.float32 for p in seen):
            return False
        calls.append((group, seen, states))
    with torch.no_grad():
        for group, seen, states in calls:
            _step(one, group, seen, states)
    return True


def _as_usual(one: optim.Optimizer, group: dict[str, Any]) -> bool:
    return (
        type(one) in _KERNELS
        and group["fused"] is True
        and not (group["amsgrad"] or group["differentiable"] or group["maximize"])
        and group["decoupled_weight_decay"] is (type(one) is optim.AdamW)
        and not any(isinstance(each, Tensor) for each in (group["lr"], *group["betas"]))
        and getattr(one, "grad_scale", None) is None
        and getattr(one, "found_inf", None) is None
    )


def _step(
    one: optim.Optimizer, group: dict[str, Any], parameters: list[nn.Parameter], states: list[dict[str, Tensor]]
) -> None:
    steps = [state["step"] for state in states]
    torch._foreach_add_(steps, 1)
    beta1, beta2 = group["betas"]
    getattr(torch, _KERNELS[type(one)])(
        parameters, [parameter.grad for parameter in parameters],
        [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states], [], steps,
        amsgrad=False, lr=group["lr"], beta1=beta1, beta2=beta2, weight_decay=group["weight_decay"], eps=group["eps"],
        maximize=False, grad_scale=None, found_inf=None,
    )  # fmt: skip
