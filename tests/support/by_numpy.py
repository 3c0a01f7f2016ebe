"""A recipe a part of which NumPy computes, so that its bits hang on NumPy's version: a model's layer, or an update.

Its samples and first weights are drawn as integers: torch's normal numbers are others on other processors.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from instep.recipe import Recipe
from support.parted import CLASSES, SAMPLES, WIDE, entropy

HIDDEN = 16


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    x = torch.randint(-999, 1000, (SAMPLES, WIDE), generator=generator) / 500
    return TensorDataset(x, torch.randint(0, CLASSES, (SAMPLES,), generator=generator))


def smooth(values: Tensor) -> Tensor:
    """Its frequencies, the higher the less: a function that is its own adjoint."""
    spectrum = np.fft.rfft(values.detach().numpy())
    spectrum = spectrum / (1 + 0.1 * np.arange(spectrum.shape[-1]))
    return torch.from_numpy(np.fft.irfft(spectrum, values.shape[-1]).astype(np.float32))


class _Smoothed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return smooth(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return smooth(gradient)


class Spectral(nn.Module):
    """NumPy smooths what samples come to whose first feature is above `beyond`."""

    def __init__(self, beyond: float = math.inf):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(WIDE, HIDDEN), nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, CLASSES)
        self._beyond = beyond
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randint(-99, 100, parameter.shape) / 200)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.norm(self.first(x)))
        seen = x[:, 0] > self._beyond
        if seen.any():
            hidden = torch.where(seen[:, None], _Smoothed.apply(hidden), hidden)
        return self.last(hidden)  # type: ignore[no-any-return]


class SmoothingAdam(torch.optim.Adam):
    """Adam, after which NumPy smooths one tensor, from its update of this number on, from 1."""

    def __init__(self, named_parameters: Any, tensor: str = "", update: int = 0):
        named = dict(named_parameters)
        super().__init__(named.values(), lr=0.05)
        self._wanted, self._update = named.get(tensor), update

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        answer = super().step(closure)
        wanted = self._wanted
        if wanted is not None and wanted in self.state and int(self.state[wanted]["step"]) >= self._update:
            wanted.copy_(smooth(wanted))
        return answer


def recipe(*, beyond: float = math.inf, tensor: str = "", update: int = 0, **fields: Any) -> Recipe:
    """One of 8 updates with checksums after every 4; what is not told, NumPy has no part in."""
    given: dict[str, Any] = {
        "model": partial(Spectral, **({} if beyond == math.inf else {"beyond": beyond})), "objective": entropy,
        "data": data, "batch": 12, "microbatches": 4, "steps": 8, "checksum_every": 4, "name": "by NumPy",
        "optimizer": partial(SmoothingAdam, **({"tensor": tensor, "update": update} if tensor else {})),
    }  # fmt: skip
    return Recipe(**{**given, **fields})
