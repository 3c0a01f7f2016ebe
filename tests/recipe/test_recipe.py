from __future__ import annotations

import dataclasses
import math
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instep import recipe_files
from instep.components import Component
from instep.differences import without_address
from instep.errors import ComponentError, RecipeError
from instep.recipe import (
    Recipe,
    Schedule,
    Team,
    dumps,
    parse,
    table_differences,
)
from instep.recipe_files import path_of, read, read_saved
from instep.schedule import Change
from instep.tables import added, as_before, as_saved
from instep.team_checks import check_team
from instep.watch import Watch

pytestmark = pytest.mark.pure

PARTS: dict[str, Any] = {"model": "m:Model", "objective": "m:loss", "data": "m:data"}


def recipe(**changes: Any) -> Recipe:
    return Recipe(**{**PARTS, **changes})


# Schedules


def test_constant_with_warm_up() -> None:
    schedule = Schedule(warmup_steps=4)
    assert [schedule.factor(step, 8) for step in range(8)] == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]


def test_cosine() -> None:
    schedule = Schedule("cosine", warmup_steps=2, final=0.1)
    factors = [schedule.factor(step, 6) for step in range(6)]
    assert factors[:2] == [0.5, 1]
    half = 0.1 + 0.9 / 2
    assert factors[3] == pytest.approx(half)
    assert factors[5] == pytest.approx(0.1)
    assert factors[2] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)


def test_wsd() -> None:
    factors = [Schedule("wsd", warmup_steps=2, final=0.0, decay_steps=4).factor(step, 10) for step in range(10)]
    assert factors == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0])


def test_wsd_decays_over_a_fifth_by_default() -> None:
    factors = [Schedule("wsd", final=0.5).factor(step, 20) for step in range(20)]
    assert factors == pytest.approx([1.0] * 16 + [0.875, 0.75, 0.625, 0.5])


KINDS = st.sampled_from(["constant", "cosine", "wsd"])


@given(KINDS, st.integers(0, 50), st.floats(0, 1), st.integers(1, 200))
def test_a_factor_is_above_0_and_at_most_1_and_ends_at_final(kind: Any, warmup: int, final: float, steps: int) -> None:
    schedule = Schedule(kind, warmup_steps=warmup, final=final)
    factors = [schedule.factor(step, steps) for step in range(steps)]
    assert all(0 <= factor <= 1 for factor in factors)
    rise = factors[: min(warmup, steps)]
    assert rise == sorted(rise)
    fall = factors[warmup:]
    assert fall == sorted(fall, reverse=True)
    if kind != "constant" and steps > warmup + 1:
        assert factors[-1] == pytest.approx(final)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"kind": "cos"}, "'schedule.kind' is 'cos'; it must be one of 'constant', 'cosine', 'wsd'."),
        ({"warmup_steps": -1}, "'schedule.warmup_steps' is -1; it must be at least 0."),
        ({"final": 1.5}, "'schedule.final' is 1.5; it is a share of the learning rate, from 0 to 1."),
        ({"final": math.nan}, "'schedule.final' is nan; it is a share of the learning rate, from 0 to 1."),
        ({"decay_steps": 5}, "'schedule.decay_steps' goes with kind 'wsd' only, and kind is 'constant'."),
        ({"kind": "wsd", "decay_steps": 0}, "'schedule.decay_steps' is 0; it must be at least 1."),
    ],
)
def test_wrong_schedules(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Schedule(**changes)
    assert caught.value.message == sentence


# Recipes and teams


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"batch": 12}, "a batch of 12 samples does not divide into 8 equal microbatches; set recipe.batch to 16, or"),
        ({"batch": 3}, "a batch of 3 samples does not divide into 8 equal microbatches; set recipe.batch to 8, or"),
        ({"microbatches": 0}, "'recipe.microbatches' is 0; it must be at least 1."),
        ({"steps": 0}, "'recipe.steps' is 0; it must be at least 1."),
        ({"steps": 2.5}, "'recipe.steps' is 2.5, of type float; it must be a whole number."),
        ({"steps": True}, "'recipe.steps' is True, of type bool; it must be a whole number."),
        ({"compile": 1}, "'recipe.compile' is 1, of type int; it must be True or False."),
        ({"name": 3}, "'recipe.name' is 3, of type int; it must be a str."),
        ({"name": "../up"}, "'recipe.name' is '../up'; it names the run folder: write a name without '/'."),
        ({"name": ""}, "'recipe.name' is ''; it names the run folder"),
        ({"name": "a\nb"}, "'recipe.name' is 'a\\nb'; it names the run folder"),
        ({"clip_norm": 0}, "'recipe.clip_norm' is 0.0; it must be above 0"),
        ({"clip_norm": math.nan}, "'recipe.clip_norm' is nan; it must be above 0"),
        ({"clip_norm": "1"}, "'recipe.clip_norm' is '1', of type str; it must be a number."),
        ({"evaluate_every": -1}, "'recipe.evaluate_every' is -1; it must be at least 0."),
        ({"evaluate_samples": 0}, "'recipe.evaluate_samples' is 0; it must be at least 1."),
        ({"precision": "half"}, "'recipe.precision' is 'half'; it must be one of 'float32', 'bfloat16', 'float16'."),
        ({"schedule": 3}, "'recipe.schedule' is 3; give an instep.Schedule."),
        ({"rule": 3}, "'recipe.rule' is 3; give an instep.UpdateRule or its text."),
        ({"model": None}, "None cannot be a component"),
    ],
)
def test_wrong_recipes(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(**changes)
    assert caught.value.message.startswith(sentence)
    assert "\n" not in caught.value.message


DEVICES = "it must be 'cpu', 'cuda', a GPU for each worker, or 'cuda:0', say, a GPU that all workers of a host share."


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"workers": 0}, "'team.workers' is 0; it must be at least 1."),
        *(
            ({"device": name}, f"'team.device' is {name!r}; {DEVICES}")
            for name in ("tpu", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "CUDA", "", "cuda:0\n")
        ),
        ({"restarts": -1}, "'team.restarts' is -1; it must be at least 0."),
        ({"keep": -1}, "'team.keep' is -1; it must be at least 0."),
        ({"keep": "thin"}, "'team.keep' is 'thin'; it must be a whole number, or 'thinned'."),
        ({"keep": 2.5}, "'team.keep' is 2.5, of type float; it must be a whole number."),
        ({"checkpoint_every": 0}, "'team.checkpoint_every' is 0; it must be at least 1."),
        (
            {"answer_timeout_s": 0},
            "'team.answer_timeout_s' is 0 s; it must be at least 0.5: workers give four signs of life a second.",
        ),
        (
            {"stall_timeout_s": math.nan},
            "'team.stall_timeout_s' is nan s; it must be at least 0.5: workers give four signs of life a second.",
        ),
    ],
)
def test_wrong_teams(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Team(**changes)
    assert caught.value.message == sentence


def test_more_workers_than_microbatches() -> None:
    check_team(recipe(microbatches=4), Team(workers=4))
    with pytest.raises(
        RecipeError, match=r"5 workers are more than the 4 microbatches .*; take at most 4 workers, or ra"
    ):
        check_team(recipe(microbatches=4), Team(workers=5))


def test_a_whole_number_serves_as_a_number() -> None:
    assert recipe(clip_norm=1).clip_norm == 1.0
    assert type(Team(answer_timeout_s=2).answer_timeout_s) is float


def test_objects_serve_as_components() -> None:
    made = recipe(model=Schedule, objective=lambda model, batch: 0)
    assert made.model == Component("instep.schedule:Schedule")
    assert made.objective.address is None


# The fingerprint

DECISIVE: dict[str, Any] = {
    "model": "m:Other",
    "objective": "m:other",
    "data": "m:other",
    "optimizer": Component("instep.optimizers:adamw", {"lr": 1.0}),
    "schedule": Schedule("cosine"),
    "changes": (Change(version=1, lr=0.5),),
    "rule": "asynchronous",
    "batch": 64,
    "microbatches": 4,
    "drop_last": True,
    "ragged": "spread",
    "order": "permutation",
    "buffers": {"*.count": "sum"},
    "freeze": {"*.weight": "all"},
    "ema": (0.9,),
    "ema_warmup": True,
    "seed": 1,
    "clip_norm": 1.0,
    "precision": "bfloat16",
    "compile": True,
    "threads": 2,
    "watch": Watch(spike="stop"),
}
BESIDE: dict[str, dict[str, Any]] = {"ema_warmup": {"ema": (0.9,)}}
"""What fields go with others alone."""
HARMLESS: dict[str, Any] = {
    "steps": 7,
    "name": "other",
    "evaluate_every": 5,
    "evaluate_samples": 5,
    "checksum_every": 5,
    "sample_prompt": "x",
    "sample_length": 5,
    "artifacts": "m:write",
    "artifacts_every": 5,
}


def test_every_field_is_decisive_or_harmless() -> None:
    with_float16 = {"loss_scale"}  # decisive: see test_loss_scale.py
    assert {field.name for field in dataclasses.fields(Recipe)} == DECISIVE.keys() | HARMLESS.keys() | with_float16


@pytest.mark.parametrize("key", DECISIVE)
def test_a_decisive_field_changes_the_fingerprint(key: str) -> None:
    one = recipe(**BESIDE.get(key, {}))
    other = recipe(**{key: DECISIVE[key]}, **BESIDE.get(key, {}))
    assert other.fingerprint() != one.fingerprint()
    assert any(f"recipe.{key}" in line for line in table_differences(other.to_table(), one.to_table()))


@pytest.mark.parametrize("key", HARMLESS)
def test_a_harmless_field_does_not(key: str) -> None:
    other = recipe(**{key: HARMLESS[key]})
    assert other != recipe()
    assert other.fingerprint() == recipe().fingerprint()
    assert table_differences(other.to_table(), recipe().to_table()) == []


def test_another_rule_is_named_before_the_fields_that_come_with_it() -> None:
    mine, theirs = recipe(rule="asynchronous").to_table(), recipe(rule="synchronous").to_table()
    first, *others = table_differences(mine, theirs)
    assert first == "recipe.rule.name is 'asynchronous' here and 'synchronous' there"
    assert others


def test_differences_name_field_and_values() -> None:
    other = recipe(seed=3, clip_norm=1.0, model=Component("m:Model", {"width": 3}))
    assert table_differences(other.to_table(), recipe().to_table()) == [
        "recipe.clip_norm is 1.0 here and not set there",
        "recipe.model.args.width is 3 here and not set there",
        "recipe.seed is 3 here and 0 there",
    ]


# TOML

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
RECIPES = st.builds(
    lambda microbatches, share, **rest: recipe(microbatches=microbatches, batch=microbatches * share, **rest),
    microbatches=st.integers(1, 9),
    share=st.integers(1, 9),
    steps=st.integers(1, 10**6),
    seed=st.integers(0, 2**63 - 1),
    clip_norm=st.none() | st.floats(0.01, 1e9),
    precision=st.sampled_from(["float32", "bfloat16", "float16"]),
    compile=st.booleans(),
    sample_prompt=TEXT,
    evaluate_samples=st.none() | st.integers(1, 9),
    schedule=st.builds(Schedule, kind=KINDS, warmup_steps=st.integers(0, 9), final=st.floats(0, 1)),
    model=st.builds(
        Component, st.just("m:Model"), st.dictionaries(TEXT, st.integers(-9, 9) | st.floats(-1e9, 1e9) | TEXT)
    ),
)
TEAMS = st.builds(Team, workers=st.integers(1, 9), restarts=st.integers(0, 9), answer_timeout_s=st.floats(0.5, 1e9))


@given(RECIPES, TEAMS)
def test_a_recipe_file_reads_back_as_it_was(made: Recipe, team: Team) -> None:
    again = parse(tomllib.loads(dumps(made, team)))
    assert again == (made, team)
    assert again[0].fingerprint() == made.fingerprint()


def test_objects_without_an_address_are_found_in_the_file() -> None:
    assert without_address(tomllib.loads(dumps(recipe(), Team()))) is None
    assert without_address(recipe(sample_prompt="<s>").to_table()) is None
    assert "<lambda>" in str(without_address(recipe(model=lambda: 0).to_table()))
    inside = recipe(model=Component("m:Model", {"layers": [{"act": lambda: 0}]}))
    assert "<lambda>" in str(without_address(inside.to_table()))
    with pytest.raises(ComponentError, match=r"stands for an object of another program"):
        parse(recipe(model=lambda: 0).to_table())


def test_a_date_is_refused() -> None:
    made, _ = parse({**PARTS, "model": {"use": "m:Model", "args": tomllib.loads("day = 2026-01-01")}})
    with pytest.raises(ComponentError, match=r"datetime.date\(2026, 1, 1\) is of a type .*; write it as text"):
        made.fingerprint()


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        ({"modle": "m:M"}, "unknown key 'modle'; did you mean 'model'?"),
        ({"teams": {}}, "unknown key 'teams'; did you mean 'team'?"),
        ({"zzzzz": 1}, "unknown key 'zzzzz'; known keys are model, objective, data,"),
        ({"team": {"wokers": 2}}, "unknown key 'team.wokers'; did you mean 'workers'?"),
        ({"team": 3}, "'team' is 3; it must be a table."),
        ({"schedule": {"knd": "wsd"}}, "unknown key 'recipe.schedule.knd'; did you mean 'kind'?"),
        ({"schedule": {"final": "x"}}, "'recipe.schedule.final' is 'x', of type str; it must be a number."),
        ({"steps": "3"}, "'recipe.steps' is '3', of type str; it must be a whole number."),
        ({"model": {"use": "m:Model", "arg": {}}}, "unknown key 'arg' beside 'use'"),
        ({"optimizer": {"args": {"lr": 1}}}, "{'args': {'lr': 1}} has no key 'use'"),
    ],
)
def test_wrong_tables(table: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse({**PARTS, **table})
    assert caught.value.message.startswith(sentence)


def test_a_missing_key() -> None:
    with pytest.raises(RecipeError, match=r"^'recipe.data' is missing; it has no default\.$"):
        parse({"model": "m:Model", "objective": "m:loss"})


# Files and names


@pytest.fixture
def builtin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "tiny.toml").write_text("# A tiny one\nsteps = 1\n")
    monkeypatch.setattr(recipe_files, "RECIPES", folder)
    monkeypatch.chdir(tmp_path)
    return folder


def test_a_built_in_name_comes_before_a_file(builtin: Path) -> None:
    Path("tiny").write_text("steps = 2")
    assert read("tiny") == {"steps": 1, "name": "tiny"}
    assert read("./tiny") == {"steps": 2, "name": "tiny"}
    assert path_of("tiny") == builtin / "tiny.toml"
    assert path_of("mine.toml") == Path("mine.toml")


def test_a_file_is_named_after_itself_unless_it_says_otherwise(builtin: Path) -> None:
    Path("mine.toml").write_text("steps = 2")
    Path("named.toml").write_text("name = 'other'")
    assert read("mine.toml") == {"steps": 2, "name": "mine"}
    assert read(Path("named.toml"))["name"] == "other"


@pytest.mark.parametrize("name", ["tinny", "recipes", "", "tiny.toml/x", "x" * 5000, "a\0b", "../tiny"])
def test_no_such_recipe(builtin: Path, name: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read(name)
    assert "is neither a built-in recipe nor a file" in caught.value.message or "cannot be read" in caught.value.message


def test_the_nearest_name_is_suggested(builtin: Path) -> None:
    with pytest.raises(RecipeError, match=r"'tinny' is neither .*; did you mean 'tiny'\?$"):
        read("tinny")
    with pytest.raises(RecipeError, match=r"'zzz' is neither .*; the built-in recipes are tiny\.$"):
        read("zzz")


@pytest.mark.parametrize("content", [b"steps = ", b"steps = 1\nsteps = 2", b"\xff\xfe"])
def test_what_is_not_toml(builtin: Path, content: bytes) -> None:
    Path("bad.toml").write_bytes(content)
    with pytest.raises(RecipeError, match=r"^bad.toml is not valid TOML: .*\.$"):
        read("bad.toml")


def test_the_built_in_recipes_can_be_read() -> None:
    for name in recipe_files.names_of_recipes():
        made, team = parse(read(name))
        check_team(made, team)
        assert made.name == name
        assert path_of(name).read_text("utf-8").startswith("# "), "its first line describes it"


# Fields that were added later


@dataclasses.dataclass(frozen=True)
class Inner:
    old: int = 1
    new: str = added(before="as ever", default="better")


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner = dataclasses.field(default_factory=Inner)
    limit: int | None = added(before=None, default=None)
    ways: int = added(before=2, default=2)


@pytest.mark.parametrize("table", [{}, {"inner": {}}, {"inner": {"old": 3}, "limit": 4}, {"inner": {"new": "better"}}])
def test_a_table_of_before_stands_for_the_values_of_before(table: dict[str, Any]) -> None:
    known = as_saved(Outer, table)
    assert known["ways"] == 2
    assert known["inner"]["new"] == table.get("inner", {}).get("new", "as ever")
    assert known.get("limit") == table.get("limit")
    assert as_saved(Outer, known) == known
    assert as_before(Outer, known).get("inner", {}) == table.get("inner", {}), "so that fingerprints stay"


def test_what_is_no_table_is_left_to_who_reads_it() -> None:
    assert as_saved(Outer, {"inner": 7})["inner"] == 7
    assert as_before(Outer, {"inner": 7}) == {"inner": 7}


def test_a_saved_recipe_lacks_no_field(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(dumps(recipe(), Team(workers=3)))
    assert parse(read_saved(path)) == (recipe(), Team(workers=3))
