"""The table of what loaders read: each case by hand, in one process."""

from __future__ import annotations

import pytest

from instep.transport.units import ROWS, State, Stream, Unit, Units

pytestmark = pytest.mark.pure


def table(microbatches: int, loaders: int = 1) -> Units:
    units = Units(2, loaders)
    units.microbatches = microbatches
    units.expect(0, Stream(0, 0, 3, 0, microbatches))
    return units


def claimed(units: Units, loader: int = 0, *, full: bool = False) -> Unit:
    unit = units.claim(loader, 2, full=full)
    assert unit is not None
    return unit


def test_what_a_worker_waits_for_takes_the_row_of_what_no_loader_can_send() -> None:
    units = table(2 * ROWS)
    first = claimed(units)
    assert units.post(first._replace(state=State.OWN))
    units.ask(1, first.key + ROWS)
    assert claimed(units, full=True).key == first.key + ROWS


def test_anybody_sees_what_a_loader_reads_and_has_read_ahead() -> None:
    units = table(8, loaders=2)
    assert units.of_loader(0) == (None, 0, 0)
    first, second = claimed(units), claimed(units, 1)
    assert units.of_loader(0) == ((0, 0), 0, 0)
    assert units.post(first._replace(state=State.LOADED, descriptor=5, nbytes=70))
    units._microbatches = 1  # as who has not said of how many a batch is
    assert (units.of_loader(0), units.of_loader(1)) == ((None, 1, 70), ((0, 1), 0, 0))
    units.microbatches = 8
    units.took(first.key)
    assert units.post(second._replace(state=State.OWN))
    assert (units.of_loader(0), units.of_loader(1)) == ((None, 0, 0), (None, 0, 0))


def test_where_the_generators_were_is_wanted_until_all_say_that_they_do_not_go_on_from_there() -> None:
    units = table(8)
    assert units.states_wanted
    units.note_draws(False)
    assert not units.states_wanted
    units.note_draws(True)
    units.note_draws(False)
    assert units.states_wanted


def test_of_one_microbatch_that_was_read_twice_the_second_stays() -> None:
    units = table(2 * ROWS, loaders=2)
    first = claimed(units)._replace(state=State.LOADED, descriptor=5, nbytes=1)
    assert units.post(first)
    for loader, key in ((1, first.key + ROWS), (0, first.key)):
        units.ask(0, key)
        again = claimed(units, loader, full=True)._replace(state=State.LOADED, descriptor=6, nbytes=1)
        assert units.post(again)
    assert again.key == first.key
    assert units.unneeded([first, again], 1 << 20) == ({5}, 1)
    assert units.look(first.key) == again


def test_what_a_worker_waited_for_that_died_is_not_read_again_and_again() -> None:
    units = table(8)
    units.ask(0, 1)
    first = claimed(units)._replace(state=State.LOADED, descriptor=5, nbytes=1)
    assert first.key == 1
    assert units.post(first)
    units.expect(0, Stream(1, 1, 3, 0, 8))  # the others go on
    assert units.unneeded([first], 1 << 20) == ({5}, 0)
    assert units.claim(0, 2, full=True) is None
    assert claimed(units).key == 9


def test_a_loader_that_dies_as_it_writes_a_row_leaves_a_free_one() -> None:
    units = table(8)
    first = claimed(units)
    units._rows[first.key % ROWS, 0] = 0  # as between two writes
    units.recall(0, -9)
    assert units.look(first.key) == Unit(first.key)
    assert claimed(units).key == first.key
