"""Checksums by tensor on the tape of a synchronous run: the same for any team, and a replay names where two part."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from instep.cli import main
from instep.offline.cluster import Cluster
from instep.offline.simulation import simulate
from instep.offline.tape_replay import replay
from instep.recipe import Recipe, Team
from instep.record import checkpoint, tape
from instep.record.folder import About, RunFolder
from instep.reduce.checksums import checksum
from instep.rules import parse
from instep.worker.replica import Replica
from instep.worker.tensor_checksums import checksums_of, own_checksums, together
from support import workloads
from support.harness import Client, stopping_at, train_here
from support.kinds import quick
from support.regression import regression
from support.serving import at, kill, replayed

Events = list[dict[str, Any]]


def told(path: Path) -> dict[int, tuple[Any, Any]]:
    """By version: what its tape tells of weights and optimizer, each name in its order."""
    events = list(tape.read(path / "tape.jsonl"))
    found = {e["version"]: e for e in events if e["kind"] == "checksummed"}
    return {version: (list(e["weights"].items()), list(e["optimizer"].items())) for version, e in found.items()}


def mine(parameters: list[Tensor], lr: float) -> torch.optim.Optimizer:
    """Nobody knows that it changes each parameter for itself."""
    return type("Mine", (torch.optim.Adam,), {})(parameters, lr=lr)


def two(**changes: Any) -> Recipe:
    lr = {"lr": 0.01}
    optimizers = {"*norm*": partial(torch.optim.SGD, momentum=0.5, **lr), "*": partial(torch.optim.RMSprop, **lr)}
    return workloads.convnet(optimizer=optimizers, **changes)


RECIPES: dict[str, Callable[..., Recipe]] = {
    "sharded": workloads.gpt, "buffers and frozen weights": workloads.convnet, "two optimizers": two,
    "replicated": partial(workloads.gpt, optimizer=partial(mine, lr=1e-3)),
}  # fmt: skip


@pytest.mark.processes
@pytest.mark.parametrize("name", quick(RECIPES, "sharded", "two optimizers"))
def test_the_checksums_are_the_same_for_any_number_of_workers_on_any_engine(name: str, tmp_path: Path) -> None:
    recipe = RECIPES[name](steps=4, checksum_every=2)
    for workers in (1, 2, 3):
        train_here(recipe, Team(workers=workers), tmp_path / str(workers))
    train_here(recipe, Team(workers=2, engine="server"), tmp_path / "server")
    RunFolder.create(tmp_path / "simulated", "", About())
    simulate(recipe, Cluster(workers=2), True, tmp_path / "simulated", lambda event: None)
    first, *others = (told(tmp_path / each) for each in ("1", "2", "3", "server", "simulated"))
    assert list(first) == [2, 4]
    assert others == [first] * 4
    assert first[2] != first[4]


@pytest.mark.processes
def test_the_checksums_are_of_each_tensor_that_a_checkpoint_holds_by_its_name(tmp_path: Path) -> None:
    recipe = two(steps=2, checksum_every=2)
    run = train_here(recipe, Team(workers=3), tmp_path / "run")
    weights, optimizer = map(dict, told(run.path)[2])
    saved = checkpoint.load(RunFolder(run.path).newest_checkpoint()[0])
    held = {**saved.model_state, **saved.training_state["buffers"]}
    assert weights == dict(zip(held, checksum(held.values()), strict=True))
    assert "frozen.weight" in weights
    assert "seen" in weights, "which no state_dict holds"
    kept = [
        (name, value) for part in saved.training_state["optimizer"]["several"] for state in part["state"].values()
        for name, value in state.items()
    ]  # fmt: skip
    assert sorted(optimizer.values()) == sorted(checksum(value for _, value in kept))
    assert {name.rpartition(".")[2] for name in optimizer} == {name for name, _ in kept}
    assert "norm.weight.momentum_buffer" in optimizer
    assert "head.weight.square_avg" in optimizer
    assert not any(name.startswith("never") for name in optimizer)


@pytest.mark.processes
def test_a_run_that_starts_again_or_is_resumed_by_another_team_tells_the_same_checksums(tmp_path: Path) -> None:
    recipe = workloads.gpt(steps=6, checksum_every=2)
    team = Team(workers=2, checkpoint_every=3)
    train_here(recipe, team, tmp_path / "one")
    train_here(recipe, team, tmp_path / "killed", client=Client(at("merged", 1, kill(1), version=5)))
    train_here(recipe, team, tmp_path / "resumed", client=stopping_at(3))
    train_here(recipe, Team(workers=3), tmp_path / "resumed", resume=True)
    assert told(tmp_path / "killed") == told(tmp_path / "resumed") == told(tmp_path / "one")
    assert replayed(recipe, tmp_path / "killed").same


@pytest.mark.processes
def test_a_resume_may_change_how_often_and_a_replay_takes_what_the_tape_tells(tmp_path: Path) -> None:
    recipe = workloads.gpt(steps=3, checksum_every=1)
    train_here(recipe, Team(), tmp_path / "run")
    longer = dataclasses.replace(recipe, steps=8, checksum_every=4)
    train_here(longer, Team(workers=2), tmp_path / "run", resume=True)
    assert list(told(tmp_path / "run")) == [1, 2, 3, 4, 8]
    found = replayed(dataclasses.replace(longer, checksum_every=100), tmp_path / "run")
    assert found.same
    assert found.proof.checksums == sum(len(each) for pair in told(tmp_path / "run").values() for each in pair)


def test_each_worker_takes_a_part_and_all_parts_come_to_the_whole() -> None:
    replica = Replica(workloads.convnet(), "cpu")
    replica.update(0, [torch.ones_like(each) for each in replica.parameters])
    own = [[place % 3 == worker for place in range(len(replica.parameters))] for worker in range(3)]
    shares = [own_checksums(replica, mine, worker, 3) for worker, mine in enumerate(own)]
    whole = checksums_of(replica)
    parts = [[len(each) for each in together([share]).values()] for share in shares]  # type: ignore[arg-type]
    assert list(map(sum, zip(*parts, strict=True))) == [len(whole["weights"]), len(whole["optimizer"])]
    assert all(min(part) > 0 for part in parts)
    assert together(shares[::-1]) == whole
    for field, each in together(shares).items():
        assert list(each) == list(whole[field]), "in the model's order"  # type: ignore[call-overload, literal-required]


class Scaled(nn.Parameter):
    """A parameter of a class of its own, which changes nothing."""


class Nested(torch.optim.SGD):
    """Keeps tensors at any depth, and one that is no parameter's."""

    def step(self, closure: Any = None) -> None:
        super().step()
        self.state["all"] = {"count": torch.ones(1)}  # type: ignore[index]
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["factors"] = [parameter.detach().clone(), {"root": parameter.detach() + 1}]


def test_tensors_at_any_depth_and_of_classes_of_their_own_have_a_checksum() -> None:
    def model() -> nn.Module:
        built = nn.Linear(3, 1)
        built.weight = Scaled(built.weight.detach())
        return built

    replica = Replica(regression(model=model, optimizer=lambda p: Nested(p, lr=0.1)), "cpu")
    replica.update(0, [torch.ones_like(each) for each in replica.parameters])
    found = checksums_of(replica)
    assert list(found["weights"]) == ["weight", "bias"]
    ends = ("factors.0", "factors.1.root")
    assert list(found["optimizer"]) == [f"{name}.{end}" for name in ("weight", "bias") for end in ends] + [
        "0.state.all.count"
    ]
    assert found["optimizer"]["weight.factors.0"] == found["weights"]["weight"]


# ------------------------------------------------------------------------------------------- a replay that is not alike


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    recipe = workloads.gpt(steps=6, checksum_every=2)
    path = tmp_path_factory.mktemp("checksums") / "run"
    train_here(recipe, Team(workers=2), path)
    return recipe, path


def changed(where: dict[str, str], *names: str) -> None:
    for name in names:
        where[name] = f"{int(where[name], 16) ^ 1:08x}"


NORM, LATER = "blocks.0.mlp_norm.weight", "blocks.1.mlp.widen.weight"


def one_tensor(events: Events) -> None:
    changed(events[1]["weights"], NORM)


def three_tensors_from_then_on(events: Events) -> None:
    changed(events[1]["weights"], LATER, NORM)
    changed(events[1]["optimizer"], f"{NORM}.exp_avg")
    changed(events[2]["weights"], "embedding.weight")


def a_moment_at_first(events: Events) -> None:
    changed(events[0]["optimizer"], f"{LATER}.exp_avg_sq")


def one_that_is_not_here(events: Events) -> None:
    events[2]["weights"] = {"gone": "00000000", **events[2]["weights"]}


@pytest.mark.processes
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (one_tensor, f"version 4 differs in '{NORM}'; all were the same in version 2"),
        (
            three_tensors_from_then_on,
            f"version 4 differs in '{NORM}' and 2 other tensors; all were",
        ),
        (a_moment_at_first, f"version 2 differs in '{LATER}.exp_avg_sq'; the last weights are those of the run."),
        (one_that_is_not_here, "version 6 differs in 'gone'; all were the same in version 4"),
    ],
)
def test_a_replay_names_the_first_update_and_tensor_that_differ(
    change: Callable[[Events], None], sentence: str, run: tuple[Recipe, Path]
) -> None:
    recipe, path = run
    events = list(tape.read(path / "tape.jsonl"))
    change([event for event in events if event["kind"] == "checksummed"])
    found = replay(recipe, events)
    assert found.divergence.startswith(sentence)
    assert not found.same


@pytest.mark.processes
def test_a_tape_of_before_without_checksums_is_replayed_as_it_was(run: tuple[Recipe, Path]) -> None:
    recipe, path = run
    found = replay(recipe, [event for event in tape.read(path / "tape.jsonl") if event["kind"] != "checksummed"])
    assert found.same
    assert found.proof.checksums == 0
    assert str(found.proof) == "6 updates and 1 checkpoint"
    assert "tensor checksums" in str(replayed(recipe, path).proof)


# ----------------------------------------------------------------------------------------------------- cost and setting


@pytest.mark.processes
@pytest.mark.parametrize("engine", ["lockstep", "server"])
def test_the_seconds_of_checksums_are_counted_with_those_of_steps(
    engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slowly(tensors: Any) -> list[str]:
        time.sleep(0.1)
        return checksum(tensors)

    monkeypatch.setattr("instep.worker.tensor_checksums.checksum", slowly)
    monkeypatch.setattr("instep.worker.gradients.checksum", slowly)
    run = train_here(workloads.gpt(steps=3, checksum_every=2), Team(engine=engine), tmp_path / "run")
    took_s = sum(event["took_s"] for event in run.events if event["kind"] == "checksummed")
    merged = {event["version"]: event for event in run.events if event["kind"] == "merged"}
    assert took_s >= 0.2
    contributed_s = 0.1 if engine == "lockstep" else 0.0  # those of a contribution, which the server takes elsewhere
    assert run.result["checksum_s"] >= took_s + contributed_s - 1e-5
    assert run.result["checksum_s"] == pytest.approx(took_s, abs=1e-5) or engine == "lockstep"
    assert merged[3]["train_s"] - merged[2]["train_s"] > 0.2


@pytest.mark.processes
def test_a_run_that_is_not_synchronous_or_ends_before_has_none(tmp_path: Path) -> None:
    for place, recipe in enumerate((workloads.gpt(rule=parse("asynchronous"), checksum_every=1), workloads.gpt())):
        run = train_here(dataclasses.replace(recipe, steps=2), Team(), tmp_path / str(place))
        assert not told(run.path)
        assert run.result["checksum_s"] == 0


def test_the_help_of_train_names_the_setting_and_a_wrong_value_is_one_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with contextlib.suppress(SystemExit):
        main(["train", "--help"])
    assert "--recipe.checksum_every" in " ".join(capsys.readouterr().out.split())
    for wrong in ("0", "-3"):
        assert main(["train", "gpt", "--recipe.checksum_every", wrong, "--out", str(tmp_path / "run")]) == 1
        assert capsys.readouterr().err.strip() == f"instep: 'recipe.checksum_every' is {wrong}; it must be at least 1."
