"""`--one-in N` leaves out slow parameters, and no whole test."""

from __future__ import annotations

import pytest

from support.shares import left_out

pytestmark = pytest.mark.pure

SLOW = ["a.py::one", "a.py::two[x]", "a.py::two[y]", *(f"b.py::seven[{n}]" for n in range(7))]


def test_each_test_keeps_its_share_rounded_up_and_always_the_same() -> None:
    assert left_out(SLOW, 1) == set()
    left = left_out(SLOW, 3)
    assert len([name for name in left if "two" in name]) == 1
    assert len([name for name in left if "seven" in name]) == 4
    assert len(left) == 5
    assert left_out(reversed(SLOW), 3) == left


def test_tests_of_the_same_parameters_do_not_all_keep_the_same_ones() -> None:
    names = [[f"c.py::{test}[{n}]" for n in range(9)] for test in ("this", "that", "third")]
    assert len({tuple(name.partition("[")[2] for name in sorted(left_out(each, 9))) for each in names}) > 1
