"""C4: any run is computed again from its recipe and its tape, with the same digest; a tape that is not the run's own is
told apart, by the first place where it differs or by a sentence on what it lacks.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from instep.api import replay as replay_alone
from instep.api import replay_under
from instep.errors import RecipeError, RecordError
from instep.offline.tape_replay import replay
from instep.recipe import Recipe, Team, dumps
from instep.record import tape
from instep.record.folder import RunFolder
from instep.record.result import Replayed
from instep.rules import UpdateRule, parse
from instep.rules import presets as p
from support import workloads
from support.harness import Client, train_here
from support.kinds import quick
from support.regression import regression, squares
from support.sentences import one_sentence
from support.serving import RULES, WORKLOADS, at, check_tape, disturbed, kill, killed_altogether, replayed

pytestmark = pytest.mark.processes

Events = list[dict[str, Any]]

# ----------------------------------------------------------------------------------------------------- the same digest


@pytest.mark.parametrize("name", quick(RULES, "asynchronous", "backup_workers", "post_local_sgd", "async_diloco"))
def test_a_run_with_a_slow_worker_a_death_and_a_successor_is_replayed_exactly(name: str) -> None:
    recipe, run = disturbed(name, WORKLOADS[name])
    found = replayed(recipe, run.path)
    assert found.divergence == ""
    assert found.same
    assert found == Replayed(run.digest, run.digest, run.result["versions"], "")


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_every_rule_is_replayed_exactly_with_the_other_model(name: str) -> None:
    recipe, run = disturbed(name, "convnet" if WORKLOADS[name] == "gpt" else "gpt")
    assert replayed(recipe, run.path).same


MORE_RULES = {
    "asynchronous": p.asynchronous(),
    "damped": UpdateRule(quorum="2", weight="staleness", max_lead=3),
    "dropping": UpdateRule(quorum="1", max_staleness=1),
    "waiting": UpdateRule(quorum="all", max_wait_s=0.05, compensation=0.3),
    "fragments": dataclasses.replace(p.diloco(4), fragments=2),
    "overlap": dataclasses.replace(p.diloco(4), fragments=2, overlap=2),
    "narrow fragments": dataclasses.replace(p.local_sgd(4), fragments=4, wire="int4"),
    "graced": UpdateRule(quorum="1", grace_s=0.02, max_lead=1),
    "rounds ahead": UpdateRule(quorum="all", order="round", max_lead=2, compensation=0.3),
    "deltas by staleness": UpdateRule(quorum="2", local_steps=2, outer="sgd", weight="staleness", max_staleness=2),
    "momentum": UpdateRule(quorum="1", local_steps=3, outer="nesterov", outer_lr=0.5, outer_momentum=0.5),
}


def random_run(rule: UpdateRule, seed: int, path: Path) -> None:
    """2 to 4 workers, any of them slow, any of them killed, at any time."""
    chance = random.Random(seed)
    workers = chance.randint(2, 4)
    names = list(workloads.ALL)
    recipe = workloads.ALL[names[seed % 2]](rule=rule, seed=seed, steps=10)
    slow = chance.sample(range(workers), chance.randint(1, workers))
    team = Team(
        workers=workers,
        slow=",".join(f"{worker}:{chance.uniform(1, 4):.2f}x" for worker in slow),
        checkpoint_every=chance.randint(1, 5),
        engine="server",
    )
    victim, moment = chance.randrange(workers), chance.randint(1, 20)
    strikes = [at("pushed", moment, kill(victim)), at("merged", 3, kill((victim + 1) % workers))]

    def see(event: dict[str, Any]) -> None:
        for strike in strikes:
            with contextlib.suppress(KeyError, ProcessLookupError):  # it has not joined yet, or is dead already
                strike(event)

    run = train_here(recipe, team, path, client=Client(see))
    check_tape(run.events, recipe)
    found = replayed(recipe, path)
    assert found.same, (found, team, recipe.rule)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_ten_asynchronous_runs_are_replayed_exactly(seed: int, tmp_path: Path) -> None:
    random_run(p.asynchronous(), seed, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [100, 101])  # of each model
@pytest.mark.parametrize("name", [*RULES, *MORE_RULES])
def test_random_runs_under_every_rule_are_replayed_exactly(name: str, seed: int, tmp_path: Path) -> None:
    random_run(RULES.get(name) or MORE_RULES[name], seed, tmp_path / "run")


def test_a_run_in_lockstep_is_replayed_over_resumes_with_other_teams(tmp_path: Path) -> None:
    """The recipe alone decides; each start is from a checkpoint that the tape tells of."""
    recipe, path = workloads.convnet(), tmp_path / "run"
    for version, workers in ((2, 2), (5, 3), (99, 4)):
        client = Client(lambda event, at=version: client.ask_to_stop() if event.get("version") == at else None)  # noqa: B023
        team = Team(workers=workers, checkpoint_every=2)
        run = train_here(recipe, team, path, resume=path.exists(), client=client)
    starts = [e for e in tape.read(path / "tape.jsonl") if e["kind"] == "run_started"]
    assert [event["cut"] for event in starts] == [2, 3, 4]
    assert replayed(recipe, path) == Replayed(run.digest, run.digest, 7, "")


@pytest.mark.slow
def test_a_run_in_lockstep_that_starts_again_is_replayed(tmp_path: Path) -> None:
    recipe = workloads.gpt()
    client = Client(at("merged", 1, lambda pids: (kill(0)(pids), kill(1)(pids)), version=4))  # nobody can stand in
    run = train_here(recipe, Team(workers=2, checkpoint_every=3), tmp_path / "run", client=client)
    assert [e["version"] for e in run.events if e["kind"] == "run_started"] == [0, 3]
    assert replayed(recipe, run.path).same


def test_a_run_in_lockstep_with_more_steps_is_replayed(tmp_path: Path) -> None:
    recipe = workloads.gpt(steps=3)
    train_here(recipe, Team(workers=2), tmp_path / "run")
    longer = dataclasses.replace(recipe, steps=6)
    train_here(longer, Team(workers=3), tmp_path / "run", resume=True)
    assert replayed(longer, tmp_path / "run").same


def test_a_run_that_was_killed_and_never_resumed_has_no_digest_to_be_the_same_as(tmp_path: Path) -> None:
    recipe = regression(rule=p.asynchronous(), steps=50)
    when = lambda event: event["kind"] == "merged" and event["version"] >= 9  # noqa: E731
    killed_altogether(recipe, Team(workers=2, checkpoint_every=2), tmp_path / "run", when)
    found = replayed(recipe, tmp_path / "run")
    assert (found.recorded, found.divergence, found.same) == (None, "", False)
    assert found.versions >= 8


@pytest.mark.slow
def test_replay_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    """As `instep replay` does: the recipe travels there, objects without an address and all."""
    recipe = regression(rule=p.asynchronous())
    run = train_here(recipe, Team(workers=2), tmp_path / "run")
    found = replay_alone(tmp_path / "run", recipe)
    assert found.same
    assert found.digest == run.digest


def test_a_recipe_that_no_file_can_hold_is_asked_for_by_the_call_that_needs_it(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run")
    run.recipe_path.write_text(dumps(regression(), Team()))
    with pytest.raises(RecipeError, match=r"instep\.replay\('.*run', recipe\)\.$"):
        replay_alone(run.path)
    with pytest.raises(RecipeError, match=r"instep\.replay_under\('.*run', rule, recipe\)\.$"):
        replay_under(run.path, p.asynchronous())


@pytest.mark.parametrize("text", ["asynchronous", "diloco:2"])
def test_an_error_of_the_users_own_code_is_not_blamed_on_the_tape(text: str, tmp_path: Path) -> None:
    calls, table = [10**6], {True: 1.0}

    def objective(model: nn.Module, batch: Any) -> torch.Tensor:
        calls[0] -= 1
        return squares(model, batch) * table[calls[0] >= 0]

    recipe = regression(objective=objective, rule=parse(text))
    run = train_here(recipe, Team(workers=2), tmp_path / "run")
    calls[0] = 12  # beyond the first forward
    with pytest.raises(KeyError, match="False"):
        replay(recipe, run.events)


# -------------------------------------------------------------------------------------------------- tapes that lie


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Events]:
    """A run of updates from two contributions of unequal items, and its tape."""
    recipe = workloads.gpt(rule=UpdateRule(quorum="2"), steps=5)
    path = tmp_path_factory.mktemp("honest") / "run"
    train_here(recipe, Team(workers=3, slow="1:3x", checkpoint_every=2), path)
    return recipe, list(tape.read(path / "tape.jsonl"))


def first(events: Events, kind: str, nth: int = 2) -> dict[str, Any]:
    return [event for event in events if event["kind"] == kind][nth]


def told(recipe: Recipe, events: Events) -> str:
    """What is said of a tape that is not the run's own: a divergence, or an error."""
    torch.set_num_threads(1)
    try:
        found = replay(recipe, events)
    except RecordError as error:
        kind, said = "error", error.message
    else:
        kind, said = "divergence", found.divergence
        assert not found.same
    assert one_sentence(said), said
    return f"{kind}: {said}"


def swap_weights(events: Events) -> None:
    weights = next(e["weights"] for e in events if e["kind"] == "merged" and len(set(e["weights"])) == 2)
    weights.reverse()


def forget_a_contribution(events: Events) -> None:
    merged = first(events, "merged")
    for key in ("contributions", "weights", "staleness"):
        merged[key].pop()


def forget_it_by_half(events: Events) -> None:
    first(events, "merged")["contributions"].pop()


def twice(events: Events) -> None:
    merged = first(events, "merged")
    for key in ("contributions", "weights", "staleness"):
        merged[key] = [merged[key][0]] * 2


def unknown_contribution(events: Events) -> None:
    first(events, "merged")["contributions"][0]["seq"] = 999


def no_contribution(events: Events) -> None:
    first(events, "merged").update(contributions=[], weights=[], staleness=[])


def other_checksum(events: Events) -> None:
    checksum = first(events, "pushed")["checksum"]
    checksum[0] = f"{int(checksum[0], 16) ^ 1:08x}"


def other_weights_after(events: Events) -> None:
    checksum = first(events, "merged")["checksum"]
    checksum[3] = f"{int(checksum[3], 16) ^ 1:08x}"


def fewer_checksums(events: Events) -> None:
    first(events, "merged")["checksum"].pop()


def other_piece(events: Events) -> None:
    first(events, "released", 4)["piece"] += 1


def other_worker(events: Events) -> None:
    first(events, "released", 4)["worker"] = 17


def older_weights(events: Events) -> None:
    next(e for e in events if e["kind"] == "released" and e["version"] > 0)["version"] -= 1


def no_update(events: Events) -> None:
    events.remove(first(events, "merged"))


def no_push(events: Events) -> None:
    events.remove(first(events, "pushed"))


def no_release(events: Events) -> None:
    events.remove(first(events, "released", 4))


def no_last_update(events: Events) -> None:
    events.remove(first(events, "merged", -1))
    events.remove(first(events, "checkpointed", -1))


def other_digest(events: Events) -> None:
    first(events, "run_ended", -1)["digest"] = "0" * 64


def other_digest_saved(events: Events) -> None:
    first(events, "checkpointed", 0)["digest"] = "0" * 64


def other_cut(events: Events) -> None:
    events[0]["cut"] = 2


def other_steps(events: Events) -> None:
    events[0]["steps"] = 9


def no_start(events: Events) -> None:
    del events[0]


def other_resume(events: Events) -> None:
    place = events.index(first(events, "checkpointed", 0))
    events.insert(place + 1, {**events[0], "version": 1})


LIES: list[tuple[Callable[[Events], None], str]] = [
    (swap_weights, r"divergence: version \d+, an update from workers? [\d, ]+, differs in '\S+'"),
    (forget_a_contribution, "divergence: version 3, an update from worker"),
    (forget_it_by_half, "error: .*update 3 has 1 contributions, 2 weights"),
    (twice, "error: .*update 3 has 2 contributions"),
    (unknown_contribution, "error: .*'merged' at .* refers to 999, which no earlier event tells of"),
    (no_contribution, "error: .*update 3 has 0 contributions"),
    (other_checksum, r"divergence: the contribution 2 of worker \d, from version \d+ on piece \d+, is another one"),
    (other_weights_after, r"divergence: version 3, an update from worker.* differs in '\S+'; the contributions were"),
    (fewer_checksums, "divergence: version 3"),
    (other_piece, r"divergence: the contribution \d+ of worker \d"),
    (other_worker, "error: .* refers to"),
    (older_weights, r"error: .*'released' at .* goes on from version 0, and the updates before it end at 1"),
    (no_update, "error: .* goes on from version 3, and the updates before it end at 2; a part of the tape is missing"),
    (no_push, "error: .* refers to 2"),
    (no_release, "error: .* refers to"),
    (no_last_update, "error: .*'run_ended' at .* a part of the tape is missing"),
    (other_digest, r"divergence: version \d+, the last, has other weights here than in the run"),
    (other_digest_saved, r"divergence: the checkpoint of version \d+ has other weights"),
    (other_cut, "(divergence|error): "),
    (other_steps, r"divergence: version \d+, an update from"),
    (no_start, "error: the tape holds no start of a run"),
    (other_resume, "error: the run was resumed at version 1, of which the tape has no checkpoint"),
]


@pytest.mark.parametrize(("lie", "sentence"), LIES, ids=[lie.__name__ for lie, _ in LIES])
def test_a_tape_changed_by_hand_is_told(
    lie: Callable[[Events], None], sentence: str, honest: tuple[Recipe, Events]
) -> None:
    recipe, events = honest[0], copy.deepcopy(honest[1])
    lie(events)
    said = told(recipe, events)
    assert re.match(sentence, said), said


def test_the_honest_tape_is_the_runs_own(honest: tuple[Recipe, Events]) -> None:
    torch.set_num_threads(1)
    assert replay(*honest).same


def test_the_order_of_an_updates_contributions_decides_bits(honest: tuple[Recipe, Events], tmp_path: Path) -> None:
    """Three floats added in another order: told unless the bits are the run's all the same."""
    recipe = workloads.gpt(rule=UpdateRule(quorum="3"), steps=4)
    train_here(recipe, Team(workers=3), tmp_path / "run")
    events = list(tape.read(tmp_path / "run" / "tape.jsonl"))
    merged = first(events, "merged", 0)
    for key in ("contributions", "weights", "staleness"):
        merged[key].reverse()
    assert told(recipe, events).startswith("divergence: version 1, an update from worker")


@settings(max_examples=6)
@given(data=st.data())
def test_no_event_that_counts_can_be_left_out(data: st.DataObject, honest: tuple[Recipe, Events]) -> None:
    """Whatever single event the tape lacks, it is told of, or the digest is the run's own all the same."""
    recipe, events = honest
    place = data.draw(st.integers(1, len(events) - 1))
    lacking = [event for number, event in enumerate(events) if number != place]
    if events[place]["kind"] in ("released", "pushed", "merged"):
        assert told(recipe, lacking)
        return
    torch.set_num_threads(1)
    found = replay(recipe, lacking)
    assert found.digest == events[-1]["digest"]
    assert found.same == (events[place]["kind"] != "run_ended")


@settings(max_examples=4)
@given(data=st.data())
def test_a_truncated_tape_is_never_the_same(data: st.DataObject, honest: tuple[Recipe, Events]) -> None:
    recipe, events = honest
    torch.set_num_threads(1)
    found = replay(recipe, events[: data.draw(st.integers(1, len(events) - 1))])
    assert (found.same, found.recorded, found.divergence) == (False, None, "")


# ------------------------------------------------------------------------------------------------------ wrong tapes


def test_a_tape_of_another_recipe_is_refused(honest: tuple[Recipe, Events]) -> None:
    recipe, events = honest
    for other in (dataclasses.replace(recipe, seed=1), dataclasses.replace(recipe, rule=p.asynchronous())):
        assert told(other, events) == (
            "error: the tape is of another recipe than the one given; replay it with the recipe in its run folder."
        )


def test_a_tape_of_another_schema_is_refused(honest: tuple[Recipe, Events], tmp_path: Path) -> None:
    events = copy.deepcopy(honest[1])
    events[0]["schema"] = 99
    (tmp_path / "tape.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    with pytest.raises(
        RecordError, match="has schema 99 at line 1, and this version of Instep reads 2 and 3;"
    ) as caught:
        replayed(honest[0], tmp_path)
    assert one_sentence(caught.value.message)


@pytest.mark.parametrize("cut", [1, 30])
def test_a_tape_with_a_torn_or_damaged_line(cut: int, honest: tuple[Recipe, Events], tmp_path: Path) -> None:
    """A torn last line is what a crash leaves; one in the middle is damage."""
    lines = [json.dumps(event) for event in honest[1]]
    (tmp_path / "tape.jsonl").write_text("\n".join(lines)[:-cut])
    assert not replayed(honest[0], tmp_path).same
    (tmp_path / "tape.jsonl").write_text("\n".join([*lines[:5], lines[5][:-cut], *lines[6:]]) + "\n")
    with pytest.raises(RecordError, match="line 6 of the tape .* is damaged") as caught:
        replayed(honest[0], tmp_path)
    assert one_sentence(caught.value.message)


def test_code_that_computes_otherwise_than_in_the_run_is_told(tmp_path: Path) -> None:
    """Another library, processor or edit of the model: the first contribution that differs is named."""
    scale = [1.0]

    def model() -> nn.Module:
        return nn.Linear(3, 1)

    def objective(net: nn.Module, batch: Any) -> torch.Tensor:
        return (net(batch[0]) - batch[1]).square().sum() * scale[0]

    recipe = regression(model=model, objective=objective, rule=p.asynchronous())
    run = train_here(recipe, Team(workers=2), tmp_path / "run")
    scale[0] = 1.5
    said = told(recipe, run.events)
    assert said.startswith("divergence: the contribution 0 of worker ")
    assert said.endswith("is another one here than in the run; its weights were the same.")
