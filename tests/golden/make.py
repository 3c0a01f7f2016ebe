"""Makes what lies beside it: ``python tests/golden/make.py digests`` or ``... runs``, from the project's root.

`digests.json` holds, for each kind of processor, the digests that later versions must give; ``digests`` adds those of
the present one. `folders/` holds a run folder for each rule, interrupted half way, that later versions must resume and
replay; ``runs`` makes them anew, which nobody has a reason to do but a change of the digests that CHANGELOG.md names.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from instep.cli.flags import merge
from instep.recipe import Recipe, Team, parse
from instep.recipe_files import names_of_recipes, read, read_saved
from instep.record import tape
from instep.rules import UpdateRule
from instep.rules import presets as p
from support.harness import Client, Outcome, train_here
from support.workloads import ALL as WORKLOADS

HERE = Path(__file__).parent
RUNS = HERE / "folders"
DIGESTS = HERE / "digests.json"

RULES: dict[str, tuple[UpdateRule, str]] = {
    "lockstep": (p.synchronous(), "lockstep"),
    "synchronous": (p.synchronous(), "server"),
    "backup_workers": (p.backup_workers(1), "server"),
    "bounded_staleness": (p.bounded_staleness(2), "server"),
    "softsync": (p.softsync(2), "server"),
    "asynchronous": (p.asynchronous(), "server"),
    "delay_compensated": (p.delay_compensated(), "server"),
    "local_sgd": (p.local_sgd(2), "server"),
    "post_local_sgd": (p.post_local_sgd(2, after=2), "server"),
    "diloco": (p.diloco(2), "server"),
    "async_diloco": (p.async_diloco(2, buffer=4), "server"),
}
"""Rule and engine of each run folder."""

STEPS = 20
"""Of the built-in recipes."""


def processor() -> str:
    """What the digests hang on: torch's version, the processor's vendor, the kernels that torch takes on it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    vendor = next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), platform.machine())
    return f"torch {torch.__version__.split('+')[0]}, {vendor}, {torch.backends.cpu.get_cpu_capability()}"


def small(rule: UpdateRule) -> Recipe:
    """The recipe of a run folder."""
    return Recipe(
        name="golden", model="golden.models:Net", objective="golden.models:loss", data="golden.models:data",
        optimizer={"use": "instep.optimizers:adamw", "args": {"lr": 0.01}},
        rule=rule, batch=16, microbatches=4, steps=12, clip_norm=1.0, evaluate_every=3,
    )  # fmt: skip


BASED_ON = {"distil": "gpt", "lora": "hf", "sft": "hf"}
"""Recipes that need a run of another one."""


def built_in(name: str, teacher: Path) -> Recipe:
    """A built-in recipe at `STEPS` steps. `teacher`: a run of what it is based on."""
    table = merge(read(name), [("recipe.steps", str(STEPS)), ("recipe.ragged", "spread")])  # the cut of before
    if name == "distil":
        table["objective"]["args"]["teacher"]["args"]["run"] = str(teacher)
    elif name in BASED_ON:
        table["model"]["args"]["folder"] = str(teacher / "artifacts" / "hf")
    return parse(table)[0]


def interrupted(name: str, path: Path) -> Outcome:
    """A run under a rule with 2 workers, stopped after its fourth update."""
    rule, engine = RULES[name]

    def see(event: dict[str, Any]) -> None:
        if event["kind"] == "merged" and event["version"] == 4:
            client.ask_to_stop()

    client = Client(see)
    return train_here(small(rule), Team(workers=2, checkpoint_every=2, keep=2, engine=engine), path, client=client)


def resumed(name: str, path: Path) -> Outcome:
    """A copy of a run folder, at `path`, trained to its end as its own files say."""
    shutil.copytree(RUNS / name, path)
    return train_here(*parse(read_saved(path / "recipe.toml")), path, resume=True)


def _runs() -> None:
    shutil.rmtree(RUNS, ignore_errors=True)
    found: dict[str, Any] = {}
    for name, (rule, _) in RULES.items():
        run = interrupted(name, RUNS / name)
        assert run.result["interrupted"], name
        (RUNS / name / "result.json").unlink(missing_ok=True)
        shutil.rmtree(RUNS / name / "logs", ignore_errors=True)
        with tempfile.TemporaryDirectory() as folder:
            ends = {resumed(name, Path(folder, str(i))).digest for i in range(2)} if rule.lockstep else {None}
        assert len(ends) == 1, name
        versions = [event["version"] for event in tape.read(RUNS / name / "tape.jsonl") if event["kind"] == "merged"]
        found[name] = {"versions": len(versions), "stopped": run.digest, "ended": ends.pop()}
        print(name, found[name], flush=True)
    _write("runs", found)


def _digests() -> None:
    with tempfile.TemporaryDirectory() as folder:
        team = Team(workers=2, checkpoint_every=1, keep=0)
        workloads = {
            name: list(train_here(make(), team, Path(folder, name)).digests.values())
            for name, make in WORKLOADS.items()
        }
        _write("workloads", workloads)
        recipes = {}
        for name in sorted(names_of_recipes(), key=BASED_ON.__contains__):
            recipe = built_in(name, Path(folder, f"{BASED_ON.get(name)}-run"))
            recipes[name] = train_here(recipe, Team(workers=2), Path(folder, f"{name}-run")).digest
            print(name, recipes[name], flush=True)
        _write("recipes", {"python": platform.python_version(), **recipes})


def _write(part: str, found: Any) -> None:
    known = json.loads(DIGESTS.read_text()) if DIGESTS.exists() else {}
    known.setdefault(processor(), {})[part] = found
    DIGESTS.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    {"digests": _digests, "runs": _runs}[sys.argv[1]]()
