"""An optimizer that trains other weights than are to be used."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BETA = 0.9


class ScheduleFree(torch.optim.Optimizer):
    """Defazio et al., 2024: gradients are those at y = (1 - BETA) z + BETA x, and x is the mean of all z."""

    def __init__(self, parameters: list[Tensor]):
        super().__init__(parameters, {"lr": 0.05, "training": False, "steps": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            assert group["training"], "call train() first"
            group["steps"] += 1
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                z = self.state[parameter].setdefault("z", parameter.clone())
                x = parameter.lerp(z, 1 - 1 / BETA)
                z.sub_(parameter.grad, alpha=group["lr"])
                parameter.copy_(x.lerp_(z, 1 / group["steps"]).lerp_(z, 1 - BETA))

    def train(self) -> None:
        self._switch(True, 1 - BETA)

    def eval(self) -> None:
        self._switch(False, 1 - 1 / BETA)

    @torch.no_grad()
    def _switch(self, training: bool, weight: float) -> None:
        for group in self.param_groups:
            if group["training"] != training:
                group["training"] = training
                for parameter in group["params"]:
                    if "z" in self.state[parameter]:
                        parameter.lerp_(self.state[parameter]["z"], weight)
