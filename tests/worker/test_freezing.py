"""`Recipe.freeze`: parameters without a gradient, for a whole run or in some of its steps, as in a plain loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim
from torch.utils.data import TensorDataset

from instep.cli.flags import merge
from instep.data.cursor import Cursor
from instep.engines import piecewise
from instep.engines.piecewise import PiecewiseUpdates
from instep.engines.seat import Seat
from instep.equivalences.whole_batch import WholeBatch
from instep.errors import ComponentError, RecipeError
from instep.freezing import FrozenSteps, check_some_train, frozen_steps, parse
from instep.offline.cluster import Cluster
from instep.offline.simulation import simulate
from instep.randomness import key, seed_all
from instep.recipe import Recipe, Team, dumps
from instep.recipe import parse as parse_recipe
from instep.recipe_files import read
from instep.reduce.layout import BLOCK, Layout
from instep.rules import UpdateRule
from instep.run import Run
from instep.worker.replica import Replica
from support import workloads
from support.deaths import STEPS, Hooks, after, before, came_through
from support.deaths import run as run_with_deaths
from support.harness import Outcome, saved, stopping_at, train_here
from support.kinds import quick
from support.sentences import one_sentence
from support.serving import replayed

PARTLY = {"0.*": "all", "2.bias": "5..25", "2.*": "..20", "6.weight": "30..", "4.*": "none", "*": "40.."}
"""Every form; the last names those that are left, of which there are none but '6.bias'."""


def samples() -> TensorDataset:
    inputs = torch.randn(64, 8, generator=torch.Generator().manual_seed(3))
    return TensorDataset(inputs, inputs[:, :4].argmax(1))


def net() -> nn.Module:
    return nn.Sequential(
        nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)
    )


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")


def decaying(parameters: Any) -> optim.Optimizer:
    return optim.AdamW(parameters, lr=0.02, weight_decay=0.1)


def recipe(**changes: Any) -> Recipe:
    fields: dict[str, Any] = {
        "model": net, "objective": loss, "data": samples, "optimizer": decaying,
        "batch": 16, "microbatches": 8, "steps": 50,
    }  # fmt: skip
    return Recipe(**{**fields, **changes})


def frozen_in(name: str, step: int, freeze: Mapping[str, str]) -> bool:
    """By hand: of the patterns here, each is a name, or one that begins or ends with a star."""
    for pattern, steps in freeze.items():
        if pattern in (name, "*") or (pattern.endswith("*") and name.startswith(pattern[:-1])):
            if steps in ("all", "none"):
                return steps == "all"
            first, end = steps.split("..")
            return int(first or 0) <= step < int(end or 10**9)
    return False


def plain_loop(made: Recipe) -> tuple[nn.Module, optim.Optimizer]:
    """Trains the model of a recipe as anybody would, freezing by `requires_grad_`."""
    torch.set_num_threads(1)
    seed_all(key(made.seed, "model"))
    model, data = made.model.build(), samples()
    optimizer = made.optimizer.build(list(model.parameters()))  # type: ignore[union-attr]
    cursor = Cursor(samples=len(data), batch=made.batch, microbatches=made.microbatches, seed=made.seed)
    for step in range(made.steps):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not frozen_in(name, step, made.freeze))
        inputs, labels = (tensor[cursor.indices(step)] for tensor in data.tensors)
        optimizer.zero_grad()
        (loss(model, (inputs, labels)) / len(labels)).backward()
        if made.clip_norm is not None:
            nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], made.clip_norm)
        optimizer.step()
    return model, optimizer


def weights(run: Outcome, version: int, names: str = "") -> dict[str, Tensor]:
    return {name: value for name, value in saved(run, version).model_state.items() if name.startswith(names)}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


# ------------------------------------------------------------------------------------------------------- a plain loop


@pytest.mark.processes
@pytest.mark.parametrize(
    "freeze",
    [{"0.*": "all"}, {"0.*": "..20", "2.*": "..10"}, {"6.*": "20.."}, {"2.*": "10..30"}, PARTLY],
    ids=["all", "first", "last", "between", "each"],
)
def test_fifty_steps_are_those_of_a_plain_loop_to_the_bit(freeze: dict[str, str], tmp_path: Path) -> None:
    """The optimizer's state too: it begins with the first gradient, and stays while there is none."""
    made = recipe(microbatches=1, freeze=freeze)
    run = train_here(made, Team(), tmp_path / "run")
    model, optimizer = plain_loop(made)
    assert same(weights(run, 50), dict(model.state_dict()))
    states = saved(run, 50).training_state["optimizer"]["state"]
    trained = [p for name, p in model.named_parameters() if not all(frozen_in(name, s, freeze) for s in range(50))]
    assert sorted(states) == list(range(len(trained))), "nothing is kept of what is frozen for the whole run"
    for index, parameter in enumerate(trained):
        assert same(states[index], optimizer.state[parameter])


@pytest.mark.processes
def test_what_is_frozen_is_in_no_norm(tmp_path: Path) -> None:
    made = recipe(freeze=PARTLY, clip_norm=0.2)
    run = train_here(made, Team(workers=3), tmp_path / "run")
    model, _ = plain_loop(made)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(weights(run, 50)[name], value, rtol=1e-4, atol=1e-5)


def test_what_is_frozen_for_the_whole_run_has_no_gradient_and_no_state() -> None:
    whole, part = Replica(recipe(), "cpu"), Replica(recipe(freeze={"2.weight": "all", "0.*": "..3"}), "cpu")
    assert [name for name in whole.names if name not in part.names] == ["2.weight"]
    layouts = [Layout.of(replica.parameters, BLOCK["cpu"]) for replica in (whole, part)]
    assert [len(layout.shapes) for layout in layouts] == [8, 7]
    held = [p for group in part.optimizer.each[0].of_torch.param_groups for p in group["params"]]
    assert len(held) == len(part.names) == 7
    assert not part.module.get_parameter("2.weight").requires_grad


def test_what_a_model_itself_freezes_stays_so() -> None:
    def partly() -> nn.Module:
        model = net()
        model.get_parameter("0.weight").requires_grad_(False)
        return model

    for freeze in ({}, {"0.weight": "none"}, {"0.weight": "..3"}):
        replica = Replica(recipe(model=partly, freeze=freeze), "cpu")
        assert "0.weight" not in replica.names
        replica.trainable.begin(5)
        assert not replica.module.get_parameter("0.weight").requires_grad


# ---------------------------------------------------------------------------------------------------------- one digest

BY_STEP = {"embedding.*": "..3", "blocks.0.mlp.widen.*": "all", "blocks.1.attention*": "5..", "*.mlp_norm.*": "2..4"}


def gpt(**changes: Any) -> Recipe:
    return workloads.gpt(**{"freeze": BY_STEP, "steps": STEPS, **changes})


def digests_of(made: Recipe, path: Path, **team: Any) -> dict[int, str]:
    run = train_here(made, Team(checkpoint_every=1, keep=0, **team), path)
    assert not [event["why"] for event in run.events if event["kind"] == "warned"]
    return run.digests


@pytest.mark.processes
@pytest.mark.parametrize("make", quick([gpt, lambda: workloads.convnet(freeze={"first.*": "..3", "h*": "4..6"})], gpt))
def test_one_digest_for_any_team_and_engine(make: Any, tmp_path: Path) -> None:
    one = digests_of(make(), tmp_path / "1")
    teams: list[dict[str, Any]] = [{"workers": w} for w in (2, 3, 5)]
    teams += [{"workers": 2, "engine": "server"}, {"workers": 2, "shard": "none"}]
    teams += [{"workers": 2, "memory": "75%"}] if make is gpt else []
    for number, team in enumerate(teams):
        assert digests_of(make(), tmp_path / f"team {number}", **team) == one, team


@pytest.mark.processes
def test_each_step_is_frozen_as_the_recipe_says_and_other_steps_give_other_digests(tmp_path: Path) -> None:
    made = gpt(microbatches=4, steps=7)
    run = train_here(made, Team(workers=2, checkpoint_every=1, keep=0), tmp_path / "run")
    for step in range(1, 7):
        one, other = weights(run, step), weights(run, step + 1)
        still = {name for name in one if torch.equal(one[name], other[name])}
        expected = {"embedding.weight", "output.weight"} if step < 3 else set()  # tied
        expected |= {name for name in one if name.startswith("blocks.0.mlp.widen.")}
        expected |= {name for name in one if name.startswith("blocks.1.attention")} if step >= 5 else set()
        expected |= {name for name in one if ".mlp_norm." in name} if 2 <= step < 4 else set()
        assert still == expected, step
    others = [{"embedding.*": "..2"}, {"embedding.*": "..3"}, {"embedding.*": "all"}, {"embedding.*": "3.."}]
    runs = [train_here(gpt(freeze=each, steps=5), Team(workers=2), tmp_path / str(n)) for n, each in enumerate(others)]
    assert len({each.digest for each in runs}) == len(others)


@pytest.mark.processes
@pytest.mark.slow
def test_a_compiled_model_is_compiled_again_where_the_frozen_ones_change(tmp_path: Path) -> None:
    made = recipe(microbatches=4, freeze={"0.*": "..4", "2.bias": "..4"}, steps=8, compile=True)
    one = digests_of(made, tmp_path / "1")
    assert digests_of(made, tmp_path / "2", workers=2) == one
    run = train_here(made, Team(workers=2, checkpoint_every=1), tmp_path / "run", client=stopping_at(1))
    assert run.result["interrupted"]
    assert run.digest == one[run.result["versions"]]
    assert run.result["versions"] < 4, "the frozen ones change after it is resumed"
    assert train_here(made, Team(), tmp_path / "run", resume=True).digest == one[8]


@pytest.mark.processes
def test_a_run_is_resumed_before_and_after_a_change_and_computed_again_from_its_tape(tmp_path: Path) -> None:
    whole = digests_of(gpt(), tmp_path / "whole")
    path, steps = tmp_path / "run", {3: Team(workers=3), 4: Team(workers=2, engine="server"), 6: Team(workers=1)}
    for version, team in steps.items():
        often = dataclasses.replace(team, checkpoint_every=1, keep=0)
        run = train_here(gpt(), often, path, client=stopping_at(version), resume=version > 3)
        assert run.result["interrupted"]
    run = train_here(gpt(), Team(workers=2, checkpoint_every=3, keep=0), path, resume=True)
    assert run.digest == whole[STEPS]
    assert replayed(gpt(), path).same


@pytest.mark.processes
@pytest.mark.usefixtures("forked_pythons")
def test_the_model_of_any_version_is_the_one_of_then(tmp_path: Path) -> None:
    every = train_here(gpt(), Team(checkpoint_every=1, keep=0), tmp_path / "every")
    run = train_here(gpt(), Team(workers=2, checkpoint_every=100), tmp_path / "run")
    for version in (3, 5):
        found = Run(run.path, run.result, gpt()).at(version).state_dict()
        assert same({name: found[name] for name in weights(every, version)}, weights(every, version))


KILLS: dict[str, Hooks] = {
    "before it computes": before(Seat, "compute", 1),
    "having computed": after(Seat, "compute", 1),
    "in the midst of an update": before(torch, "_fused_adamw_", 1, calls=25),
    "before its update": before(PiecewiseUpdates, "make", 0, calls=4),
    "having updated": after(PiecewiseUpdates, "make", 1, calls=4),
}


@pytest.mark.processes
@pytest.mark.parametrize(
    "when",
    quick(KILLS, "having updated"),
)
def test_workers_that_are_killed_in_the_step_of_a_thaw_are_stood_in_for(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In step 3, from which on the embedding is trained, so that its state is new."""
    monkeypatch.setattr(piecewise, "PIECE", 500)
    undisturbed = train_here(gpt(), Team(workers=2), tmp_path / "undisturbed")
    came_through(run_with_deaths(gpt(), 3, tmp_path / "killed", KILLS[when]), undisturbed, 1)


@pytest.mark.processes
def test_audits_raise_no_alarm_where_parameters_thaw_and_freeze(tmp_path: Path) -> None:
    run = train_here(gpt(), Team(workers=3, audit="100%"), tmp_path / "run")
    assert run.result["audit"]["looked_at"] == STEPS * 8
    assert run.result["audit"]["wrong"] == []
    assert run.digest == train_here(gpt(), Team(), tmp_path / "alone").digest


# --------------------------------------------------------------------------------------------------------- other rules


@pytest.mark.processes
@pytest.mark.parametrize(
    "rule",
    quick(["asynchronous", "delay_compensated", "softsync:2", "local_sgd:2", "post_local_sgd:2"], "asynchronous"),
)
def test_a_run_under_any_rule_is_computed_again(rule: str, tmp_path: Path) -> None:
    made = recipe(rule=UpdateRule.from_text(rule), freeze={"0.*": "..4", "2.*": "all", "6.*": "6.."}, steps=10)
    run = train_here(made, Team(workers=2, checkpoint_every=100), tmp_path / "run")
    assert replayed(made, run.path).same
    assert simulate(made, Cluster(workers=2), True, None, lambda event: None)["digest"]


@pytest.mark.processes
@pytest.mark.parametrize("rule", quick(["diloco:5", "async_diloco:5,buffer=2", "diloco:10,fragments=2"], "diloco:5"))
def test_no_outer_momentum_moves_what_is_frozen(rule: str, tmp_path: Path) -> None:
    made = recipe(rule=UpdateRule.from_text(rule), freeze={"0.*": "10..", "2.*": "..10"}, steps=40)
    run = train_here(made, Team(workers=2, checkpoint_every=1, keep=0), tmp_path / "run")
    assert replayed(made, run.path).same
    versions = sorted(run.digests)
    first = {version: weights(run, version, "0.") for version in versions}
    thawed = {version: weights(run, version, "2.") for version in versions}
    # From step 10 on, at the latest from where contributions of before have all arrived.
    frozen = versions[len(versions) // 2]
    assert same(first[frozen], first[versions[-1]])
    assert not same(first[versions[0]], first[versions[-1]])
    assert same(thawed[versions[0]], {n: v for n, v in Replica(made, "cpu").module.state_dict().items() if n[0] == "2"})
    assert not same(thawed[versions[0]], thawed[versions[-1]])


@pytest.mark.processes
def test_many_workers_at_once_take_what_is_frozen_for_the_whole_run_alone() -> None:
    made = recipe(rule=UpdateRule.from_text("asynchronous"), steps=4)
    cluster = Cluster(workers=2, batched=True)
    for freeze, refused in (({"0.*": "all"}, False), ({"0.*": "..2"}, True)):
        part = dataclasses.replace(made, freeze=freeze)
        if refused:
            with pytest.raises(RecipeError, match="at once: recipe.freeze freezes parameters in some steps alone; lea"):
                simulate(part, cluster, True, None, lambda event: None)
        else:
            assert simulate(part, cluster, True, None, lambda event: None)["digest"]


# -------------------------------------------------------------------------------------------------------- what is wrong


@pytest.mark.pure
@pytest.mark.parametrize(
    ("freeze", "sentence"),
    [
        ({"0.*": "alll"}, "'recipe.freeze' has 'alll' for '0.*', which are no steps; did you mean 'all'?"),
        ({"0.*": 200}, "'recipe.freeze' has 200 for '0.*', which are no steps; write 'all', 'none', '..200' for"),
        ({"0.*": True}, "'recipe.freeze' has True for '0.*', which are no steps; write 'all', 'none', '..2"),
        ({"0.*": ".."}, "'recipe.freeze' has '..' for '0.*', which are no steps; write 'all', 'none',"),
        ({"0.*": "1-2"}, "'recipe.freeze' has '1-2' for '0.*', which are no steps; write 'all', 'none',"),
        ({"0.*": "5..5"}, "'recipe.freeze' has '5..5' for '0.*', in which there is no step of a run; the number"),
        ({"0.*": "..0"}, "'recipe.freeze' has '..0' for '0.*', in which there is no step of a run; the number"),
        ({"0.*": f"{10**16 - 1}.."}, "'recipe.freeze' has '9999999999999999..' for '0.*', in which there is"),
        ("all", "'recipe.freeze' is 'all'; it must be a dict."),
    ],
)
def test_what_are_no_steps_is_one_sentence(freeze: Any, sentence: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(freeze=freeze)
    assert caught.value.message.startswith(sentence)
    assert one_sentence(caught.value.message)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("freeze", "sentence"),
    [
        ({"0.weigth": "all"}, "'recipe.freeze' has '0.weigth', and no parameter of the model has such a name; did"),
        ({"wte": "all"}, "'recipe.freeze' has 'wte', and no parameter of the model has such a name; names"),
        ({"*": "all"}, "'recipe.freeze' has all parameters of the model frozen in step 0, counted from 0, so"),
        ({"0.*": "..9", "*": "3.."}, "'recipe.freeze' has all parameters of the model frozen in step 3, count"),
    ],
)
def test_what_goes_with_no_model_is_one_sentence(freeze: dict[str, str], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        train_here(recipe(freeze=freeze), Team(workers=2), tmp_path / "run")
    assert caught.value.message.startswith(sentence)
    assert one_sentence(caught.value.message)


def test_steps_that_a_run_does_not_come_to_may_freeze_all() -> None:
    Replica(recipe(freeze={"*": "50.."}, steps=50), "cpu")
    with pytest.raises(RecipeError, match="frozen in step 50, counted from 0"):
        Replica(recipe(freeze={"*": "50.."}, steps=51), "cpu")


class Thawing(nn.Linear):
    """Unfreezes itself in its second forward."""

    def __init__(self) -> None:
        super().__init__(8, 4)
        self.register_buffer("n", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.n += 1
        self.bias.requires_grad_(self.bias.requires_grad or int(self.n) > 1)
        return super().forward(x)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("steps", "sentence"),
    [
        ("..3", "parameter 'bias' began to require a gradient in step 2, in which 'recipe.freeze' has it f"),
        ("all", "parameter 'bias' began to require a gradient in step 2, and which are trained is settled when"),
    ],
)
def test_a_model_that_unfreezes_what_the_recipe_freezes_is_refused(steps: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        train_here(recipe(model=Thawing, freeze={"bias": steps}), Team(workers=2), tmp_path / "run")
    assert caught.value.message.startswith(sentence)
    assert one_sentence(caught.value.message)


def test_patterns_of_optimizers_may_match_what_is_frozen_as_long_as_they_have_others() -> None:
    muon = {"parameters": "2.*", "use": "torch.optim:AdamW", "args": {"lr": 0.01}}
    others = {"parameters": ["0.*", "*"], "use": "torch.optim:SGD", "args": {"lr": 0.01}}
    replica = Replica(recipe(optimizer=[muon, others], freeze={"0.*": "all", "2.weight": "all"}), "cpu")
    assert [one.what_it_trains for one in replica.optimizer.each] == [
        "AdamW: 1 tensor, 16 weights", "SGD: 4 tensors, 340 weights",
    ]  # fmt: skip
    with pytest.raises(ComponentError) as caught:
        Replica(recipe(optimizer=[muon, others], freeze={"2.*": "all"}), "cpu")
    assert caught.value.message == (
        "no parameter is left for the optimizer torch.optim:AdamW, whose 'parameters' are '2.*': all that these match, "
        "'2.weight' among them, are frozen; leave its table out, or train one of them."
    )


def test_a_late_gradient_of_before_moves_what_an_optimizer_has_alone() -> None:
    """As it would with one optimizer for all. Without a gradient its optimizer makes no step."""
    parts: list[dict[str, Any]] = [
        {"parameters": names, "use": "torch.optim:SGD", "args": {"lr": 0.01, "weight_decay": 0.1}}
        for names in ("2.*", "*")
    ]
    replica = Replica(recipe(optimizer=parts, freeze={"2.*": "1.."}), "cpu")
    ones: list[Tensor | None] = [torch.ones_like(parameter) for parameter in replica.parameters]
    late = [index for index, name in enumerate(replica.names) if name.startswith("2.")]
    for given, moves in ((ones, True), ([None if i in late else one for i, one in enumerate(ones)], False)):
        before = [parameter.detach().clone() for parameter in replica.parameters]
        replica.update(1, given)
        moved = {i for i, one in enumerate(replica.parameters) if not torch.equal(one, before[i])}
        assert moved == set(range(len(before))) - (set() if moves else set(late))


def test_the_check_compares_the_gradient_of_what_is_trained() -> None:
    made = recipe(freeze={"0.*": "..3", "2.*": "all", "6.*": "1.."})
    for found in WholeBatch(made).run(0, lambda question: None):
        assert found.right, found.worst
        assert {name.partition(".")[0] for name in found.off} == ({"4", "6"} if found.step == 0 else {"4"})


# ------------------------------------------------------------------------------------------------------ writing it down


@pytest.mark.pure
def test_the_first_pattern_that_matches_decides() -> None:
    names = ["a.weight", "a.bias", "b.weight"]
    found = frozen_steps({"a.bias": "none", "a.*": "..5", "*": "all"}, names)
    assert [str(each) for each in found] == ["..5", "none", "all"]
    assert [each.holds(5) for each in found] == [False, False, True]
    assert [each.holds(4) for each in found] == [True, False, True]
    assert parse({"x": "3..7"})["x"] == FrozenSteps(3, 7)
    assert [str(parse({"x": text})["x"]) for text in ("0..", "3..", "0..7", "03..7")] == ["all", "3..", "..7", "3..7"]
    check_some_train([FrozenSteps(0, 5), FrozenSteps(5)], 100)


@pytest.mark.pure
def test_the_order_of_patterns_is_in_the_fingerprint_and_none_is_as_before() -> None:
    one, other = recipe(freeze={"0.*": "..3", "*.bias": "all"}), recipe(freeze={"*.bias": "all", "0.*": "..3"})
    assert one.fingerprint() != other.fingerprint()
    assert recipe().fingerprint() == recipe(freeze={}).fingerprint() != one.fingerprint()


@pytest.mark.pure
def test_steps_from_a_file_and_from_flags(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_text(
        'model = "m:M"\nobjective = "m:f"\ndata = "m:d"\n[freeze]\n"blocks.0.*" = "..200"\nhead.bias = "500.."\n'
    )
    assert dict(parse_recipe(read(path))[0].freeze) == {"blocks.0.*": "..200", "head.bias": "500.."}
    flags = [("recipe.freeze.blocks.0.*", "..20"), ("recipe.freeze.wte.*", "all"), ("recipe.freeze.a.b", "10..20")]
    made, team = parse_recipe(merge(read(path), flags))
    expected = {"blocks.0.*": "..20", "wte.*": "all", "a.b": "10..20", "head.bias": "500.."}
    assert list(made.freeze.items()) == list(expected.items()), "flags win over the file, the first of them first"
    path.write_text(dumps(made, team))
    assert list(parse_recipe(read(path))[0].freeze.items()) == list(expected.items())
