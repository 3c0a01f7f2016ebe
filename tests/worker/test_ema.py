"""Averages of the weights, `Recipe.ema`: what they are, one for any team, through deaths, resumes and replays."""

from __future__ import annotations

import copy
import dataclasses
import json
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from instep.cli import main
from instep.components import Component
from instep.data import Data
from instep.ema import decay_at
from instep.engines import piecewise
from instep.errors import RecipeError, RecordError
from instep.models import generate
from instep.monitors.progress import ProgressDisplay
from instep.monitors.scalars import scalars
from instep.offline.cluster import Cluster
from instep.offline.simulation import simulate
from instep.offline.verifying import verify
from instep.pretrained.runs import run_model
from instep.recipe import Recipe, Team, dumps, parse
from instep.record import checkpoint, tape
from instep.record.digest import digest_of_state
from instep.rules import presets as p
from instep.run import Run
from instep.team.asking import resized
from instep.worker.averages import Averages
from instep.worker.replica import Replica
from support import deaths, workloads
from support.agents import train_on
from support.harness import Client, Outcome, digests, saved, told, train_here
from support.kinds import quick
from support.paced import Paced, changed
from support.regression import numbers, regression, squares
from support.schedule_free import ScheduleFree
from support.sentences import one_sentence
from support.serving import at, drive, kill, replayed, serving
from support.threads import meanwhile

pytestmark = pytest.mark.processes

DECAYS = (0.3, 0.9)


def layers() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.BatchNorm1d(5), nn.Linear(5, 1))


def recipe_of(**changes: Any) -> Recipe:
    fields: dict[str, Any] = {
        "model": layers, "data": lambda: Data(numbers(24), numbers(24, seed=1)), "batch": 6, "microbatches": 3,
        "ema": DECAYS,
    }  # fmt: skip
    return regression(**{**fields, **changes})


def first_weights(recipe: Recipe) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in Replica(recipe, "cpu").module.state_dict().items()}


def moved(average: dict[str, Tensor], now: Mapping[str, Tensor], decay: float) -> dict[str, Tensor]:
    """After one update, by the definition."""
    return {
        name: torch.lerp(average[name], value, 1 - decay) if value.is_floating_point() else value.clone()
        for name, value in now.items()
    }


def by_hand(recipe: Recipe, run: Outcome, decay: float) -> dict[str, Tensor]:
    """The average over the weights of all checkpoints, of which there is one for each version."""
    average = first_weights(recipe)
    for version in range(1, recipe.steps + 1):
        average = moved(
            average, saved(run, version).model_state, decay_at(decay, version - 1, warmup=recipe.ema_warmup)
        )
    return average


def opened(recipe: Recipe, run: Outcome) -> Run:
    return Run(run.path, run.result, recipe)


# ------------------------------------------------------------------------------------------------------- what they are


@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize("workload", workloads.ALL)
def test_an_average_is_that_of_the_weights_of_all_versions_to_the_bit(
    workload: str, warmup: bool, tmp_path: Path
) -> None:
    plain = workloads.ALL[workload]()
    recipe = dataclasses.replace(plain, ema=DECAYS, ema_warmup=warmup)
    run = train_here(recipe, Team(workers=2, checkpoint_every=1, keep=0), tmp_path / "run")
    for decay in DECAYS:
        expected = by_hand(recipe, run, decay)
        found = opened(recipe, run).state_dict(ema=decay)
        assert digest_of_state(found) == digest_of_state(expected) == run.result["ema"][str(decay)]["digest"]
        for name, value in found.items():
            assert torch.equal(value, expected[name]), name
    assert len(set(digests(run).values())) == 3
    assert run.digest == train_here(plain, Team(), tmp_path / "plain").digest, "the weights do not know of it"


def test_averages_are_those_of_a_plain_loop_with_torch_over_50_steps(tmp_path: Path) -> None:
    recipe = recipe_of(
        model=lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)), steps=50, ema=(0.9, 0.99)
    )
    replica = Replica(recipe, "cpu")
    model = copy.deepcopy(replica.module)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    averages = {d: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(d), use_buffers=True) for d in recipe.ema}
    for average in averages.values():
        average.n_averaged.fill_(1)  # they begin with the first weights, not with those after the first update
    x, y = numbers(24).tensors
    for step in range(recipe.steps):
        batch = [index for m in range(recipe.microbatches) for index in replica.cursor.microbatch(step, m)]
        optimizer.zero_grad()
        (squares(model, (x[batch], y[batch])) / len(batch)).backward()
        optimizer.step()
        for average in averages.values():
            average.update_parameters(model)
    run = train_here(recipe, Team(workers=3), tmp_path / "run")
    for decay, average in averages.items():
        found = opened(recipe, run).state_dict(ema=decay)
        for name, value in average.module.state_dict().items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def test_an_average_is_evaluated_beside_the_weights_on_tape_and_in_the_result(tmp_path: Path) -> None:
    recipe = recipe_of(evaluate_every=2)
    run = train_here(recipe, Team(workers=2), tmp_path / "run")
    evaluated = told(run, "evaluated")
    assert [sorted(event["ema"]) for event in evaluated] == [["0.3", "0.9"]] * 3
    plain = train_here(recipe_of(evaluate_every=2, ema=()), Team(), tmp_path / "plain")
    assert all("ema" not in event for event in told(plain, "evaluated"))
    assert "ema" not in plain.result
    assert [e["objective"] for e in evaluated] == [e["objective"] for e in told(plain, "evaluated")]
    for decay in DECAYS:
        model = opened(recipe, run).model(ema=decay).eval()
        objective = float(squares(model, numbers(24, seed=1).tensors).detach()) / 24
        result = run.result["ema"][str(decay)]
        assert result["held_out"] == evaluated[-1]["ema"][str(decay)]["objective"] == pytest.approx(objective, rel=1e-5)
        assert result["held_out_terms"] == {"objective": result["held_out"]}
        assert result["held_out"] != run.result["held_out"]


def test_weights_of_a_narrow_type_have_averages_in_float32(tmp_path: Path) -> None:
    recipe = recipe_of(
        model=lambda: nn.Linear(3, 1).to(torch.bfloat16), steps=4,
        objective=lambda model, batch: (model(batch[0].bfloat16()) - batch[1]).float().square().sum(),
    )  # fmt: skip
    run = train_here(recipe, Team(workers=2, checkpoint_every=1, keep=0), tmp_path / "run")
    average = first_weights(recipe)["weight"].float()
    for version in range(1, 5):
        now = saved(run, version).model_state["weight"]
        average = average.lerp(now.float(), 0.1)
    assert torch.equal(saved(run, 4).training_state["ema"]["averages"]["0.9"]["weight"], average)
    assert opened(recipe, run).state_dict(ema=0.9)["weight"].dtype == torch.bfloat16


class Sometimes(nn.Module):
    """Has a layer that most steps of two samples do not use."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.sometimes = nn.Linear(3, 1), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.always(x)
        return out + self.sometimes(x) if bool(x[0, 0] > 0.6) else out


def test_an_average_moves_on_towards_weights_that_got_no_gradient(tmp_path: Path) -> None:
    recipe = recipe_of(model=Sometimes, batch=2, microbatches=2, steps=12)
    run = train_here(recipe, Team(workers=2, checkpoint_every=1, keep=0), tmp_path / "run")
    paths = (checkpoint.path_of(run.path / "checkpoints", version) for version in range(1, 13))
    weights = [tuple(checkpoint.load(path).model_state["sometimes.weight"].flatten().tolist()) for path in paths]
    assert 2 < len(set(weights)) < 10, "some updates change it, and others come after"
    assert digest_of_state(by_hand(recipe, run, 0.9)) == run.result["ema"]["0.9"]["digest"]


def test_infinite_buffers_that_stay_are_no_numbers_to_average(tmp_path: Path) -> None:
    class Masked(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 1)
            self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))

    run = train_here(recipe_of(model=Masked), Team(), tmp_path / "run")
    assert opened(recipe_of(model=Masked), run).state_dict(ema=0.9)["mask"].tolist() == [0.0, -torch.inf]


# ------------------------------------------------------------------------------------------------------- any team, once


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Outcome]:
    known: dict[str, Outcome] = {}

    def of(workload: str) -> Outcome:
        if workload not in known:
            folder = tmp_path_factory.mktemp("undisturbed") / "run"
            known[workload] = train_here(averaging(workload), Team(), folder)
        return known[workload]

    return of


def averaging(workload: str = "gpt", **changes: Any) -> Recipe:
    fields = {"ema": DECAYS, "steps": deaths.STEPS, "evaluate_every": 0, "checksum_every": 2}
    return workloads.ALL[workload](**{**fields, **changes})


TEAMS: dict[str, Team] = {
    "two": Team(workers=2),
    "three": Team(workers=3),
    "each all": Team(workers=2, shard="none"),
    "by a server": Team(workers=3, engine="server"),
}


@pytest.mark.parametrize("workload", workloads.ALL)
@pytest.mark.parametrize("team", TEAMS)
def test_averages_are_the_same_for_any_team(
    team: str, workload: str, tmp_path: Path, undisturbed: Callable[[str], Outcome]
) -> None:
    run = train_here(averaging(workload), TEAMS[team], tmp_path / "run")
    assert digests(run) == digests(undisturbed(workload))
    known = {event["version"]: event["optimizer"] for event in told(undisturbed(workload), "checksummed")}
    assert {event["version"]: event["optimizer"] for event in told(run, "checksummed")} == known
    assert any(".ema.0.9" in name for name in known[2])
    assert replayed(averaging(workload), run.path).same


FOLLOW = {
    f"{when} worker {worker} has moved averages, call {calls}": (worker, make(Averages, "follow", worker, calls=calls))
    for when, make in (("before", deaths.before), ("after", deaths.after))
    for worker in (0, 1)
    for calls in (1, 8, 17)
}


@pytest.mark.parametrize("moment", quick(FOLLOW, *list(FOLLOW)[1:12:4]))
def test_a_death_in_the_midst_of_an_update_neither_loses_nor_doubles_that_of_an_average(
    moment: str, tmp_path: Path, undisturbed: Callable[[str], Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(piecewise, "PIECE", 500)  # each worker's part of an update is of several
    _, hooks = FOLLOW[moment]
    run = deaths.run(averaging(), 2, tmp_path / "it", hooks)
    deaths.came_through(run, undisturbed("gpt"), 1)
    assert digests(run) == digests(undisturbed("gpt"))


def test_a_successor_goes_on_with_the_averages(tmp_path: Path, undisturbed: Callable[[str], Outcome]) -> None:
    hooks = deaths.all_of(deaths.before(Averages, "settle", 1, calls=3), deaths.waiting_for_successors)
    run = deaths.run(averaging("convnet"), 2, tmp_path / "it", hooks)
    assert told(run, "took_place")
    assert digests(run) == digests(undisturbed("convnet"))


def test_one_worker_goes_on_from_what_is_remembered(tmp_path: Path, undisturbed: Callable[[str], Outcome]) -> None:
    client = Client(at("merged", 5, kill(0)))
    run = train_here(averaging(), Team(workers=1, remember=2), tmp_path / "run", client=client)
    assert run.result["restarts"] == 1
    assert told(run, "run_started")[1]["remembered"]
    assert digests(run) == digests(undisturbed("gpt"))


@pytest.mark.parametrize("engine", ["lockstep", "server"])
def test_a_resume_with_another_team_goes_on_with_the_averages(
    engine: Any, tmp_path: Path, undisturbed: Callable[[str], Outcome]
) -> None:
    path = tmp_path / "run"
    train_here(averaging(steps=3), Team(workers=2, engine=engine), path, tried=True)  # its schedule follows the steps
    run = train_here(averaging(steps=6), Team(workers=3, engine=engine), path, resume=True)
    whole = train_here(averaging(steps=3), Team(), tmp_path / "whole")
    assert digests(train_here(averaging(steps=6), Team(), tmp_path / "whole", resume=True)) == digests(run)
    assert whole.digest != run.digest
    assert replayed(averaging(steps=6), path).same


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1), pytest.param(2, 3, marks=pytest.mark.slow)])
def test_a_team_that_is_changed_in_its_run_goes_on_with_the_averages(before: int, after: int, tmp_path: Path) -> None:
    path, paced, client = tmp_path / "run", Paced(tmp_path), Client()
    recipe = dataclasses.replace(paced.recipe, ema=DECAYS)

    def ask() -> None:
        paced.until(lambda: len(told(client, "merged")) > 1, "two steps")
        resized(path, after)
        paced.until(lambda: changed(client, 1), "the change")

    with meanwhile(ask, paced.go_on):
        run = train_here(recipe, Team(workers=before), path, client=client)
    assert run.result["workers"] == after
    assert [each["version"] for each in told(run, "merged")] == list(range(1, paced.steps + 1))
    assert len(told(run, "run_started")) == 1, "no average was read from a checkpoint"
    assert digests(run) == digests(train_here(dataclasses.replace(recipe, objective=squares), Team(), tmp_path / "one"))


@pytest.mark.usefixtures("agents_meet_here")
def test_hosts_have_the_averages_too(tmp_path: Path, undisturbed: Callable[[str], Outcome]) -> None:
    run, _ = train_on((1, 1), averaging(evaluate_every=4), Team(workers=3, lease_s=60.0), tmp_path / "run")
    assert digests(run) == digests(undisturbed("gpt"))


@pytest.mark.usefixtures("agents_meet_here")
def test_what_a_host_lost_of_an_update_its_workers_get_from_the_other(
    tmp_path: Path, undisturbed: Callable[[str], Outcome]
) -> None:
    client = Client(at("merged", 4, kill(1)))
    team = Team(workers=4, lease_s=60.0)
    run, _ = train_on((1, 1), averaging(), team, tmp_path / "run", client=client)
    assert run.result["restarts"] == 1
    assert digests(run) == digests(undisturbed("gpt"))


# ------------------------------------------------------------------------------------------------- other rules, replays


@pytest.mark.parametrize("rule", ["asynchronous", "diloco:5"])
def test_under_other_rules_they_follow_the_servers_versions_and_are_replayed(rule: str, tmp_path: Path) -> None:
    recipe = workloads.convnet(rule=p.parse(rule), steps=10, ema=DECAYS, evaluate_every=5)
    client = Client(at("released", 2, kill(1), worker=1))
    run = train_here(recipe, serving(3, checkpoint_every=4, slow="2:2x"), tmp_path / "run", client=client)
    assert len(set(digests(run).values())) == 3
    found = replayed(recipe, run.path)
    assert found.same, found
    with_verdict = verify(recipe, run.path, list(tape.read(run.path / "tape.jsonl")), 1.0, 0)
    assert with_verdict.verdict == "same", with_verdict


@pytest.mark.parametrize("rule", [p.asynchronous(), p.diloco(2), p.async_diloco(2, buffer=4)], ids=lambda r: r.name)
def test_each_version_of_a_server_moves_them_once(rule: Any) -> None:
    recipe = recipe_of(rule=rule, batch=6, microbatches=3, steps=8)
    average, versions = first_weights(recipe), [0]

    def see(run: Any, merge: Any) -> None:
        nonlocal average
        versions[0] += 1
        replica = run.replayer.merger.replica
        average = moved(average, replica.module.state_dict(), 0.9)
        assert digest_of_state(replica.saved_state(0.9)) == digest_of_state(average), versions

    drive(recipe, 3, after=see)
    assert versions[0] > 2


def test_a_simulation_has_them_and_is_replayed(tmp_path: Path) -> None:
    recipe = recipe_of(rule=p.asynchronous(), evaluate_every=2)
    (tmp_path / "virtual/checkpoints").mkdir(parents=True)
    result = simulate(recipe, Cluster(workers=2), True, tmp_path / "virtual", lambda event: None)
    assert result["ema"].keys() == {"0.3", "0.9"}
    assert replayed(recipe, tmp_path / "virtual").same


def test_other_averages_than_the_runs_own_are_told_by_replay_and_verify(tmp_path: Path) -> None:
    recipe = recipe_of(checksum_every=100)
    run = train_here(recipe, Team(checkpoint_every=3, keep=0), tmp_path / "run")
    assert replayed(recipe, run.path).same
    folder = run.path / "checkpoints"
    there = checkpoint.load(checkpoint.path_of(folder, 6))
    there.training_state["ema"]["averages"]["0.9"]["0.weight"].view(-1)[0] += 1
    checkpoint.save(
        folder, version=6, model_state=there.model_state, training_state=there.training_state, meta=there.meta,
        fingerprint=there.fingerprint, keep=0,
    )  # fmt: skip
    verdict = verify(recipe, run.path, list(tape.read(run.path / "tape.jsonl")), 1.0, 0)
    assert verdict.verdict == "wrong"
    assert "of its ema differs 'averages.0.9.0.weight'" in str(verdict)
    file = run.path / "tape.jsonl"
    events = [json.loads(line) for line in file.read_text().splitlines()]
    events[-1]["result"]["ema"]["0.9"]["digest"] = "0" * 64
    file.write_text("".join(json.dumps(event) + "\n" for event in events))
    assert replayed(recipe, run.path).divergence.startswith("version 6, the last, has other averages of weights here")


@pytest.mark.usefixtures("forked_pythons")
def test_any_version_has_its_averages(tmp_path: Path) -> None:
    recipe = recipe_of()
    run = train_here(recipe, Team(workers=2, checkpoint_every=1, keep=0), tmp_path / "run")
    short = train_here(recipe_of(), Team(workers=2, checkpoint_every=3, keep=0), tmp_path / "short")
    average = first_weights(recipe)
    for version in range(1, 5):
        average = moved(average, saved(run, version).model_state, 0.3)
    found = opened(recipe, short).at(4, ema=0.3).state_dict()
    assert digest_of_state(found) == digest_of_state(average)
    with pytest.raises(RecordError, match="no average of the decay 0.7") as refused:
        opened(recipe, short).at(4, ema=0.7)
    assert one_sentence(refused.value.message)
    with pytest.raises(RecordError, match="no average of the decay 0.7, but those of the decays 0.3, 0.9") as refused:
        opened(recipe, short).model(ema=0.7)
    assert one_sentence(refused.value.message)


def test_an_update_that_is_left_out_moves_no_average_and_a_rollback_takes_them_back(tmp_path: Path) -> None:
    replica = Replica(recipe_of(), "cpu")
    replica.averages.begin()
    before = digest_of_state(replica.saved_state(0.9))
    replica.update(0, [torch.ones_like(parameter) for parameter in replica.parameters])
    replica.averages.settle(made=False)
    assert digest_of_state(replica.saved_state(0.9)) == before
    replica.averages.settle(made=True)
    state, training = replica.saved_state(), copy.deepcopy(replica.training_state())
    after = digest_of_state(replica.saved_state(0.9))
    assert after != before
    replica.averages.settle(made=True)
    replica.load(state, training)
    assert digest_of_state(replica.saved_state(0.9)) == after


# ------------------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ema": (1.0,)}, "'recipe.ema' has the decay 1.0; it is the share"),
        ({"ema": (0.9, 0.0)}, "'recipe.ema' has the decay 0.0; it is the share"),
        ({"ema": (float("nan"),)}, "'recipe.ema' has the decay nan; it is the share"),
        ({"ema": (0.9, 0.9)}, "'recipe.ema' has the decay 0.9 twice"),
        ({"ema": (), "ema_warmup": True}, "'recipe.ema_warmup' is true, and 'recipe.ema' has no decay"),
        ({"ema": 0.9}, "'recipe.ema' is 0.9; it must be a list."),
    ],
)
def test_decays_that_are_none_are_one_sentence(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as refused:
        recipe_of(**changes)
    assert refused.value.message.startswith(said)
    assert one_sentence(refused.value.message)


def test_an_optimizer_that_averages_weights_itself_is_refused_with_them(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"'recipe.ema' is \[0.3, 0.9\], and the optimizer ScheduleFree") as refused:
        train_here(recipe_of(optimizer=ScheduleFree), Team(), tmp_path / "run")
    assert one_sentence(refused.value.message)


def test_a_recipe_with_averages_comes_back_from_its_file_and_without_is_what_it_was() -> None:
    recipe = Recipe(model="a:b", objective="c:d", data="e:f", ema=(0.999, 0.9999), ema_warmup=True)
    table = tomllib.loads(dumps(recipe, Team()))
    assert (table["ema"], table["ema_warmup"]) == ([0.999, 0.9999], True)
    assert parse(table)[0] == recipe
    others = [dataclasses.replace(recipe, ema=(0.999,)), dataclasses.replace(recipe, ema_warmup=False)]
    assert len({each.fingerprint() for each in (recipe, *others)}) == 3


def test_a_sample_and_a_model_for_others_take_an_average(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    recipe = Recipe(
        model=Component("instep.models.gpt:GPT", {"vocabulary": 256, "context": 16, "width": 16, "depth": 1}),
        objective="instep.objectives.language:NextToken",
        data=Component("instep.data.text:text_files", {"pattern": str(tmp_path / "*.txt"), "context": 16}),
        optimizer=Component("instep.optimizers:adamw", {"lr": 0.03}),
        batch=8, microbatches=2, steps=20, ema=(0.9,), sample_prompt="the ", sample_length=12,
    )  # fmt: skip
    run = train_here(recipe, Team(), tmp_path / "run")
    assert run.result["artifacts"] == {"files": ["artifacts/ema-0.9/sample.txt"], "figures": {}}
    assert (run.path / "artifacts/ema-0.9/sample.txt").read_text().startswith("the ")
    assert run.result["sample"].startswith("the ")
    for more in ([], ["--ema", "0.9"]):
        assert main(["sample", str(run.path), "--prompt", "the ", "--tokens", "40", "--temperature", "0", *more]) == 0
    said = capsys.readouterr().out
    assert digest_of_state(run_model(run.path, ema=0.9).state_dict()) == run.result["ema"]["0.9"]["digest"]
    prompt = torch.tensor([list(b"the ")])
    drawn = generate(run_model(run.path, ema=0.9), prompt, 40, torch.Generator().manual_seed(0), 0.0)[0].tolist()
    assert bytes(drawn).decode("utf-8", "replace") in said
    assert main(["sample", str(run.path), "--prompt", "a", "--ema", "0.99"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("instep: the checkpoint of version 20 has no average of the decay 0.99, but those of")
    assert main(["export", str(run.path), "--to", "csv", "--ema", "0.9"]) == 2
    assert capsys.readouterr().err == "instep: --ema goes with --to hf: what is written for 'csv' holds no weights.\n"


def test_the_live_line_trackers_and_the_end_name_the_averages() -> None:
    progress = ProgressDisplay()
    progress.see({"kind": "run_started", "step": 0, "steps": 4, "clock": "wall"})
    evaluated = {"kind": "evaluated", "t_s": 1.0, "objective": 0.3, "ema": {"0.9": {"objective": 0.25, "terms": {}}}}
    progress.see(evaluated)
    assert "held-out 0.3000  ema 0.9 0.2500" in progress.line(evaluated=True)
    progress.state = "training"
    assert [part.long for part in progress.parts() if part.label == "ema 0.9"] == ["0.250"]
    assert scalars(evaluated) == {"objective/held_out": 0.3, "objective/held_out_ema_0.9": 0.25}
