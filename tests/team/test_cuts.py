"""Hosts that are cut off for a while: the same processes go on as soon as the cut has ended, with the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.cuts import LEASE_S, CutRun
from support.hosts import Hosts
from support.patience import LONG_S

pytestmark = pytest.mark.processes

SHORTER = [(2, 1, (1.5,)), (2, 0, (1.0, 3.0)), (3, 1, (1.0, 4.0)), (3, 0, (3.0, 1.0))]


@pytest.mark.slow
@pytest.mark.parametrize("case", SHORTER, ids=str)
def test_a_cut_that_is_shorter_than_the_lease_costs_nobody_and_no_step(
    case: tuple[int, int, tuple[float, ...]], tmp_path: Path
) -> None:
    """Also of the first host, from all others, and twice. On a busy machine a cut may last longer than it was to."""
    count, host, lengths = case
    with Hosts(count, tmp_path) as hosts:
        run = CutRun(hosts, lease_s=LONG_S)
        run.begin()
        for seconds in lengths:
            run.cut(host, seconds)
        run.check()
        back = [event["host"] for event in run.told("host_back")]
        assert set(back) == ({host} if host else set(range(1, count)))
        assert not run.told("left")


LONGER = [(2, 1, (LEASE_S, 8.0)), (3, 0, (8.0,)), (3, 2, (8.0, 1.0))]
"""The first one is as long as the lease: it may be noticed in time, or too late."""


@pytest.mark.slow
@pytest.mark.parametrize("case", LONGER, ids=str)
def test_after_a_cut_that_is_longer_than_the_lease_the_same_processes_take_part_again(
    case: tuple[int, int, tuple[float, ...]], tmp_path: Path
) -> None:
    """The others have gone on without them; where it was the first host, that alone has."""
    count, host, lengths = case
    with Hosts(count, tmp_path) as hosts:
        run = CutRun(hosts)
        run.begin()
        for seconds in lengths:
            run.cut(host, seconds)
        run.check()
        away = {host} if host else set(range(1, count))
        assert {event["host"] for event in run.told("host_back")} == away
        assert {event["worker"] for event in run.told("left")} == away


@pytest.mark.slow
def test_of_a_host_that_is_cut_off_only_who_died_meanwhile_is_another(tmp_path: Path) -> None:
    with Hosts(2, tmp_path) as hosts:
        run = CutRun(hosts, workers=4)
        run.begin()
        pids = {event["worker"]: event["pid"] for event in run.told("joined")}
        run.cut(1, 8.0, lambda: hosts[1].run("kill", "-KILL", str(pids[3])))
        run.check(new=[3])


@pytest.mark.slow
def test_a_host_that_does_not_come_back_in_time_has_successors_elsewhere(tmp_path: Path) -> None:
    """Its agent has given up by then, and kept what its workers had."""
    with Hosts(2, tmp_path) as hosts:
        run = CutRun(hosts, give_up_s=2.0)
        run.begin()
        run.loses(1)
        assert run.commands[1].ends() == 1
        assert "what its workers had, version" in run.commands[1].err
        run.check(new=[1], restarts=1)
        assert len(run.told("left")) == 1
