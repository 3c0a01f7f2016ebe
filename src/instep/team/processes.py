"""The processes of a team between one start and its end, and what they share."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from instep.descendants import children, end_children, reap
from instep.errors import killed_by, no_process
from instep.memory_file import let_go, memory_file
from instep.team.channel import Channel, Line
from instep.team.heartbeat import HeartbeatBoard
from instep.team.launcher import Handle
from instep.team.messages import Assignment, Ready, SupervisorToWorker, WorkerToSupervisor
from instep.team.orders import Member
from instep.team.regroup_messages import TakePlace
from instep.team.stacks import Stack


@dataclass
class MemberProcess:
    """A member's process, as the agent sees it. `ready`: what it has said. `began`: on the monotonic clock."""

    member: Member
    handle: Handle
    pipe: Channel
    stack: Stack
    ready: Ready | None = None
    began: float = field(default_factory=time.monotonic)

    def send(self, message: SupervisorToWorker) -> None:
        """Sends a message; nothing where it is dead, as will be seen."""
        with contextlib.suppress(OSError):
            self.pipe.send(message)

    def receive(self) -> WorkerToSupervisor | None:
        """The next message, if one is there. Raises EOFError where none can come any more."""
        dead = self.handle.exitcode is not None
        try:
            if self.pipe.poll():
                message: WorkerToSupervisor = self.pipe.recv()
                return message
        except OSError:
            dead = True
        if dead:
            raise EOFError
        return None

    def rest(self) -> list[WorkerToSupervisor]:
        """What has arrived from it that nobody has received, once it has ended."""
        found: list[WorkerToSupervisor] = []
        with contextlib.suppress(EOFError, OSError):
            while self.pipe.poll():
                found.append(self.pipe.recv())
        return found

    def how_it_ended(self, name: str, log: Path) -> tuple[str, str]:
        """A sentence on a process that is dead, or as good as that, and the end of what it printed."""
        self.handle.join(1)
        code = self.handle.exitcode
        if code is not None and code < 0:
            how = f"was {killed_by(code)}"
        else:
            how = f"ended with exit status {code} in the middle of the run"
        return f"{name} (pid {self.handle.pid}) {how}.", _tail(log)

    def close(self) -> None:
        """Closes what is open here for the process, which has ended."""
        self.pipe.close()
        self.stack.close()
        self.handle.close()


class MemberProcesses:
    """Those of one epoch and host. `workers`: of all hosts. `others`: children of this process that are not the run's.
    `lines`: how many workers are on the server's host, if this is that. `most`: how many there may come to be. Raises
    ResourceError.
    """

    def __init__(self, workers: int, others: set[int], *, serving: bool, lines: int, most: int = 0):
        self._workers, self._others = workers, others
        self._by_number: dict[int, MemberProcess] = {}
        self._spare: MemberProcess | None = None  # that is to take a place, and has none yet
        self._orphans: set[int] = set()  # of processes that lived at the last look
        opened: list[Line] = []
        try:
            for _ in range(lines):
                opened.append(Line.open())
            self.board = HeartbeatBoard(max(workers + serving, 2 * most) + 1)  # some come, and others leave then
            self.descriptor = memory_file()
            """Of the memory that all map."""
        except OSError as error:
            for line in opened:
                line.close()
            raise no_process(f"a team of {workers} workers", error) from error
        self._renewed: dict[int, io.FileIO] = {}  # by generation
        self._newest = self.descriptor
        self.lines = tuple(opened)
        """Between the server and each worker of this host."""

    def __iter__(self) -> Iterator[MemberProcess]:
        """In order of their numbers."""
        return iter([self._by_number[number] for number in sorted(self._by_number)])

    @property
    def _all(self) -> list[MemberProcess]:
        return [*self, *([self._spare] if self._spare is not None else [])]

    def __getitem__(self, member: Member) -> MemberProcess:
        return self._by_number[member.number]

    @property
    def opened(self) -> list[Any]:
        """What is open here that only its members, or this process, need."""
        memory = SimpleNamespace(close=partial(os.close, self.descriptor))  # given back once there is another group
        own = (each for process in self._all for each in (process.pipe, process.stack))
        return [memory, *self._renewed.values(), *self.lines, *own]

    def fork(self, member: Member, assignment: Assignment, unused: Sequence[Any]) -> None:
        """Starts the member's process, which closes what it does not need. Raises ResourceError."""
        self._by_number[member.number] = self._forked(member, assignment, unused)

    def fork_spare(self, member: Member, assignment: Assignment, unused: Sequence[Any]) -> None:
        """As `fork`; of a process that is built, and waits to take this member's place should that die."""
        self._spare = self._forked(member, assignment, unused, spare=True)

    def _forked(
        self, member: Member, assignment: Assignment, unused: Sequence[Any], *, spare: bool = False
    ) -> MemberProcess:
        try:
            ours, theirs = Channel.pair()
            with contextlib.closing(theirs):
                stack = Stack()
                unused = [
                    *unused,
                    *(memory for memory in self._renewed.values() if memory.fileno() != self._newest),
                    ours,
                    *(each for other in self._all for each in (other.pipe, other.stack)),
                ]
                arguments = (unused, assignment, member.number, theirs, self.board, self._newest, stack, spare)
                handle = Handle(_main, arguments, f"worker-{member.number}")
        except OSError as error:
            raise no_process(f"process {member.number + 1} of the {self._workers} workers", error) from error
        return MemberProcess(member, handle, ours, stack)

    def drop_spare(self) -> None:
        """Ends the process that is to take a place, if there is one."""
        if (spare := self._spare) is not None:
            self._spare = None
            self._end_one(spare)
            spare.close()

    def give_to_spare(self, successor: Member, workers: int) -> bool:
        """Has the process that waits for it be this successor, in a team of so many, if there is one."""
        spare = self._spare
        if spare is None or spare.member.number != successor.number or spare.handle.exitcode is not None:
            return False
        self._spare = None
        self._by_number[successor.number] = process = MemberProcess(successor, spare.handle, spare.pipe, spare.stack)
        self.board.give_place(spare.handle.pid)
        process.send(TakePlace(workers))
        return True

    def renew_memory(self, generation: int, reserved: Callable[[int], None] = lambda _: None) -> tuple[int, int]:
        """Descriptor and inode of what those that live are to map for a group, who find it here. Raises ResourceError.

        reserved: is called with it before anything changes.
        """
        try:
            memory = io.FileIO(memory_file(), "r+")
        except OSError as error:
            raise no_process("what workers share", error) from error
        try:
            reserved(memory.fileno())
        except BaseException:
            memory.close()
            raise
        self._renewed[generation] = memory
        self._newest = memory.fileno()
        return memory.fileno(), os.fstat(memory.fileno()).st_ino

    def close_memory(self, generation: int) -> None:
        """Nobody is to map any more what is here for groups up to this generation, and the first one: all have."""
        for old in [each for each in self._renewed if each <= generation]:
            self._renewed.pop(old).close()
        self._newest = max(self._renewed.items())[1].fileno() if self._renewed else self.descriptor
        let_go(self.descriptor)

    def look_for_orphans(self) -> None:
        """Notes what the run's processes have started and left behind. Of that, what is dead is waited for."""
        self._orphans = children() - self._others - {process.handle.pid for process in self._all}
        reap(self._orphans)

    def take_out(self, member: Member) -> MemberProcess | None:
        """Ends a member's process, with all that it has left behind; to be closed. None where it was not begun."""
        there = self._by_number.get(member.number)
        if there is None or there.member != member:
            return None
        process = self._by_number.pop(member.number)
        self._end_one(process)
        return process

    def _end_one(self, process: MemberProcess) -> None:
        process.handle.kill()
        process.handle.join()
        end_children(self._others | self._orphans | {other.handle.pid for other in self._all})

    def end(self) -> None:
        """Ends all, with all that they have left behind."""
        for process in self._all:
            process.handle.kill()
        for process in self._all:
            process.handle.join()
        end_children(but=self._others)

    def close(self) -> None:
        """Closes what is open here for them, who have ended."""
        for process in self._all:
            process.close()
        for line in self.lines:
            line.close()
        for memory in self._renewed.values():
            memory.close()
        os.close(self.descriptor)


def import_before_forks() -> None:
    """What every worker needs and takes long to import: each optimizer imports torch._dynamo when it is built."""
    from torch.profiler import record_function

    with record_function("imports"):  # as each optimizer's steps are, of which the first would import more
        for name in ("numpy.random", "torch._dynamo", "torch.utils.serialization.config", "instep.team.process"):
            import_module(name)


def _main(unused: list[Any], *arguments: Any) -> None:
    from instep.team.process import main

    gc.freeze()  # what was inherited: the collector would write to it, and so copy it
    for each in unused:  # or a worker would keep its siblings' pipes open after the agent's end
        each.close()
    main(*arguments)


def _tail(log: Path, lines: int = 20) -> str:
    """The end of what the worker printed."""
    try:
        return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
    except OSError:
        return ""
