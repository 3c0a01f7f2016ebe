"""Workers in step that die, are stopped and join, at random moments of random steps: one digest, and no step again."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from support.proved import save
from support.step_faults import Run, Setting
from support.two_models import undisturbed

pytestmark = pytest.mark.processes

SEED = 16
WORKERS = 2, 3, 5, 8, 16

FEW = (
    Setting("convnet", 1, kills=2),
    Setting("gpt", 2, kills=5),
    Setting("convnet", 5, kills=7, stops=2),
    Setting("gpt", 3, kills=4, joins=2),
    Setting("convnet", 16, kills=4),
)
"""A tenth."""

ALL = (
    *(Setting(model, 1, kills=5) for model in ("gpt", "convnet")),
    *(
        setting
        for workers in WORKERS
        for setting in (
            Setting("gpt", workers, kills=12, stops=2, joins=2),
            Setting("convnet", workers, kills=20, stops=2, joins=2),
            Setting("gpt", workers, kills=4, compiled=True),
            Setting("gpt", workers, kills=4, memory=True),
        )
    ),
)


def suffered(settings: Sequence[Setting], folder: Path) -> list[dict[str, Any]]:
    """A line for each fault of these runs, see `lines_of`."""
    runs: dict[tuple[str, bool], list[Run]] = {}
    for number, setting in enumerate(settings):
        (place := folder / f"run-{number}").mkdir()
        run = Run(setting, place, f"{SEED}/{number}")
        run.suffer()
        runs.setdefault((setting.model, setting.compiled), []).append(run)
    found = []
    for (model, compiled), alike in runs.items():
        last = max(max(run.team.digests) for run in alike)
        alone = undisturbed(Setting(model, 1, compiled=compiled).files, last, folder / f"{model} {compiled}")
        found += [line for run in alike for line in lines_of(run, alone)]
    return found


def lines_of(run: Run, alone: Mapping[int, str]) -> list[dict[str, Any]]:
    """One for each fault of a run: `held`, whether it cost no more than it may, in a run of the one digest.

    alone: the digests of an undisturbed run at its checkpoints.
    """
    found = run.team.digests
    same = all(alone.get(version, digest) == digest for version, digest in found.items()) and found.keys() & alone
    back = [fault for fault in run.faults if fault.recovered.startswith("went back: ")]
    alone_again = sum(fault.recovered == "from memory" for fault in run.faults)
    once = len(run.starts()) <= run.team.resizes + alone_again and (alone_again or not run.again())
    whole = bool(same and not back and once and not run.computed_too_often())
    return [{**asdict(fault), "held": whole and fault.again <= fault.most} for fault in run.faults]


@pytest.mark.slow
def test_a_tenth_of_the_faults(tmp_path: Path) -> None:
    found = suffered(FEW, tmp_path)
    assert [line for line in found if not line["held"]] == []
    assert len(found) == sum(setting.kills + setting.stops + setting.joins for setting in FEW)


@pytest.mark.prove
def test_all_faults_in_step(tmp_path: Path) -> None:
    began = time.monotonic()
    found = suffered(ALL, tmp_path)
    recovered = Counter(line["recovered"].partition(":")[0] for line in found if line["recovered"])
    save("faults_in_step", found, seed=SEED, began=began, recovered=dict(recovered))
    assert [line for line in found if not line["held"]] == []
