"""Hosts that are cut off for a while: the same processes go on as soon as the cut has ended, with the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.cuts import CutRun
from support.hosts import Hosts

pytestmark = pytest.mark.processes

CASES = [(2, 1, (1.5,)), (2, 0, (1.0, 3.0)), (3, 1, (1.0, 4.0)), (3, 0, (3.0, 1.0))]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_cut_that_is_shorter_than_the_lease_costs_nobody_and_no_step(
    case: tuple[int, int, tuple[float, ...]], tmp_path: Path
) -> None:
    """Also of the first host, from all others, and twice."""
    count, host, lengths = case
    with Hosts(count, tmp_path) as hosts:
        run = CutRun(hosts)
        run.begin()
        for seconds in lengths:
            run.cut(host, seconds)
        run.check()
        back = [event["host"] for event in run.told("host_back")]
        assert set(back) == ({host} if host else set(range(1, count)))
        assert not run.told("left")
        assert all(event["given"] in ([], [1], [2], [1, 2], [0]) for event in run.told("regrouped"))
