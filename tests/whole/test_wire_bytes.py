"""`wire_bytes` are the bytes that the interfaces of hosts count."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from instep.recipe import Team
from instep.record.tape import read
from support import workloads
from support.harness import train_here
from support.hosts import Hosts
from support.over_hosts import trained
from support.proved import save

pytestmark = pytest.mark.processes

WITHIN = 0.02
WORK = """
    --recipe.batch 2 --recipe.microbatches 2 --recipe.model.args.width 512 --recipe.model.args.heads 8
    --recipe.model.args.context 16 --recipe.data.args.context 16 --recipe.evaluate_samples 2 --recipe.sample_length 0
"""
"""Much to send, and little to compute."""

RULES = {
    "synchronous": (2, 12),
    "local_sgd:2,wire=int4": (14, 132),
    "async_diloco:2,wire=int8": (8, 84),
}
"""Each with the steps that take more than 50 and 500 MB. The first is lockstep, the others have a server."""


def compared(hosts: Hosts, rule: str, steps: int) -> dict[str, Any]:
    """A run's bytes beside those of the interfaces, whose packets have heads, and acknowledge what they receive."""
    folder = f"run-{time.monotonic_ns()}"
    before = [host.traffic() for host in hosts]
    how = ["--rule", rule, "--steps", str(steps), "--recipe.evaluate_every", "0", "--team.checkpoint_every", str(steps)]
    commands = trained(hosts, "--workers", "2", "--out", folder, *how, *WORK.split())
    assert [command.ends(1000) for command in commands] == [0, 0], commands[0].err
    after = [host.traffic() for host in hosts]
    path = hosts[0].path() / folder
    result = json.loads((path / "result.json").read_text())
    (ended,) = (event for event in read(path / "tape.jsonl") if event["kind"] == "run_ended")
    assert ended["wire_bytes"] == ended["result"]["wire_bytes"] == result["wire_bytes"]
    received, sent = ([b[way] - a[way] for a, b in zip(before, after, strict=True)] for way in (0, 1))
    return {"rule": rule, "wire_bytes": result["wire_bytes"], "interfaces": {"sent": sent, "received": received}}


def shares(found: Mapping[str, Any]) -> list[float]:
    """Of what the interfaces have counted, of each host and way."""
    return [
        told[way] / counted
        for way in ("sent", "received")
        for told, counted in zip(found["wire_bytes"], found["interfaces"][way], strict=True)
    ]


def total(wire_bytes: Sequence[Mapping[str, int]], way: str) -> int:
    return sum(each[way] for each in wire_bytes)


def held(found: Mapping[str, Any], least: float) -> bool:
    """Whether all that was sent came, was enough, and is what the interfaces say."""
    sent, received = (total(found["wire_bytes"], way) for way in ("sent", "received"))
    same = abs(sent - received) < 1e-4 * sent  # but for the last signs of life
    return same and sent >= least and all(1 - WITHIN < share <= 1 for share in shares(found))


@pytest.mark.slow
def test_bytes_are_those_of_the_interfaces(tmp_path: Path) -> None:
    with Hosts(2, tmp_path) as hosts:
        for rule in list(RULES)[:2]:
            found = compared(hosts, rule, RULES[rule][0])
            assert held(found, 50e6), (found, shares(found))


@pytest.mark.prove
def test_all_bytes(tmp_path: Path) -> None:
    began, lines = time.monotonic(), []
    with Hosts(2, tmp_path) as hosts:
        for rule, (_, steps) in RULES.items():
            found = compared(hosts, rule, steps)
            lines.append({**found, "shares": [round(share, 5) for share in shares(found)], "held": held(found, 500e6)})
    save("wire_bytes", lines, seed=0, began=began)
    assert [line for line in lines if not line["held"]] == []


def test_a_run_of_one_machine_has_no_wire(tmp_path: Path) -> None:
    run = train_here(workloads.gpt(steps=1), Team(workers=2), tmp_path / "run")
    assert "wire_bytes" not in run.result
    assert not [event for event in run.events if "wire_bytes" in event]
