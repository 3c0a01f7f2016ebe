"""What a worker takes from loaders, and what it makes of those that fail it."""

from __future__ import annotations

import errno
import os
import pickle
import sys
from typing import Any
from unittest import mock

import pytest
import torch

from instep.restore import random_state
from instep.transport import batch_files
from instep.transport.units import State, Stream, Unit, Units
from instep.worker import loaded, sample_reader
from instep.worker.loaded import Beside, LoadedAhead
from instep.worker.sample_reader import SampleReader


def refused(unit: Unit) -> int:
    raise PermissionError(errno.EACCES, "Permission denied")


@pytest.mark.processes
@pytest.mark.skipif(sys.platform != "linux", reason="there are loaders on Linux alone")
def test_a_loader_that_has_just_died_is_waited_for_though_the_system_refuses_what_it_had_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loaded, "_opened", refused)  # as it does to all but root
    ahead = LoadedAhead(Units(1, 1), 0, 8, idle=False)
    if not (pid := os.fork()):
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    try:
        assert ahead._mapped(Unit(1, State.LOADED, pid=pid)) is None
    finally:
        os.waitpid(pid, 0)
    assert ahead._mapped(Unit(1, State.LOADED, pid=pid)) is None, "it is gone"
    assert not ahead.doubts()
    assert ahead._mapped(Unit(1, State.LOADED, pid=os.getpid())) is None
    assert "cannot be had from them" in ahead.doubts()[0]


def with_found(value: float) -> SampleReader:
    """A reader of samples that are 1, of which loaders have read this."""
    units = Units(1, 1)
    reader = SampleReader(None)
    reader.loaded = ahead = LoadedAhead(units, 0, 8, idle=False)
    ahead.expect(Stream(0, 0, 9, 0, 8))
    state = pickle.dumps(random_state(), protocol=5)
    found = torch.full((1,), value), Beside(state, [])
    ahead.take = lambda *place, draws: None if ahead.doubts() else found  # type: ignore[method-assign]
    return reader


def ones(reader: SampleReader, microbatch: int, *, draws: bool = False) -> Any:
    return reader.batch([torch.ones(())], [0], 3, (0, microbatch, 0), draws=draws)


@pytest.mark.pure
@pytest.mark.parametrize("value", [1.0, 2.0])
def test_each_worker_compares_the_first_that_it_takes_whichever_it_is(value: float) -> None:
    reader = with_found(value)
    for microbatch in (5, 6):
        assert ones(reader, microbatch).item() == 1
    assert bool(reader.doubts()) == (value != 1)


@pytest.mark.pure
def test_generators_that_a_loader_lacks_are_seeded_before_the_users_code_draws() -> None:
    reader = with_found(1.0)
    ones(reader, 0)
    with mock.patch.object(sample_reader, "seed_all") as seeded:
        ones(reader, 1, draws=True)
    seeded.assert_called_once_with(3)


@pytest.mark.pure
@pytest.mark.parametrize(("draws", "state"), [(False, b""), (True, b"x"), (True, b"")])
def test_a_worker_that_goes_on_drawing_reads_itself_what_came_without_the_generators(draws: bool, state: bytes) -> None:
    units = Units(1, 1)
    ahead = LoadedAhead(units, 0, 8, idle=False)
    ahead.expect(Stream(0, 0, 3, 0, 8))
    unit, file = units.claim(0, 2, full=False), batch_files.write(torch.ones(3), Beside(state, []))
    assert unit is not None
    inode = os.fstat(file.descriptor).st_ino
    units.post(unit._replace(state=State.LOADED, inode=inode, **file._asdict()))
    found = ahead.take(0, 0, unit.entered, draws=draws)
    os.close(file.descriptor)
    assert (found is None) == (draws and not state)
    assert units.states_wanted == draws
