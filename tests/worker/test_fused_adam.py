"""A step of fused Adam by its kernel is torch's own, to the bit, and is left to torch where it may be another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn, optim

from instep.worker.fused_adam import step_by_kernel

SHAPES = (33, 7), (5,), (129,), (64, 16)


def built(kind: type[optim.Adam], **options: Any) -> tuple[list[nn.Parameter], optim.Adam]:
    """Of two groups, with a gradient each but the second parameter."""
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    for place, parameter in enumerate(parameters):
        parameter.grad = None if place == 1 else torch.randn(parameter.shape, generator=generator)
    groups = [{"params": parameters[:2], "weight_decay": 0.1}, {"params": parameters[2:], "lr": 0.01}]
    return parameters, kind(groups, **{"fused": True, **options})


def bits(parameters: list[nn.Parameter], one: optim.Adam) -> list[bytes]:
    state = [value for p in parameters for _, value in sorted(one.state.get(p, {}).items())]
    return [value.detach().numpy().tobytes() for value in [*parameters, *state]]


@pytest.mark.parametrize("kind", [optim.Adam, optim.AdamW])
def test_the_kernel_makes_torchs_step(kind: type[optim.Adam]) -> None:
    (ours, by_kernel), (theirs, by_torch) = built(kind), built(kind)
    for one in (by_kernel, by_torch):
        one.step()  # what they keep is made
    for _ in range(3):
        for parameter in range(len(SHAPES)):  # one after the other, as pieces of an update
            some = [[p for p in group["params"] if p is ours[parameter]] for group in by_kernel.param_groups]
            assert step_by_kernel(by_kernel, some)
        by_torch.step()
    assert bits(ours, by_kernel) == bits(theirs, by_torch)
    assert float(by_kernel.state[ours[0]]["step"]) == 4
    assert ours[1] not in by_kernel.state


OTHERS: list[dict[str, Any]] = [
    {"fused": False},
    {"amsgrad": True},
    {"maximize": True},
    {"lr": torch.tensor(0.1)},
    {"decoupled_weight_decay": True},
]


@pytest.mark.parametrize("options", OTHERS, ids=str)
def test_another_step_is_left_to_torch(options: dict[str, Any]) -> None:
    parameters, one = built(optim.Adam, **options)
    one.step()
    before = bits(parameters, one)
    assert not step_by_kernel(one, [group["params"] for group in one.param_groups])
    assert bits(parameters, one) == before


def test_the_first_step_is_left_to_torch() -> None:
    parameters, one = built(optim.AdamW)
    before = bits(parameters, one)
    assert not step_by_kernel(one, [group["params"] for group in one.param_groups])
    assert bits(parameters, one) == before
    assert not one.state


def test_what_scales_gradients_is_left_to_torch() -> None:
    _, one = built(optim.AdamW)
    one.step()
    one.grad_scale = torch.tensor(2.0)  # type: ignore[attr-defined]  # as torch.amp sets it
    assert not step_by_kernel(one, [group["params"] for group in one.param_groups])


def test_types_that_differ_are_left_to_torch() -> None:
    parameter = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    one = optim.AdamW([parameter], fused=True)
    parameter.grad = torch.ones_like(parameter)
    one.step()
    assert not step_by_kernel(one, [[parameter]])
