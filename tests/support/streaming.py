"""Streaming DiLoCo by its definition, line by line in one process, and the small recipe that it is tried on."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn

from instep.recipe import Recipe
from instep.rules import parse
from instep.rules.fragments import Fragments
from instep.worker.replica import Replica
from support.regression import numbers, regression
from support.serving import drive

forty_eight = functools.partial(numbers, 48)
"""Of which every batch of 12 is whole."""


def layers() -> nn.Module:
    """Six parameters."""
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.02, foreach=False)


def recipe(rule: str, **fields: Any) -> Recipe:
    given: dict[str, Any] = {"model": layers, "optimizer": adamw, "steps": 14, "batch": 12, "data": forty_eight}
    return regression(**{**given, "rule": parse(rule), **fields})


def plainly(given: Recipe, workers: int) -> list[Tensor]:
    """Streaming DiLoCo over W workers, each with one microbatch of every batch: the server's weights at the end."""
    rule, replica = given.rule, Replica(given, "cpu")
    N, stride = rule.fragments, rule.local_steps // rule.fragments
    models = [copy.deepcopy(replica.module) for _ in range(workers)]
    local = [list(model.parameters()) for model in models]
    inner = [adamw(weights) for weights in local]
    server = [value.detach().clone() for value in replica.parameters]
    before = [[value.clone() for value in server] for _ in range(workers)]  # by worker: what its next delta is against
    fragment = Fragments([value.nbytes for value in server], N).all
    momentum, nesterov = rule.outer_momentum, rule.outer == "nesterov"
    outer = [
        torch.optim.SGD([server[i] for i in which], rule.outer_lr, momentum, nesterov=nesterov, foreach=False)
        for which in fragment
    ]
    sends, update, due, mix = 0, dict[int, Tensor](), 0, rule.mix if rule.overlap else 0.0

    def take() -> None:
        for worker in range(workers):
            for i, value in update.items():
                own = local[worker][i].detach()
                own.copy_(torch.add(value, own - value, alpha=mix) if mix else value)
                before[worker][i].copy_(value)

    for t in range(1, given.steps + 1):
        for worker in range(workers):
            x, y = replica.batch(t - 1, worker)
            inner[worker].zero_grad()
            ((models[worker](x) - y).square().sum() / len(x)).backward()
            inner[worker].step()
        if t in (due, given.steps):
            take()
        if t % stride == 0 or t == given.steps:
            for i in fragment[sends % N]:
                deltas = [before[worker][i] - local[worker][i].detach() for worker in range(workers)]
                server[i].grad = torch.stack(deltas).mean(0)
            outer[sends % N].step()
            update, due = {i: server[i].detach().clone() for i in fragment[sends % N]}, t + rule.overlap
            sends += 1
            if not rule.overlap:
                take()
    return server


def check_definition(rule: str, workers: int) -> None:
    """What the engine makes is what the plain loop makes: to the bit where the mean of W numbers has one rounding, as
    for powers of two.
    """
    given = recipe(rule, microbatches=workers)
    found = drive(given, workers).state.values()
    for value, expected in zip(found, plainly(given, workers), strict=True):
        if workers == 3:
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(value, expected)
