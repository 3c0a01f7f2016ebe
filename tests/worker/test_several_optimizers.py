"""Several optimizers in one recipe, each for the parameters whose names match its patterns."""

from __future__ import annotations

from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

from instep.by_pattern import ByPattern
from instep.components import Component
from instep.engines.sharding import Placement, Sharded, choose
from instep.errors import ComponentError
from instep.offline.cluster import Cluster
from instep.offline.simulation import simulate
from instep.recipe import Recipe, Team, dumps, parse
from instep.record import checkpoint
from instep.reduce.layout import BLOCK, Layout
from instep.reduce.reduction import Reduction
from instep.rules import UpdateRule
from instep.rules import presets as p
from instep.worker.replica import Replica
from support import workloads
from support.harness import saved, stopping_at, train_here
from support.regression import regression
from support.schedule_free import ScheduleFree
from support.sentences import one_sentence
from support.serving import replayed
from support.sharding import CHOOSE, assert_same, replicated

SMALL = ["*norm*", "*.bias", "embedding*"]

TABLES: list[dict[str, Any]] = [
    {"parameters": SMALL, "use": "torch.optim:AdamW", "args": {"lr": 0.003}},
    {"parameters": "*", "use": "torch.optim:Muon", "args": {"lr": 0.01}},
]


def gpt(**changes: Any) -> Recipe:
    return workloads.gpt(**{"optimizer": TABLES, "clip_norm": 0.5, **changes})


class ByHand(optim.Optimizer):
    """The same two, as a wrapper of the user's own."""

    def __init__(self, named_parameters: list[tuple[str, Tensor]]):
        small = [q for name, q in named_parameters if "norm" in name or name.endswith("bias") or "embedding" in name]
        others = [q for _, q in named_parameters if all(q is not s for s in small)]
        self.inner = [optim.AdamW(small, lr=0.003), optim.Muon(others, lr=0.01)]
        self.param_groups = [group for each in self.inner for group in each.param_groups]
        self.defaults, self.state = {}, {}  # type: ignore[assignment]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for each in self.inner:
            each.step()

    def state_dict(self) -> dict[str, Any]:
        return {str(index): each.state_dict() for index, each in enumerate(self.inner)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for index, each in enumerate(self.inner):
            each.load_state_dict(state_dict[str(index)])
        self.param_groups = [group for each in self.inner for group in each.param_groups]


def training_state(run: Path, version: int) -> dict[str, Any]:
    return checkpoint.load(checkpoint.path_of(run / "checkpoints", version)).training_state


@pytest.mark.processes
@pytest.mark.parametrize("engine", ["lockstep", "server", "simulated"])
def test_the_tape_tells_what_each_of_several_optimizers_trains(engine: Any, tmp_path: Path) -> None:
    def started(recipe: Recipe, name: str) -> dict[str, Any]:
        events: list[dict[str, Any]] = []
        if engine == "simulated":
            simulate(recipe, Cluster(workers=2), False, None, events.append)
        else:
            events += train_here(recipe, Team(workers=2, engine=engine), tmp_path / name).events
        return next(event for event in events if event["kind"] == "run_started")

    event = started(gpt(steps=1), "two")
    replica = Replica(gpt(), "cpu")
    sizes = [(name, each.numel()) for name, each in zip(replica.names, replica.parameters, strict=True)]
    small = [size for name, size in sizes if any(fnmatchcase(name, pattern) for pattern in SMALL)]
    large = sum(size for _, size in sizes) - sum(small)
    assert event["optimizers"] == [
        f"AdamW: {len(small)} tensors, {sum(small):,} weights",
        f"Muon: {len(sizes) - len(small)} tensors, {large:,} weights",
    ]
    assert "optimizers" not in started(workloads.gpt(steps=1), "one")


def placement_of(recipe: Recipe) -> Placement:
    replica = Replica(recipe, "cpu")
    reduction = Reduction(Layout.of(replica.parameters, BLOCK["cpu"]), recipe.microbatches, 2)
    return choose(replica, reduction, 0, range(2))


@pytest.mark.processes
def test_muon_and_adamw_train_a_gpt_with_one_digest_for_any_team(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    team = partial(Team, checkpoint_every=1, keep=0)
    assert isinstance(placement_of(gpt(steps=4)), Sharded)
    runs = [train_here(gpt(steps=4), team(workers=w), tmp_path / str(w)) for w in (1, 2, 3)]
    runs.append(train_here(gpt(optimizer=ByHand, steps=4), team(workers=2), tmp_path / "by hand", tried=True))
    runs.append(train_here(gpt(steps=4), team(workers=2, engine="server"), tmp_path / "server"))
    monkeypatch.setattr(CHOOSE, replicated)
    runs.append(train_here(gpt(steps=4), team(workers=3), tmp_path / "replicated"))
    for run in runs[1:]:
        assert run.digests == runs[0].digests
        assert not [event["why"] for event in run.events if event["kind"] == "warned"]
    for path in ("2", "3", "server", "replicated"):
        one, other = (training_state(tmp_path / each, 4)["optimizer"] for each in ("1", path))
        assert_same(one, other)
    kinds = [set(part["state"][0]) for part in training_state(tmp_path / "3", 4)["optimizer"]["several"]]
    assert kinds == [{"step", "exp_avg", "exp_avg_sq"}, {"momentum_buffer"}]


@pytest.mark.processes
def test_a_run_of_several_is_resumed_by_another_team_and_engine(tmp_path: Path) -> None:
    whole = train_here(gpt(), Team(), tmp_path / "whole", tried=True)
    for version, team in ((2, Team(workers=3)), (4, Team(workers=2, engine="server"))):
        run = train_here(gpt(), team, tmp_path / "run", client=stopping_at(version), resume=version > 2)
        assert run.result["interrupted"]
    run = train_here(gpt(), Team(workers=2), tmp_path / "run", resume=True)
    assert run.digest == whole.digest
    assert replayed(gpt(), run.path).same


@pytest.mark.processes
@pytest.mark.parametrize("rule", [p.asynchronous(), UpdateRule.from_text("local_sgd:2")], ids=lambda rule: rule.name)
def test_every_rule_and_the_virtual_clock_take_several(rule: UpdateRule, tmp_path: Path) -> None:
    recipe = gpt(rule=rule, clip_norm=None, steps=4)
    run = train_here(recipe, Team(workers=2), tmp_path / "run")
    assert replayed(recipe, run.path).same
    assert simulate(recipe, Cluster(workers=2), True, None, lambda event: None)["digest"]


@pytest.mark.processes
def test_one_of_several_may_average_its_weights(tmp_path: Path) -> None:
    parts = {"0.*": ScheduleFree, "*": lambda q: optim.SGD(q, lr=0.01)}
    recipe = regression(model=lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)), optimizer=parts)
    runs = [train_here(recipe, Team(workers=w, checkpoint_every=2), tmp_path / str(w)) for w in (1, 3)]
    assert runs[0].digest == runs[1].digest
    there = saved(runs[0], 6)
    same = {n: torch.equal(there.training_state["weights"][n], v) for n, v in there.model_state.items()}
    assert same == {"0.weight": False, "0.bias": False, "1.weight": True, "1.bias": True}


# ------------------------------------------------------------------------------------------------------ writing it down


def test_tables_and_mappings_are_the_same_and_come_back_from_toml() -> None:
    import tomllib

    muon, adamw = Component("torch.optim:Muon", {"lr": 0.01}), Component("torch.optim:AdamW", {"lr": 0.003})
    base = {"model": "m:Model", "objective": "m:objective", "data": "m:data"}
    recipes = [
        Recipe(**base, optimizer=[{**TABLES[0], "parameters": "*norm*"}, TABLES[1]]),
        Recipe(**base, optimizer={"*norm*": adamw, "*": muon}),
        Recipe(**base, optimizer={"*norm*": {"use": "torch.optim:AdamW", "args": {"lr": 0.003}}, "*": muon}),
    ]
    assert len({recipe.fingerprint() for recipe in recipes}) == 1
    again, _ = parse(tomllib.loads(dumps(recipes[0], Team())))
    assert again == recipes[0]
    assert "[[optimizer]]" in dumps(Recipe(**base, optimizer=TABLES), Team())
    assert Recipe(**base, optimizer={"*": muon, "*norm*": adamw}).fingerprint() != recipes[0].fingerprint()
    assert Recipe(**base, optimizer={"*norm*": adamw, "*": adamw}).fingerprint() != recipes[0].fingerprint()


def test_the_first_pattern_that_matches_has_a_parameter() -> None:
    parts = ByPattern.of({"a.*": "m:A", "*.weight": "m:B", "*": "m:C"})
    assert isinstance(parts, ByPattern)
    assert parts.split(["a.weight", "b.weight", "b.bias", "a.bias"]) == [
        ["a.weight", "a.bias"],
        ["b.weight"],
        ["b.bias"],
    ]


@pytest.mark.processes
@pytest.mark.parametrize(
    ("optimizer", "sentence"),
    [
        ({"weight": "torch.optim:SGD"}, "parameter 'bias' matches no pattern of 'optimizer'; add a last table for the"),
        ({"*": "torch.optim:SGD", "b*": "torch.optim:Adam"}, "no parameter is left for the optimizer .*Adam, whose"),
        ([{"use": "torch.optim:SGD"}], "has no key 'parameters', which each of several optimizers has; write"),
        ([], "'optimizer' is an empty list"),
        ([{"use": "torch.optim:SGD", "parameters": 3}], "'parameters' of an optimizer is 3; it must be a pattern of"),
        (lambda q: [optim.SGD(q, lr=0.1)], "gave a list; called with the list of parameters, it must give one torch"),
        ({"*": optim.SGD(nn.Linear(3, 1).parameters())}, "the optimizer is a finished SGD"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_split_is_one_sentence(optimizer: Any, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ComponentError, match=sentence) as caught:
        train_here(regression(optimizer=optimizer), Team(workers=2), tmp_path / "run")
    assert one_sentence(caught.value.message)
