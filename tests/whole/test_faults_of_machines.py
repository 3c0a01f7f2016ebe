"""Whatever befalls machines in the midst of a run, it ends with the digest of one that nothing happened to."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from support.hosts import Hosts
from support.machine_faults import FAULTS, HOSTS, NAMED_S, Campaign, Fault
from support.patience import LONG_S
from support.processes import MODULE, wait_until
from support.proved import save

pytestmark = pytest.mark.processes

SEED = 15
BUSY, MINUTES = 8, 10
"""Workers under load, and for how long."""


def suffered(folder: Path, count: int, lease_s: float) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The faults of a campaign, and what else there is to tell of it."""
    with Hosts(HOSTS, folder) as hosts:
        campaign = Campaign(hosts, SEED, count, lease_s=lease_s)
        result = campaign.run()
        undisturbed = campaign.undisturbed(result["steps"])
    more = {"lease_s": lease_s, "steps": result["steps"], "digest": result["digest"]}
    return [{**asdict(fault), "lost_none": fault.lost_none} for fault in campaign.faults], {
        **more,
        "undisturbed": undisturbed["digest"],
    }


@pytest.mark.slow
def test_a_run_that_suffers_four_faults_of_machines_has_the_digest_of_one_that_suffers_none(tmp_path: Path) -> None:
    faults, found = suffered(tmp_path, 4, 2.0)
    assert found["digest"] == found["undisturbed"]
    assert [fault for fault in faults if not fault["lost_none"]] == []
    assert any(fault["kind"].startswith("agent 0") for fault in faults)


HANGS = """
def pause(gradient):
    while os.path.exists("hang"):
        open("hangs", "w").close()
        time.sleep(0.1)
    time.sleep(0.05)
"""


@pytest.mark.slow
def test_a_first_host_that_vanishes_while_nothing_is_on_its_way_is_missed_and_no_step_is_lost(tmp_path: Path) -> None:
    """Its worker computes, and the other one waits: neither has sent what the other has not acknowledged."""
    with Hosts(2, tmp_path) as hosts:
        run = Campaign(hosts, SEED, 0, lease_s=2.0, workers=2)
        hosts.put({"mymodel.py": MODULE + HANGS})
        run.begin()
        first = hosts[0].path()
        (first / "hang").touch()
        wait_until((first / "hangs").exists, LONG_S, "a worker that hangs")
        time.sleep(1)  # until all is acknowledged
        told = run.told("merged")[-1]["version"]
        hosts.cut(0)
        assert run.commands[1].ends() == 1
        found = re.search(r"what its workers had, version (\d+), is in", run.commands[1].err)
        assert found, run.commands[1].err
        assert int(found[1]) >= told


@pytest.mark.prove
def test_all_faults(tmp_path: Path) -> None:
    began = time.monotonic()
    faults, found = suffered(tmp_path, FAULTS, 5.0)
    same = found["digest"] == found["undisturbed"]
    for fault in faults:
        in_time = fault["named_after_s"] is None or fault["named_after_s"] <= NAMED_S
        fault["held"] = same and in_time and fault.pop("lost_none")
    save("faults_of_machines", faults, seed=SEED, began=began, **found)
    assert [fault for fault in faults if not fault["held"]] == []
    assert len(faults) == FAULTS


def test_a_fault_is_told_of_by_what_it_cost() -> None:
    """Steps from before the newest checkpoint count apart: of them none may be done again."""
    campaign = object.__new__(Campaign)
    campaign._at = 3
    kinds = [("run_started", 0), ("merged", 1), ("checkpointed", 1), ("merged", 2), ("run_started", 0), ("merged", 1)]
    campaign._tape = type("Told", (), {"events": [{"kind": kind, "version": version} for kind, version in kinds]})
    campaign._count(fault := Fault(0, "worker killed", 1, 0.0))
    assert (fault.starts, fault.again, fault.before_checkpoint) == ([0], 2, 1)


@pytest.mark.parametrize(("start", "none"), [(2, True), (1, True), (0, False)])
def test_of_a_first_agent_that_is_lost_the_step_on_its_way_may_be_done_again(start: int, none: bool) -> None:
    campaign = object.__new__(Campaign)
    campaign._at = 3
    kinds = [("run_started", 0), ("merged", 1), ("merged", 2), ("run_started", start), ("merged", start + 1)]
    events = [{"kind": kind, "version": version, "t_s": at / 10} for at, (kind, version) in enumerate(kinds)]
    campaign._tape = type("Told", (), {"events": events})
    campaign._count(fault := Fault(0, "agent 0: host killed", 0, 0.0))
    assert (fault.again, fault.lost_none, fault.commit_s) == (2 - start, none, 0.4)


@contextmanager
def busy_loops() -> Iterator[None]:
    """One on each core."""
    command = ["setpriv", "--pdeathsig", "KILL", sys.executable, "-S", "-c", "while True: pass"]
    loops = [subprocess.Popen(command) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def under_load(folder: Path, parts: int, part_s: float) -> list[dict[str, Any]]:
    """So many parts of a run on hosts that have too much to do: the steps of each, and who was lost so far."""
    with Hosts(2, folder) as hosts, busy_loops():
        run = Campaign(hosts, SEED, 0, lease_s=5.0, workers=BUSY)
        run.begin()
        cases = []
        for part in range(parts):
            before = len(run.told("merged"))
            time.sleep(part_s)
            steps, lost = len(run.told("merged")) - before, [event["why"] for event in run.told("left")]
            cases.append({"part": part, "seconds": part_s, "steps": steps, "lost": lost, "held": not lost})
        result = run.end()
        assert result["restarts"] == 0
        assert result["digest"] == run.undisturbed(result["steps"])["digest"]
        return cases


@pytest.mark.slow
def test_who_is_slow_under_load_is_not_lost(tmp_path: Path) -> None:
    assert [case for case in under_load(tmp_path, 1, 20.0) if not case["held"]] == []


@pytest.mark.prove
def test_who_is_slow_under_load_is_not_lost_for_minutes(tmp_path: Path) -> None:
    began = time.monotonic()
    cases = under_load(tmp_path, MINUTES, 60.0)
    save("hosts_under_load", cases, seed=SEED, began=began, workers=BUSY, loops=os.cpu_count())
    assert [case for case in cases if not case["held"]] == []
