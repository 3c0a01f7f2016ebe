"""C2: the gradient is that of the objective on the whole batch in one process, and so are the weights it leads to."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from instep.data import Data
from instep.models import GPT
from instep.objectives.language import NextToken
from instep.optimizers import adamw
from instep.recipe import Recipe, Team
from instep.record import checkpoint
from instep.worker.replica import Replica
from support import workloads
from support.ddp import by_ddp
from support.gradients import instep_gradient
from support.harness import train_here
from support.tasks import PADDING, Texts, padded

pytestmark = pytest.mark.processes


class Reader(nn.Module):
    """Predicts the next token from the mean of those so far, and has a code for each text as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 16)
        self.mix = nn.Linear(16, 24)
        self.output = nn.Linear(24, 32)
        self.code = nn.Linear(24, 4)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        present = (tokens != PADDING).unsqueeze(2)
        x = self.embedding(tokens.clamp(min=0)) * present
        so_far = x.cumsum(1) / present.cumsum(1)
        hidden = torch.tanh(self.mix(so_far)) * present
        return self.output(hidden), self.code(hidden.sum(1))


def two_terms(model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
    """Tokens have one denominator, texts another, and texts whose first token is even a third."""
    logits, code = model(batch)
    even = code[batch[:, 0] % 2 == 0]
    return {
        "next": F.cross_entropy(logits[:, :-1].transpose(1, 2), batch[:, 1:], ignore_index=PADDING, reduction="sum"),
        "code": 0.3 * code.square().sum(),
        "even": even.sin().sum(),
    }


def count_terms(batch: Tensor) -> dict[str, int]:
    return {"next": int((batch[:, 1:] != PADDING).sum()), "code": len(batch), "even": int((batch[:, 0] % 2 == 0).sum())}


two_terms.counts = count_terms  # type: ignore[attr-defined]


def small_gpt() -> GPT:
    return GPT(vocabulary=32, context=12, width=16, depth=2, heads=2, tied=True)


TASKS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "gpt": (small_gpt, NextToken),
    "two terms": (Reader, two_terms),
}


def whole_batch_loss(replica: Replica, model: nn.Module, indices: list[int]) -> Tensor:
    """The objective as its words say: each term's sum over its items, all samples in one batch."""
    batch = padded([replica.data.train[index] for index in indices])
    counts = replica.objective.counts(batch)
    sums = replica.objective.sums(model, batch)
    return torch.stack([value / max(1, counts[name]) for name, value in sums.items()]).sum()


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("weights", [torch.float32, torch.float64])
@settings(max_examples=20)
@given(data=st.data())
def test_the_gradient_is_that_of_the_whole_batch_in_float64(
    task: str, weights: torch.dtype, data: st.DataObject
) -> None:
    """To 1e-6. With weights in float64, where Instep alone rounds, in the norm of the largest entry:
    max |g - g64| <= 1e-6 max |g64|. In float32, where the model's own rounding is in it, in the Euclidean norm.
    """
    torch.set_num_threads(1)
    microbatches = data.draw(st.integers(1, 8), "microbatches")
    workers = data.draw(st.integers(1, microbatches), "workers")
    batch = microbatches * data.draw(st.integers(1, 4), "samples a microbatch")
    samples = batch + data.draw(st.integers(0, batch), "samples beyond a batch")
    seed = data.draw(st.integers(0, 2**16), "seed")
    longest = data.draw(st.integers(3, 12), "longest")
    model, objective = TASKS[task]
    recipe = Recipe(
        model=lambda: model().to(weights),
        objective=objective,
        data=lambda: Data(Texts(samples, longest, seed), collate=padded),
        batch=batch,
        microbatches=microbatches,
        seed=seed,
    )
    replica = Replica(recipe, "cpu")
    replica.learn_terms(0)
    step = data.draw(st.integers(0, 2), "step")  # the second is ragged where samples are beyond a batch
    truth = copy.deepcopy(replica.module).double()
    whole_batch_loss(replica, truth, replica.cursor.indices(step)).backward()
    wanted = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in truth.parameters()])
    found = torch.cat([gradient.double().flatten() for gradient in instep_gradient(replica, step, workers)])
    norm = math.inf if weights == torch.float64 else 2
    assert torch.linalg.vector_norm(found - wanted, norm) <= 1e-6 * torch.linalg.vector_norm(wanted, norm)


# ------------------------------------------------------------------------------------------------------- trajectories


def training(**changes: Any) -> Recipe:
    """Padding of uneven length, a ragged last batch, clipping, a cosine; dropout would need the same random numbers."""
    return workloads.gpt(**{"model": small_gpt, "steps": 10, **changes})


def even_texts(**changes: Any) -> Recipe:
    """The same without padding and ragged batches: each half of a batch has the same number of tokens."""
    return training(data=lambda: Data(Texts(64, 12, 0, shortest=12), collate=padded), **changes)


def momentum(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.5, momentum=0.9)


def decayed(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return adamw(parameters, lr=3e-3)


def instep_weights(recipe: Recipe, path: Path) -> dict[str, Tensor]:
    run = train_here(recipe, Team(workers=2), path)
    found, _ = checkpoint.newest_sound(run.path / "checkpoints")
    assert found is not None
    return checkpoint.load(found).model_state


def plain_weights(recipe: Recipe, wrap: Callable[[nn.Module], nn.Module] = lambda m: m) -> dict[str, Tensor]:
    """What a plain PyTorch loop makes of the recipe's samples. `wrap` may hand the model to DDP.

    Each process takes its part of every batch and the mean over the items of that part, as such loops do.
    """
    torch.set_num_threads(1)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    replica = Replica(recipe, "cpu")  # for its data, and the weights it starts from
    module = replica.module
    model = wrap(module)
    optimizer = recipe.optimizer.build(list(module.parameters()))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: recipe.schedule.factor(step, recipe.steps))
    for step in range(recipe.steps):
        indices = replica.cursor.indices(step)
        part = indices[len(indices) * rank // world : len(indices) * (rank + 1) // world]
        batch = padded([replica.data.train[index] for index in part])
        inputs, targets = batch[:, :-1].clamp(min=0), batch[:, 1:]
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=PADDING)
        optimizer.zero_grad()
        loss.backward()
        if recipe.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(module.parameters(), recipe.clip_norm)
        optimizer.step()
        schedule.step()
    return module.state_dict()


def ddp_weights(recipe: Recipe, folder: Path) -> dict[str, Tensor]:
    """The same loop under DistributedDataParallel, two processes over gloo."""
    return by_ddp(lambda rank: plain_weights(recipe, DistributedDataParallel), folder)


def apart(recipe: Recipe, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The Euclidean distance of two ends of training, as a part of the way from the start to `wanted`."""

    def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
        return float(torch.cat([(a[name] - b[name]).flatten() for name in wanted]).norm())

    return distance(found, wanted) / distance(Replica(recipe, "cpu").module.state_dict(), wanted)


TOLERANCE = [(momentum, 1e-4), (decayed, 2e-3)]
"""AdamW divides each gradient by its own size, and so makes rounding in the smallest ones large."""


@pytest.mark.parametrize(("optimizer", "tolerance"), TOLERANCE)
def test_it_trains_as_a_plain_loop_on_whole_batches(optimizer: Any, tolerance: float, tmp_path: Path) -> None:
    recipe = training(optimizer=optimizer)
    assert apart(recipe, instep_weights(recipe, tmp_path / "run"), plain_weights(recipe)) < tolerance


@pytest.mark.parametrize(("optimizer", "tolerance"), TOLERANCE)
def test_it_trains_as_ddp_where_counts_are_even(optimizer: Any, tolerance: float, tmp_path: Path) -> None:
    recipe = even_texts(optimizer=optimizer)
    assert apart(recipe, instep_weights(recipe, tmp_path / "run"), ddp_weights(recipe, tmp_path / "ddp")) < tolerance


def test_where_counts_are_uneven_ddp_trains_something_else_and_instep_does_not(tmp_path: Path) -> None:
    """The mean of each process's mean is not the mean over all tokens: after 10 steps it is a third of the way off."""
    recipe = training(optimizer=momentum)
    truth = plain_weights(recipe)
    assert apart(recipe, ddp_weights(recipe, tmp_path / "ddp"), truth) > 0.1
    assert apart(recipe, instep_weights(recipe, tmp_path / "run"), truth) < 1e-4
