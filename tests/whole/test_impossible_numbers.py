"""Numbers that cannot be: each is one sentence where it is given, or is taken and does what it says."""

from __future__ import annotations

import dataclasses
import math
import tomllib
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest
from torch import nn

from instep.budget import parse_budget
from instep.clock.network import Network
from instep.clock.slow import parse_slow
from instep.clock.times import Failures, WorkerTimes
from instep.errors import RecipeError, ResourceError
from instep.offline.cluster import Cluster
from instep.recipe import Recipe, Schedule, Team, dumps, parse
from instep.rules.presets import parse as parse_rule
from instep.rules.rule import UpdateRule
from instep.watch import Watch
from support.harness import Client, train_here
from support.regression import numbers, squares

ABSURD: list[Any] = [
    -(10**18), -1, 0, 10**18, 2**62, 2**63, 2**64, 10**400, 10**5000, math.inf, -math.inf, math.nan, 1e308, 5e-324,
]  # fmt: skip

WHOLE: dict[type, dict[str, Any]] = {
    Recipe: {"model": "torch.nn:Linear", "objective": "math:sin", "data": "math:cos"},
    Team: {},
    Watch: {},
    Schedule: {},
    UpdateRule: {"quorum": "1"},
    Cluster: {"workers": 2},
    Network: {},
    Failures: {"mean_time_between_s": 1.0, "restart_s": 1.0},
    WorkerTimes: {"mean_s": 1.0},
}


def numeric(cls: type) -> list[str]:
    hints = get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls) if get_origin(hints[field.name]) is not tuple]
    return [name for name in names if {int, float} & {hints[name], *get_args(hints[name])}]


FIELDS = [(cls, name) for cls in WHOLE for name in numeric(cls)]


def test_every_kind_of_number_is_among_them() -> None:
    assert len(FIELDS) > 40
    assert {(Recipe, "steps"), (Team, "answer_timeout_s"), (UpdateRule, "max_wait_s"), (Cluster, "merge_s")} <= {
        *FIELDS
    }


@pytest.mark.parametrize(("cls", "name"), FIELDS)
def test_an_absurd_number_is_a_sentence_or_is_held_by_files(cls: type, name: str) -> None:
    sentences: list[str] = []
    for value in ABSURD:
        try:
            made = cls(**{**WHOLE[cls], name: value})
        except RecipeError as error:
            sentences.append(error.message)
            continue
        assert not (isinstance(value, float) and math.isnan(value)), (name, value)
        if cls in (Recipe, Team):
            recipe, team = (made, Team()) if cls is Recipe else (Recipe(**WHOLE[Recipe]), made)
            assert parse(tomllib.loads(dumps(recipe, team))) == (recipe, team)
            recipe.fingerprint()
    assert max(map(len, sentences)) < 400


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda: Recipe(**WHOLE[Recipe], threads=10**18),
            f"'recipe.threads' is {10**18}; it must be at most 1024.",
        ),
        (lambda: Recipe(**WHOLE[Recipe], steps=2**63), f"'recipe.steps' is {2**63}; it must be at most {2**53}."),
        (
            lambda: Recipe(**WHOLE[Recipe], seed=10**5000),
            "'recipe.seed' is a number of 5001 digits; a whole",
        ),
        (lambda: Team(workers=10**9), "'team.workers' is 1000000000; it must be at most 1048576."),
        (
            lambda: Team(answer_timeout_s=0.1),
            "'team.answer_timeout_s' is 0.1 s; it must be at least 0.5: w",
        ),
        (lambda: Team(stall_timeout_s=1e-9), "'team.stall_timeout_s' is 1e-09 s; it must be at least 0.5"),
        (lambda: Schedule(final=10**400), "'schedule.final' is a number of 401 digits; write a large number as"),
        (lambda: UpdateRule(quorum="9" * 5000), "write a number from 1, 'all', 'all-1'"),
        (lambda: parse_slow("1:1e308x"), "no factor by which a worker is slow; write a number from 1 to 1000000"),
        (lambda: parse_slow("9" * 5000 + ":2x"), "does not say who is slow"),
        (lambda: parse_budget("9" * 400 + "TiB", "--budget"), "more than any machine has"),
        (lambda: Cluster(workers=10**18), "it must be a whole number from 1 to 1048576"),
        (lambda: Cluster(workers=1, merge_s="1"), "'cluster.merge_s' is '1'; it must be a finite time"),  # type: ignore[arg-type]
    ],
)
def test_sentences_on_impossible_numbers(make: Any, sentence: str) -> None:
    with pytest.raises(RecipeError) as caught:
        make()
    assert sentence in caught.value.message


@pytest.mark.processes
@pytest.mark.parametrize("rule", ["synchronous", "asynchronous", "local_sgd:9007199254740991"])
def test_as_many_steps_as_there_may_be_are_begun(rule: str, tmp_path: Path) -> None:
    recipe = Recipe(
        model=lambda: nn.Linear(3, 1), objective=squares, data=numbers, batch=8, microbatches=4, steps=2**53,
        rule=parse_rule(rule), clip_norm=math.inf, schedule=Schedule("cosine", warmup_steps=2**62),
        watch=Watch(window=2**62, rollback_every=2**62, rollbacks=2**62, deviations=1e308),
    )  # fmt: skip
    client = Client()
    begun = {"merged", "computed", "released"}
    client._on_event = lambda event: client.ask_to_stop() if event["kind"] in begun else None
    team = Team(workers=2, stall_timeout_s=math.inf, checkpoint_every=2**62, keep=2**62, restarts=2**62)
    if rule.startswith("local"):
        team = dataclasses.replace(team, answer_timeout_s=0.5)
    outcome = train_here(recipe, team, tmp_path / "run", client=client)
    assert outcome.result["interrupted"]


def test_a_limit_on_the_size_of_files_is_told_as_that(tmp_path: Path) -> None:
    import resource

    from instep.memory_file import memory_file
    from instep.transport.memory import Region, reserve

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    descriptor = memory_file()
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(ResourceError, match=r"share 8 MiB of memory as a file .* ulimit -f, is smaller; raise it"):
            reserve(descriptor, {"a": Region((1 << 20,), "float64")})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
