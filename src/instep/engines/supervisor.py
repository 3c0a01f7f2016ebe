"""The supervisor's process: forks the workers, watches them, writes the tape, starts the team again after a death.

It imports torch once, before it forks, so that a team starts, and starts again, in a moment. It runs none of the
user's code, has one thread, and ends with its client: no process of a run outlives another.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import platform
import signal
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from instep.engines.pulse import PulseBoard, Watch
from instep.engines.request import Request
from instep.errors import CheckpointError, InstepError, WorkerError, by_name
from instep.record import checkpoint
from instep.record.files import write_atomically
from instep.record.folder import RunFolder
from instep.record.tape import SCHEMA, Tape
from instep.reduce.shared import Region, anonymous_file, reserve
from instep.tables import to_table

LOOK_S = 0.2
"""Seconds between two looks at the workers."""

GRACE_S = 10.0
"""Seconds that workers have to leave after their last message."""


class ClientGone(Exception):
    """The client's process has ended, or wants no more."""


class Interrupted(Exception):
    """The run was asked to stop before a step of this start."""


class WorkerFailure(Exception):
    """A worker died or stopped answering: the team may start again."""

    def __init__(self, worker: int, why: str, detail: str = ""):
        super().__init__(why)
        self.worker, self.why, self.detail = worker, why, detail


class Supervisor:
    """One run, over all starts of its team."""

    def __init__(self, run: Request, client: Connection):
        self._run, self._client = run, client
        self._folder = RunFolder(run.folder)
        self._board = PulseBoard(run.team.workers)
        self._restarts = 0
        self._early: list[dict[str, Any]] = []
        self._started = run.resumed  # the tape of a resumed run has its beginning

    def supervise(self) -> dict[str, Any]:
        """Trains to the end, with restarts. Returns the result. Raises InstepError."""
        with self._folder.locked(), Tape(self._folder.tape_path, append=self._run.resumed) as self._tape:
            try:
                write_atomically(self._folder.recipe_path, self._run.recipe_file.encode())
                return self._with_restarts()
            except InstepError as error:
                self._record("failed", why=error.message)
                raise

    def _with_restarts(self) -> dict[str, Any]:
        while True:
            try:
                return self._start(self._newest_checkpoint())
            except WorkerFailure as failure:
                self._record("left", worker=failure.worker, why=failure.why)
                if self._board.stop_wanted():
                    raise Interrupted from None
                if self._restarts == self._run.team.restarts:
                    raise WorkerError(
                        f"{failure.why.rstrip('.')}; the team has started again {self._restarts} times, as often as "
                        f"team.restarts allows.",
                        detail=failure.detail,
                    ) from None
                self._restarts += 1

    def _newest_checkpoint(self) -> Path | None:
        if not self._folder.checkpoints.exists():
            return None
        path, problems = checkpoint.newest_sound(self._folder.checkpoints)
        for problem in problems:
            self._record("warned", why=problem)
        if path is None and problems and self._run.resumed:
            raise CheckpointError(
                f"no checkpoint in {self._folder.checkpoints} is sound, so the run cannot be resumed; start a new one.",
                detail="\n".join(problems),
            )
        return path

    def _start(self, resume_from: Path | None) -> dict[str, Any]:
        """One start of the team, until it ends. Raises InstepError, WorkerFailure or ClientGone."""
        descriptor = anonymous_file()
        self._board = PulseBoard(self._run.team.workers)
        workers: list[_Worker] = []
        try:
            for number in range(self._run.team.workers):
                workers.append(self._fork(number, resume_from, descriptor, workers))
            return _Start(self, workers, descriptor).watch()
        finally:
            for started in workers:
                started.process.kill()
            for started in workers:
                started.process.join()
                self._pass_on_the_rest(started.pipe)
                started.pipe.close()
            os.close(descriptor)

    def _fork(self, worker: int, resume_from: Path | None, descriptor: int, before: list[_Worker]) -> _Worker:
        from instep.engines import worker as worker_module

        run = self._run
        assignment = worker_module.Assignment(
            recipe=run.recipe,
            team=run.team,
            folder=run.folder,
            fingerprint=run.fingerprint,
            resume_from=resume_from,
            began=run.began,
        )
        ours, theirs = multiprocessing.Pipe()
        unused = [self._client, ours, *(other.pipe for other in before)]
        process = multiprocessing.get_context("fork").Process(
            target=_worker_main,
            args=(unused, assignment, worker, theirs, self._board, descriptor),
            name=f"worker-{worker}",
        )
        process.start()
        theirs.close()
        return _Worker(process, ours)

    def _pass_on_the_rest(self, pipe: Connection) -> None:
        """What a worker told before its end belongs on the tape: a checkpoint may hold those very steps."""
        with contextlib.suppress(EOFError, OSError, ClientGone):
            while pipe.poll():
                what, *rest = pipe.recv()
                if what == "events":
                    self.pass_on(rest[0])

    def _record(self, kind: str, **fields: Any) -> None:
        """Writes an event of the supervisor's own to the tape and to the client."""
        t_s = round(time.monotonic() - self._run.began, 6)
        self.pass_on([{"t_s": t_s, "clock": "wall", "kind": kind, **fields}])

    def pass_on(self, events: list[dict[str, Any]]) -> None:
        """Writes events to the tape and sends them to the client. On the tape, ``run_started`` comes first."""
        self._early += events
        if self._started or any(event["kind"] == "run_started" for event in events):
            self._started = True
            for waiting in sorted(self._early, key=lambda early: early["kind"] != "run_started"):
                self._tape.write(waiting)
            self._early.clear()
        self._tell(("events", events))

    def _tell(self, message: Any) -> None:
        try:
            self._client.send(message)
        except (BrokenPipeError, ConnectionResetError):
            raise ClientGone from None


def _worker_main(unused: list[Connection], *arguments: Any) -> None:
    from instep.engines.worker import main

    for pipe in unused:  # or a worker would keep its siblings' pipes open after the supervisor's end
        pipe.close()
    main(*arguments)


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    ready: tuple[dict[str, Any], Mapping[str, Region]] | None = None
    ended: tuple[dict[str, Any], str, bool, str | None] | None = None


class _Start:
    """The team between one start and its end."""

    def __init__(self, supervisor: Supervisor, workers: list[_Worker], descriptor: int):
        self._supervisor, self._run, self._board = supervisor, supervisor._run, supervisor._board
        self._workers, self._descriptor = workers, descriptor
        self._digests: dict[int, dict[int, str]] = {}
        self._going = False
        team = self._run.team
        pids = [worker.process.pid or 0 for worker in workers]
        self._watch = Watch(self._board, pids, team.answer_timeout_s, team.stall_timeout_s)

    def watch(self) -> dict[str, Any]:
        """Serves the workers' messages until all have ended. Returns the result."""
        client = self._supervisor._client
        looked = time.monotonic()
        while not all(worker.ended for worker in self._workers):
            active = [worker for worker in self._workers if worker.ended is None]
            sources: list[Any] = [client, *(w.pipe for w in active), *(w.process.sentinel for w in active)]
            ready = wait(sources, timeout=LOOK_S)
            if client in ready:
                self._hear_client(client)
            for number, worker in enumerate(self._workers):
                if worker in active and (worker.pipe in ready or worker.process.sentinel in ready):
                    self._hear(number, worker)
            if time.monotonic() - looked >= LOOK_S:
                looked = time.monotonic()
                found = self._watch.look()
                if found:
                    raise WorkerFailure(*found)
        return self._result()

    def _hear_client(self, client: Connection) -> None:
        try:
            client.recv()
        except (EOFError, ConnectionResetError):
            raise ClientGone from None
        self._board.ask_to_stop()
        if not self._going:
            raise Interrupted

    def _hear(self, number: int, worker: _Worker) -> None:
        try:
            while worker.pipe.poll():
                self._handle(number, worker, worker.pipe.recv())
        except (EOFError, ConnectionResetError, OSError):
            if worker.ended is None:
                raise self._death(number, worker) from None
        if worker.ended is None and not worker.process.is_alive() and not worker.pipe.poll():
            raise self._death(number, worker)

    def _handle(self, number: int, worker: _Worker, message: tuple[Any, ...]) -> None:
        what, *rest = message
        if what == "events":
            self._supervisor.pass_on(rest[0])
        elif what == "digest":
            self._compare(number, *rest)
        elif what == "ready":
            worker.ready = (rest[0], rest[1])
            if all(other.ready for other in self._workers):
                self._go()
        elif what == "ended":
            worker.ended = (rest[0], rest[1], rest[2], rest[3])
            self._watch.leave_out(number)
        elif what == "failed":
            name, sentence, detail = rest
            raise by_name(name)(sentence, detail=detail)

    def _go(self) -> None:
        """All workers are built: checks that they agree, gives them memory, lets them start."""
        facts, memory = self._workers[0].ready or ({}, {})
        for number, worker in enumerate(self._workers):
            theirs = (worker.ready or ({}, {}))[0]
            for name, value in facts.items():
                if theirs.get(name) != value:
                    raise WorkerError(
                        f"worker {number} starts from other {name} than worker 0 ({theirs.get(name)} instead of "
                        f"{value}); what builds them must depend on its arguments and the seed alone."
                    )
        reserve(self._descriptor, memory)
        self._supervisor._record(
            "run_started",
            schema=SCHEMA,
            folder=str(self._run.folder),
            recipe=dict(self._run.recipe_table),
            team=to_table(self._run.team),
            fingerprint=self._run.fingerprint,
            data_digest=facts["data"],
            samples=facts["samples"],
            parameters=facts["parameters"],
            version=facts["version"],
            steps=self._run.recipe_table["steps"],
            resumed=self._run.resumed or self._supervisor._restarts > 0,
            libraries=_libraries(),
            import_paths=list(self._run.import_paths),
        )
        self._facts = facts
        for worker in self._workers:
            worker.pipe.send(memory)
        self._going = True

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

    def _death(self, number: int, worker: _Worker) -> WorkerFailure:
        worker.process.join(1)
        code, pid = worker.process.exitcode, worker.process.pid
        log = self._supervisor._folder.logs / f"worker-{number}.log"
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            hint = ", as the kernel does when memory runs out" if name == "SIGKILL" else ""
            why = f"worker {number} (pid {pid}) was killed by {name}{hint}."
        else:
            why = f"worker {number} (pid {pid}) ended with exit status {code} in the middle of the run."
        return WorkerFailure(number, why, detail=_tail(log))

    def _result(self) -> dict[str, Any]:
        for number, worker in enumerate(self._workers):
            worker.process.join(GRACE_S)
            assert worker.ended is not None
            self._compare(number, -1, worker.ended[1])
        ended = self._workers[0].ended
        assert ended is not None
        progress, digest, interrupted, sample = ended
        held_out = progress["held_out"]
        result: dict[str, Any] = {
            "recipe": self._run.recipe_table["name"],
            "digest": digest,
            "steps": progress["version"],
            "items": progress["items"],
            "workers": len(self._workers),
            "microbatches": self._run.recipe_table["microbatches"],
            "parameters": self._facts["parameters"],
            "objective_first": progress["objective_first"],
            "objective_last": progress["objective_last"],
            "held_out": held_out.get("objective"),
            "bits_per_byte": held_out.get("bits_per_byte"),
            "items_per_s": progress["items"] / progress["train_s"] if progress["train_s"] else None,
            "wall_s": round(time.monotonic() - self._run.began, 3),
            "restarts": self._supervisor._restarts,
            "interrupted": interrupted,
            "data_digest": self._facts["data"],
            "sample": sample,
        }
        self._supervisor._folder.write_result(result)
        self._supervisor._record(
            "run_ended", version=progress["version"], digest=digest, result=result, interrupted=interrupted
        )
        return result


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


def main(descriptor: int) -> None:
    """Entry of the process: serves one run for the client at the other end of `descriptor`, and ends."""
    _serve(Connection(descriptor))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # nothing is open any more, and taking torch down in order costs a second


def _serve(client: Connection) -> None:
    try:
        run: Request = client.recv()
    except EOFError:
        return
    import_before_forks()
    try:
        client.send(("ended", Supervisor(run, client).supervise()))
    except ClientGone:
        pass
    except Interrupted:
        _send_quietly(client, ("interrupted",))
    except InstepError as error:
        _send_quietly(client, ("failed", type(error).__name__, error.message, error.detail))
    except BaseException as error:
        sentence = (
            f"the supervisor failed: {type(error).__name__}: {error}; this is a fault of Instep, please report it."
        )
        _send_quietly(client, ("failed", "InstepError", sentence, traceback.format_exc()))


def import_before_forks() -> None:
    """What every worker needs and takes seconds to import: each optimizer imports torch._dynamo when it is built."""
    for name in ("numpy.random", "torch._dynamo", "instep.engines.worker"):
        import_module(name)


def _send_quietly(client: Connection, message: Any) -> None:
    with contextlib.suppress(OSError):
        client.send(message)
