"""Digests and run folders of before: later versions give, resume and replay them. A line of CHANGELOG.md is the only
way to change one. `tests/golden/make.py` made them.
"""

from __future__ import annotations

import functools
import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from golden import make
from instep.recipe import Team, parse
from instep.recipe_files import names_of_recipes, read_saved
from instep.record.result import Replayed
from support.harness import train_here
from support.serving import replayed
from support.workloads import ALL as WORKLOADS

pytestmark = pytest.mark.processes

KNOWN: dict[str, dict[str, Any]] = json.loads(make.DIGESTS.read_text())


def golden(part: str) -> Any:
    """What is known for this kind of processor."""
    torch.set_num_threads(1)
    if make.processor() not in KNOWN:
        pytest.skip(f"digests are known for {' and '.join(KNOWN)}, and this is {make.processor()}")
    return KNOWN[make.processor()][part]


@pytest.mark.parametrize("name", WORKLOADS)
def test_the_workloads_have_the_digests_of_before(name: str, tmp_path: Path) -> None:
    expected = golden("workloads")[name]
    run = train_here(WORKLOADS[name](), Team(workers=3, checkpoint_every=1, keep=0), tmp_path / "run")
    assert list(run.digests.values()) == expected


@pytest.mark.parametrize("name", make.RULES)
def test_a_run_of_before_is_replayed(name: str) -> None:
    known = golden("runs")[name]
    recipe, _ = parse(read_saved(make.RUNS / name / "recipe.toml"))
    found = replayed(recipe, make.RUNS / name)
    assert found == Replayed(known["stopped"], known["stopped"], known["versions"], "")


@pytest.mark.parametrize("name", make.RULES)
def test_a_run_of_before_is_resumed(name: str, tmp_path: Path) -> None:
    known = golden("runs")[name]
    run = make.resumed(name, tmp_path / "run")
    assert run.result["steps"] == 12
    assert replayed(parse(read_saved(run.path / "recipe.toml"))[0], run.path).same
    if known["ended"] is not None:
        assert run.digest == known["ended"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Runs of recipes that others are based on, each once."""

    @functools.cache
    def run_of(name: str) -> Path:
        path = tmp_path_factory.mktemp("base") / name
        train_here(make.built_in(name, path), Team(workers=2), path)
        return path

    return run_of


@pytest.mark.slow
@pytest.mark.parametrize("name", names_of_recipes())
def test_the_recipes_have_the_digests_of_before(name: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    known = golden("recipes")
    if known["python"] != platform.python_version():
        pytest.skip(f"some train on the source of Python {known['python']}, and this is {sys.version.split()[0]}")
    if name == "lora":
        pytest.importorskip("peft")
    base = bases(make.BASED_ON[name]) if name in make.BASED_ON else tmp_path
    run = train_here(make.built_in(name, base), Team(workers=1), tmp_path / "run")
    assert run.digest == known[name]
