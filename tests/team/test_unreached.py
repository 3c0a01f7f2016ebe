"""Hosts whose agents or workers do not reach each other from the start on: what is said of them, and by whom."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.hosts import Hosts
from support.patience import LONG_S
from support.step_places import Machines
from support.two_models import files_of

pytestmark = [pytest.mark.processes, pytest.mark.slow]

PORT = 16384 + 77
"""Where agent 0 listens, by the number of the job that `Machines` tells of."""


@pytest.fixture
def there(tmp_path: Path) -> Iterator[Machines]:
    machines = Machines(tmp_path, 2)
    try:
        yield machines
    finally:
        machines.end()


def ended(there: Machines, *arguments: str) -> list[str]:
    """What each host's command has said at its end."""
    files = files_of("gpt", compiled=False, every=5, answer_s=LONG_S, lease_s=2.0)
    there.start(files, "--workers", "2", *arguments)
    assert [command.process.wait(LONG_S) for command in there.commands] == [1, 1]
    return [command.err for command in there.commands]


def test_workers_that_a_firewall_keeps_apart_are_told_of_it(there: Machines) -> None:
    hosts: Hosts = there.hosts
    for host in hosts:
        hosts.shut(host.number, PORT)
    first, other = ended(there, "--team.restarts", "1")
    why = (
        f"worker 1 on host 1 ({hosts[1].name}) was cut off from the other workers, who live: {hosts[0].address}, where "
        f"the workers meet, has answered nothing for 2.T s: a firewall between hosts must leave all their ports open "
        f"to each other; the team has started again 1 times, as often as team.restarts allows."
    )
    assert re.sub(r"\d\.\d s", "2.T s", first.splitlines()[-1]).endswith(why)
    assert f"the run failed, as agent 0 says on host 0 ({hosts[0].name})" in other


def test_an_agent_that_the_first_does_not_hear_is_named_there_and_says_so_itself(there: Machines) -> None:
    there.hosts.cut(1)
    first, other = ended(there, "--team.join_timeout_s", "12")
    assert "agent 1 has waited 1" in other
    assert "agent 1 ends: no answer came from agent 0 within 12 s" in other
    assert "no word came within 12 s from agent 1 (host 1); look there for an error and whether " in first
    assert f"{there.hosts[0].address} can be reached" in first
