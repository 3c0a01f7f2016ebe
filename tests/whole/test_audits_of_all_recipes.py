"""Audits of sound workers raise no alarm, whatever the recipe, and cost little more than what they repeat."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from instep.recipe import Recipe, Team, parse
from instep.recipe_files import read
from support import workloads, writers
from support.harness import train_here
from support.proved import missed, save

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("forked_pythons")]

SEED = 16

AUDITS = {
    "gpt": 400, "hf": 200, "distil": 200, "dpo": 200, "flow": 400, "vae": 400, "lora": 200, "sft": 200,
    "muon": 200, "gan": 400,
    "convnet": 3000, "sentences": 4000, "compiled": 400, "memory": 400, "written": 400,
}  # fmt: skip
"""How many of each recipe: those that are built in, and small ones with what could change a bit."""


BASED_ON = {"distil": "gpt", "lora": "hf", "sft": "hf"}
"""Recipes that need a run of another one."""


def recipe_of(name: str, bases: Path) -> Recipe:
    """Without what comes after training. `bases`: where the runs lie that some need."""
    if name in workloads.ALL and name != "gpt":
        return workloads.ALL[name]()
    if name in ("sentences", "compiled", "memory"):
        return workloads.gpt(compile=name == "compiled")
    if name == "written":
        return writers.recipe(writers.Forced)
    table = read(name)
    if name == "distil":
        table["objective"]["args"]["teacher"]["args"]["run"] = str(bases / "gpt")
    elif name in BASED_ON:
        table["model"]["args"]["folder"] = str(bases / "hf" / "artifacts" / "hf")
    recipe, _ = parse(table)
    return replace(recipe, evaluate_every=0, artifacts=None, sample_prompt="")


def bases_in(folder: Path) -> Path:
    """The runs that others are based on, by name."""
    for name in sorted(set(BASED_ON.values())):
        recipe = replace(parse(read(name))[0], steps=1, evaluate_every=0, evaluate_samples=8, sample_prompt="")
        train_here(recipe, Team(workers=1), folder / name)
    return folder


def audited(name: str, audits: int, folder: Path, bases: Path) -> dict[str, Any]:
    """One run, each of whose microbatches is looked at. `held`: no alarm was raised.

    extra: seconds that looking took, in percent of those of computing, where one microbatch in a hundred is looked at.
    checksums: seconds of checksums on the tape, in percent of the others in steps.
    """
    recipe = recipe_of(name, bases)
    recipe = replace(recipe, steps=math.ceil(audits / recipe.microbatches))
    team = Team(
        workers=3 if name in ("dpo", "vae", "convnet", "written") else 2,
        audit="100%",
        memory="60%" if name == "memory" else "",
        checkpoint_every=9999,
    )
    run = train_here(recipe, team, folder / name)
    told, audit = run.result, run.result["audit"]
    computed_s = sum(event["to_s"] - event["from_s"] for event in run.events if event["kind"] == "computed")
    train_s = next(event["train_s"] for event in reversed(run.events) if event["kind"] == "merged")
    return {
        "recipe": name, "workers": team.workers, "steps": recipe.steps, "audits": audit["looked_at"],
        "alarms": len(audit["wrong"]), "extra": round(audit["extra_s"] / computed_s, 3),
        "checksums": round(100 * told["checksum_s"] / (train_s - audit["extra_s"] / team.workers), 3),
        "held": (told["restarts"], audit["wrong"], audit["uncertain_since"]) == (0, [], recipe.steps),
    }  # fmt: skip


@pytest.mark.slow
def test_a_tenth_of_ten_thousand_audits_raises_no_alarm(tmp_path: Path) -> None:
    """Of the small recipes: each of the large ones is audited for a few steps with the tests of audits."""
    some = {"convnet": 300, "sentences": 400, "written": 300}
    cases = [audited(name, audits, tmp_path, tmp_path) for name, audits in some.items()]
    assert sum(case["audits"] for case in cases) >= 1000
    assert missed(cases) == []


@pytest.mark.prove
def test_ten_thousand_audits_raise_no_alarm(tmp_path: Path) -> None:
    began, bases = time.monotonic(), bases_in(tmp_path / "bases")
    cases = [audited(name, audits, tmp_path, bases) for name, audits in AUDITS.items()]
    assert sum(case["audits"] for case in cases) >= 10_000
    save("audits", cases, seed=SEED, began=began)
    assert missed(cases) == []
    of_gpt = cases[0]
    assert of_gpt["extra"] <= 1.1, "percent of the seconds of computing, at 1 %"
    assert of_gpt["checksums"] <= 1, "percent of the seconds in steps"
