"""Workers in step that die, are stopped and join, at random moments of random steps: one digest, and no step again."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from support.present import Present, Process, computed_again, merged_again, starts
from support.proved import missed, save
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

FEW_OVER_HOSTS = (
    Setting("gpt", 3, 2, kills=3, cuts=1),
    Setting("convnet", 5, 4, kills=2, stops=1, cuts=1),
)

OVER_HOSTS = (
    *(
        Setting(model, workers, hosts, kills=5, stops=1, cuts=1, joins=1)
        for hosts in (2, 4)
        for workers in WORKERS
        for model in ("gpt", "convnet")
    ),
    Setting("gpt", 2, 2, compiled=True, kills=4),
    Setting("convnet", 3, 2, compiled=True, kills=4),
    Setting("gpt", 5, 2, memory=True, kills=4),
    Setting("gpt", 8, 4, memory=True, kills=4),
)
"""What `ALL` is on one machine."""

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
    events = run.tape.events
    once = len(starts(events)) == alone_again and (alone_again or not merged_again(events))
    whole = bool(same and not back and once and not run.computed_too_often())
    return [
        {**asdict(fault), "held": whole and fault.again <= max(fault.most, fault.most_of_host)} for fault in run.faults
    ]


@pytest.mark.slow
@pytest.mark.parametrize("settings", [FEW, FEW_OVER_HOSTS], ids=["one machine", "hosts"])
def test_a_tenth_of_the_faults(settings: Sequence[Setting], tmp_path: Path) -> None:
    found = suffered(settings, tmp_path)
    assert missed(found) == []
    assert len(found) == sum(len(setting.kinds) for setting in settings)


@pytest.mark.prove
@pytest.mark.parametrize(
    ("name", "settings"), [("faults_in_step", ALL), ("faults_in_step_over_hosts", OVER_HOSTS)], ids=["machine", "hosts"]
)
def test_all_faults_in_step(name: str, settings: Sequence[Setting], tmp_path: Path) -> None:
    began = time.monotonic()
    found = suffered(settings, tmp_path)
    recovered = Counter(line["recovered"].partition(":")[0] for line in found if line["recovered"])
    more = sum(line["again"] > line["most"] for line in found)
    save(name, found, seed=SEED, began=began, recovered=dict(recovered), more_than_the_dead_had=more)
    assert missed(found) == []


def test_what_is_computed_beyond_the_microbatches_of_a_step_is_counted_but_that_of_the_dead() -> None:
    """No further than to the version that a team has started again from."""

    def told(kind: str, version: int, *microbatches: int) -> dict[str, Any]:
        return {"kind": kind, "version": version, "microbatches": microbatches}

    whole = [told("computed", version, *part) for version in (4, 5, 6) for part in ((0, 3), (3, 8))]
    assert computed_again(whole, 8) == {}
    assert computed_again([*whole, told("computed", 5, 3, 8)], 8) == {5: 5}
    assert computed_again([*whole, told("computed", 5, 3, 8), told("stood_in", 5, 3, 8)], 8) == {}
    started = [{"kind": "run_started", "version": version} for version in (0, 5)]
    assert computed_again([*started, *whole, told("computed", 4, 0, 1), *whole[2:]], 8) == {4: 1}


@pytest.mark.parametrize("machine", [True, False])
def test_a_worker_has_its_place_again_when_the_tape_tells_so(machine: bool) -> None:
    """On one machine it takes it, over hosts it is in a group; a loss is known by its process. Who leaves a team that
    becomes smaller has none.
    """
    there = Present(machine)
    back = {"kind": "took_place", "worker": 1} if machine else {"kind": "regrouped", "workers": [0, 1]}
    events = [
        {"kind": "run_started", "version": 0, "team": {"workers": 2}},
        *({"kind": "joined", "worker": worker, "host": "a", "pid": 7 + worker} for worker in (0, 1)),
        {"kind": "merged", "version": 1},
        {"kind": "left", "worker": 1, "why": "worker 1 (pid 8) was killed."},
        {"kind": "joined", "worker": 1, "host": "a", "pid": 9},
        back,
        {"kind": "resized", "workers": 1},
        {"kind": "regrouped", "workers": [0]},
        {"kind": "left", "worker": 1, "why": "the team goes on with 1 worker."},
    ]
    whole = []
    for place, event in enumerate(events):
        there.take(event, place)
        whole.append(there.whole)
    assert whole == [False, False, False, True, False, False, True, True, True, True]
    assert there.left[Process(1, "" if machine else "a", 8)] == 4
    assert there.seated == [0]
