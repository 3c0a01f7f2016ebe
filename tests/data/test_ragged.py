"""The last, smaller batch of an epoch: how it is cut, leaving it out, and what BatchNorm says to one sample."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from instep.data.cursor import Cursor
from instep.errors import RecipeError
from instep.offline.cluster import Cluster
from instep.offline.simulation import simulate
from instep.randomness import key, seed_all
from instep.recipe import Recipe, Team
from instep.record import checkpoint
from instep.tables import as_before, as_saved
from instep.worker.replica import Replica
from support import workloads
from support.harness import train_here
from support.kinds import quick
from support.reference import reference_digests
from support.serving import replayed

pytestmark = pytest.mark.processes

_known: dict[str, dict[int, str]] = {}


def reference(name: str) -> dict[int, str]:
    torch.set_num_threads(1)
    if name not in _known:
        _known[name] = reference_digests(workloads.ALL[name](ragged="even"))
    return _known[name]


@pytest.mark.parametrize("name", workloads.ALL)
@pytest.mark.parametrize("workers", quick([1, 2, 3, 5], 1, 3))
def test_cut_evenly_every_step_is_that_of_the_reference_for_any_number_of_workers(
    name: str, workers: int, tmp_path: Path
) -> None:
    run = train_here(workloads.ALL[name](ragged="even"), Team(workers=workers, checkpoint_every=1, keep=0), tmp_path)
    assert run.digests == reference(name)


def test_cut_evenly_the_server_and_the_virtual_clock_give_the_same_bits(tmp_path: Path) -> None:
    recipe = workloads.convnet(ragged="even")
    served = train_here(recipe, Team(workers=3, engine="server"), tmp_path / "served")
    virtual = simulate(recipe, Cluster(workers=3), True, None, lambda event: None)
    assert served.digest == virtual["digest"] == reference("convnet")[7]


@pytest.mark.parametrize("rule", ["asynchronous", "local_sgd:2"])
def test_cut_evenly_a_run_under_any_rule_is_replayed(rule: str, tmp_path: Path) -> None:
    recipe = workloads.convnet(ragged="even", rule=rule)
    run = train_here(recipe, Team(workers=3), tmp_path / "run")
    assert run.result["items"] == 2 * 69 + 32
    found = replayed(recipe, run.path)
    assert found.same, found.divergence


def test_the_cut_and_the_left_out_batch_are_what_the_digest_depends_on(tmp_path: Path) -> None:
    recipes = [
        workloads.convnet(steps=3, **change)
        for change in ({"ragged": "spread"}, {"ragged": "even"}, {"ragged": "even", "drop_last": True})
    ]
    runs = [train_here(r, Team(workers=2), tmp_path / str(i)) for i, r in enumerate(recipes)]
    assert len({run.digest for run in runs}) == 3
    assert len({recipe.fingerprint() for recipe in recipes}) == 3
    assert [run.result["items"] for run in runs] == [69, 69, 96]


def test_saved_recipes_of_before_keep_their_cut_and_their_fingerprint() -> None:
    now = workloads.convnet(ragged="spread", order="permutation")
    added = {field.name for field in dataclasses.fields(Recipe) if "before" in field.metadata}
    saved = {name: value for name, value in now.to_table().items() if name not in added}
    known = as_saved(Recipe, saved)
    assert (known["ragged"], known["drop_last"], known["order"]) == ("spread", False, "permutation")
    assert as_before(Recipe, now.to_table()) == as_before(Recipe, saved)
    assert (normed(64).ragged, normed(64).order) == ("even", "keyed")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn, self.b = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.bn(self.a(x)))
        return out


def classes(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")


def points(count: int) -> TensorDataset:
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, (x[:, 0] > 0).long())


def normed(samples: int, **changes: Any) -> Recipe:
    fields: dict[str, Any] = {
        "model": Net, "objective": classes, "data": points(samples), "batch": 16, "microbatches": 4, "steps": 9,
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    }  # fmt: skip
    return Recipe(**{**fields, **changes})


@pytest.mark.parametrize("rest", [2, 5, 9])
def test_batch_norm_trains_on_every_last_batch_that_a_plain_loop_takes(rest: int, tmp_path: Path) -> None:
    digests = {train_here(normed(32 + rest), Team(workers=w), tmp_path / str(w)).digest for w in (1, 3)}
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("recipe", "step", "remedy"),
    [
        (normed(33), "0 of step 3 with its 1 samples", "set recipe.drop_last to true, which leaves out that smaller b"),
        (normed(37, microbatches=8), "0 of step 3 with its 5 samples", "set recipe.microbatches to 4."),
        (normed(48, microbatches=16), "0 of step 1 with its 16 samples", "set recipe.microbatches to 8."),
        (normed(49, microbatches=16), "0 of step 1 with its 16 samples", "take a larger recipe.batch."),
        (normed(37, ragged="spread"), "0 of step 3 with its 5 samples", "set recipe.ragged to 'even', which cuts a s"),
        (normed(36, batch=1, microbatches=1), "0 of step 1 with its 1 samples", "take a larger recipe.batch."),
    ],
)
@pytest.mark.parametrize("team", [Team(workers=1), Team(workers=1, engine="server")])
def test_one_sample_for_batch_norm_is_refused_before_the_first_step_with_what_helps(
    recipe: Recipe, step: str, remedy: str, team: Team, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError) as caught:
        train_here(recipe, team, tmp_path / "run")
    assert f"a microbatch of one sample, {step} in all, is refused by BatchNorm ('bn')" in str(caught.value)
    assert remedy in str(caught.value)


def test_what_helps_against_one_sample_does(tmp_path: Path) -> None:
    recipes = [normed(33, drop_last=True), normed(37, microbatches=4), normed(48, microbatches=8)]
    for number, recipe in enumerate(recipes):
        assert train_here(recipe, Team(workers=2), tmp_path / str(number)).digest


def test_one_sample_is_let_pass_where_it_is_never_met_or_does_no_harm(tmp_path: Path) -> None:
    assert train_here(normed(33, steps=2), Team(), tmp_path / "short").digest
    frozen = normed(33, model=lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8).eval(), nn.Linear(8, 2)))
    before = Replica(frozen, "cpu")
    state = {name: value.clone() for name, value in before.module.state_dict().items()}
    before.learn_terms(0)
    assert all(torch.equal(value, state[name]) for name, value in before.module.state_dict().items())


def test_dropping_the_last_batch_trains_as_a_loop_that_drops_it(tmp_path: Path) -> None:
    recipe = normed(37, model=lambda: nn.Linear(4, 2), drop_last=True, steps=6)
    run = train_here(recipe, Team(workers=3), tmp_path / "run")
    cursor = Cursor(37, 16, 4, 0, drop_last=True)
    seed_all(key(0, "model"))
    model, data = nn.Linear(4, 2), points(37)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    for step in range(6):
        indices = torch.tensor(cursor.indices(step))
        seen.append(set(indices.tolist()))
        optimizer.zero_grad()
        F.cross_entropy(model(data.tensors[0][indices]), data.tensors[1][indices]).backward()
        optimizer.step()
    assert [len(part) for part in seen] == [16] * 6
    assert all(seen[i].isdisjoint(seen[i + 1]) for i in (0, 2, 4))
    assert run.result["items"] == 96
    found = checkpoint.load(run.path / "checkpoints" / "step-00000006").model_state
    torch.testing.assert_close(found, dict(model.state_dict()), rtol=1e-5, atol=1e-6)
