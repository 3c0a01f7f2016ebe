"""Whatever befalls machines in the midst of a run, it ends with the digest of one that nothing happened to."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from support.hosts import Hosts
from support.machine_faults import FAULTS, HOSTS, NAMED_S, Campaign, Fault
from support.proved import save

pytestmark = pytest.mark.processes

SEED = 15


def suffered(folder: Path, count: int, lease_s: float) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The faults of a campaign, and what else there is to tell of it."""
    with Hosts(HOSTS, folder) as hosts:
        campaign = Campaign(hosts, SEED, count, lease_s=lease_s, note=lambda fault: print(fault, flush=True))
        result = campaign.run()
        undisturbed = campaign.undisturbed(result["steps"])
    more = {"lease_s": lease_s, "steps": result["steps"], "digest": result["digest"]}
    return [asdict(fault) for fault in campaign.faults], {**more, "undisturbed": undisturbed["digest"]}


@pytest.mark.slow
def test_a_run_that_suffers_four_faults_of_machines_has_the_digest_of_one_that_suffers_none(tmp_path: Path) -> None:
    faults, found = suffered(tmp_path, 4, 2.0)
    assert found["digest"] == found["undisturbed"]
    assert [fault for fault in faults if fault["before_checkpoint"]] == []
    assert any(fault["kind"].startswith("agent 0") for fault in faults)


@pytest.mark.prove
def test_all_faults(tmp_path: Path) -> None:
    began = time.monotonic()
    faults, found = suffered(tmp_path, FAULTS, 5.0)
    same = found["digest"] == found["undisturbed"]
    for fault in faults:
        in_time = fault["named_after_s"] is None or fault["named_after_s"] <= NAMED_S
        fault["held"] = same and in_time and not fault["before_checkpoint"]
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
