"""The processes of a team on this host, over all its epochs."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

from instep.descendants import is_stopped
from instep.recipe import Team
from instep.record.folder import RunFolder
from instep.sources import KeptSources
from instep.team.assigning import next_group
from instep.team.crews import SERVED_GRACE_S, Heard
from instep.team.heartbeat import Liveness, process_state
from instep.team.loaders import Loaders
from instep.team.messages import (
    Agreed,
    Assignment,
    Ended,
    Failed,
    FoundWritten,
    FoundWrong,
    Ready,
    StoppedAt,
    SupervisorToWorker,
    WorkerToSupervisor,
)
from instep.team.orders import Lost, Member, Regroup
from instep.team.processes import MemberProcess, MemberProcesses
from instep.team.remembered import Remembered
from instep.team.spare import Spare
from instep.team.wire_messages import LoaderShown, Shown
from instep.transport.memory import reserve
from instep.transport.meter import METER

GRACE_S = 10.0
"""Seconds that workers have to leave after their last message."""


class LocalCrew:
    """Those of this machine, forked from this process.

    team: its fields, and how many all hosts have. others: children of this process that are not the run's. unused: what
    is open here that members do not need. name: what a member is called in a sentence. folder: has the logs. began:
    when the run did, on this host's monotonic clock. host: the number of this one. most: of how many workers a team may
    come to be while it goes on. copies: where one keeps its state that comes to be alone. sources: what members of
    before have imported.
    """

    def __init__(
        self,
        team: Team,
        others: set[int],
        unused: Callable[[], list[Any]],
        *,
        serving: bool,
        name: Callable[[int], str],
        folder: RunFolder,
        began: Callable[[], float],
        host: int = 0,
        most: int = 0,
        copies: Callable[[], Remembered | None] = lambda: None,
        sources: KeptSources | None = None,
    ):
        self._most, self._copies = most, copies
        self._team, self._others, self._unused, self._serving = team, others, unused, serving
        self._name, self._folder, self._began, self._host = name, folder, began, host
        self._processes: MemberProcesses | None = None
        self._loaders: Loaders | None = None
        self._done: set[Member] = set()
        self._asked: dict[Member, str] = {}  # for their stacks
        self._workers: list[int] = []  # of this host, by number
        self._sources = sources or KeptSources()

    def start(self, members: Collection[Member], assignment: Assignment) -> None:
        self._team = assignment.team
        workers, here = self._team.workers, [member.number for member in members if member.host == self._host]
        lines = len(here) - 1 if workers in here else 0  # the server is here
        self._processes = processes = MemberProcesses(
            workers, self._others, serving=self._serving, lines=lines, most=self._most
        )
        self._done.clear()
        self._workers = [number for number in here if number != workers]
        for_loaders = replace(assignment, sources=self._sources.of)
        self._loaders = Loaders.of(for_loaders, self._workers, self._others, self._unneeded, self._most)
        self._spare = Spare(assignment, self._host, self._own, self._unused)
        with assignment.recipe.prepared() as recipe:
            for member in members:
                if member.host == self._host:
                    self._fork(member, replace(assignment, recipe=recipe))
            if self._loaders is not None:
                self._loaders.start()
        count = len(processes.board.beats)
        pids = {process.member.number: process.handle.pid for process in processes}
        self._liveness = Liveness(
            processes.board,
            [pids.get(number, 0) for number in range(count)],
            self._team.answer_timeout_s,
            self._team.stall_timeout_s,
            [self._name(number) for number in range(count)],
            now_s=time.monotonic(),
        )

    def _fork(self, member: Member, assignment: Assignment) -> None:
        self.processes.fork(member, self._own(member, assignment), self._unused())

    def _own(self, member: Member, assignment: Assignment) -> Assignment:
        """The member's."""
        works = member.number != self._team.workers or not self._serving
        self._workers += [member.number] * (works and member.number not in self._workers)  # who comes later
        place = self._workers.index(member.number) if works else 0, len(self._workers)
        units = self._loaders.units if self._loaders is not None and works else None
        if units is not None and place[0] >= units.workers:
            units = None
        fields = dict[str, Any](lines=self.processes.lines, incarnation=member.incarnation, sources=self._sources.of)
        return replace(assignment, place=place, units=units, **fields)

    def prepare(self, facts: Mapping[str, Any]) -> None:
        lead = list(self.processes)[-1 if self._serving else 0].ready
        assert lead is not None, "all are ready"
        self._agreed = Agreed(facts, lead.memory)
        reserve(self.processes.descriptor, lead.memory)

    def go(self) -> None:
        self._spare.begin(self._agreed.facts)
        for process in self.processes:
            process.send(self._agreed)

    def join(self, member: Member) -> None:
        self.send(member, self._agreed)

    def send(self, member: Member, message: SupervisorToWorker) -> None:
        self.processes[member].send(message)

    def sources(self) -> list[Any]:
        waiting = [process for process in self._processes or () if process.member not in self._done]
        loaders = self._loaders.sources() if self._loaders is not None else []
        return [*(process.pipe for process in waiting), *(process.handle.death for process in waiting), *loaders]

    def hear(self, ready: Collection[Any]) -> Iterator[Heard | Lost]:
        processes = self._processes
        if self._loaders is not None:
            self._loaders.hear(ready)
        for process in list(processes or ()):
            if process.pipe in ready or process.handle.death in ready:
                yield from self._hear_one(processes, process)

    def _hear_one(self, processes: MemberProcesses | None, process: MemberProcess) -> Iterator[Heard | Lost]:
        """All that it has said, and its death. Whoever hears it may end the epoch or take the member out meanwhile."""
        member = process.member
        try:
            while processes and self._processes is processes and process in processes and member not in self._done:
                message = process.receive()
                if message is None:
                    return
                if isinstance(message, Ready):
                    process.ready = message
                    self._sources.keep(message.files)
                elif isinstance(message, Ended | Failed | FoundWritten | FoundWrong | StoppedAt):
                    self._done.add(member)
                yield Heard(member, message)
        except EOFError:
            yield self._lost(process)

    def _lost(self, process: MemberProcess) -> Lost:
        self._done.add(process.member)
        number = process.member.number
        serves = self._serving and number == self._team.workers
        log = self._folder.log_of("server" if serves else f"worker {number}")
        return Lost(process.member, *process.how_it_ended(self._name(number), log))

    def look(self) -> Lost | None:
        if self._processes is None:
            return None
        self._processes.look_for_orphans()
        self._spare.look(self._processes, self._done)
        if self._loaders is not None:
            self._loaders.look()
            self._loaders.follow(sum(process.member.number in self._workers for process in self._processes))
        waiting = {p.member.number: p for p in self._processes if p.member not in self._done}
        states = {number: process_state(process.handle.pid) for number, process in waiting.items()}
        found = self._liveness.look(time.monotonic(), states)
        if found is None:
            return None
        number, why = found
        self._done.add(waiting[number].member)
        return Lost(waiting[number].member, why)

    @property
    def processes(self) -> MemberProcesses:
        """Those of the present epoch."""
        assert self._processes is not None, "a team has started"
        return self._processes

    def carried(self) -> tuple[int, int]:
        """Bytes that this process and those that it has started have sent to other hosts, and received from them."""
        sent, received = METER.look()
        if self._processes is not None:
            board = self._processes.board
            sent, received = sent + int(board.sent.sum()), received + int(board.received.sum())
        return sent, received

    def ask_to_stop(self) -> None:
        """Asks for an end after the present step, with a checkpoint."""
        self.processes.board.ask_to_stop()

    def ask_to_pause(self) -> None:
        """The same, for a team that is to start anew."""
        self.processes.board.ask_to_pause()

    def stop_wanted(self) -> bool:
        """Whether that was asked for, by one of the members too."""
        return self._processes is not None and self._processes.board.stop_wanted()

    def shown(self) -> tuple[Shown, ...]:
        return tuple(map(self._shown, self._processes or ()))

    def _shown(self, process: MemberProcess) -> Shown:
        board, began, number = self.processes.board, self._began(), process.member.number
        since_s, done = process.began - began, process.member in self._done
        doing, told = board.doing.read(number)
        waits = int(board.waits[number])
        return Shown(
            member=process.member,
            pid=process.handle.pid,
            seen_s=time.monotonic() - began,
            since_s=since_s,
            doing=doing,
            doing_s=told / 1e9 - began if told else since_s,
            waits_s=waits / 1e9 - began if waits and not done else None,
            stopped=is_stopped(process.handle.pid),
            done=done,
        )

    def loaders_shown(self) -> tuple[LoaderShown, ...]:
        return () if self._loaders is None else self._loaders.shown(self._host)

    def ask_for_stacks(self, numbers: Collection[int]) -> None:
        self._asked = {}
        for process in self._processes or ():
            pid, number = process.handle.pid, process.member.number
            able = number in numbers and self.processes.board.answers[number] and process.member not in self._done
            if able and process_state(pid)[0] not in "TtZX":  # a stopped one would answer whenever it goes on
                process.stack.ask(pid)
                self._asked[process.member] = ""

    def stacks(self) -> Mapping[int, str]:
        for process in self._processes or ():
            if self._asked.get(process.member) == "":
                self._asked[process.member] = process.stack.found(process.handle.pid)
        return {member.number: text for member, text in self._asked.items() if text}

    def someone_waits(self, since_s: float) -> bool:
        """Whether a member waits for others since then, on the run's clock, or for longer. It costs next to nothing."""
        if self._processes is None:
            return False
        waits = self._processes.board.waits
        return bool(((waits > 0) & (waits <= int(1e9 * (since_s + self._began())))).any())

    def take_out(self, member: Member) -> list[WorkerToSupervisor]:
        old = self.processes.take_out(member)
        if old is None:
            return []
        self.processes.board.doing.clear(member.number)
        self.processes.board.answers[member.number] = 0
        words = old.rest()
        old.close()
        return words

    def hold(self, holders: Mapping[Member, Member], told: int) -> None:
        """Tells members whose places they hold, by successor. told: the last update that the tape has."""
        if not holders:
            return
        self.processes.board.hold({s.number: (h.number, s.incarnation) for s, h in holders.items()}, told)

    def succeed(self, successor: Member, assignment: Assignment) -> None:
        if not self.processes.give_to_spare(successor, assignment.team.workers):
            self._fork(successor, assignment)
        self._liveness.renew(successor.number, self.processes[successor].handle.pid)

    def add(self, members: Collection[Member], assignment: Assignment) -> None:
        if self._processes is None:
            self.start(members, assignment)
            return
        for member in members:
            self.succeed(member, assignment)

    def regroup(self, group: Regroup, told: int, saved: int) -> None:
        processes, members = self.processes, group.members
        here = [process for process in processes if process.member in members]
        come = here[-1].ready if here and len(here) == len(members) and not (group.at_once or group.fewer) else None
        regions = come.memory if come is not None else {}  # with which there is room or, at once, an error

        def reserved(file: int) -> None:
            if regions:
                reserve(file, regions)

        memory = processes.renew_memory(group.generation, reserved) if len(here) > 1 else (-1, 0)
        if members or group.at_once:  # else they are still in that of before, and so are successors of who dies in it
            processes.close_memory(group.generation - 1 if group.at_once else group.formed)
        word = next_group(group, told, saved, memory, self._copies() if len(members) == 1 else None)
        for process in here:
            process.send(word)
        processes.board.regroup(group.generation, at_once=group.at_once, fewer=group.fewer)

    def leave(self) -> None:
        until = time.monotonic() + SERVED_GRACE_S
        for process in self.processes:
            process.handle.join(max(0.0, until - time.monotonic()) if self._serving else GRACE_S)

    def end(self) -> None:
        if self._loaders is not None:
            self._loaders.end()
            self._loaders = None
        if self._processes is not None:
            self._processes.end()

    def _unneeded(self) -> list[Any]:
        """What is open here that loaders do not need."""
        return [*self._unused(), *self.processes.opened]

    def last_words(self) -> Iterator[Heard]:
        if self._processes is None:
            return
        processes, self._processes = self._processes, None
        try:
            for process in processes:
                yield from (Heard(process.member, message) for message in process.rest())
        finally:
            METER.add(int(processes.board.sent.sum()), int(processes.board.received.sum()))
            processes.close()
