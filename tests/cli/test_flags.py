from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from instep.budget import parse_budget
from instep.buffer_modes import parse as parse_modes
from instep.cli.flags import UsageError, merge, split, toml_value
from instep.clock.slow import parse_slow
from instep.clock.times import WorkerTimes
from instep.clock.units import duration_s
from instep.components import Component
from instep.errors import InstepError, RecipeError
from instep.recipe import parse
from instep.rules import UpdateRule
from instep.rules.presets import parse as parse_rule

pytestmark = pytest.mark.pure


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3), ("-3", -3), ("1_000", 1000), ("3e-4", 3e-4), (".5", 0.5), ("5.", 5.0), ("-.5e3", -500.0),
        ("true", True), ("True", True), ("False", False), ("[1, [2]]", [1, [2]]), ("{a = 1}", {"a": 1}),
        ('"3"', "3"), ("text", "text"), ("", ""), ("a b", "a b"), ("1\nx = 2", "1\nx = 2"), ("a:b", "a:b"),
        ("2026-01-01", "2026-01-01"), ("e5", "e5"), (".", "."), ("007", "007"),
    ],
)  # fmt: skip
def test_how_values_are_read(text: str, value: Any) -> None:
    assert toml_value(text) == value
    assert type(toml_value(text)) is type(value)


SCALARS = st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text("aé\"'\\ #=\n[]{}")


@given(st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4), max_leaves=6))
def test_every_toml_value_is_read(value: Any) -> None:
    text = tomli_w.dumps({"value": value}).partition("= ")[2].rstrip("\n")
    assert toml_value(text) == value


@given(st.text())
def test_any_text_is_some_value(text: str) -> None:
    assert isinstance(toml_value(text), (bool, int, float, str, list, dict))


NAMES = st.sampled_from(["recipe.steps", "recipe.model.args.width", "team.workers", "recipe.schedule.final"])


@given(st.dictionaries(NAMES, st.integers(1, 9)), st.lists(st.sampled_from(["train", "x.toml", "--out", "a.b", "-x"])))
def test_split_keeps_the_rest_in_order(settings: dict[str, int], rest: list[str]) -> None:
    tokens = [token for name, value in settings.items() for token in (f"--{name}", str(value))]
    assert split([*tokens, *rest]) == ([(name, str(value)) for name, value in settings.items()], rest)
    assert split([*rest, *tokens])[1] == rest


def test_nothing_is_a_flag_after_two_dashes() -> None:
    assert split(["train", "--", "--recipe.steps", "3"]) == ([], ["train", "--", "--recipe.steps", "3"])


def test_merge_tells_what_is_in_the_way() -> None:
    with pytest.raises(
        RecipeError, match=r"'recipe.model.args.width' is 3, and a part of it cannot be set; it must be a t"
    ):
        merge({"model": {"use": "m:M", "args": {"width": 3}}}, [("recipe.model.args.width.x", "1")])
    with pytest.raises(RecipeError, match=r"'team' is 3"):
        merge({"team": 3}, [("team.workers", "1")])
    with pytest.raises(RecipeError, match=r"'recipe.schedule' is 'wsd'"):
        merge({"schedule": "wsd"}, [("recipe.schedule.final", "1")])


def test_a_part_of_several_optimizers_is_refused_with_its_remedy() -> None:
    each = {"parameters": "*", "use": "torch.optim:SGD", "args": {"lr": 0.1}}
    for flag in ("recipe.optimizer.args.lr", "recipe.optimizer.use"):
        with pytest.raises(RecipeError, match=r"'recipe.optimizer' is a list of 2 tables.*--recipe\.schedule\.scale"):
            merge({"optimizer": [each, each]}, [(flag, "1")])


@pytest.mark.parametrize(
    "wrong",
    [
        lambda long: merge({"schedule": long}, [("recipe.schedule.final", "1")]),
        lambda long: parse({long: 1}),
        lambda long: parse({"schedule": {long: 1}}),
        lambda long: parse_budget(long, "the budget"),
        lambda long: parse_rule(long),
        lambda long: parse_rule(f"bounded_staleness:{long}"),
        lambda long: parse_rule(f"synchronous,{long}"),
        lambda long: parse_rule(f"synchronous,{long}=1"),
        lambda long: UpdateRule(quorum=long),
        lambda long: parse_slow(long),
        lambda long: parse_slow(f"1:{long}x"),
        lambda long: WorkerTimes.from_text(long),
        lambda long: duration_s(long, "the time"),
        lambda long: Component(f"json:{long}").load(),
        lambda long: Component(f"{long}:x").load(),
        lambda long: Component.of({"use": "json:loads", "args": long}),
        lambda long: parse_modes({"x": long}),
    ],
)
def test_a_long_value_is_cut_in_its_sentence(wrong: Callable[[str], Any]) -> None:
    with pytest.raises(InstepError) as raised:
        wrong("ab" * 5_000)
    assert len(raised.value.message) < 1_500


def test_usage_errors_are_instep_errors() -> None:
    with pytest.raises(UsageError, match=r"is given twice"):
        split(["--team.keep=1", "--team.keep", "2"])
