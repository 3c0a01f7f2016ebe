"""Values of a recipe file that another place of it gives."""

from __future__ import annotations

from typing import Any

import pytest

from instep.cli.flags import merge
from instep.errors import RecipeError
from instep.recipe import dumps, parse
from instep.references import resolved


def table(**others: Any) -> dict[str, Any]:
    return {
        "model": {"use": "torch.nn:Linear", "args": {"in_features": 2, "out_features": 3}},
        "objective": "torch.nn.functional:mse_loss",
        "data": {"use": "torch:arange", "args": {"end": "${recipe.model.args.in_features}", "text": "a ${recipe.x}"}},
        **others,
    }


def test_a_reference_is_the_value_that_it_names() -> None:
    recipe, team = parse(table())
    assert recipe.data.args == {"end": 2, "text": "a ${recipe.x}"}
    assert "${recipe.model" not in dumps(recipe, team), "the run's file has the value"


def test_a_flag_sets_what_is_referred_to_and_what_refers() -> None:
    assert parse(merge(table(), [("recipe.model.args.in_features", "5")]))[0].data.args["end"] == 5
    assert parse(merge(table(), [("recipe.data.args.end", "7")]))[0].data.args["end"] == 7


def test_a_reference_to_nothing_is_one_sentence() -> None:
    with pytest.raises(RecipeError, match=r"refers to its own field 'model.args.folder', and has none; give it with"):
        resolved({"model": {"args": {}}, "data": ["${recipe.model.args.folder}"]})
    with pytest.raises(RecipeError, match=r"the recipe's field 'name' refers on to"):
        resolved({"data": "${recipe.name}", "name": "${recipe.seed}", "seed": 1})
