"""The team between one start and its end, as the supervisor watches it."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, assert_never

from instep.errors import InstepError, WorkerError, killed_by
from instep.record.tape import SCHEMA
from instep.reduce.written import FirstWrite
from instep.tables import to_table
from instep.team.channel import Channel
from instep.team.heartbeat import Liveness
from instep.team.launcher import Handle
from instep.team.messages import (
    Agreed,
    ClientToSupervisor,
    Digest,
    Ended,
    Events,
    Failed,
    Left,
    Ready,
    Saved,
    StopRun,
    Sync,
    Synced,
    WorkerToSupervisor,
    Written,
)
from instep.transport.shared_memory import reserve
from instep.worker.stopping import with_saved

if TYPE_CHECKING:
    from instep.team.supervisor import Supervisor

LOOK_S = 0.2
"""Seconds between two looks at the workers."""

GRACE_S = 10.0
"""Seconds that workers have to leave after their last message."""

SERVED_GRACE_S = 1.0
"""Seconds that workers of the server engine have, all together: what they still compute is for nobody."""


class ClientGone(Exception):
    """The client's process has ended, or wants no more."""


class Interrupted(Exception):
    """The run was asked to stop before a step of this start."""


class WorkerFailure(Exception):
    """A worker died or stopped answering: the team may start again."""

    def __init__(self, worker: int, why: str, detail: str = ""):
        super().__init__(why)
        self.worker, self.why, self.detail = worker, why, detail


@dataclass
class Member:
    process: Handle
    pipe: Channel
    incarnation: int = 0
    ready: Ready | None = None
    ended: Ended | None = None

    def close(self) -> None:
        """Closes what is open here for the process, which has ended."""
        self.pipe.close()
        self.process.close()


class Start:
    """The team between one start and its end. Raises FirstWrite where it must start again for it."""

    def __init__(self, supervisor: Supervisor, workers: list[Member], descriptor: int):
        self._supervisor, self._run, self._board = supervisor, supervisor.run, supervisor.board
        self._workers, self._descriptor = workers, descriptor
        self._digests: dict[int, dict[int, str]] = {}
        self._going, self._parent = False, os.getppid()
        self._orphans: set[int] = set()  # of processes that lived at the last look
        self._raised: InstepError | None = None  # by a worker of the server engine, while the server saves
        self._serving = supervisor.run.engine == "server"
        self._leader = len(workers) - 1 if self._serving else 0
        team = self._run.team
        pids = [worker.process.pid for worker in workers]
        names = [self._name(number) for number in range(len(workers))]
        self._watch = Liveness(self._board, pids, team.answer_timeout_s, team.stall_timeout_s, names)

    def watch(self) -> dict[str, Any]:
        """Serves the workers' messages until all have ended. Returns the result."""
        client = self._supervisor.client
        looked = time.monotonic()
        while not self._over():
            active = [worker for worker in self._workers if worker.ended is None]
            sources: list[Any] = [client, *(w.pipe for w in active), *(w.process.death for w in active)]
            ready: list[Any] = wait(sources, timeout=LOOK_S)
            if client in ready:
                self._hear_client(client)
            self._hear_signals()
            for number, worker in enumerate(self._workers):
                if worker in active and (worker.pipe in ready or worker.process.death in ready):
                    with self._replacing():
                        self._hear(number, worker)
            if time.monotonic() - looked >= LOOK_S:
                looked = time.monotonic()
                self._supervisor.held.check()
                if os.getppid() != self._parent:  # whoever it was that held the client's end of the pipe open
                    raise ClientGone
                self._orphans = self._supervisor.orphans(self._workers)
                found = self._watch.look()
                if found:
                    with self._replacing():
                        raise WorkerFailure(*found)
        return self._result()

    def _over(self) -> bool:
        """Whether the run has ended: with the server, or else with all workers."""
        if self._serving:
            return self._workers[self._leader].ended is not None
        return all(worker.ended for worker in self._workers)

    @contextlib.contextmanager
    def _replacing(self) -> Iterator[None]:
        """Under the server engine, puts a new process in the place of a worker that failed; nobody else stops."""
        try:
            yield
        except WorkerFailure as failure:
            number = failure.worker
            if self._raised is not None:
                self._fail(number, self._workers[number], self._raised)
                return
            if not self._serving or not self._going or number == self._leader:
                raise
            if not self._board.stop_wanted():
                try:
                    self._supervisor.count_restart(failure)
                except WorkerError:
                    self._supervisor.record("left", worker=number, why=failure.why)
                    raise
            old = self._workers[number]
            old.process.kill()
            old.process.join()
            self._supervisor.end_orphans([w for w in self._workers if w is not old], but=self._orphans)
            self._supervisor.pass_on_the_rest(old.pipe)
            old.close()
            with contextlib.suppress(OSError):  # the server is dead too, as will be seen
                self._workers[self._leader].pipe.send(Left(number, failure.why))
            if self._board.stop_wanted():
                old.ended = Ended(interrupted=True)
                self._watch.leave_out(number)
                return
            new = self._supervisor.fork(number, None, self._descriptor, self._workers, old.incarnation + 1)
            self._workers[number] = new
            self._watch.renew(number, new.process.pid)

    def _hear_client(self, client: Channel) -> None:
        try:
            message: ClientToSupervisor = client.recv()
        except (EOFError, ConnectionResetError):
            raise ClientGone from None
        assert isinstance(message, StopRun), f"during a run a client asks for its end alone, not {message}"
        self._stop()

    def _hear_signals(self) -> None:
        requests = self._supervisor.requests
        if requests.at_once:
            raise Interrupted
        if requests.end and not self._board.stop_wanted():
            self._stop()

    def _stop(self) -> None:
        self._board.ask_to_stop()
        if not self._going:
            raise Interrupted

    def _hear(self, number: int, worker: Member) -> None:
        try:
            while worker.pipe.poll():
                self._handle(number, worker, worker.pipe.recv())
        except (EOFError, ConnectionResetError, OSError):
            if worker.ended is None:
                raise self._death(number, worker) from None
        if worker.ended is None and worker.process.exitcode is not None and not worker.pipe.poll():
            raise self._death(number, worker)

    def _handle(self, number: int, worker: Member, message: WorkerToSupervisor) -> None:
        match message:
            case Events(events):
                self._supervisor.pass_on(events)
            case Sync():
                self._supervisor.sync_tape()
                worker.pipe.send(Synced())
            case Digest(version, digest):
                self._compare(number, version, digest)
            case Ready():
                worker.ready = message
                if self._going:
                    self._let_start(worker)
                elif all(other.ready for other in self._workers):
                    self._go()
            case Ended():
                worker.ended = message
                self._watch.leave_out(number)
            case Written(names, where):
                raise FirstWrite(names, where)
            case Failed():
                self._fail(number, worker, message.error())
            case Saved(version):
                assert self._raised is not None, "the server was told to stop"
                sentence = with_saved(self._raised.message, version, self._run.folder)
                raise type(self._raised)(sentence, detail=self._raised.detail)
            case _:
                assert_never(message)

    def _fail(self, number: int, worker: Member, error: InstepError) -> None:
        """What a process's code raised ends the run; in lockstep, and at the server, it is saved by then."""
        if not self._serving or not self._going or number == self._leader:
            raise self._raised or error
        worker.ended = Ended(interrupted=True)
        self._watch.leave_out(number)
        if self._raised is not None:
            return
        self._raised = error
        try:
            self._workers[self._leader].pipe.send(StopRun())
        except OSError:
            raise error from None

    def _go(self) -> None:
        """All workers are built: checks that they agree, gives them memory, lets them start."""
        lead = self._workers[self._leader].ready
        assert lead is not None, "all are ready"
        facts, self._agreed = lead.facts, Agreed(lead.facts, lead.memory)
        for number, worker in enumerate(self._workers):
            theirs = worker.ready.facts if worker.ready else {}
            for name, value in facts.items():
                if name in theirs and theirs[name] != value:
                    raise WorkerError(
                        f"worker {number} starts from other {name} than {self._name(self._leader)} "
                        f"({theirs.get(name)} instead of {value}); what builds them must depend on its arguments and "
                        f"the seed alone{', and each sample on its index besides' if name == 'data' else ''}."
                    )
        self._supervisor.check_written(facts.get("written", ()))
        reserve(self._descriptor, lead.memory)
        self._supervisor.accept()
        about = self._supervisor.about
        self._supervisor.record(
            "run_started",
            schema=SCHEMA,
            folder=str(self._run.folder),
            run=about.id if about is not None else None,
            recipe=dict(self._run.recipe_table),
            team=to_table(self._run.team),
            fingerprint=self._run.fingerprint,
            data_digest=facts["data"],
            samples=facts["samples"],
            engine=self._run.engine,
            cut=facts.get("cut", self._run.team.workers),
            parameters=facts["parameters"],
            version=facts["version"],
            digest=facts["weights"],
            step=facts.get("step", facts["version"]),
            steps=self._run.recipe_table["steps"],
            resumed=self._supervisor.begun or self._supervisor.again,
            libraries=_libraries(),
            import_paths=list(self._run.import_paths),
            **({"written": facts["written"]} if facts.get("written") else {}),
        )
        if not self._supervisor.again:
            for why in (*self._run.notices, *self._run.rule.warnings()):
                self._supervisor.record("warned", why=why)
        for worker in self._workers:
            self._let_start(worker)
        self._going = True

    def _let_start(self, worker: Member) -> None:
        with contextlib.suppress(OSError):  # it is dead, as will be seen
            worker.pipe.send(self._agreed)

    def _compare(self, number: int, version: int, digest: str) -> None:
        digests = self._digests.setdefault(version, {})
        digests[number] = digest
        if digest != next(iter(digests.values())):
            raise WorkerError(
                f"worker {number} has other weights than worker {next(iter(digests))} at version {version}, which "
                f"lockstep rules out: some code depends on more than the batch and the seed (a clock, a set's order, "
                f"threads), or the machine is faulty."
            )
        if len(digests) == len(self._workers):
            del self._digests[version]

    def _death(self, number: int, worker: Member) -> WorkerFailure:
        worker.process.join(1)
        code, pid = worker.process.exitcode, worker.process.pid
        name = self._name(number)
        log = self._supervisor.folder.log_of(name.removeprefix("the "))
        if code is not None and code < 0:
            why = f"{name} (pid {pid}) was {killed_by(code)}."
        else:
            why = f"{name} (pid {pid}) ended with exit status {code} in the middle of the run."
        return WorkerFailure(number, why, detail=_tail(log))

    def _result(self) -> dict[str, Any]:
        until = time.monotonic() + SERVED_GRACE_S
        for number, worker in enumerate(self._workers):
            worker.process.join(max(0.0, until - time.monotonic()) if self._serving else GRACE_S)
            if not self._serving:
                assert worker.ended is not None
                self._compare(number, -1, worker.ended.digest)
        ended = self._workers[self._leader].ended
        assert ended is not None
        progress, interrupted, left = ended.progress, ended.interrupted, ended.left
        held_out = progress["held_out"]
        result: dict[str, Any] = {
            "recipe": self._run.recipe_table["name"],
            "digest": ended.digest,
            "rule": self._run.rule.name,
            "engine": self._run.engine,
            "steps": progress["steps"],
            "versions": progress["version"],
            "items": progress["items"],
            "workers": self._run.team.workers,
            "microbatches": self._run.recipe_table["microbatches"],
            "parameters": self._agreed.facts["parameters"],
            "objective_first": progress["objective_first"],
            "objective_last": progress["objective_last"],
            "held_out": held_out.get("objective"),
            "held_out_terms": held_out.get("terms"),
            "bits_per_byte": held_out.get("bits_per_byte"),
            "gathered": held_out.get("gathered"),
            "items_per_s": progress["items"] / progress["train_s"] if progress["train_s"] else None,
            "wall_s": round(time.monotonic() - self._run.began, 3),
            "restarts": self._supervisor.restarts,
            **self._costs(),
            "interrupted": interrupted,
            "stopped": progress["stopped"] or None,
            "skipped": progress["skipped"],
            "bad_batches": progress["bad_batches"],
            "data_digest": self._agreed.facts["data"],
            "sample": left.get("sample"),
            "artifacts": left.get("artifacts"),
        }
        self._supervisor.held.check()
        self._supervisor.folder.write_result(result)
        self._supervisor.record(
            "run_ended", version=progress["version"], digest=ended.digest, result=result, interrupted=interrupted
        )
        return result

    def _costs(self) -> dict[str, Any]:
        """What the rule cost in this start of the team."""
        found = [worker.ended.costs for worker in self._workers if worker.ended is not None]
        if self._serving:
            return dict(found[-1])
        return {
            "bytes_sent": found[0]["bytes_sent"],
            "staleness_mean": 0.0,
            "staleness_max": 0,
            "delayed_max": 0,
            "lead_max": 0,
            "idle_share": [share for each in found for share in each["idle_share"]],
            "dropped": 0,
        }

    def _name(self, number: int) -> str:
        return "the server" if self._serving and number == self._leader else f"worker {number}"


def _libraries() -> dict[str, str]:
    import numpy
    import torch

    import instep

    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a TorchVersion would make the client import torch to read it
        "numpy": numpy.__version__,
        "instep": instep.__version__,
    }


def _tail(log: Path, lines: int = 20) -> str:
    """The end of what the worker printed."""
    try:
        return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
    except OSError:
        return ""
