"""The outer optimizer of rules with local steps, which moves the weights along what workers have moved theirs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from instep.errors import CheckpointError
from instep.reduce.layout import Layout
from instep.rules.fragments import Fragments
from instep.rules.rule import UpdateRule

OuterStep = Callable[[Tensor, Sequence[Tensor]], float]
"""Moves parameters against a delta; gives the learning rate."""


class OuterOptimizer:
    """SGD along the mean delta, with momentum as `UpdateRule.outer` says.

    "sgd" and "nesterov" are those of torch.optim.SGD. "delayed_nesterov" is algorithm 3 of Liu et al., 2024,
    arXiv:2401.09135, with c = 0: each update moves by a part of outer_buffer of its delta, and once in outer_buffer
    updates the momentum takes in the mean of the deltas since, a running sum, and moves the weights.
    """

    def __init__(self, rule: UpdateRule, layout: Layout):
        self._rule, self._layout = rule, layout
        self._momentum: Tensor | None = None
        self._sum: Tensor | None = None
        self._updates = 0

    def step(self, delta: Tensor, parameters: Sequence[Tensor | None]) -> float:
        """Moves `parameters` against `delta` ([layout.size] float32), but for None; the learning rate."""
        rule = self._rule
        if rule.outer == "delayed_nesterov":
            move = self._delayed(delta)
        elif rule.outer_momentum:
            if self._momentum is None:
                self._momentum = delta.clone()
            else:
                self._momentum.mul_(rule.outer_momentum).add_(delta)
            nesterov = rule.outer == "nesterov"
            move = delta.add_(self._momentum, alpha=rule.outer_momentum) if nesterov else self._momentum
        else:
            move = delta
        with torch.no_grad():
            for parameter, view in zip(parameters, self._layout.views(move), strict=True):
                if parameter is not None:
                    parameter.sub_(view.to(parameter.dtype), alpha=rule.outer_lr)
        return rule.outer_lr

    def _delayed(self, delta: Tensor) -> Tensor:
        length, decay = self._rule.outer_buffer, self._rule.outer_momentum
        if self._momentum is None or self._sum is None:
            self._momentum, self._sum = torch.zeros_like(delta), torch.zeros_like(delta)
        self._sum.add_(delta)
        self._updates += 1
        delta.div_(length)
        if self._updates % length == 0:
            self._momentum.mul_(decay).add_(self._sum, alpha=1 / length)
            self._sum.zero_()
            delta.add_(self._momentum, alpha=decay)
        return delta

    def state(self) -> dict[str, Any]:
        """For a checkpoint: tensors and numbers."""
        return {"momentum": self._momentum, "sum": self._sum, "updates": self._updates}

    def load(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state` gave. Raises CheckpointError where it is none."""
        if not isinstance(state, Mapping) or type(state.get("updates")) is not int:
            raise CheckpointError("the outer optimizer's state is not in the checkpoint; use an earlier one.")
        for name in ("momentum", "sum"):
            value = state.get(name)
            if value is None:
                continue
            if not isinstance(value, Tensor) or (value.shape, value.dtype) != ((self._layout.size,), torch.float32):
                raise CheckpointError(f"the outer optimizer's '{name}' in the checkpoint is none; use an earlier one.")
        self._momentum, self._sum, self._updates = state.get("momentum"), state.get("sum"), state["updates"]


class OuterOptimizers:
    """One `OuterOptimizer` for each fragment, which moves that alone: its momentum and its count are of its updates."""

    def __init__(self, rule: UpdateRule, layout: Layout, fragments: Fragments):
        self._fragments = fragments
        self._parts = {which: layout.part(which) for which in fragments.all}
        self._each = {which: OuterOptimizer(rule, own) for which, (_, own) in self._parts.items()}

    def of_round(self, number: int, still: Collection[int] = ()) -> OuterStep:
        """`OuterOptimizer.step` for the update of this round: takes the whole delta, and all parameters.

        still: those that it does not move, by index. Their momentum goes on, and falls where their delta is 0.
        """
        return partial(self._step, self._fragments.of_round(number), still)

    def _step(self, which: range, still: Collection[int], delta: Tensor, parameters: Sequence[Tensor]) -> float:
        moved = [None if index in still else parameters[index] for index in which]
        return self._each[which].step(delta[self._parts[which][0]], moved)

    def state(self) -> dict[str, Any]:
        """For a checkpoint: that of the only one, or of each as "fragments"."""
        each = [one.state() for one in self._each.values()]
        return each[0] if len(each) == 1 else {"fragments": each}

    def load(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state` gave. Raises CheckpointError where it is none."""
        each = [state] if len(self._each) == 1 else state.get("fragments") if isinstance(state, Mapping) else None
        if not isinstance(each, list) or len(each) != len(self._each):
            raise CheckpointError(
                f"the outer optimizer's state in the checkpoint is not that of {len(self._each)} fragments; use an "
                f"earlier one."
            )
        for one, part in zip(self._each.values(), each, strict=True):
            one.load(part)
