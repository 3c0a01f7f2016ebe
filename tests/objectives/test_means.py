"""Objectives that draw random numbers: their sums are let pass, and their means are not."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from instep.data.cursor import load
from instep.errors import ObjectiveError
from instep.objectives import bind, check_is_sum
from instep.offline.cluster import Cluster
from instep.offline.simulation import simulate
from instep.recipe import Recipe, Team
from support.harness import train_here
from support.tasks import TASKS


def linear():
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def heavy(count):
    """Random numbers above 0 of which few are most of the sum."""
    return (2 * torch.randn(count, 1)).exp()


RANDOM = {
    "flow": lambda m, b: (m(torch.rand(len(b), 1) * b) - torch.randn(len(b), 2)).square(),
    "one time for all": lambda m, b: (m(torch.rand(()) * b) - 1).square(),
    "noise and no more": lambda m, b: 0 * m(b) + torch.randn(len(b), 2),
    "noise near zero": lambda m, b: 0 * m(b) + torch.randn(len(b), 2) + 0.1,
    "heavy tails": lambda m, b: 0 * m(b) + heavy(len(b)),
    "rarely anything": lambda m, b: 0 * m(b) + (torch.rand(len(b), 1) < 0.02).float(),
    "dropout in evaluation": lambda m, b: F.dropout(m(b), 0.5, training=True).square(),
    "infinite at times": lambda m, b: m(b) / (torch.rand(()) > 0.1).float(),
}


@pytest.mark.parametrize("kind", RANDOM)
@pytest.mark.parametrize("samples", [1, 32])
def test_right_random_sums_are_let_pass(kind, samples, monkeypatch):
    monkeypatch.setattr("instep.objectives.checks._DRAWN_SAMPLES", 256)
    for seed in range(2):
        torch.manual_seed(seed)
        batch = torch.randn(samples, 3)
        check_is_sum(bind(lambda m, b: RANDOM[kind](m, b).sum()), linear(), batch)


@pytest.mark.parametrize("samples", [2, 4, 32])
@pytest.mark.parametrize("kind", ["flow", "one time for all", "dropout in evaluation"])
def test_random_means_are_caught(kind, samples):
    batch = torch.randn(samples, 3, generator=torch.Generator().manual_seed(samples))
    with pytest.raises(ObjectiveError, match="'objective' .*is a mean, not a sum"):
        check_is_sum(bind(lambda m, b: RANDOM[kind](m, b).mean()), linear(), batch)
    parts = {"fine": torch.sum, "wrong": torch.mean}
    terms = bind(lambda m, b: {name: part(RANDOM[kind](m, b)) for name, part in parts.items()})
    with pytest.raises(ObjectiveError, match="'wrong' .*is a mean, not a sum"):
        check_is_sum(terms, linear(), batch)


class Divided:
    """An objective's sums, divided by their counts."""

    def __init__(self, objective):
        self.objective, self.counts = objective, bind(objective).counts
        self.weights = getattr(objective, "weights", None)

    def __call__(self, model, batch):
        sums, counts = bind(self.objective).sums(model, batch), self.counts(batch)
        whole = max(counts.values())
        return {name: value / max(1, counts.get(name, whole)) for name, value in sums.items()}


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("samples", [2, 4, 16])
def test_built_in_objectives_are_let_pass_and_their_means_are_not(name, samples):
    task = TASKS[name]
    torch.manual_seed(samples)
    model, data = task.model(), task.data(20, 9, samples, torch.float32)
    batch = load(data.train, range(samples), data.collate)
    check_is_sum(bind(task.objective()), model, batch)
    if name != "clip":  # it sees the whole global batch: what it gives for a part is no share of a sum
        with pytest.raises(ObjectiveError, match="is a mean, not a sum"):
            check_is_sum(bind(Divided(task.objective())), model, batch)


def test_a_sum_that_is_not_random_takes_few_forwards_and_a_random_one_some_ten():
    calls = []

    def sums(noise, model, batch):
        calls.append(len(batch))
        return (model(batch) + noise * torch.randn(len(batch), 2)).square().sum()

    check_is_sum(bind(partial(sums, 0.0)), linear(), torch.randn(16, 3))
    assert len(calls) == 3
    check_is_sum(bind(partial(sums, 1.0)), linear(), torch.randn(16, 3))
    assert len(calls) - 3 <= 30


class Named:
    """Samples with a name, which no tensor doubles."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
        return torch.full((3,), float(index)), str(index)


@pytest.mark.processes
@pytest.mark.parametrize("engine", ["lockstep", "server"])
def test_a_mean_is_caught_where_only_the_data_set_can_double_the_batch(engine, tmp_path):
    def run(reduction, name):
        recipe = Recipe(
            model=linear, objective=lambda m, b: getattr(m(b[0]).square(), reduction)(), data=Named, batch=8,
            microbatches=4, steps=2,
        )  # fmt: skip
        return train_here(recipe, Team(workers=2, engine=engine), tmp_path / name)

    run("sum", "sum")
    with pytest.raises(ObjectiveError, match="is a mean, not a sum"):
        run("mean", "mean")


@pytest.mark.processes
def test_a_simulation_refuses_a_mean():
    recipe = Recipe(
        model=linear, objective=lambda m, b: m(b).square().mean(), data=torch.ones(20, 3), batch=8, microbatches=4
    )
    with pytest.raises(ObjectiveError, match="is a mean, not a sum"):
        simulate(recipe, Cluster(workers=2), True, None, lambda event: None)
