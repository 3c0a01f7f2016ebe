"""C1 and C2 for every objective: the gradient is that of its definition on the whole batch, and the bits do not know
the team. A plain DDP loop with the usual mean has neither, and it is measured by how much.
"""

from __future__ import annotations

import copy
import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

from instep.errors import RecipeError
from instep.objectives import vocabulary
from instep.offline.cluster import Cluster
from instep.offline.simulation import simulate
from instep.randomness import key, seed_all
from instep.recipe import Recipe, Team
from instep.record import tape
from instep.record.folder import RunFolder
from instep.rules import UpdateRule
from instep.worker.replica import Replica
from support.ddp import by_ddp
from support.gradients import instep_gradient
from support.harness import train_here
from support.kinds import quick
from support.regression import squares
from support.tasks import TASKS, WORDS, Drawn

pytestmark = pytest.mark.processes


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that objectives of language take the chunked way: five rows at a time."""
    torch.set_num_threads(1)
    monkeypatch.setattr(vocabulary, "LEAST_ROWS", 1)
    monkeypatch.setattr(vocabulary, "CHUNK_ELEMENTS", {"cpu": 5 * WORDS, "cuda": 5 * WORDS})


def recipe(
    name: str, dtype: torch.dtype = torch.float32, samples: int = 40, longest: int = 9, **changes: Any
) -> Recipe:
    task = TASKS[name]
    seed = changes.get("seed", 0)
    objective = task.objective
    fields: dict[str, Any] = {
        "model": lambda: task.model().to(dtype),
        "objective": objective if isinstance(objective, type) else objective(),
        "data": lambda: task.data(samples, longest, seed, dtype),
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        "batch": 24,
        "microbatches": 8,
        "steps": 4,
    }
    return Recipe(**{**fields, **changes})


def whole_batch(replica: Replica, step: int) -> Drawn:
    """The global batch as its microbatches, with the seeds of their random numbers."""
    seed = replica.recipe.seed
    batches = [(key(seed, step, m, "compute"), replica.batch(step, m)) for m in range(replica.recipe.microbatches)]
    return [(seed, batch) for seed, batch in batches if batch is not None]


def truth(name: str, replica: Replica, step: int) -> Tensor:
    """The gradient of the definition, flat, in float64."""
    model = copy.deepcopy(replica.module).double()
    loss = TASKS[name].definition(model, whole_batch(replica, step), step)
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    parts = zip(found, model.parameters(), strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in parts])


def flat(gradients: list[Tensor]) -> Tensor:
    return torch.cat([gradient.double().flatten() for gradient in gradients])


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(max_examples=8)
@given(data=st.data())
def test_the_gradient_is_that_of_the_definition_on_the_whole_batch(
    name: str, dtype: torch.dtype, data: st.DataObject
) -> None:
    """To 1e-6: with weights in float64 of the largest entry, in float32, where the model rounds too, of the norm (DPO,
    which takes the difference of large numbers, to 5e-6)."""
    microbatches = data.draw(st.integers(1, 6), "microbatches")
    workers = data.draw(st.integers(1, microbatches), "workers")
    batch = microbatches * data.draw(st.integers(1, 3), "samples a microbatch")
    samples = batch + data.draw(st.integers(0, batch), "samples beyond a batch")
    longest = data.draw(st.integers(3, 9), "longest")
    step = data.draw(st.integers(0, 2), "step")  # the second is ragged where samples are beyond a batch
    seed = data.draw(st.integers(0, 2**16), "seed")
    made = recipe(name, dtype, samples, longest, batch=batch, microbatches=microbatches, seed=seed)
    replica = Replica(made, "cpu")
    replica.learn_terms(0)
    wanted = truth(name, replica, step)
    found = flat(instep_gradient(replica, step, workers))
    norm = math.inf if dtype == torch.float64 else 2
    floor = 1e-8 if dtype == torch.float32 else 1e-12  # a batch whose gradients cancel
    # Of log-probabilities around -20 in float32 the difference that DPO's sigmoid takes is off by some 1e-6.
    share = 5e-6 if name.startswith("dpo") and dtype == torch.float32 else 1e-6
    assert torch.linalg.vector_norm(found - wanted, norm) <= share * torch.linalg.vector_norm(wanted, norm) + floor


@pytest.mark.parametrize("name", quick(TASKS, "next token", "distillation", "dpo", "flow", "vae", "clip"))
def test_one_digest_for_any_number_of_workers(name: str, tmp_path: Path) -> None:
    made = recipe(name)
    runs = [train_here(made, Team(workers=w, checkpoint_every=1, keep=0), tmp_path / str(w)) for w in (1, 3)]
    assert len(runs[0].digests) == 4
    assert runs[0].digests == runs[1].digests


# ----------------------------------------------------------------------------------------------------------------- DDP

STEP = 1

OFF_BY = {
    "next token": 0.599,
    "smoothed, z-loss": 0.596,
    "masked tokens": 1.113,
    "distillation": 0.528,
    "reverse distillation": 0.392,
    "dpo": 0.203,
    "dpo, given": 0.187,
    "epsilon": 0.103,
    "epsilon, min-SNR": 0.12,
    "v, min-SNR": 0.19,
    "v, truncated SNR": 0.18,
    "flow": 0.186,
    "flow, logit-normal": 0.177,
    "vae": 0.098,
    "vae, bernoulli": 0.059,
    "clip": 0.43,
}
"""How far a DDP loop's gradient is from the definition's, as a part of it: 2 processes of 4 microbatches each, 19
samples of 2 to 9 tokens, each microbatch's mean, and the mean of these. Measured here; the test holds it to 5 %."""


def ddp_gradients(folder: Path) -> dict[str, Tensor]:
    """Of every task, by a loop as most are: the mean over a microbatch, accumulated, averaged over processes."""
    return by_ddp(lambda rank: {name: ddp_gradient(name, rank) for name in TASKS}, folder)


def uneven(name: str) -> Recipe:
    return recipe(name, samples=43, batch=24, seed=5, ragged="spread", order="permutation")


class MeanLoss(torch.nn.Module):
    """What DDP wraps: from a batch to its loss, so that its hooks see the whole forward."""

    def __init__(self, replica: Replica):
        super().__init__()
        self.model, self.objective = replica.module, replica.objective

    def forward(self, batch: Any) -> Tensor:
        sums, counts = self.objective.sums(self.model, batch), self.objective.counts(batch)
        weights = self.objective.weights(STEP)
        return torch.stack([weight * sums[name] / max(1, counts[name]) for name, weight in weights.items()]).sum()


def ddp_gradient(name: str, rank: int) -> Tensor:
    replica = Replica(uneven(name), "cpu")
    replica.learn_terms(0)
    model = DistributedDataParallel(MeanLoss(replica))
    own = range(rank * 4, rank * 4 + 4)
    for microbatch in own:
        batch = replica.batch(STEP, microbatch)
        seed_all(key(replica.recipe.seed, STEP, microbatch, "compute"))
        with model.no_sync() if microbatch != own[-1] else functools.partial(torch.enable_grad)():
            (model(batch) / len(own)).backward()
    return flat([torch.zeros_like(p) if p.grad is None else p.grad for p in replica.parameters])


def test_a_ddp_loop_with_the_usual_mean_fails_the_same_check(tmp_path: Path) -> None:
    found = ddp_gradients(tmp_path)
    off: dict[str, float] = {}
    for name in TASKS:
        replica = Replica(uneven(name), "cpu")
        replica.learn_terms(0)
        wanted = truth(name, replica, STEP)
        off[name] = float((found[name] - wanted).norm() / wanted.norm())
        assert (flat(instep_gradient(replica, STEP, 2)) - wanted).norm() <= 1e-6 * wanted.norm()
    assert off == pytest.approx(OFF_BY, rel=0.05)


# ------------------------------------------------------------------------------------------------- the objective's bits


def doubles() -> TensorDataset:
    inputs = torch.randn(40, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return TensorDataset(inputs, (inputs[:, :1] * 3).tanh())


def test_the_objective_on_the_tape_is_one_number_for_any_team_engine_and_clock(tmp_path: Path) -> None:
    """With sums in float64 each way of adding them up in parts rounds another way."""
    made = Recipe(
        model=lambda: torch.nn.Linear(5, 1).double(),
        objective=squares,
        data=doubles,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.01),
        batch=16,
        microbatches=8,
        steps=8,
    )
    teams: list[tuple[Any, int]] = [(engine, workers) for engine in ("lockstep", "server") for workers in (1, 2, 3)]
    tapes = [
        train_here(made, Team(workers=workers, engine=engine), tmp_path / f"{engine}{workers}").events
        for engine, workers in teams
    ]
    RunFolder.create(tmp_path / "virtual")
    simulate(made, Cluster(workers=3), True, tmp_path / "virtual", lambda event: None)
    tapes.append(list(tape.read(tmp_path / "virtual" / "tape.jsonl")))
    found = {tuple(e["objective"] for e in events if e["kind"] == "merged") for events in tapes}
    assert len(found) == 1


# ------------------------------------------------------------------------------------------------- the global negatives


@pytest.mark.parametrize("rule", ["asynchronous", "local_sgd:2", "diloco:2", "backup_workers:1"])
def test_global_negatives_are_refused_where_a_batch_meets_several_weights(rule: str) -> None:
    made = recipe("clip", rule=UpdateRule.from_text(rule))
    with pytest.raises(RecipeError, match=f"compares each sample with its whole global batch, which rule '{rule[:5]}"):
        Replica(made, "cpu")


def test_global_negatives_under_the_server_engine_have_the_bits_of_lockstep(tmp_path: Path) -> None:
    engines: list[Any] = ["lockstep", "server"]
    runs = [train_here(recipe("clip"), Team(workers=2, engine=engine), tmp_path / engine) for engine in engines]
    assert runs[0].digest == runs[1].digest
