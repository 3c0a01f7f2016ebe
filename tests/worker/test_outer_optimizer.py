"""Outer optimizers: torch's own, and the delayed Nesterov of a paper."""

from __future__ import annotations

import io
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from instep.reduce.layout import Layout
from instep.rules import UpdateRule
from instep.worker.outer_optimizer import OuterOptimizer

SEEDS = st.integers(0, 1 << 30)

RULE: dict[str, Any] = {"quorum": "all", "order": "round", "max_lead": 0}


def stepped(rule: UpdateRule, deltas: list[list[Tensor]], save_at: int = -1) -> list[Tensor]:
    """The parameters after the outer optimizer's steps; with `save_at`, its state goes through a file before it."""
    parameters = [torch.linspace(-1, 1, 6).reshape(2, 3), torch.ones(4)]
    layout = Layout.of(parameters, 64)
    outer = OuterOptimizer(rule, layout)
    for number, delta in enumerate(deltas):
        if number == save_at:
            file = io.BytesIO()
            torch.save(outer.state(), file)
            file.seek(0)
            outer = OuterOptimizer(rule, layout)
            outer.load(torch.load(file, weights_only=True))
        flat = torch.zeros(layout.size)
        for view, part in zip(layout.views(flat), delta, strict=True):
            view.copy_(part)
        outer.step(flat, parameters)
    return parameters


def deltas_of(seed: int, count: int) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(2, 3, generator=generator), torch.randn(4, generator=generator)] for _ in range(count)]


@given(
    outer=st.sampled_from(["sgd", "nesterov"]),
    momentum=st.sampled_from([0.0, 0.5, 0.9]),
    lr=st.floats(0.1, 2),
    seed=SEEDS,
)
def test_the_outer_optimizer_is_that_of_torch(outer: Any, momentum: float, lr: float, seed: int) -> None:
    deltas = deltas_of(seed, 7)
    rule = UpdateRule(outer=outer, outer_lr=lr, outer_momentum=momentum, local_steps=2, **RULE)
    expected = [torch.linspace(-1, 1, 6).reshape(2, 3), torch.ones(4)]
    optimizer = torch.optim.SGD(expected, lr=lr, momentum=momentum, nesterov=outer == "nesterov" and momentum > 0)
    for delta in deltas:
        for parameter, gradient in zip(expected, delta, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    for found, value in zip(stepped(rule, deltas), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-5)


def delayed_nesterov(
    start: Tensor, gradients: list[Tensor], lr: float, decay: float, length: int, activation: float = 0.0
) -> Tensor:
    """Algorithm 3 of Liu et al., 2024, line by line, with the buffer as a list, in float64."""
    weights, momentum, buffer = start.double(), torch.zeros_like(start).double(), []
    for gradient in gradients:
        g = gradient.double()
        buffer.append(g)
        if len(buffer) == length:
            momentum = decay * momentum + torch.stack(buffer).sum(0) / length
            step = (1 - activation * length + activation) * decay * momentum + g / length
            buffer = []
        else:
            step = activation * decay * momentum + g / length
        weights = weights - lr * step
    return weights


@given(length=st.integers(2, 6), decay=st.sampled_from([0.0, 0.5, 0.9]), lr=st.floats(0.1, 2), seed=SEEDS)
def test_delayed_nesterov_is_algorithm_3_of_the_paper(length: int, decay: float, lr: float, seed: int) -> None:
    deltas = deltas_of(seed, 15)
    rule = UpdateRule(
        quorum="1", outer="delayed_nesterov", outer_lr=lr, outer_momentum=decay, outer_buffer=length, local_steps=2
    )
    starts = [torch.linspace(-1, 1, 6).reshape(2, 3), torch.ones(4)]
    for place, found in enumerate(stepped(rule, deltas)):
        expected = delayed_nesterov(starts[place], [delta[place] for delta in deltas], lr, decay, length)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@given(
    outer=st.sampled_from(["sgd", "nesterov", "delayed_nesterov"]),
    momentum=st.sampled_from([0.0, 0.9]),
    save_at=st.integers(0, 9),
    seed=SEEDS,
)
def test_the_outer_state_that_is_saved_is_all_of_it(outer: Any, momentum: float, save_at: int, seed: int) -> None:
    buffer = {"outer_buffer": 3} if outer == "delayed_nesterov" else {}
    rule = UpdateRule(outer=outer, outer_momentum=momentum, outer_lr=0.7, local_steps=2, **buffer, **RULE)
    deltas = deltas_of(seed, 10)
    for saved, whole in zip(stepped(rule, deltas, save_at), stepped(rule, deltas), strict=True):
        assert torch.equal(saved, whole)
