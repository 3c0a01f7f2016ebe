"""What an agent that has lost agent 0 does with its workers' state: has them keep it, and gives it to the next one."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from instep.errors import InstepError
from instep.record.events import Event
from instep.record.folder import RunFolder
from instep.team.channel import Channel
from instep.team.crew import LocalCrew
from instep.team.link import AgentLink
from instep.team.messages import KeepingState, KeepState, StateKept
from instep.team.received import parts_of
from instep.team.waiting import ready_of
from instep.team.wire_messages import CheckpointPart, GiveKept, Kept, KeptGiven

LOOK_S = 0.2
"""Seconds between two looks at the workers."""

AGREE_S = 60.0
"""Seconds that workers have to notice that others are lost, and to agree on what is to be kept. To write it may take as
long as any checkpoint may."""

EVENTS_BYTES = 1 << 20
"""Bytes of events that are given at once, about: the link takes no message of any length."""


class Keeping:
    """On one host, in its folder for scratch."""

    def __init__(self, scratch: RunFolder, host: int):
        self._scratch, self._host = scratch, host
        self.kept: Kept | None = None
        """What there is."""
        self._events: tuple[Event, ...] = ()
        self._giving: Iterator[CheckpointPart | KeptGiven] = iter(())
        self._next: CheckpointPart | KeptGiven | None = None

    @property
    def gives(self) -> bool:
        """Whether more is to be sent."""
        return self._next is not None

    def keep(self, crew: LocalCrew, run_id: str | None, look: Callable[[], None]) -> None:
        """Has workers that are built, who have lost others or soon will, keep what they hold. Nothing where one does
        not answer in time, gets nowhere, or dies. `look` is called meanwhile.
        """
        self.forget()
        waiting = {process.pipe: process for process in crew.processes if process.ready is not None}
        for process in waiting.values():
            process.send(KeepState())
        until, writing = time.monotonic() + AGREE_S, set[Channel]()
        try:
            while waiting and (writing >= waiting.keys() or time.monotonic() < until) and crew.look() is None:
                look()
                for pipe in ready_of([*waiting, *(each.handle.death for each in waiting.values())], [], LOOK_S):
                    while pipe in waiting and (said := waiting[pipe].receive()) is not None:
                        if isinstance(said, KeepingState):
                            writing.add(pipe)
                        elif isinstance(said, StateKept):
                            del waiting[pipe]
                            self._note(said, run_id)
                if any(process.handle.exitcode is not None for process in waiting.values()):
                    return
        except EOFError:
            return

    def _note(self, said: StateKept, run_id: str | None) -> None:
        if said.version:
            self.kept, self._events = Kept(run_id, said.version, said.name, said.digest), tuple(said.events)

    def forget(self) -> None:
        """It is not needed any more."""
        self.kept, self._events, self._giving, self._next = None, (), iter(()), None

    def give(self, asked: GiveKept) -> None:
        """Begins to send it."""
        self._giving = self._parts(asked.name)
        self._next = next(self._giving, None)

    def _parts(self, name: str) -> Iterator[CheckpointPart | KeptGiven]:
        try:
            yield from parts_of(self._scratch.checkpoints / name)
        except InstepError as error:
            yield KeptGiven(name, why=error.message.rstrip("."))
        else:
            *parts, last = in_parts(self._events, EVENTS_BYTES)
            yield from (KeptGiven(name, part, more=True) for part in parts)
            yield KeptGiven(name, last)

    def pump(self, link: AgentLink) -> None:
        """Sends what is to be sent, as far as the link takes it. Raises OSError where agent 0 is gone."""
        while self._next is not None and not link.full:
            link.send(self._next)
            self._next = next(self._giving, None)

    def leave(self, folder: str) -> str:
        """Agent 0 does not come back: what was kept goes where the command runs. The words on it for a sentence, or "".

        folder: of the run, agent 0's.
        """
        if self.kept is None:
            return ""
        there = Path(f"{Path(folder).name or 'run'}-kept-by-host-{self._host}").absolute()
        try:
            there.mkdir(exist_ok=True)
            shutil.rmtree(there / self.kept.name, ignore_errors=True)
            shutil.move(self._scratch.checkpoints / self.kept.name, there / self.kept.name)
        except OSError:
            return ""
        return (
            f"; what its workers had, version {self.kept.version}, is in {there / self.kept.name}: moved into that "
            f"folder's checkpoints before, it saves the steps since the last one"
        )


def in_parts(events: Sequence[Event], most: int) -> list[tuple[Event, ...]]:
    """These in order, in parts of about so many bytes at most, or one event; one part where there are none."""
    parts: list[list[Event]] = [[]]
    size = 0
    for event in events:
        length = len(msgspec.msgpack.encode(event))
        if parts[-1] and size + length > most:
            parts.append([])
            size = 0
        parts[-1].append(event)
        size += length
    return [tuple(part) for part in parts]
