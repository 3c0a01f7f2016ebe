"""What a step leaves out where it can make no difference: the result is that of a step that leaves out nothing."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor, nn, optim
from torch.utils.data import TensorDataset

from instep.bits import same_bits
from instep.objectives import objective
from instep.randomness import key, key_of_step
from instep.recipe import Recipe, Team
from instep.watch import limit, usual
from instep.worker import replica
from instep.worker.optimizer import Optimizer
from support.harness import train_here


def drawn() -> float:
    """From all generators."""
    return random.random() + np.random.random() + float(torch.rand(()))


class Noisy(nn.Module):
    """It draws in each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(x + 0.1 * drawn())
        return out


def counts(batch: Sequence[Tensor]) -> int:
    """It draws, as none should."""
    return len(batch[0]) + int(100 * drawn())


def squares(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    x, y = batch
    return (model(x) - y).square().sum()


@objective(counts=counts)
def counted(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    return squares(model, batch)


def numbers(kind: type[TensorDataset] = TensorDataset) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return kind(torch.randn(13, 3, generator=generator), torch.randn(13, 1, generator=generator))


class NoisyRows(TensorDataset):
    """It draws for each sample."""

    def __getitem__(self, index: Any) -> tuple[Tensor, ...]:
        return tuple(tensor + 0.1 * drawn() for tensor in super().__getitem__(index))


class NoisySGD(optim.SGD):
    """It draws in each step."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                parameter.add_(0.01 * drawn())
        super().step()


def hooked(parameters: list[nn.Parameter]) -> optim.Optimizer:
    """AdamW with a hook that draws."""
    made = optim.AdamW(parameters, lr=0.01)

    def noise(*_: Any) -> None:
        with torch.no_grad():
            parameters[0].add_(0.01 * drawn())

    made.register_step_pre_hook(noise)
    return made


CASES: dict[str, dict[str, Any]] = {
    "rows": {},
    "counts": {"objective": counted},
    "optimizer": {"optimizer": partial(NoisySGD, lr=0.01), "data": partial(numbers, NoisyRows)},
    "hook": {"optimizer": hooked},
}


@pytest.mark.processes
@pytest.mark.parametrize("case", CASES)
def test_what_draws_anywhere_draws_the_same_for_any_team(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields: dict[str, Any] = {
        "model": Noisy, "objective": squares, "data": numbers, "optimizer": partial(optim.AdamW, lr=0.01),
        "batch": 6, "microbatches": 3, "steps": 4,
    }  # fmt: skip
    recipe = Recipe(**fields | CASES[case])
    found = [train_here(recipe, Team(workers=w), tmp_path / str(w)).digest for w in (1, 2, 3)]
    monkeypatch.setattr(Optimizer, "may_draw", True)
    monkeypatch.setattr(replica, "rows_of", lambda *_: None)
    monkeypatch.setattr(replica, "_root", by_autograd)
    assert found == [train_here(recipe, Team(), tmp_path / "the long way").digest] * 3


def by_autograd(value: Tensor, weight: float, total: int) -> Tensor:
    value = value.detach().requires_grad_()
    (weight * (value.float() / total)).backward()
    assert value.grad is not None
    return value.grad


@given(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]), st.floats(-9, 9), st.integers(1, 1 << 40))
def test_backward_starts_from_the_gradient_that_autograd_gives(dtype: torch.dtype, weight: float, total: int) -> None:
    value = torch.ones((), dtype=dtype)
    assert same_bits(replica._root(value, weight, total), by_autograd(value, weight, total))


def test_what_backward_starts_from_is_its_own_memory() -> None:
    value = torch.ones(())
    replica._root(value, 1.0, 7).zero_()
    assert float(replica._root(value, 1.0, 7)) != 0


past = st.lists(st.floats(-1e3, 1e3) | st.floats(), min_size=3, max_size=60)


@given(past, st.floats(), st.floats(0.01, 20))
def test_what_is_usual_is_within_the_limit(past: list[float], objective: float, deviations: float) -> None:
    assert not usual(objective, past, deviations) or not objective > limit(past, deviations)


@given(st.lists(st.floats(-9, 9), min_size=3, max_size=60), st.floats(0.01, 20))
def test_the_median_is_usual(past: list[float], deviations: float) -> None:
    assert usual(statistics.median(past), past, deviations)


@given(st.integers(0, 1 << 40), st.integers(0, 100), st.integers(0, 40))
def test_keys_made_ahead_are_those_made_one_by_one(seed: int, step: int, microbatch: int) -> None:
    assert key_of_step(seed, step, microbatch, "compute") == key(seed, step, microbatch, "compute")
