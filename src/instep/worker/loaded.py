"""What loaders have read, as a worker takes it in place of reading samples itself."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

from instep.data.signature import signature
from instep.descendants import has_ended
from instep.errors import DataError, killed_by
from instep.transport import batch_files
from instep.transport.units import State, Stream, Unit, Units

REMEDY = "mend it, or leave the sample out with skip_samples (--skip-samples)"
"""For a sample that cannot be read."""


class Beside(NamedTuple):
    """What goes with a batch. state: of the generators once it was read, pickled; b"" where no worker has gone on from
    there. again: the errors of the system after which the loader has read samples again so far.
    """

    state: bytes
    again: list[str]


class LoadedAhead:
    """One worker's side. place: of the worker among those of its machine, from 0. idle: there is nothing to read, as
    samples are rows of tensors.

    A worker reads by itself what no loader was to read, what a loader could not read or send, and all where loaders
    read something else than it does.
    """

    def __init__(self, units: Units, place: int, microbatches: int, *, idle: bool):
        units.microbatches = microbatches
        self._units, self._place, self._idle = units, place, idle
        self._now: Stream | None = None
        self._why_not = ""
        self._not_sent = False
        self.compared = False
        """Whether what a loader has read was compared with what this worker reads."""

    def expect(self, what: Stream) -> None:
        """Says what all workers of the machine will need, who say the same."""
        self._units.expect(0, what)

    def expect_own(self, now: Stream, then: Stream) -> None:
        """Says what this worker needs now, and what it will probably need then."""
        self._now = now
        self._units.expect(2 * self._place, now)
        self._units.expect(2 * self._place + 1, then)

    def take(self, batch: int, microbatch: int, entered: int, *, draws: bool) -> tuple[Any, Beside] | None:
        """A microbatch, as it was read when so many of the recipe's changes held; None: the worker is to read it.
        draws: the generators are to go on from there.

        It waits for the loader. Raises DataError where a sample ends the processes that read it.
        """
        units = self._units
        units.note_draws(draws)
        if self._why_not or not units.expected(batch, microbatch):
            return None
        if self._now is not None and self._now.covers(batch, microbatch) and batch > self._now.first:
            self._now = self._now._replace(keep=batch, first=batch)
            units.expect(2 * self._place, self._now)
        key, waits = units.key_of(batch, microbatch), False
        try:
            while not (units.closed or self._why_not):
                signs, unit = units.signs(), units.look(key)
                if unit.state == State.FREE and not units.expected(batch, microbatch):
                    return None  # no more: the others are further
                if unit.state in (State.OWN, State.GONE):
                    self._not_sent = self._not_sent or unit.state == State.OWN
                    return None
                if unit.state == State.DEADLY:
                    raise self._deadly(unit)
                if unit.state in (State.LOADED, State.TAKEN):
                    if unit.entered != entered:
                        return None
                    if (found := self._mapped(unit)) is not None:
                        units.took(key)
                        return found if found[1].state or not draws else None
                if not waits:
                    units.ask(self._place, key)
                    waits = True
                else:
                    units.sleep(signs, loader=False)
        finally:
            if waits:
                units.ask(self._place, 0)
        return None

    def _mapped(self, unit: Unit) -> tuple[Any, Beside] | None:
        """What the loader has read; None where it has died meanwhile, or has given it up, or the system refuses it."""
        try:
            descriptor = _opened(unit)
        except (FileNotFoundError, ProcessLookupError):
            return None
        except OSError as error:
            if has_ended(unit.pid):
                return None
            why = f"what loaders read cannot be had from them ({error.strerror})"
            self._why_not = f"{why}, so that workers read samples themselves."
            return None
        try:
            if os.fstat(descriptor).st_ino != unit.inode:
                return None
            return batch_files.read(descriptor, unit.nbytes, unit.head)
        finally:
            os.close(descriptor)

    def compare(self, batch: int, microbatch: int, found: Any, own: Any) -> None:
        """found, own: what a loader has read, and what the worker reads of the same samples; nothing more is taken from
        loaders unless they are alike.
        """
        self.compared = True
        if signature(found) != signature(own):
            self._why_not = (
                f"what a loader reads is not what a worker reads, as of step {batch + 1}, microbatch {microbatch}, so "
                f"that workers read themselves: samples depend on more than index and random numbers."
            )

    def _deadly(self, unit: Unit) -> DataError:
        batch, microbatch = self._units.place_of(unit.key)
        what = f"sample {unit.sample}" if unit.sample >= 0 else f"microbatch {microbatch} of step {batch + 1}"
        how = killed_by(unit.code) if unit.code < 0 else f"it ended with exit status {unit.code}"
        return DataError(f"{what} ended each of the {unit.tries} loaders that read it, the last one {how}; {REMEDY}.")

    def doubts(self) -> list[str]:
        """Sentences on why loaders are not used."""
        found = [self._why_not] if self._why_not else []
        if self._idle:
            found.append(
                "team.loaders has nothing to do: samples are rows of tensors, which workers take where they lie."
            )
        elif self._units.closed and not self._why_not:
            found.append(
                "loaders came to nothing, so that workers read samples themselves: logs/loader-*.log tell why."
            )
        if self._not_sent:
            found.append("workers read some samples themselves, for a loader could not: logs/loader-*.log tell why.")
        return found


def _opened(unit: Unit) -> int:
    """A descriptor of the file that the loader has open. Raises OSError."""
    return os.open(f"/proc/{unit.pid}/fd/{unit.descriptor}", os.O_RDONLY)
