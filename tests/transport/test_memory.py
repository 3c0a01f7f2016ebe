"""Memory that forked processes share: all see the same, it is there when asked for, and it leaves nothing behind."""

from __future__ import annotations

import os
import resource
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instep.errors import ResourceError
from instep.memory_file import memory_file
from instep.transport import memory
from instep.transport.group import Sizes
from instep.transport.memory import Region, attach, mark, reserve, wait_for
from instep.transport.shared_memory import SharedMemoryGroup, regions
from support.processes import no_shared_memory_since, shared_memory

REGIONS = {
    "marks": Region((3,), "int64"),
    "empty": Region((0, 5), "float32"),
    "slots": Region((2, 5000), "float32"),
    "later": Region((7,), "uint8", reserve=False),
}


@pytest.fixture
def descriptor() -> Any:
    found = memory_file()
    yield found
    os.close(found)


def test_all_that_attach_see_the_same_memory(descriptor: int) -> None:
    reserve(descriptor, REGIONS)
    ours, theirs = attach(descriptor, REGIONS), attach(descriptor, REGIONS)
    for index, (name, region) in enumerate(REGIONS.items()):
        assert (ours[name].shape, str(ours[name].dtype)) == (region.shape, region.dtype)
        assert not ours[name].any(), "it begins with zeros"
        ours[name][...] = index + 1
    for index, name in enumerate(REGIONS):
        assert (theirs[name] == index + 1).all(), "arrays do not overlap"
    theirs["slots"][1, 7] = 5.0
    assert ours["slots"][1, 7] == 5.0


def test_reserved_pages_are_there_before_they_are_written(descriptor: int) -> None:
    reserve(descriptor, REGIONS)
    had = os.fstat(descriptor).st_blocks * 512
    assert had >= REGIONS["slots"].nbytes
    attach(descriptor, REGIONS)["later"][:] = 1
    assert os.fstat(descriptor).st_blocks * 512 > had


def test_too_little_memory_is_refused_before_it_is_used(descriptor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_available_bytes", lambda: 1 << 20)
    reserve(descriptor, {"slots": Region((1 << 20,), "uint8")})
    sentence = r"need 3 MiB of shared memory, and 1 MiB are free; take fewer workers .*\.$"
    with pytest.raises(ResourceError, match=sentence):  # 1 MiB of it is there by now
        reserve(descriptor, {"slots": Region((3 << 20,), "uint8")})
    reserve(descriptor, {"slots": Region((2 << 20,), "uint8", reserve=False)})
    monkeypatch.setattr(memory, "_available_bytes", lambda: None)
    reserve(descriptor, {"slots": Region((2 << 20,), "uint8")})


def test_what_the_system_refuses_is_a_sentence(descriptor: int) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(ResourceError, match="the limit on the size of files, ulimit -f, is smaller; raise it"):
            reserve(descriptor, REGIONS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


def test_the_memory_that_is_free_is_known_here() -> None:
    free = memory._available_bytes()
    assert free is None or free > 1 << 20


@pytest.mark.parametrize("named", [False, True])
def test_an_anonymous_file_leaves_nothing(named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if named:  # as where the system has no memory files
        monkeypatch.delattr(os, "memfd_create", raising=False)
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = shared_memory()
    found = memory_file()
    reserve(found, REGIONS)
    attach(found, REGIONS)["slots"][0, 0] = 1.0
    assert os.fstat(found).st_nlink == 0
    os.close(found)
    assert not list(tmp_path.iterdir())
    no_shared_memory_since(before)


@pytest.mark.processes
def test_marks_order_what_forked_processes_write(descriptor: int) -> None:
    """Two processes in turn add to each other's rows; each reads only what the other has marked."""
    regions = {"marks": Region((2,), "int64"), "rows": Region((2, 1 << 14), "int64")}
    reserve(descriptor, regions)
    rounds = 300
    child = os.fork()
    arrays = attach(descriptor, regions)
    marks, rows = arrays["marks"], arrays["rows"]
    me = 0 if child else 1
    wrong = 0
    for turn in range(1, rounds + 1):
        rows[me] = turn
        mark(marks, me, 2 * turn - 1)
        wait_for(marks, 2 * turn - 1)
        wrong += int((rows[1 - me] != turn).sum())
        mark(marks, me, 2 * turn)
        wait_for(marks, 2 * turn)
    if not child:
        os._exit(wrong > 0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert wrong == 0


@pytest.mark.processes
def test_waiting_ends_only_when_all_have_come(descriptor: int) -> None:
    regions = {"marks": Region((3,), "int64")}
    reserve(descriptor, regions)
    marks = attach(descriptor, regions)["marks"]
    mark(marks, 0, 5)
    mark(marks, 1, 4)
    began = time.monotonic()
    child = os.fork()
    if not child:
        time.sleep(0.2)
        mark(marks, 2, 9)
        os._exit(0)
    wait_for(marks, 4)
    assert time.monotonic() - began >= 0.2
    assert marks.tolist() == [5, 4, 9]
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.processes
def test_who_waits_looks_once_in_a_while_and_when_a_mark_is_set(
    descriptor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    regions = {"marks": Region((2,), "int64"), "raised": Region((2,), "int64")}
    reserve(descriptor, regions)
    arrays = attach(descriptor, regions)
    marks, raised = arrays["marks"].view(np.int64), arrays["raised"].view(np.int64)
    monkeypatch.setattr("instep.transport.futex._longest", None)  # only a mark wakes
    child = os.fork()
    if not child:
        time.sleep(0.2)
        mark(marks, 0, 7)
        time.sleep(0.2)
        mark(marks, 1, 7)
        os._exit(0)
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
    assert wait_for(marks, 7, raised)
    slept = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw - before
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert slept < 20


def test_who_waits_for_one_mark_while_it_is_set_still_waits_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    class Racing(np.ndarray[Any, np.dtype[np.int64]]):
        """The mark that is found to be the lowest is set before it is looked at again."""

        def argmin(self, *_: Any, **__: Any) -> Any:
            found = super().argmin()
            self[found] = 7
            return found

    marks, slept = np.zeros(3, dtype=np.int64).view(Racing), []
    monkeypatch.setattr("instep.transport.futex.sleep_while", lambda _, place, value: slept.append((place, value)))
    assert wait_for(marks, 7)
    assert marks.tolist() == [7, 7, 7]
    assert not slept


def test_a_wait_of_minutes_looks_a_thousand_times_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system wakes nobody."""
    monkeypatch.setattr("instep.transport.futex._call", None)
    marks, slept_s = np.zeros(2, dtype=np.int64), [0.0]

    def sleep(seconds: float) -> None:
        slept_s.append(slept_s[-1] + seconds)
        marks[:] = slept_s[-1] >= 300

    monkeypatch.setattr("instep.transport.memory.time.sleep", sleep)
    wait_for(marks, 1)
    assert 300_000 <= len(slept_s) < 301_000
    assert slept_s[1] == 0.00005


def test_rows_that_a_rank_may_come_to_write_take_no_memory_until_it_does(descriptor: int) -> None:
    sizes = Sizes(((range(2),),), (1, 2), (), 1 << 18, most_rows=5)
    reserve(descriptor, regions(sizes))
    first, second = (SharedMemoryGroup(descriptor, sizes, rank) for rank in range(2))
    before = os.fstat(descriptor).st_blocks
    assert before * 512 < 4 << 20
    for rows in ((5, 0), (0, 5), (1, 2)):
        for group in (first, second):
            group.arrange(rows)
        for row, value in zip(first.rows[: rows[0]], (7.0, 8.0, 9.0, 10.0, 11.0), strict=False):
            row.fill_(value)
        for row, value in zip(second.rows[: rows[1]], (1.0, 2.0, 3.0, 4.0, 5.0), strict=False):
            row.fill_(value)
        found = [float(row[0]) for row in second._all]
        assert found == [7.0, 8.0, 9.0, 10.0, 11.0][: rows[0]] + [1.0, 2.0, 3.0, 4.0, 5.0][: rows[1]]
    assert (os.fstat(descriptor).st_blocks - before) * 512 == 7 << 20
