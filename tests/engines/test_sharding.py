"""Shared weights, each worker updating its share of them: same bits, same checkpoints, and only where that holds."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn, optim
from torch.utils.data import TensorDataset

from instep.engines.sharding import Placement, Replicated, Sharded, choose, owners
from instep.engines.shared_state import SharedState
from instep.errors import WorkerError
from instep.recipe import Recipe, Team, Watch
from instep.record import checkpoint
from instep.record.digest import digest_of_state
from instep.reduce.layout import Layout
from instep.reduce.reduction import Reduction
from instep.worker.optimizer import BY_PARAMETER
from instep.worker.optimizer_state import copied
from instep.worker.replica import Replica
from support import workloads
from support.harness import Client, Outcome, train_here
from support.kinds import quick
from support.sharding import CHOOSE, assert_same, replicated, sharded


def placed(recipe: Recipe, workers: int = 2, written: tuple[str, ...] = (), shard: str = "optimizer") -> Placement:
    replica = Replica(recipe, "cpu", written=written)
    reduction = Reduction(Layout.of(replica.parameters, 16), recipe.microbatches, workers)
    return choose(replica, reduction, 0, range(workers), shard)


def chosen(recipe: Recipe, workers: int = 2, written: tuple[str, ...] = ()) -> type:
    return type(placed(recipe, workers, written))


# ------------------------------------------------------------------------------------------------------ who owns what


@given(st.lists(st.integers(0, 1000), max_size=30), st.integers(1, 9))
def test_no_worker_owns_more_than_its_share_and_one_parameter(sizes: list[int], workers: int) -> None:
    whose = owners(sizes, workers)
    loads = [sum(size for size, owner in zip(sizes, whose, strict=True) if owner == w) for w in range(workers)]
    assert sum(loads) == sum(sizes)
    assert max(loads) <= sum(sizes) / workers + max(sizes, default=0)
    assert max(loads) - min(loads) <= max(sizes, default=0)


def test_the_largest_goes_first_and_the_first_worker_wins_a_tie() -> None:
    assert owners([1, 5, 4, 4, 3], 2) == [0, 0, 1, 1, 0]
    assert owners([2, 2, 2], 2) == [0, 1, 0]


# ---------------------------------------------------------------------------------------------------------- same bits


OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "SGD": partial(optim.SGD, lr=0.1),
    "SGD, Nesterov": partial(optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "SGD, foreach": partial(optim.SGD, lr=0.1, momentum=0.9, nesterov=True, foreach=True),
    "Adam": partial(optim.Adam, lr=0.01),
    "Adam, AMSGrad": partial(optim.Adam, lr=0.01, amsgrad=True, maximize=True),
    "Adam, rate as a tensor": partial(optim.Adam, lr=torch.tensor(0.01)),
    "Adam, foreach": partial(optim.Adam, lr=0.01, foreach=True),
    "AdamW": partial(optim.AdamW, lr=0.01),
    "AdamW, fused": partial(optim.AdamW, lr=0.01, fused=True),
    "RMSprop": partial(optim.RMSprop, lr=0.01, centered=True, momentum=0.5),
    "RMSprop, foreach": partial(optim.RMSprop, lr=0.01, foreach=True),
    "Adagrad": partial(optim.Adagrad, lr=0.01, lr_decay=0.1),
    "Adagrad, foreach": partial(optim.Adagrad, lr=0.01, foreach=True),
    "Adagrad, fused": partial(optim.Adagrad, lr=0.01, fused=True),
    "Adadelta": partial(optim.Adadelta, lr=1.0),
    "Adadelta, foreach": partial(optim.Adadelta, lr=1.0, foreach=True),
    "Adamax": partial(optim.Adamax, lr=0.01),
    "Adamax, foreach": partial(optim.Adamax, lr=0.01, foreach=True),
    "NAdam": partial(optim.NAdam, lr=0.01),
    "NAdam, foreach": partial(optim.NAdam, lr=0.01, foreach=True, decoupled_weight_decay=True),
    "RAdam": partial(optim.RAdam, lr=0.01),
    "RAdam, foreach": partial(optim.RAdam, lr=0.01, foreach=True),
    "Rprop": partial(optim.Rprop, lr=0.01),
    "Rprop, foreach": partial(optim.Rprop, lr=0.01, foreach=True),
    "ASGD": partial(optim.ASGD, lr=0.01, t0=2, weight_decay=0.1),
    "ASGD, foreach": partial(optim.ASGD, lr=0.01, t0=2, foreach=True),
    "Muon": partial(optim.Muon, lr=0.01),
}


class Mixed(nn.Module):
    """Weights of two types, one that some batches leave without gradient, one that all do, and one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 7)
        self.frozen = nn.Linear(7, 7).requires_grad_(False)
        self.narrow = nn.Linear(7, 7, bias=False).to(torch.bfloat16)
        self.sometimes = nn.Linear(7, 7)
        self.never = nn.Linear(7, 2)
        self.last = nn.Linear(7, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.frozen(torch.tanh(self.first(x)))
        x = x + self.narrow(x.to(torch.bfloat16)).float()
        if bool(x.sum() > 0.5):
            x = x + self.sometimes(x)
        out: Tensor = self.last(x)
        return out


def numbers() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(40, 3, generator=generator), torch.randn(40, 1, generator=generator))


def squares(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().sum()


def recipe_with(optimizer: Callable[..., Any], **changes: Any) -> Recipe:
    fields: dict[str, Any] = {
        "model": Mixed, "objective": squares, "data": numbers, "optimizer": lambda p: _for(optimizer, p),
        "batch": 6, "microbatches": 3, "steps": 6, "clip_norm": 1.0,
    }  # fmt: skip
    return Recipe(**{**fields, **changes})


def _for(optimizer: Any, parameters: list[Tensor]) -> Any:
    chosen = [p for p in parameters if p.dim() == 2] if getattr(optimizer, "func", 0) is optim.Muon else parameters
    if optimizer is sgd:
        return sgd(parameters)
    half = len(chosen) // 2
    return optimizer([{"params": chosen[:half]}, {"params": chosen[half:]}])


def test_each_optimizer_that_is_known_is_tried() -> None:
    assert {each.func for each in OPTIMIZERS.values()} == set(BY_PARAMETER)  # type: ignore[attr-defined]


MAIN = [next(name for name, each in OPTIMIZERS.items() if each.func is kind) for kind in BY_PARAMETER]  # type: ignore[attr-defined]


@pytest.mark.processes
@pytest.mark.parametrize("name", quick(OPTIMIZERS, "SGD", "Adam", "AdamW", "Adagrad", "Rprop", "Muon"))
def test_each_step_is_that_of_a_worker_alone(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    team = partial(Team, checkpoint_every=1, keep=0)
    recipe = recipe_with(OPTIMIZERS[name])
    alone = train_here(recipe, team(workers=1), tmp_path / "1")
    assert len(set(alone.digests.values())) == recipe.steps
    monkeypatch.setattr(CHOOSE, sharded)
    for workers in (2, 3) if name in MAIN[:2] else (3,):
        assert train_here(recipe, team(workers=workers), tmp_path / str(workers)).digests == alone.digests
    for version in (1, recipe.steps):
        assert_same(*(state_of(tmp_path / run, version) for run in ("1", "3")))


@pytest.mark.processes
def test_replicated_weights_come_to_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [train_here(workloads.convnet(), Team(workers=3), tmp_path / "sharded")]
    monkeypatch.setattr(CHOOSE, replicated)
    runs += [train_here(workloads.convnet(), Team(workers=3), tmp_path / "replicated")]
    assert runs[0].digest == runs[1].digest
    assert_same(*(state_of(run.path, 7) for run in runs))


@pytest.mark.processes
def test_either_value_of_shard_gives_one_digest_and_one_checkpoint_that_the_other_resumes(tmp_path: Path) -> None:
    recipe = workloads.convnet()
    teams = {shard: Team(workers=3, shard=shard, checkpoint_every=1, keep=0) for shard in ("optimizer", "none")}
    runs = {shard: train_here(recipe, team, tmp_path / shard) for shard, team in teams.items()}
    assert runs["none"].digests == runs["optimizer"].digests
    for version in (1, recipe.steps):
        assert_same(*(state_of(run.path, version) for run in runs.values()))
    for shard, other in (("optimizer", "none"), ("none", "optimizer")):
        for version in range(3, recipe.steps + 1):
            shutil.rmtree(checkpoint.path_of(runs[shard].path / "checkpoints", version))
        again = train_here(recipe, Team(workers=2, shard=other), runs[shard].path, resume=True)
        assert again.digest == runs["none"].digest


@pytest.mark.parametrize("name", workloads.ALL)
def test_the_usual_recipes_share_their_weights(name: str) -> None:
    assert chosen(workloads.ALL[name]()) is Sharded


# -------------------------------------------------------------------------------------------------------- checkpoints


def state_of(run: Path, version: int) -> dict[str, Any]:
    return checkpoint.load(checkpoint.path_of(run / "checkpoints", version)).training_state


@pytest.mark.processes
@pytest.mark.parametrize(("before", "after"), [(replicated, sharded), (sharded, replicated)])
def test_a_checkpoint_of_one_kind_is_resumed_by_the_other(
    before: Any, after: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = workloads.gpt()
    whole = train_here(recipe, Team(checkpoint_every=1, keep=0), tmp_path / "whole")
    client = Client(lambda event: client.ask_to_stop() if event.get("version") == 3 else None)
    monkeypatch.setattr(CHOOSE, before)
    first = train_here(recipe, Team(workers=3), tmp_path / "run", client=client)
    assert first.result["steps"] < recipe.steps
    assert first.digest == whole.digests[first.result["steps"]]
    assert_same(*(state_of(path, first.result["steps"]) for path in (whole.path, first.path)))
    monkeypatch.setattr(CHOOSE, after)
    assert train_here(recipe, Team(workers=2), tmp_path / "run", resume=True).digest == whole.digest


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 20_000), nn.Linear(20_000, 2))  # of four blocks; worker 1 owns 60 000 weights


@pytest.mark.processes
def test_state_that_is_larger_than_a_slot_is_gathered_in_pieces(tmp_path: Path) -> None:
    recipe = recipe_with(partial(optim.Adam, lr=1e-4, amsgrad=True), model=wide, steps=3, clip_norm=0.5)
    runs = [train_here(recipe, Team(workers=w, checkpoint_every=1, keep=0), tmp_path / str(w)) for w in (1, 2)]
    assert runs[0].digests == runs[1].digests
    for version in (1, 2, 3):
        assert_same(*(state_of(run.path, version) for run in runs))


@pytest.mark.processes
def test_a_best_checkpoint_has_the_state_of_all_workers(tmp_path: Path) -> None:
    recipe = workloads.gpt(evaluate_every=1)
    runs = [train_here(recipe, Team(workers=w, checkpoint_every=100, keep=0), tmp_path / str(w)) for w in (1, 3)]
    assert runs[0].digests == runs[1].digests
    assert len(runs[0].digests) > 2, "one of them at least is there because it is the best"
    for version in runs[0].digests:
        assert_same(*(state_of(run.path, version) for run in runs))


@pytest.mark.processes
def test_what_the_recipe_does_at_the_end_with_shared_weights_is_its_own_affair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(model: nn.Module, data: Any, folder: Path) -> dict[str, float]:
        for parameter in model.parameters():
            parameter.data.zero_()
        return {}

    from instep.team import process as worker

    digest = worker.digest_of_state

    def slowly(state: Any) -> str:
        time.sleep(0.05 * (os.getpid() % 7))
        return digest(state)

    monkeypatch.setattr(worker, "digest_of_state", slowly)
    recipe = workloads.gpt(steps=2, artifacts=spoil)
    digests = {train_here(recipe, Team(workers=w), tmp_path / str(w)).digest for w in (1, 4)}
    assert len(digests) == 1


# ---------------------------------------------------------------------------------------------------- where it cannot


class Hooked(optim.SGD):
    pass


def with_hook(parameters: list[Tensor]) -> optim.Optimizer:
    made = optim.SGD(parameters, lr=0.1)
    made.register_step_post_hook(lambda *_: None)
    return made


def scheduled(parameters: list[Tensor]) -> optim.Optimizer:
    made = optim.SGD(parameters, lr=0.1)
    made.scheduler = optim.lr_scheduler.ConstantLR(made)  # type: ignore[attr-defined]
    return made


class Sub(nn.Parameter):
    pass


class Odd(nn.Module):
    """A linear layer with one oddity."""

    def __init__(self, oddity: str):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 3))
        if oddity == "subclass":
            self.weight = Sub(torch.ones(1, 3))
        elif oddity == "gaps":
            self.weight = nn.Parameter(torch.ones(1, 6)[:, ::2])
        elif oddity == "same memory":
            self.other = nn.Parameter(self.weight.data)
        elif oddity == "frozen part":
            self.other = nn.Parameter(self.weight.data[:, :1], requires_grad=False)
        elif oddity == "alias":
            self.seen = [self.weight.data.view(-1)]
        elif oddity == "buffer":
            self.register_buffer("seen", self.weight.data)
        self.oddity, self.calls = oddity, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        with torch.no_grad():
            if self.oddity == "clamps":
                self.weight.clamp_(-0.5, 0.5)
            elif self.oddity == "clamps past autograd":
                self.weight.data.clamp_(-0.5, 0.5)
        return nn.functional.linear(x, self.weight)


ODDITIES = ["subclass", "gaps", "same memory", "frozen part", "alias", "buffer"]


def sgd(parameters: list[Tensor]) -> optim.Optimizer:
    return optim.SGD(parameters, lr=0.01)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": lambda p: Hooked(p, lr=0.1)},
        {"optimizer": lambda p: optim.Adafactor(p)},
        {"optimizer": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, fused=True)},
        {"optimizer": with_hook},
        {"optimizer": scheduled},
        {"watch": Watch(spike="rollback")},
        *({"model": partial(Odd, name)} for name in ODDITIES),
    ],
    ids=["subclass", "adafactor", "fused SGD", "hook", "scheduler", "rollback", *ODDITIES],
)  # fmt: skip
def test_weights_stay_private_where_others_could_see_the_difference(changes: dict[str, Any]) -> None:
    recipe = Recipe(
        **{**{"model": partial(Odd, ""), "objective": squares, "data": numbers, "optimizer": sgd}, **changes}
    )
    assert chosen(recipe) is Replicated
    told = placed(recipe).why_whole
    assert told.startswith("team.shard is 'optimizer', and each worker makes the whole update all the same, for "), told
    assert not placed(recipe, workers=1).why_whole, "nothing was to be shared"
    assert not placed(recipe, shard="none").why_whole


@pytest.mark.processes
def test_the_tape_tells_why_each_worker_makes_the_whole_update(tmp_path: Path) -> None:
    recipe = recipe_with(optim.Adafactor, steps=1)
    started = started_of(train_here(recipe, Team(workers=2), tmp_path / "run"))
    assert started["whole_update"] == (
        "team.shard is 'optimizer', and each worker makes the whole update all the same, for what Adafactor does to a "
        "parameter may depend on more than this parameter."
    )
    shared = train_here(workloads.gpt(steps=1), Team(workers=2), tmp_path / "shared")
    assert "whole_update" not in started_of(shared)


def started_of(run: Outcome) -> dict[str, Any]:
    return next(event for event in run.events if event["kind"] == "run_started")


def test_weights_are_shared_by_plain_models_and_several_workers_alone() -> None:
    recipe = Recipe(model=partial(Odd, ""), objective=squares, data=numbers, optimizer=sgd)
    assert chosen(recipe) is Sharded
    assert chosen(recipe, workers=1) is Replicated
    assert type(placed(recipe, shard="none")) is Replicated
    assert chosen(recipe, written=("weight",)) is Replicated


@pytest.mark.processes
@pytest.mark.parametrize("oddity", ["clamps", "clamps past autograd", "alias", "same memory"])
def test_odd_models_train_as_before(oddity: str, tmp_path: Path) -> None:
    recipe = recipe_with(sgd, model=partial(Odd, oddity))
    runs = [train_here(recipe, Team(workers=w, checkpoint_every=1, keep=0), tmp_path / str(w)) for w in (1, 3)]
    assert runs[0].digests == runs[1].digests


@pytest.mark.processes
def test_a_team_that_does_not_agree_where_its_weights_lie_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def differing(replica: Replica, reduction: Reduction, worker: int, machine: range, *others: Any) -> Any:
        if worker:
            return Sharded(replica, reduction, worker, machine)
        return Replicated(replica, reduction, worker)

    monkeypatch.setattr(CHOOSE, differing)
    with pytest.raises(WorkerError, match="worker 1 starts from other shared_weight_bytes than worker 0"):
        train_here(recipe_with(sgd), Team(workers=2), tmp_path / "run")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_an_optimizer_keeps_of_a_parameter_stays_in_the_memory_that_the_workers_share(name: str) -> None:
    """Another takes it over as it is after the last update, and goes on with the same bits."""

    def built() -> tuple[Replica, SharedState]:
        replica = Replica(recipe_with(OPTIMIZERS[name]), "cpu")
        return replica, SharedState(replica)

    def step(replica: Replica, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        gradients = [torch.randn(p.shape, generator=generator) for p in replica.parameters]
        gradients[-1 - number % 2] = None  # type: ignore[call-overload]  # the last one has none at first
        replica.update(number, gradients)

    (replica, state), (other, others) = built(), built()
    memory, everything = torch.zeros(state.nbytes, dtype=torch.uint8), range(len(replica.parameters))
    state.attach(memory)
    state.keep(everything)
    others.attach(memory)
    for number in range(4):
        step(replica, number)
        state.grow(everything)
    other.module.load_state_dict(replica.module.state_dict())
    assert others.take_over(everything)
    assert_same(other.training_state(), replica.training_state())
    kept = copied(replica.training_state())
    step(other, 4)
    again, _ = built()
    again.load(replica.saved_state(), kept)
    step(again, 4)
    assert_same(other.training_state(), again.training_state())
    assert digest_of_state(other.saved_state()) == digest_of_state(again.saved_state())
    others.give_back(everything)
    assert not [one.of_torch.state for one in other.optimizer.each if one.of_torch.state]
