"""C1: the digest is a function of the recipe alone."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import optim

from instep.data import Data
from instep.recipe import Recipe, Team
from instep.reduce.tree import Node
from support import workloads
from support.harness import Client, Outcome, stopping_at, train_here
from support.kinds import quick
from support.moving import AtRandom
from support.reference import reference_digests
from support.workloads import Sentences, padded

pytestmark = pytest.mark.processes

WORKERS = [1, 2, 3, 4, 5, 8]

_known: dict[str, dict[int, str]] = {}


def reference(name: str) -> dict[int, str]:
    torch.set_num_threads(1)
    if name not in _known:
        _known[name] = reference_digests(workloads.ALL[name]())
    return _known[name]


@pytest.mark.parametrize("name", workloads.ALL)
@pytest.mark.parametrize("workers", quick(WORKERS, 1, 2, 3, 8))
def test_every_step_is_that_of_the_reference_for_any_number_of_workers(name: str, workers: int, tmp_path: Path) -> None:
    recipe = workloads.ALL[name]()
    run = train_here(recipe, Team(workers=workers, checkpoint_every=1, keep=0), tmp_path / "run", tried=workers == 2)
    assert run.digests == reference(name)


@pytest.mark.parametrize("microbatches", quick([1, 3, 6], 1, 3))
def test_microbatches_need_not_be_a_power_of_two(microbatches: int, tmp_path: Path) -> None:
    recipe = workloads.convnet(batch=24, microbatches=microbatches, steps=4)
    torch.set_num_threads(1)
    expected = reference_digests(recipe)[4]
    for workers in range(1, microbatches + 1):
        assert train_here(recipe, Team(workers=workers), tmp_path / str(workers)).digest == expected


def test_an_order_of_arrival_gives_other_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail: adding workers' sums from left to right, as a plain all-reduce may, is not enough."""

    def left_to_right(nodes: Sequence[Node], *rest: Any) -> list[tuple[int, int]]:
        return [(0, other) for other in range(1, len(nodes))]

    monkeypatch.setattr("instep.reduce.reduction.merge_plan", left_to_right)
    recipe = workloads.gpt()
    digests = {w: train_here(recipe, Team(workers=w), tmp_path / str(w)).digest for w in (1, 8)}
    assert digests[1] == reference("gpt")[recipe.steps]
    assert digests[8] != digests[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", workloads.ALL)
def test_resumed_from_any_version_with_another_team(name: str, tmp_path: Path) -> None:
    recipe = workloads.ALL[name]()
    whole = train_here(recipe, Team(workers=2, checkpoint_every=1, keep=0), tmp_path / "whole")
    for version, workers in zip(range(1, recipe.steps), [3, 5, 1, 8, 4, 3], strict=True):
        path = tmp_path / str(version)
        shutil.copytree(whole.path, path)
        for later in range(version + 1, recipe.steps + 1):
            shutil.rmtree(path / "checkpoints" / f"step-{later:08d}")
        resumed = train_here(recipe, Team(workers=workers, checkpoint_every=1, keep=0), path, resume=True)
        assert resumed.digests == {v: reference(name)[v] for v in range(version + 1, recipe.steps + 1)}
        assert resumed.result["items"] == whole.result["items"]
        assert resumed.result["objective_first"] == whole.result["objective_first"]


@pytest.mark.parametrize(("before", "after"), [(2, 3), pytest.param(8, 1, marks=pytest.mark.slow)])
def test_interrupted_and_resumed(before: int, after: int, tmp_path: Path) -> None:
    recipe = workloads.gpt(steps=30)
    whole = train_here(recipe, Team(workers=2, checkpoint_every=1, keep=0), tmp_path / "whole")
    first = train_here(recipe, Team(workers=before), tmp_path / "run", client=stopping_at(2))
    assert first.result["interrupted"]
    assert 2 <= first.result["steps"] < recipe.steps
    assert first.digest == whole.digests[first.result["steps"]]
    second = train_here(recipe, Team(workers=after), tmp_path / "run", resume=True)
    assert not second.result["interrupted"]
    assert second.digest == whole.digest


@pytest.mark.parametrize("version", [2, 5])
def test_a_killed_worker_changes_no_bit(version: int, tmp_path: Path) -> None:
    client = Client(_killer({version}))
    run = train_here(workloads.gpt(), Team(workers=3, checkpoint_every=2), tmp_path / "run", client=client)
    assert run.result["restarts"] == 1
    assert run.digest == reference("gpt")[7]
    assert next(e["why"] for e in run.events if e["kind"] == "left").startswith("worker ")


@pytest.mark.slow
def test_up_to_twenty_workers_killed_at_random_moments(tmp_path: Path) -> None:
    recipe = workloads.gpt(steps=100)
    expected = train_here(recipe, Team(workers=2), tmp_path / "undisturbed").digest
    team = Team(workers=4, checkpoint_every=3, restarts=20)
    client = Client(_killer_at_random(20), free=True)
    run = train_here(recipe, team, tmp_path / "run", client=client)
    assert 10 <= run.result["restarts"] <= 20, "no step is done again, so the last ones may find it at its end"
    assert run.digest == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", workloads.ALL)
def test_compiled(name: str, tmp_path: Path) -> None:
    fixed = {"data": lambda: Data(Sentences(69), collate=partial(padded, longest=12))} if name == "gpt" else {}
    recipe = workloads.ALL[name](compile=True, **fixed)  # two shapes: a full microbatch, and one of the ragged end
    team = partial(Team, checkpoint_every=1, keep=0)
    digests = {w: train_here(recipe, team(workers=w), tmp_path / str(w)).digests for w in WORKERS}
    assert all(found == digests[1] for found in digests.values())
    assert digests[1] != reference(name), "another kernel order was used, or nothing was compiled"
    train_here(recipe, Team(workers=2), tmp_path / "run", client=stopping_at(3))
    assert train_here(recipe, Team(workers=3), tmp_path / "run", resume=True).digest == digests[1][recipe.steps]


def test_bfloat16(tmp_path: Path) -> None:
    recipe = workloads.gpt(precision="bfloat16", steps=4)
    digests = {train_here(recipe, Team(workers=w), tmp_path / str(w)).digest for w in (1, 3)}
    assert len(digests) == 1
    assert digests != {reference("gpt")[4]}


@pytest.mark.parametrize(
    "optimizer",
    quick([optim.Adam, optim.SGD, optim.Adagrad, optim.RMSprop, optim.NAdam, optim.Muon], optim.Adam, optim.Muon),
)
def test_any_optimizer(optimizer: Callable[..., Any], tmp_path: Path) -> None:
    recipe = workloads.gpt(steps=3, optimizer=lambda parameters: _matrices(optimizer, parameters))
    digests = {train_here(recipe, Team(workers=w), tmp_path / str(w)).digest for w in (1, 3)}
    assert len(digests) == 1


def _matrices(optimizer: Callable[..., Any], parameters: list[torch.Tensor]) -> Any:
    chosen = [p for p in parameters if p.dim() == 2] if optimizer is torch.optim.Muon else parameters
    return optimizer(chosen, lr=1e-3)


def _killer(versions: set[int]) -> Callable[[dict[str, Any]], None]:
    pids: dict[int, int] = {}

    def kill(event: dict[str, Any]) -> None:
        if event["kind"] == "joined":
            pids[event["worker"]] = event["pid"]
        if event["kind"] == "merged" and event["version"] in versions:
            versions.discard(event["version"])
            os.kill(pids[max(pids)], signal.SIGKILL)

    return kill


def _killer_at_random(times: int) -> Callable[[dict[str, Any]], None]:
    """Kills some worker at some event, from its joining to the writing of checkpoints, `times` in all."""
    chance = random.Random(7)
    pids: dict[int, int] = {}
    left = [times]

    def kill(event: dict[str, Any]) -> None:
        if event["kind"] == "joined":
            pids[event["worker"]] = event["pid"]
        elif event["kind"] == "left":
            pids.clear()
        if left[0] and pids and chance.random() < (0.5 if event["kind"] == "checkpointed" else 0.1):
            left[0] -= 1
            os.kill(chance.choice(list(pids.values())), signal.SIGKILL)
            pids.clear()

    return kill


def test_the_recipe_is_what_the_digest_depends_on(tmp_path: Path) -> None:
    recipes: list[Recipe] = [
        workloads.gpt(steps=2, seed=1),
        workloads.gpt(steps=2),
        workloads.gpt(steps=2, clip_norm=0.01),
    ]
    digests = [train_here(r, Team(workers=2), tmp_path / str(i)).digest for i, r in enumerate(recipes)]
    assert len(set(digests)) == 3


@pytest.mark.parametrize("name", workloads.ALL)
@pytest.mark.parametrize("workers", quick([2, 3, 5], 3))
def test_ranges_that_move_in_every_step_change_no_bit(
    name: str, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("instep.engines.division.Balance", AtRandom)
    recipe = workloads.ALL[name]()
    run = train_here(recipe, Team(workers=workers, checkpoint_every=1, keep=0), tmp_path / "run")
    assert run.digests == reference(name)
    assert run.result["moves"] == recipe.steps - 2
    first, *others = computed_by(run)
    assert any(each != first for each in others)
    for each in (first, *others):
        assert sorted(m for own in each.values() for m in own) == list(range(recipe.microbatches))
        assert all(each.values()), "who computes none says nothing"


def computed_by(run: Outcome) -> list[dict[int, list[int]]]:
    """By step, which microbatches each worker has computed, as the tape tells."""
    found: dict[int, dict[int, list[int]]] = {}
    for event in run.events:
        if event["kind"] == "computed":
            found.setdefault(event["version"], {})[event["worker"]] = list(range(*event["microbatches"]))
    return [found[version] for version in sorted(found)]
