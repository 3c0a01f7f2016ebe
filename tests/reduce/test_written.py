"""Forwards that write parameters: each microbatch starts from the step's weights, and what it wrote is taken once."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from instep.errors import CheckpointingError, RecipeError
from instep.recipe import Recipe, Team
from instep.record import checkpoint
from instep.record.digest import digest_of_file
from instep.worker.memory_trade import memory_trade
from instep.worker.replica import Replica
from support import writers
from support.harness import Outcome, stopping_at, train_here
from support.kinds import quick
from support.reference import reference_digests
from support.serving import replayed
from support.writers import Forced, Lookup, Torn, recipe

pytestmark = pytest.mark.processes


def run(made: Recipe, path: Path, workers: int, **team: Any) -> Outcome:
    return train_here(made, Team(workers=workers, **team), path / f"{workers}")


def state(outcome: Outcome) -> dict[str, torch.Tensor]:
    path, _ = checkpoint.newest_sound(outcome.path / "checkpoints")
    assert path is not None
    return checkpoint.load(path).model_state


@pytest.mark.parametrize("kind", quick(writers.KINDS, "max_norm", "forced", "teacher"))
def test_each_step_is_that_of_the_reference_for_any_number_of_workers(kind: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    made = recipe(writers.KINDS[kind])
    expected = reference_digests(made)
    for workers in (1, 2, 3):
        assert run(made, tmp_path, workers, checkpoint_every=1, keep=0).digests == expected


@pytest.mark.parametrize("kind", quick(writers.KINDS, "max_norm", "forced", "teacher"))
def test_the_weights_are_those_of_a_plain_loop(kind: str, tmp_path: Path) -> None:
    made = recipe(writers.KINDS[kind])
    found = state(run(made, tmp_path, 2))
    for name, value in writers.plain_loop(made).state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: name + text)


def test_rows_of_an_embedding_with_a_largest_norm_keep_it(tmp_path: Path) -> None:
    made = recipe(Lookup, optimizer=lambda p: torch.optim.SGD(p, lr=0.01))
    norms = state(run(made, tmp_path, 3))["rows.weight"].norm(dim=1)
    torch.testing.assert_close(norms, writers.plain_loop(made).rows.weight.detach().norm(dim=1))
    assert float(norms.max()) < 1.01  # one update away from 1, and 4 at the start


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_microbatches_that_disagree_end_the_run_before_the_update(workers: int, tmp_path: Path) -> None:
    made = recipe(partial(Torn, late=4))
    with pytest.raises(RecipeError, match="step 5 left different values in the same element of parameter 'scale'"):
        run(made, tmp_path, workers)
    saved, _ = checkpoint.newest_sound(tmp_path / str(workers) / "checkpoints")
    assert saved is not None
    assert saved.name == "step-00000004"


def test_one_microbatch_agrees_with_itself(tmp_path: Path) -> None:
    made = recipe(Torn, microbatches=1)
    found = state(run(made, tmp_path, 1))
    for name, value in writers.plain_loop(made).state_dict().items():
        torch.testing.assert_close(found[name], value)


LATE = {
    "in place": partial(Forced, late=5),
    "past autograd": partial(Forced, late=6, past=True),  # seen a step later, before a checkpoint
    "other memory": partial(Forced, late=5, swaps=True),
    "in evaluation alone": partial(Forced, late=100, evaluation=True),
}


@pytest.mark.parametrize("workers", quick([1, 2, 3], 2))
@pytest.mark.parametrize("how", LATE)
def test_a_first_write_late_gives_the_digest_of_a_run_that_knew_of_it(how: str, workers: int, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    made = recipe(LATE[how], evaluate_every=3)
    expected = reference_digests(made)[made.steps]
    late = run(made, tmp_path, workers, checkpoint_every=2, restarts=0)
    assert late.digest == expected
    assert late.result["restarts"] == 0
    assert [e["written"] for e in late.events if e["kind"] == "run_started" and "written" in e] == [["weight"]]
    (why,) = (e["why"] for e in late.events if e["kind"] == "warned")
    assert "wrote parameter 'weight' for the first time in" in why


@pytest.mark.parametrize(("engine", "workers"), [("lockstep", 1), ("server", 2)])
def test_the_best_checkpoint_too_holds_no_write_that_nobody_has_seen(engine: Any, workers: int, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    made = recipe(partial(Forced, late=3, past=True), evaluate_every=2, optimizer=lambda p: torch.optim.SGD(p, lr=0.01))
    found = run(made, tmp_path, workers, engine=engine, checkpoint_every=100, restarts=0)
    assert 4 in found.digests, "each evaluation finds the best"
    assert found.digest == reference_digests(made)[made.steps]


@pytest.mark.parametrize(("engine", "workers"), [("lockstep", 1), ("lockstep", 2), ("server", 2)])
def test_a_resume_does_not_trust_weights_of_a_stop_that_nobody_has_looked_at(
    engine: Any, workers: int, tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    made = recipe(partial(Forced, late=3, past=True))
    team = Team(workers=workers, engine=engine, checkpoint_every=100)
    client = stopping_at(5)
    stopped = train_here(made, team, tmp_path / "run", client=client)
    assert stopped.result["interrupted"]
    found = train_here(made, team, tmp_path / "run", resume=True)
    assert found.digest == reference_digests(made)[made.steps]
    assert any("was saved at a stop" in event["why"] for event in found.events if event["kind"] == "warned")
    assert replayed(made, tmp_path / "run").same


class Base(nn.Module):
    """A trained layer on a larger frozen one, of which no copy is made beforehand, and which every forward writes."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(4, 40).requires_grad_(False)
        self.head = nn.Linear(40, 3)
        self.more = nn.Parameter(torch.zeros(500), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.frozen.weight.mul_(0.9)
        out: Tensor = self.head(torch.tanh(self.frozen(x)))
        return out


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_frozen_parameters_larger_than_the_trained_ones_are_written_alike(workers: int, tmp_path: Path) -> None:
    made = recipe(Base)
    found = run(made, tmp_path, workers, restarts=0)
    model = state(found)
    for name, value in writers.plain_loop(made).state_dict().items():
        torch.testing.assert_close(model[name], value, rtol=1e-5, atol=1e-6)
    if workers == 1:
        with pytest.raises(CheckpointingError, match="no repeated block"):  # it has come so far
            memory_trade(made, "cpu", None)


def test_a_checkpoint_never_holds_what_a_first_write_of_the_next_step_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers share the weights, and go on while the first one saves them."""
    torch.set_num_threads(1)
    write = checkpoint.write_weights

    def slowly(*arguments: Any) -> None:
        time.sleep(0.5)
        write(*arguments)

    monkeypatch.setattr(checkpoint, "write_weights", slowly)
    made = recipe(partial(Forced, late=4))
    expected = reference_digests(made)
    late = run(made, tmp_path, 3, checkpoint_every=4, restarts=0)
    assert late.digests == {version: expected[version] for version in (4, 8, 9)}
    for version in (4, 8, 9):
        path = checkpoint.path_of(late.path / "checkpoints", version)
        assert digest_of_file(path / "model.safetensors") == expected[version]


def test_what_evaluation_writes_is_put_back_after_each_batch(tmp_path: Path) -> None:
    """So that the objective on held-out data hangs on the weights alone, not on who has which batch."""
    made = recipe(partial(Drifting), evaluate_every=3)
    runs = [run(made, tmp_path, workers, checkpoint_every=3) for workers in (1, 2, 3)]
    held_out = [[e["objective"] for e in each.events if e["kind"] == "evaluated"] for each in runs]
    assert held_out[0] == held_out[1] == held_out[2]
    assert len({each.digest for each in runs}) == 1


class Drifting(nn.Module):
    """Each forward, in evaluation too, makes the weight smaller."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.layer.weight.mul_(0.99)
        out: Tensor = self.layer(x)
        return out


class Sharing:
    """Compares each sample with the whole batch, and has it computed for that."""

    def share(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        answer: Tensor = model(batch[0])
        return answer

    def __call__(self, model: nn.Module, batch: tuple[Tensor, Tensor], shared: Any) -> Tensor:
        mean = torch.cat(shared.parts).mean(0)
        return (model(batch[0]) - batch[1] - 0.1 * mean).square().sum()


def test_forwards_of_the_whole_batch_leave_nothing_written(tmp_path: Path) -> None:
    calls = []

    class Counted(Sharing):
        def share(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            calls.append(1)
            return super().share(model, batch)

    made = recipe(Drifting, objective=Sharing)
    assert len({run(made, tmp_path, workers).digest for workers in (1, 2, 3)}) == 1
    replica = Replica(recipe(Drifting, objective=Counted), "cpu")
    replica.learn_terms(0)
    weight = replica.module.layer.weight.detach().clone()  # type: ignore[union-attr]
    replica.written.begin()
    batches = [replica.batch(0, place) for place in range(3)]
    calls.clear()
    for place, batch in enumerate(batches):
        replica.compute(0, place, batch, {"objective": 12})
        replica.written.leave()
        assert torch.equal(replica.module.layer.weight, weight)  # type: ignore[union-attr,arg-type]
    assert len(calls) == 3, "once for a step"
