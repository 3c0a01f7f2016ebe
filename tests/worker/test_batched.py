"""Gradients of many virtual workers at once, beside those of one worker at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from instep.clock.times import Failures, WorkerTimes
from instep.data.cursor import Cursor
from instep.errors import RecipeError
from instep.objectives import objective
from instep.offline.cluster import Cluster
from instep.offline.simulation import simulate
from instep.offline.tape_replay import replay
from instep.recipe import Recipe
from instep.record import tape
from instep.record.folder import RunFolder
from instep.rules import parse
from instep.rules.work import Pieces
from instep.worker.batched import Together
from instep.worker.contributor import Contributor
from instep.worker.replica import Replica
from support.workloads import convnet, gpt

pytestmark = pytest.mark.processes

WORKERS, MICROBATCHES = 6, 12


class Ragged(nn.Module):
    """A bias that only some samples reach, a frozen layer, and tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.again = nn.Linear(5, 5)
        self.again.weight = self.first.weight
        self.frozen = nn.Linear(5, 3)
        self.frozen.requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.frozen(torch.tanh(self.again(torch.tanh(self.first(x)))))
        return answer


def points() -> TensorDataset:
    return TensorDataset(torch.randn(101, 5), torch.randint(0, 3, (101,)))


def listed() -> list[tuple[Tensor, Tensor]]:
    """The same, sample by sample."""
    return list(points())


@objective
def classes(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")


def recipe(rule: str, **fields: Any) -> Recipe:
    given = {
        "model": Ragged, "objective": classes, "data": points, "optimizer": "torch.optim:AdamW", "steps": 12,
        "batch": 2 * MICROBATCHES, "microbatches": MICROBATCHES, "rule": parse(rule), **fields,
    }  # fmt: skip
    return Recipe(**given)


def contributor(given: Recipe) -> Contributor:
    made = Contributor(Replica(given, "cpu"), Pieces(given.rule, WORKERS, given.microbatches, given.steps))
    made.prepare(0)
    return made


class Counted:
    """Samples that count how often each was loaded."""

    loaded: ClassVar[list[int]] = []

    def __len__(self) -> int:
        return 101

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.loaded.append(index)
        return torch.full((5,), index / 101), torch.tensor(index % 3)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("rule", ["synchronous", "asynchronous"])
def test_a_simulation_loads_each_sample_once_to_count_and_compute_it(rule: str, batched: bool) -> None:
    given = recipe(rule, data=Counted, steps=4)
    cluster = Cluster(workers=WORKERS, times=WorkerTimes.lognormal(1.0, 0.5), merge_s=0.0, batched=batched)
    Counted.loaded = []
    simulate(given, cluster, True, None, lambda event: None)
    cursor = Cursor(len(Counted()), given.batch, given.microbatches, given.seed)
    used = {index for step in range(4) for index in cursor.indices(step)}
    assert len(used) == 4 * given.batch
    assert used <= set(Counted.loaded)
    at_the_start = 50  # at most: for the digest, the look at samples twice, the terms, a piece computed both ways
    assert len(Counted.loaded) <= len(used) + at_the_start


@pytest.mark.parametrize("rule", ["synchronous", "diloco:2"])
def test_the_data_are_built_once_for_all_workers_of_a_simulation(rule: str) -> None:
    built = []

    def data() -> TensorDataset:
        built.append(1)
        return points()

    cluster = Cluster(workers=WORKERS, times=WorkerTimes.constant(1.0), merge_s=0.0)
    simulate(recipe(rule, data=data, steps=4), cluster, True, None, lambda event: None)
    assert len(built) == 1


@objective(counts=lambda batch: {"loss": len(batch[0]), "size": 3 * len(batch[0])}, weights={"size": lambda step: step})
def weighted(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Two terms, the weight of one of which is 0 in the first batch and rises."""
    return {"loss": classes(model, batch), "size": model(batch[0]).square().sum()}


@objective(counts=lambda batch: {"loss": len(batch[0]), "none": 0})
def with_nothing(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """A term that has a sum and no items."""
    return {"loss": classes(model, batch), "none": model(batch[0]).sum()}


@pytest.mark.parametrize("data", [points, listed])
@pytest.mark.parametrize("target", [classes, weighted, with_nothing])
@pytest.mark.parametrize("rule", ["synchronous", "asynchronous", "softsync:2", "delay_compensated"])
def test_contributions_equal_those_of_one_worker_at_a_time(rule: str, target: Any, data: Any) -> None:
    one = contributor(recipe(rule, objective=target, data=data))
    first, second = one.pack.empty(), one.pack.empty()
    one.pack.save(first)
    second.copy_(first)
    for parameter in one.pack.parameters(second):
        parameter.mul_(1.5)
    # Pieces of the fifth batch hold the ragged end of the epoch, and microbatches without samples.
    tasks = [(one.pieces.work(piece), (first, second)[piece % 2]) for piece in (0, 1, *range(24, 30), 31)]
    for (work, weights), (facts, vectors) in zip(tasks, Together(one).compute(tasks), strict=True):
        alone = one.empty()
        expected = one.compute(work, weights, alone)
        torch.testing.assert_close(vectors.gradient, alone.gradient, rtol=1e-5, atol=1e-7)
        assert {**vars(facts), "sums": None} == {**vars(expected), "sums": None}
        assert facts.sums.keys() == expected.sums.keys()
        for name, sums in expected.sums.items():
            assert facts.sums[name] == pytest.approx(sums, rel=1e-5)


@pytest.mark.parametrize("rule", ["asynchronous", "bounded_staleness:1", "softsync:2", "synchronous"])
def test_a_batched_simulation_learns_the_same_and_can_be_replayed(rule: str, tmp_path: Path) -> None:
    given = recipe(rule)
    times = WorkerTimes.lognormal(0.1, 0.05, seed=1, failures=Failures(3.0, 0.5))
    found = {}
    for batched in (False, True):
        folder = RunFolder.create(tmp_path / str(batched)).path
        cluster = Cluster(workers=WORKERS, times=times, merge_s=0.01, batched=batched)
        found[batched] = simulate(given, cluster, True, folder, lambda event: None)
    assert found[True]["objective_last"] == pytest.approx(found[False]["objective_last"], rel=1e-3)
    assert found[True]["versions"] == found[False]["versions"]
    again = replay(given, tape.read(tmp_path / "True" / "tape.jsonl"))
    assert again.same, again.divergence
    assert again.digest == found[True]["digest"]


@objective
def looking(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    loss = classes(model, batch)
    return loss if float(loss) > 0 else 2 * loss


def across(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Has another value where it is computed for many at once."""
    alone = torch._C._functorch.maybe_current_level() is None  # type: ignore[attr-defined]
    return classes(model, batch) * (1 if alone else 2)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (recipe("diloco:2"), "rule 'diloco'"),
        (convnet(rule=parse("asynchronous")), "changes its buffers"),
        (gpt(rule=parse("asynchronous")), "--batched"),  # dropout
        (recipe("asynchronous", objective=looking), "--batched"),
        (recipe("asynchronous", objective=across), "otherwise than alone"),
        (recipe("asynchronous", precision="bfloat16"), "not float32"),
    ],
)
def test_what_cannot_be_batched_is_refused(given: Recipe, why: str) -> None:
    cluster = Cluster(workers=2, times=WorkerTimes.constant(1.0), merge_s=0.0, batched=True)
    with pytest.raises(RecipeError, match=why) as caught:
        simulate(given, cluster, True, None, lambda event: None)
    assert "leave out --batched" in str(caught.value)
