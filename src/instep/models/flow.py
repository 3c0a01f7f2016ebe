"""A velocity field for small pictures, and the way from noise to a picture along it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from instep.errors import RecipeError
from instep.models.sizes import check_sizes


class FlowNet(nn.Module):
    """The velocity at x, [B, 1, S, S], and time t, [B], for pictures of the classes `labels`, [B]: shape of x.

    A residual multilayer perceptron; time, as sines and cosines, and class set the gain and the shift of each layer's
    norm (FiLM, Perez et al., 2018). Raises RecipeError for numbers that fit no model.
    """

    def __init__(self, *, side: int = 8, classes: int = 10, width: int = 256, depth: int = 4) -> None:
        super().__init__()
        check_sizes("FlowNet", side=side, classes=classes, width=width, depth=depth)
        if width % 2:
            raise RecipeError(f"a FlowNet's 'width' is {width}; it must be even, for pairs of sine and cosine.")
        self.side, self.classes = side, classes
        self.into = nn.Linear(side * side, width)
        self.times = nn.Linear(width, width)
        self.names = nn.Embedding(classes, width)
        self.blocks = nn.ModuleList(Modulated(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, side * side)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.frequencies: Tensor
        self.register_buffer("frequencies", torch.logspace(0, 2, width // 2) * math.pi, persistent=False)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        angles = t[:, None] * self.frequencies
        condition = F.silu(self.times(torch.cat((angles.sin(), angles.cos()), dim=1)) + self.names(labels))
        hidden = self.into(x.flatten(1))
        for block in self.blocks:
            hidden = block(hidden, condition)
        out: Tensor = self.out(self.norm(hidden))
        return out.view_as(x)


class Modulated(nn.Module):
    """A residual layer, [B, D], whose norm's gain and shift come from `condition`, [B, D]. At first it adds nothing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulate = nn.Linear(width, 2 * width)
        self.widen = nn.Linear(width, 2 * width)
        self.into_residual = nn.Linear(2 * width, width)
        nn.init.zeros_(self.into_residual.weight)
        nn.init.zeros_(self.into_residual.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        gain, shift = self.modulate(condition).chunk(2, dim=1)
        out: Tensor = self.into_residual(F.silu(self.widen(self.norm(x) * (1 + gain) + shift)))
        return x + out


@torch.no_grad()
def integrate(velocity: Callable[[Tensor, Tensor], Tensor], noise: Tensor, steps: int = 50) -> Tensor:
    """Where `noise`, [B, ...], at time 0 is carried to at time 1, by Heun's method in so many steps.

    `velocity` maps x, shape of `noise`, and times [B] to dx/dt.
    """
    x, length = noise, 1 / steps
    for step in range(steps):
        now = x.new_full((len(x),), step * length)
        first = velocity(x, now)
        second = velocity(x + length * first, now + length)
        x = x + length / 2 * (first + second)
    return x
