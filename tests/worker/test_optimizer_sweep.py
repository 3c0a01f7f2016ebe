"""Optimizers of torch and of pytorch_optimizer: each resumes bit for bit, or is refused in the first step."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_optimizer
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from instep.errors import InstepError, NonFiniteError
from instep.offline.replayer import Replayer
from instep.recipe import Recipe
from instep.record import checkpoint
from instep.record.digest import digest_of_state
from instep.worker import trial
from instep.worker.replica import Replica
from support.regression import regression
from support.sentences import one_sentence

STEPS, HALF = 8, 4

Build = Callable[[list[Tensor]], torch.optim.Optimizer]

TORCH = sorted(
    name
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.last = nn.Linear(8, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.tanh(self.first(x)))
        return out


class Narrow(Small):
    """Weights in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(torch.bfloat16)).float()


class Matrices(nn.Module):
    """For those that take nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8, bias=False), nn.Linear(8, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.tanh(self.first(x)))
        return out


def points() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(16, 6, generator=generator), torch.randn(16, 4, generator=generator))


def recipe_of(build: Any, model: Any = Small) -> Recipe:
    return regression(model=model, data=points, optimizer=build, batch=4, microbatches=2, steps=STEPS)


def outcome(recipe: Recipe, folder: Path) -> str:
    """What becomes of a run in this process: "", or the sentence that refuses it in its first step.

    Raises AssertionError where it goes on otherwise after a resume, and what the optimizer raises past the trial.
    """
    try:
        trial._try_steps(Replica(recipe, "cpu"), True)
        run = Replayer(recipe, 1, "cpu")
        run.alone(0)
        replica = run.merger.replica
        trial._there_and_back(replica, replica.device, replica.saved_state(), replica.training_state())
    except InstepError as error:
        return error.message
    for step in range(1, HALF):
        try:
            run.alone(step)
        except NonFiniteError:  # with its defaults it diverges here
            return ""
    saved = checkpoint.save(
        folder, version=HALF, model_state=run.merger.replica.saved_state(), training_state=run.merger.training_state(),
        meta={}, fingerprint="", keep=1,
    )  # fmt: skip
    again, loaded = Replayer(recipe, 1, "cpu"), checkpoint.load(saved.path)
    again.merger.load(loaded.model_state, loaded.training_state)
    again.merger.microbatches = HALF * recipe.microbatches
    for step in range(HALF, STEPS):
        run.alone(step)
        again.alone(step)
    digests = [digest_of_state(each.merger.replica.saved_state()) for each in (run, again)]
    assert digests[0] == digests[1]
    return ""


WRAPPERS = ["Lookahead", "OrthoGrad", "PCGrad", "ScheduleFreeWrapper", "TRAC"]
MUONS = ["adago", "adamuon", "distributedmuon", "muon", "muonclip", "normuon"]
UNTRIED = {"demo"}  # which asks for a package more

REFUSED = {
    **dict.fromkeys(["a2grad", "alig"], "has a group of parameters without 'lr'"),
    **dict.fromkeys(["adahessian", "sophiah"], "needs gradients of gradients"),
    **dict.fromkeys(["bsam", "lbfgs"], "needs a closure"),
    **dict.fromkeys(["adalomo", "adammini", "distributedmuon", "lomo"], "could not be built"),
    **dict.fromkeys(["adashift", "conda", "scalableshampoo", "scion", "scionlight"], "which torch.load refuses"),
}
"""In the first step, and why; all others resume."""

REFUSED_NARROW = {**REFUSED, **dict.fromkeys(["lorarite", "TRAC"], "cannot make a step, tried on random gradients")}


@pytest.mark.slow
def test_each_of_torchs_resumes_or_is_refused(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    found = {}
    for name in TORCH:
        build = partial(getattr(torch.optim, name), lr=0.01)
        found[name] = outcome(recipe_of(build, Matrices if name == "Muon" else Small), tmp_path / name)
    refused = {name: sentence for name, sentence in found.items() if sentence}
    assert refused.keys() == {"LBFGS", "SparseAdam"}, refused


@pytest.mark.slow
@pytest.mark.parametrize(("model", "expected"), [(Small, REFUSED), (Narrow, REFUSED_NARROW)], ids=["wide", "narrow"])
def test_each_of_pytorch_optimizers_resumes_or_is_refused(model: Any, expected: dict[str, str], tmp_path: Path) -> None:
    torch.set_num_threads(1)
    found: dict[str, str] = {}
    names = sorted(set(pytorch_optimizer.get_supported_optimizers()) - UNTRIED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in [*names, *WRAPPERS]:
            fitting = Matrices if name == "spectralsphere" else model
            found[name] = outcome(recipe_of(builder(name), fitting), tmp_path / name)
    refused = {name: sentence for name, sentence in found.items() if sentence}
    assert refused.keys() == expected.keys(), refused
    assert all(words in refused[name] for name, words in expected.items()), refused
    assert all(one_sentence(sentence) for sentence in refused.values()), refused
    assert len(found) - len(refused) >= 110


def builder(name: str) -> Build:
    """Builds it with its defaults, and what it asks for beside the parameters."""
    if name in WRAPPERS:
        wrapper = getattr(pytorch_optimizer, name)
        return lambda parameters: wrapper(torch.optim.AdamW(parameters, lr=0.01))
    kind: Any = pytorch_optimizer.load_optimizer(name)
    more = {"ranger21": {"num_iterations": STEPS}, "bsam": {"num_data": 16}}.get(name, {})
    if name in MUONS:
        return lambda parameters: kind(
            [{"params": [p for p in parameters if (p.dim() == 2) == flag], "use_muon": flag} for flag in (True, False)]
        )
    return lambda parameters: kind(parameters, **more)
