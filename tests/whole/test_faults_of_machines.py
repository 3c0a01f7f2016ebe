"""Whatever befalls machines in the midst of a run, it ends with the digest of one that nothing happened to."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from support.fault_kinds import FAULTS, Fault
from support.hosts import Hosts
from support.machine_faults import HOSTS, NAMED_S, Campaign
from support.patience import LONG_S
from support.processes import MODULE, wait_until
from support.proved import save
from support.server_faults import ServedCampaign, audit

pytestmark = pytest.mark.processes

SEED = 15
FEW = 10
BUSY, MINUTES = 8, 10
"""Workers under load, and for how long."""


def suffered(folder: Path, count: int, lease_s: float, **more: Any) -> tuple[list[Fault], dict[str, Any]]:
    """The faults of a campaign in step, and what else there is to tell of it."""
    with Hosts(HOSTS, folder) as hosts:
        campaign = Campaign(hosts, SEED, count, lease_s=lease_s, **more)
        result = campaign.run()
        undisturbed = campaign.undisturbed(result["steps"])["digest"]
    found = {"lease_s": lease_s, "steps": result["steps"], "digest": result["digest"], "undisturbed": undisturbed}
    same = result["digest"] == undisturbed
    return campaign.faults, {**found, **more, "all_hosts": campaign.patient, "whole": same}


def suffered_by_a_server(folder: Path, count: int, lease_s: float) -> tuple[list[Fault], dict[str, Any]]:
    """As `suffered`, under a rule with a server."""
    with Hosts(HOSTS, folder) as hosts:
        campaign = ServedCampaign(hosts, SEED, count, lease_s=lease_s)
        result = campaign.run()
        found = {name: result[name] for name in ("rule", "steps", "digest")}
        found |= {
            "updates": result["versions"],
            "lease_s": lease_s,
            "replayed": campaign.replayed(),
            **campaign.audit(),
        }
    whole = found["replayed"] and not found["merged_twice"] and not found["lost"]
    return campaign.faults, {**found, "whole": whole}


@pytest.mark.slow
def test_a_run_that_suffers_four_faults_of_machines_has_the_digest_of_one_that_suffers_none(tmp_path: Path) -> None:
    faults, found = suffered(tmp_path, 4, 2.0)
    assert found["digest"] == found["undisturbed"]
    assert [fault for fault in faults if not fault.lost_none] == []
    assert any(fault.kind.startswith("agent 0") for fault in faults)


@pytest.mark.slow
def test_under_a_server_nothing_is_lost_or_merged_twice_by_two_faults_of_machines(tmp_path: Path) -> None:
    faults, found = suffered_by_a_server(tmp_path, 2, 2.0)
    assert found["whole"], found
    assert [fault for fault in faults if not fault.lost_none] == []


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
        run = Campaign(hosts, SEED, 0, lease_s=5.0, workers=2, give_up_s=5.0)
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


def prove(name: str, faults: Sequence[Fault], found: Mapping[str, Any], began: float, held: bool = True) -> None:
    """Saves a line for each fault: whether it cost nothing and somebody was named in time, in a run that is whole."""
    lines = []
    for fault in faults:
        in_time = fault.named_after_s is None or fault.named_after_s <= NAMED_S
        lines.append({**asdict(fault), "held": held and found["whole"] and in_time and fault.lost_none})
    save(name, lines, seed=SEED, began=began, **found)
    assert [line for line in lines if not line["held"]] == []


@pytest.mark.prove
def test_all_faults(tmp_path: Path) -> None:
    began = time.monotonic()
    faults, found = suffered(tmp_path, FAULTS, 5.0)
    prove("faults_of_machines", faults, found, began)
    assert len(faults) == FAULTS


@pytest.mark.prove
def test_faults_where_hosts_are_waited_for(tmp_path: Path) -> None:
    """Each start of the team has workers on all hosts."""
    began = time.monotonic()
    faults, found = suffered(tmp_path, FEW, 5.0, when_lost="wait")
    prove("faults_of_hosts_that_wait", faults, found, began, held=found["all_hosts"])
    assert len(faults) == FEW


@pytest.mark.prove
def test_faults_under_a_server(tmp_path: Path) -> None:
    began = time.monotonic()
    faults, found = suffered_by_a_server(tmp_path, FEW, 5.0)
    prove("faults_under_a_server", faults, found, began)
    assert len(faults) == FEW


def test_pieces_that_were_merged_twice_or_lost_are_found() -> None:
    """A restart undoes what came after its version."""

    def merged(version: int, piece: int) -> dict[str, Any]:
        return {"kind": "merged", "version": version, "contributions": [{"piece": piece}]}

    def released(worker: int, piece: int) -> dict[str, Any]:
        return {"kind": "released", "worker": worker, "piece": piece}

    again = {"kind": "run_started", "version": 1}
    begun = [released(0, 0), released(1, 1), merged(1, 0), released(0, 2), merged(2, 1), released(1, 3)]
    assert audit(begun) == {"merged_twice": [], "lost": []}
    assert audit([*begun, merged(3, 1)]) == {"merged_twice": [1], "lost": []}
    assert audit([*begun, merged(3, 2), released(0, 5)]) == {"merged_twice": [], "lost": [4]}
    assert audit([*begun, again, released(0, 1), released(1, 2), merged(2, 1)]) == {"merged_twice": [], "lost": []}
    assert audit([*begun, again, released(0, 2), released(1, 3)]) == {"merged_twice": [], "lost": [1]}


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
    campaign._count(fault := Fault(0, "agent 0: host killed", 0, 0.0, most_again=1))
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
