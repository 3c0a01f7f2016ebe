"""The loss scale in a recipe: what it may be, and what that says of a result."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import instep
from instep.cli.flags import UsageError, merge
from instep.errors import CheckpointError, RecipeError
from instep.loss_scale import LossScale
from instep.recipe import dumps, parse
from instep.record import events
from instep.tables import as_before, as_saved
from instep.worker.scaler import Scaler
from support.regression import regression

pytestmark = pytest.mark.pure


def test_float16_has_a_scale_with_the_defaults_of_torchs_scaler() -> None:
    recipe = regression(precision="float16")
    assert recipe.loss_scale == instep.LossScale(init=65536.0, growth=2.0, backoff=0.5, growth_interval=2000)
    assert regression().loss_scale is None


def test_a_recipe_file_sets_it_and_the_saved_one_reads_back() -> None:
    table = regression().to_table() | {
        "model": {"use": "torch.nn:Linear"}, "objective": {"use": "torch:sum"}, "data": {"use": "torch:ones"},
        "optimizer": {"use": "torch.optim:SGD"}, "precision": "float16", "loss_scale": {"init": 1024, "backoff": 0.25},
    }  # fmt: skip
    recipe, team = parse(table)
    assert recipe.loss_scale == LossScale(init=1024.0, backoff=0.25)
    assert "[loss_scale]" in dumps(recipe, team)


def test_flags_set_each_of_its_fields() -> None:
    table = merge({}, [("recipe.loss_scale.init", "1024"), ("recipe.loss_scale.growth_interval", "5")])
    assert table == {"loss_scale": {"init": 1024, "growth_interval": 5}}
    assert merge(table, [("recipe.loss_scale", "none")]) == {}
    with pytest.raises(UsageError, match=r"did you mean --recipe.loss_scale.growth_interval\?"):
        merge({}, [("recipe.loss_scale.growth_intervall", "5")])


def test_other_precisions_keep_their_fingerprints() -> None:
    table = regression().to_table()
    assert "loss_scale" not in table
    assert as_saved(instep.Recipe, as_before(instep.Recipe, table))["precision"] == "float32"


def test_every_field_decides_the_result() -> None:
    recipe, changed = regression(precision="float16"), {
        "init": 2.0**8, "growth": 4.0, "backoff": 0.25, "growth_interval": 10, "least": 1.0,
    }  # fmt: skip
    assert changed.keys() == {each.name for each in dataclasses.fields(LossScale)}
    fingerprints = {recipe.fingerprint()}
    for name, value in changed.items():
        assert recipe.loss_scale is not None
        scale = dataclasses.replace(recipe.loss_scale, **{name: value})
        fingerprints.add(dataclasses.replace(recipe, loss_scale=scale).fingerprint())
    assert len(fingerprints) == len(changed) + 1


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"init": 65000.0}, "'loss_scale.init' is 65000; it must be a power of two, such as 65536"),
        ({"init": 0.0}, "'loss_scale.init' is 0; it must be a power of two"),
        ({"init": float("inf")}, "'loss_scale.init' is inf; it must be a power of two"),
        ({"least": -1.0}, "'loss_scale.least' is -1; it must be a power of two"),
        ({"growth": 1.5}, "'loss_scale.growth' is 1.5; it must be a power of two"),
        ({"growth": 0.5}, "'loss_scale.growth' is 0.5; it must be above 1"),
        ({"backoff": 1.0}, "'loss_scale.backoff' is 1; it must be below 1"),
        ({"growth_interval": 0}, "'loss_scale.growth_interval' is 0; it must be at least 1"),
        ({"init": 2.0**-20}, "the first must be at least the second"),
        ({"init": 2.0**127}, "both lie from 2^-126 to 2^126"),
        ({"init": "many"}, "'loss_scale.init' is 'many'"),
    ],
)
def test_what_it_cannot_be_is_refused_in_a_sentence(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(told)):
        LossScale(**fields)


def test_a_scale_without_float16_is_refused() -> None:
    told = "'recipe.loss_scale' is given and 'recipe.precision' is 'bfloat16', whose gradients need none; leave it out"
    with pytest.raises(RecipeError, match=re.escape(told)):
        regression(precision="bfloat16", loss_scale=LossScale())
    with pytest.raises(RecipeError, match=r"'recipe.precision' is 'half'; it must be one of .*'float16'"):
        regression(precision="half")


# ------------------------------------------------------------------------------------------------------------ its state


def test_without_one_nothing_is_scaled() -> None:
    scaler = Scaler(None)
    scaler.made(finite=False)
    assert (scaler.value, scaler.scales, scaler.yields()) == (1.0, False, False)


@given(
    st.lists(st.booleans(), max_size=60), st.integers(1, 5), st.sampled_from([2.0, 8.0]), st.sampled_from([0.5, 0.25])
)
def test_a_state_that_was_saved_goes_on_the_same(
    finite: list[bool], interval: int, growth: float, backoff: float
) -> None:
    how = LossScale(init=2.0**10, growth=growth, backoff=backoff, growth_interval=interval, least=2.0**-5)
    scaler, values = Scaler(how), list[float]()
    for each in finite:
        other = Scaler(how)
        other.load(scaler.state()["loss_scale"])
        scaler = other
        scaler.made(finite=each)
        values.append(scaler.value)
    straight = Scaler(how)
    for each, value in zip(finite, values, strict=True):
        straight.made(finite=each)
        assert straight.value == value >= how.least


def test_of_gradients_on_their_way_with_one_scale_only_the_first_lowers_it() -> None:
    scaler = Scaler(LossScale(init=2.0**10))
    for _ in range(3):
        scaler.made(finite=False, used=2.0**10)
    assert scaler.value == 2.0**9
    scaler.made(finite=False, used=2.0**9)
    assert scaler.value == 2.0**8


def test_the_least_scale_does_not_yield_and_does_not_fall() -> None:
    scaler = Scaler(LossScale(init=2.0, least=1.0))
    assert scaler.yields()
    scaler.made(finite=False)
    assert (scaler.value, scaler.yields(), scaler.yields(2.0)) == (1.0, False, True)
    scaler.made(finite=False)
    assert scaler.value == 1.0


@pytest.mark.parametrize("state", [{"scale": 3.0, "good": 0}, {"scale": 2.0}, {"scale": -2.0, "good": 0}, 5])
def test_a_state_that_is_none_is_refused(state: Any) -> None:
    with pytest.raises(CheckpointError, match="of the loss scale in the checkpoint"):
        Scaler(LossScale()).load(state)


def test_both_kinds_of_updates_tell_of_it() -> None:
    for kind in (events.MergedEvent, events.MergedByServerEvent):
        assert {"loss_scale", "overflows"} <= set(kind.__struct_fields__)
