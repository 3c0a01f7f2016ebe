"""`instep check` proves every built-in recipe, in a minute each; of two that load a library's models, in two."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from instep.recipe_files import names_of_recipes
from support.proved import save

pytestmark = pytest.mark.processes

LIMIT_S = {"hf": 120.0, "distil": 120.0, "lora": 120.0, "sft": 120.0}


def instep(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "instep", *words], capture_output=True, text=True, check=False)


def checked(name: str, bases: Path) -> dict[str, Any]:
    """As a person does it. `held`: nothing is refuted, in time. `bases`: where the runs lie that some need."""
    given = ["--recipe.objective.args.teacher.args.run", str(bases / "gpt")] if name == "distil" else []
    given += ["--recipe.model.args.folder", str(bases / "hf" / "artifacts" / "hf")] if name in ("lora", "sft") else []
    began = time.monotonic()
    done = instep("check", name, "--json", *given)
    took_s, found = time.monotonic() - began, json.loads(done.stdout)
    verdicts = {each["name"]: each["verdict"] for each in found["equivalences"]}
    return {
        "recipe": name, "seconds": round(took_s, 1), "cpu_seconds": round(found["cpu_s"], 1),
        "proved": sum(verdict == "proved" for verdict in verdicts.values()),
        "not_run": [each for each, verdict in verdicts.items() if verdict == "not run"],
        "refuted": [each for each, verdict in verdicts.items() if verdict == "refuted"],
        "held": done.returncode == 0 and bool(found["proved"]) and took_s < LIMIT_S.get(name, 60.0),
    }  # fmt: skip


@pytest.mark.slow
def test_a_built_in_recipe_is_proved(tmp_path: Path) -> None:
    """However long that takes here."""
    case = checked("vae", tmp_path)
    assert (case["refuted"], case["not_run"]) == ([], ["memory"])  # for want of repeated blocks
    assert case["proved"] == 9


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "sft"])
def test_a_recipe_on_a_pretrained_model_is_proved_with_the_folder_that_recipe_hf_leaves(
    name: str, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    based_on(tmp_path, "hf")
    case = checked(name, tmp_path)
    assert (case["refuted"], case["not_run"]) == ([], [])


def based_on(bases: Path, *names: str) -> None:
    """Runs that other recipes go on with, as short as can be."""
    short = ["--steps", "2", "--recipe.evaluate_samples", "8", "--recipe.sample_length", "0"]
    for name in names:
        assert instep("train", name, "--out", str(bases / name), *short).returncode == 0


@pytest.mark.prove
def test_every_built_in_recipe_is_proved_in_time(tmp_path: Path) -> None:
    began = time.monotonic()
    based_on(tmp_path, "gpt", "hf")
    cases = [checked(name, tmp_path) for name in names_of_recipes()]
    save("checks", cases, seed=0, began=began)
    assert [case for case in cases if not case["held"]] == []
