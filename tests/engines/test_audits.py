"""Workers that compute microbatches of each other's again: who is wrong is named, and nothing else changes."""

from __future__ import annotations

import itertools
import math
import os
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from instep.engines.audits import looked_at
from instep.engines.balance import Balance
from instep.errors import RecipeError, WorkerError
from instep.offline.tape_replay import replay
from instep.ranges import equal_ranges
from instep.recipe import Recipe, Team, parse
from instep.recipe_files import read
from instep.record import checkpoint, tape
from instep.team import judging
from instep.team_checks import check_team
from instep.worker.gradients import Gradients
from instep.worker.noting import noted_alone
from instep.worker.standalone import replica_before
from support import workloads, writers
from support.agents import meet_here, train_on
from support.harness import Outcome, stopping_at, train_here
from support.kinds import quick
from support.regression import regression, squares
from support.sentences import one_sentence
from support.wrong_workers import computed, one_wrong

STEPS = 24

# -------------------------------------------------------------------------------------------------- what is looked at


@pytest.mark.pure
@given(
    microbatches=st.integers(2, 40), workers=st.integers(2, 9), share=st.floats(0.001, 1), step=st.integers(0, 1 << 40)
)
def test_of_each_worker_others_look_at_its_share_in_the_same_steps(
    microbatches: int, workers: int, share: float, step: int
) -> None:
    workers = min(workers, microbatches)
    ranges = equal_ranges(microbatches, workers)
    found = looked_at(0, share, step, ranges)
    assert found == looked_at(0, share, step, ranges), "every worker draws the same"
    assert len({each.microbatch for each in found}) == len(found)
    assert all(ranges[each.owner][0] <= each.microbatch < ranges[each.owner][1] for each in found)
    assert all(each.owner != each.auditor for each in found)
    by_owner, by_auditor = Counter(e.owner for e in found), Counter(e.auditor for e in found)
    assert sorted(by_owner.values()) == sorted(by_auditor.values()), "nobody does the work of two"
    assert all(abs(by_owner[w] - share * (stop - start)) < 1 for w, (start, stop) in enumerate(ranges))
    assert share < 1 or len(found) == microbatches


@pytest.mark.pure
def test_over_many_steps_it_comes_to_the_share_of_each_worker() -> None:
    ranges = [(0, 4), (4, 8), (8, 11)]
    found = Counter(each.owner for step in range(20_000) for each in looked_at(3, 0.01, step, ranges))
    for owner, own in enumerate((4, 4, 3)):
        assert math.isclose(found[owner], 20_000 * 0.01 * own, rel_tol=0.1)


@pytest.mark.pure
@pytest.mark.parametrize("workers", [2, 3, 4])
def test_of_no_worker_more_than_300_microbatches_pass_unseen_at_1_percent(workers: int) -> None:
    """Whoever is wrong in each is named within 500, whatever is drawn."""
    ranges = equal_ranges(4, workers)
    for seed in range(40):
        last = [-1] * workers
        for step in range(1500):
            for each in looked_at(seed, 0.01, step, ranges):
                last[each.owner] = step
            assert all((step - last[w]) * (stop - start) <= 300 for w, (start, stop) in enumerate(ranges))


# --------------------------------------------------------------------------------------------- nothing else is changed


class Shared(nn.Module):
    """An embedding whose gradient is sparse, and a BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.norm, self.head = nn.Embedding(12, 4, sparse=True), nn.BatchNorm1d(4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.dropout(self.norm(self.rows(x[:, 0].abs().mul(3).long())), 0.3, self.training))
        return out


RECIPES: dict[str, Any] = {
    **workloads.ALL,
    "sparse": lambda: regression(model=Shared),
    "written": lambda: writers.recipe(writers.Forced),
}


@pytest.mark.processes
@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("name", RECIPES)
def test_a_run_all_of_whose_microbatches_are_looked_at_has_the_digest_of_one_that_is_not(
    name: str, workers: int, tmp_path: Path
) -> None:
    recipe = RECIPES[name]()
    alone = train_here(recipe, Team(workers=1), tmp_path / "alone")
    run = train_here(recipe, Team(workers=workers, audit="100%"), tmp_path / "run")
    assert run.digest == alone.digest
    told = [event for event in run.events if event["kind"] == "audited"]
    assert sum(len(event["looked_at"]) for event in told) == recipe.steps * recipe.microbatches
    assert {event["worker"] for event in told} == {event["owner"] for event in told} == set(range(workers))
    assert run.result["restarts"] == 0
    audit = run.result["audit"]
    assert (audit["looked_at"], audit["uncertain_since"]) == (recipe.steps * recipe.microbatches, recipe.steps)
    took_s = {(event["worker"], event["version"]): event["took_s"] for event in told}
    assert math.isclose(audit["extra_s"], sum(took_s.values()), abs_tol=1e-3)
    assert "audit" not in alone.result


@pytest.mark.processes
def test_it_follows_microbatches_that_move_from_worker_to_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last one: who has none of its own still looks at others'."""
    counts = itertools.cycle([[4, 0, 0], [1, 2, 1], [0, 0, 4]])
    monkeypatch.setattr(Balance, "decide", lambda self, seconds: next(counts))
    recipe = regression(steps=12)
    run = train_here(recipe, Team(workers=3, audit="100%"), tmp_path / "run")
    assert run.digest == train_here(recipe, Team(workers=1), tmp_path / "alone").digest
    moved = [event["ranges"] for event in run.events if event["kind"] == "ranges_moved"]
    assert [[0, 4], [4, 4], [4, 4]] in moved
    assert run.result["audit"]["looked_at"] == 12 * 4
    assert run.result["audit"]["uncertain_since"] == 12


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("name", ["gpt", "vae", "flow", "dpo", "memory", "compiled"])
def test_no_recipe_gives_a_false_alarm(name: str, tmp_path: Path) -> None:
    memory = ""
    if name in ("memory", "compiled"):
        recipe, memory = workloads.gpt(steps=3, compile=name == "compiled"), "60%" if name == "memory" else ""
    else:
        table = {**parse(read(name))[0].to_table(), "steps": 2, "evaluate_every": 0, "evaluate_samples": 8}
        recipe, _ = parse({key: value for key, value in table.items() if key != "artifacts"})
    run = train_here(recipe, Team(workers=2, audit="100%", memory=memory), tmp_path / "run")
    assert run.result["audit"]["looked_at"] == recipe.steps * recipe.microbatches
    assert run.result["audit"]["wrong"] == []
    assert run.digest == train_here(recipe, Team(workers=2), tmp_path / "unaudited").digest


# ------------------------------------------------------------------------------------------------------- who is wrong


@cache
def undisturbed() -> str:
    with tempfile.TemporaryDirectory() as place:
        return train_here(regression(steps=STEPS), Team(workers=1), Path(place) / "run").digest


def with_one_wrong(
    worker: int, workers: int, place: Path, share: str, team: dict[str, Any] | None = None, **fault: Any
) -> Outcome:
    recipe = regression(steps=STEPS, objective=one_wrong(squares, worker, place / "noted", **fault))
    # Who computes how many decides when it is wrong first.
    options: dict[str, Any] = {"checkpoint_every": 2, "keep": 0, "balance": "off", **(team or {})}
    return train_here(recipe, Team(workers=workers, audit=share, **options), place / "run")


@pytest.mark.processes
@pytest.mark.usefixtures("forked_pythons")
@pytest.mark.parametrize("team", quick([(2, 0), (2, 1), (3, 0), (3, 1), (3, 2)], (2, 1), (3, 0)))
def test_a_worker_that_is_wrong_from_some_step_on_is_named_and_what_it_did_is_done_again(
    team: tuple[int, int], tmp_path: Path
) -> None:
    workers, worker = team
    run = with_one_wrong(worker, workers, tmp_path, "40%", after=30)
    assert run.digest == undisturbed()
    assert run.result["restarts"] == 1
    (wrong,) = run.result["audit"]["wrong"]
    assert wrong["worker"] == worker
    (refuted,) = (event for event in run.events if event["kind"] == "refuted")
    (left,) = (event for event in run.events if event["kind"] == "left")
    again = next(e for e in run.events[run.events.index(refuted) :] if e["kind"] == "run_started")
    assert again["version"] <= refuted["since"] <= refuted["version"]
    assert (left["worker"], refuted["worker"]) == (worker, worker)
    assert one_sentence(left["why"])
    where = f"microbatch {refuted['microbatch']} of step {refuted['version'] + 1}"
    assert left["why"].startswith(f"worker {worker} computed {where} wrong: ")
    assert f"the weights after version {refuted['since']}, when" in left["why"]
    judges = "a process of its own" if workers == 2 else "worker"
    assert refuted["by_whom"].rpartition(" and ")[2].startswith(judges)


@pytest.mark.processes
@pytest.mark.usefixtures("forked_pythons")
@pytest.mark.parametrize("agents", quick([(1, 1), (2, 1)], (1, 1)))
def test_so_is_one_on_another_host(agents: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meet_here(monkeypatch, tmp_path)
    workers = sum(agents)
    recipe = regression(steps=STEPS, objective=one_wrong(squares, workers - 1, tmp_path / "noted", after=20))
    team = Team(workers=workers, audit="40%", checkpoint_every=2, keep=0, balance="off")
    run, _ = train_on(agents, recipe, team, tmp_path / "run")
    assert [wrong["worker"] for wrong in run.result["audit"]["wrong"]] == [workers - 1]
    assert run.result["restarts"] == 1
    assert run.digest == undisturbed()


@pytest.mark.processes
def test_what_was_uncertain_when_a_team_began_stays_uncertain(tmp_path: Path) -> None:
    """A run goes on after it was stopped, and worker 1 is found wrong before any audit of this team was good."""
    folder, noted = tmp_path / "run", tmp_path / "noted"
    recipe = regression(steps=STEPS, objective=one_wrong(squares, 1, noted))
    noted.write_text("0\n")  # another process's: nobody is wrong yet
    team: dict[str, Any] = {"workers": 3, "checkpoint_every": 1, "keep": 0, "balance": "off"}
    stopped = train_here(recipe, Team(**team, audit="10%"), folder, client=stopping_at(12))
    noted.unlink()
    good = [event["version"] for event in stopped.events if event["kind"] == "audited" and event["owner"] == 1]
    assert stopped.result["audit"]["uncertain_since"] < 12
    assert good[-1] + 1 < 12
    run = train_here(recipe, Team(**team, audit="100%"), folder, resume=True)
    (refuted,) = (event for event in run.events if event["kind"] == "refuted")
    assert (refuted["worker"], refuted["since"]) == (1, good[-1] + 1)
    again = next(e for e in run.events[run.events.index(refuted) :] if e["kind"] == "run_started")
    assert again["version"] == good[-1]
    assert run.digest == undisturbed()
    assert run.result["audit"]["wrong"][0]["since"] == good[-1] + 1
    played = replay(recipe, tape.read(folder / "tape.jsonl"))
    assert (played.digest, played.divergence) == (run.digest, "")


@pytest.mark.processes
@pytest.mark.usefixtures("forked_pythons")
def test_a_third_computation_says_what_the_others_wait_for_and_has_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which a kill would leave behind."""
    recipe, seen = regression(), list[str]()
    replica = replica_before(0, recipe, "cpu", (), lambda replica: None)
    totals = {"objective": recipe.batch}
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def looked(*given: Any, **by_name: Any) -> Any:
        assert list(tmp_path.iterdir()) == []
        seen.append(replica.doing)
        return answer(*given, **by_name)

    answer = judging.computed
    monkeypatch.setattr(judging, "computed", looked)
    found = judging.third_result(recipe, replica, 0, 1, totals)
    assert seen == ["having a process of its own compute step 1, microbatch 1 again"]
    gradients = Gradients(replica)
    gradients.assign_own([(1, 2)])
    assert found == noted_alone(replica, gradients, 0, 1, totals)


@pytest.mark.processes
def test_checkpoints_of_what_is_uncertain_are_removed(tmp_path: Path) -> None:
    run = with_one_wrong(1, 3, tmp_path, "10%", {"checkpoint_every": 1}, after=12)
    (refuted,) = (event for event in run.events if event["kind"] == "refuted")
    at = run.events.index(refuted)
    saved = [event["version"] for event in run.events[:at] if event["kind"] == "checkpointed"]
    again = next(event for event in run.events[at:] if event["kind"] == "run_started")
    assert refuted["removed"] == [version for version in saved if version > again["version"]] != []
    assert again["version"] < max(1, refuted["since"])
    assert run.digest == undisturbed()
    assert len(checkpoint.all_in(run.path / "checkpoints")) == STEPS


@pytest.mark.processes
@pytest.mark.parametrize("seed", [1, 2])
def test_of_one_that_is_seldom_wrong_the_first_wrong_microbatch_is_seen_where_all_are_looked_at(
    seed: int, tmp_path: Path
) -> None:
    run = with_one_wrong(1, 3, tmp_path, "100%", one_in=40, seed=seed)
    assert computed(tmp_path / "noted").count("w") == 1, "the step in which it was, was its last"
    assert [wrong["worker"] for wrong in run.result["audit"]["wrong"]] == [1]
    assert run.digest == undisturbed()


@pytest.mark.processes
def test_a_team_that_may_not_start_again_ends_with_the_sentence(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match=r"^worker 1 computed microbatch . of step .* wrong: worker . and"):
        with_one_wrong(1, 3, tmp_path, "100%", {"restarts": 0}, after=5)


@pytest.mark.processes
def test_three_different_results_name_nobody(tmp_path: Path) -> None:
    done = [0]

    def anything(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        done[0] += 1
        noise = int.from_bytes(os.urandom(4)) if done[0] > 20 else 0  # not while it is tried
        return squares(model, batch) * (1 + noise / 2**40)

    with pytest.raises(WorkerError, match="came to three different results in three computations") as caught:
        train_here(regression(steps=STEPS, objective=anything), Team(workers=3, audit="100%"), tmp_path / "run")
    assert one_sentence(caught.value.message.partition("; version")[0] + ".")


# ------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.pure
@pytest.mark.parametrize(
    ("team", "recipe", "sentence"),
    [
        ({"workers": 1, "audit": "1%"}, {}, "'team.audit' has workers compute microbatches of each other's again, and"),
        ({"workers": 2, "audit": 0.01}, {"rule": "asynchronous"}, "'team.audit' is for workers in lockstep, without a"),
        ({"workers": 2, "audit": "1%", "engine": "server"}, {}, "'team.audit' is for workers in lockstep, without a"),
        ({"workers": 2, "audit": "1%", "deterministic": False}, {}, "'team.audit' compares bits, and with 'team.det"),
        ({"workers": 2, "audit": "1%", "mixed_processors": True}, {}, "'team.audit' compares bits, and with 'team.m"),
        ({"workers": 2, "audit": "0%"}, {}, "'team.audit' is '0%'; write a share above 0 % and at most 100 %, such as"),
        ({"workers": 2, "audit": "often"}, {}, "'team.audit' is 'often'; write a share above 0 % and at most 100 %,"),
    ],
)
def test_audits_that_cannot_be_are_refused(team: dict[str, Any], recipe: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RecipeError) as caught:
        check_team(Recipe(model="m:m", objective="m:o", data="m:d", **recipe), Team(**team))
    assert caught.value.message.startswith(sentence)
    assert one_sentence(caught.value.message)
