"""`instep check` on recipes that are broken, each in one way: what it refutes, where, and what it says of the cause."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from instep.equivalences.proving import prove
from support import broken_recipes
from support.broken_recipes import Broken
from support.kinds import quick

pytestmark = pytest.mark.processes

ALL = {each.name: each for each in broken_recipes.ALL}

QUICK = (
    "a counter in an attribute", "BatchNorm", "a mean over some targets", "the order of first reading",
    "a value that a recompute does not see", "momentum kept aside",
)  # fmt: skip


@pytest.mark.parametrize("name", quick(ALL, *QUICK))
def test_a_broken_recipe_is_diagnosed(name: str, tmp_path: Path) -> None:
    broken: Broken = ALL[name]
    found, _ = prove(broken.recipe(), [broken.refuted], tmp_path)
    verdicts = {each.name: each for each in found}
    refuted = verdicts[broken.refuted]
    assert refuted.verdict == "refuted", verdicts
    assert re.search(broken.says, refuted.why), refuted.why
    for field, value in broken.where.items():
        assert getattr(refuted.place, field) == value, refuted.place
