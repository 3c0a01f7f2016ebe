"""The supervisor's process: forks the workers, watches them, writes the tape, starts the team again after a death.

It imports torch once, before it forks, so that a team starts, and starts again, in a moment. It runs none of the
user's code, has one thread, and ends with its client: no process of a run outlives another.
"""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from instep.descendants import adopting_orphans, children, die_with_parent, end_children, reap
from instep.errors import CheckpointError, InstepError, RecipeError, RecordError, WorkerError, described, no_process
from instep.record import best, checkpoint
from instep.record.files import write_atomically
from instep.record.folder import RunFolder
from instep.record.tape import Tape, Told, told
from instep.reduce.written import FirstWrite
from instep.team.channel import Channel, Line
from instep.team.heartbeat import HeartbeatBoard
from instep.team.launcher import Handle
from instep.team.messages import (
    Assignment,
    Cancelled,
    ClientToSupervisor,
    Events,
    Failed,
    Finished,
    Request,
    SupervisorToClient,
    WorkerToSupervisor,
    Written,
)
from instep.team.signals import Requests
from instep.team.start import ClientGone, Interrupted, Member, Start, WorkerFailure
from instep.transport.shared_memory import anonymous_file

PATIENCE_S = 1.0
"""Seconds to wait for the lock of the run folder: the workers of a run that was killed hold it a moment longer."""


class Supervisor:
    """One run, over all starts of its team."""

    def __init__(self, run: Request, client: Channel, requests: Requests | None = None):
        self.run, self.client = run, client
        self.requests = requests or Requests()
        self.folder = RunFolder(run.folder)
        self._recipe = run.recipe
        self.restarts = 0
        self.again = False
        """Whether the team has started before in this process."""
        self._written: set[str] = set()  # the parameters that forwards are known to write,
        self._found: set[str] = set()  # and those that workers told of when the team was ended
        self._early: list[dict[str, Any]] = []
        self.begun = False  # whether the tape had the run's beginning already, whatever the client takes it for
        self._started = False  # whether a team of this process has: what is told before waits for it, or is not written
        self._told = Told()

    def supervise(self) -> dict[str, Any]:
        """Trains to the end, with restarts. Returns the result. Raises InstepError."""
        self._others = children()  # which are not this run's: none, unless a program supervises by itself
        with (
            adopting_orphans(),
            self.folder.locked(PATIENCE_S) as self.held,
            Tape(self.folder.tape_path, append=True) as self._tape,
        ):
            try:
                self.begun = self._tape.begun
                self._told = told(self.folder.tape_path)
                self.about = self.folder.about()
                best.read(self.folder.checkpoints)  # a damaged one is told of now, not in the midst of training
                resume_from = self._newest_checkpoint()
                self._check_steps(resume_from)
                return self._with_restarts(resume_from)
            except InstepError as error:
                why = self._cause(error)
                self.record("failed", why=why.message)
                raise why from error.__cause__

    def accept(self) -> None:
        """All workers have built the recipe: from here on it is the run's. One that is refused leaves no trace."""
        if not self._started:
            write_atomically(self.folder.recipe_path, self.run.recipe_file.encode())

    def _cause(self, error: InstepError) -> InstepError:
        """What is to be told: where the run folder is gone, that is why something else failed."""
        try:
            self.held.check()
        except RecordError as gone:
            return gone
        return error

    def _check_steps(self, resume_from: Path | None) -> None:
        steps = self.run.recipe_table["steps"]
        done = checkpoint.steps_done(resume_from) if resume_from is not None else 0
        if done > steps:
            raise RecipeError(
                f"{self.run.folder} has done {done} steps already, and 'recipe.steps' is {steps}; give {done} or more."
            )

    def _with_restarts(self, resume_from: Path | None) -> dict[str, Any]:
        while True:
            try:
                return self._start(resume_from)
            except WorkerFailure as failure:
                self.record("left", worker=failure.worker, why=failure.why)
                if self.board.stop_wanted():
                    raise Interrupted from None
                self.count_restart(failure)
            except FirstWrite as found:
                if self.board.stop_wanted():
                    raise Interrupted from None
                self._note_write(found)  # no fault of a worker's, so it does not count as a restart
                self._forget_unlooked()
            self.again = True
            resume_from = self._newest_checkpoint()

    def _note_write(self, found: FirstWrite) -> None:
        new = sorted({*found.names, *self._found} - self._written)
        if not new:
            raise WorkerError(
                f"a forward wrote parameter '{found.names[0]}' in {found.where}, which was known to be written; this "
                f"is a fault of Instep, please report it."
            )
        self._written.update(new)
        more = f" and {len(new) - 1} more" if len(new) > 1 else ""
        self.record(
            "warned",
            why=f"a forward wrote parameter '{new[0]}'{more} for the first time in {found.where}; the team goes back "
            f"to its last checkpoint, each worker with a copy of its own of what is written, as if so from the start.",
        )

    def check_written(self, names: Sequence[str]) -> None:
        """Raises FirstWrite where first forwards write parameters `names`, and those of which nobody knew may have been
        written, unseen, before the checkpoint that the team starts from.
        """
        new = sorted({*names} - self._written)
        if new and self._unlooked:
            raise FirstWrite(new, "a first forward after a stop")

    def _forget_unlooked(self) -> None:
        """Removes checkpoints of stops: forwards may have written into their weights past autograd, unseen."""
        for path in checkpoint.all_in(self.folder.checkpoints):
            with contextlib.suppress(CheckpointError):
                if checkpoint.read_manifest(path).meta.get("unlooked"):
                    shutil.rmtree(path)
                    self.record(
                        "warned",
                        why=f"the checkpoint {path} was saved at a stop, and that forward may have written its weights "
                        f"before anybody looked; it was removed.",
                    )

    def count_restart(self, failure: WorkerFailure) -> None:
        """Counts a worker, or a team, that starts again. Raises WorkerError where it was one too often."""
        if self.restarts == self.run.team.restarts:
            raise WorkerError(
                f"{failure.why.rstrip('.')}; the team has started again {self.restarts} times, as often as "
                f"team.restarts allows.",
                detail=failure.detail,
            ) from None
        self.restarts += 1

    def _newest_checkpoint(self) -> Path | None:
        path, problems = self.folder.newest_checkpoint(self._told)
        for problem in problems:
            self.record("warned", why=problem)
        if path is None and problems and self.run.resumed:
            raise CheckpointError(
                f"no checkpoint in {self.folder.checkpoints} is sound, so the run cannot be resumed; start a new one.",
                detail="\n".join(problems),
            )
        return path

    def _start(self, resume_from: Path | None) -> dict[str, Any]:
        """One start of the team, until it ends. Raises InstepError, WorkerFailure or ClientGone."""
        self.held.check()
        self._unlooked = False
        if resume_from is not None:
            meta = checkpoint.read_manifest(resume_from).meta
            self._written.update(meta.get("written", ()))
            self._unlooked = bool(meta.get("unlooked"))
        serving = self.run.engine == "server"
        count = self.run.team.workers + serving
        descriptor = self._share(count, self.run.team.workers if serving else 0)
        workers: list[Member] = []
        try:
            with self.run.recipe.prepared() as self._recipe:
                for number in range(count):
                    workers.append(self.fork(number, resume_from, descriptor, workers))
            self._recipe = self.run.recipe
            return Start(self, workers, descriptor).watch()
        finally:
            for started in workers:
                started.process.kill()
            for started in workers:
                started.process.join()
            end_children(but=self._others)
            for started in workers:
                self.pass_on_the_rest(started.pipe)
                started.close()
            for line in self._lines:
                line.close()
            os.close(descriptor)

    def _share(self, processes: int, lines: int) -> int:
        """Opens what the team's processes share. Returns the descriptor of their memory. Raises ResourceError."""
        opened: list[Line] = []
        try:
            for _ in range(lines):
                opened.append(Line.open())
            self.board = HeartbeatBoard(processes)
            descriptor = anonymous_file()
        except OSError as error:
            for line in opened:
                line.close()
            raise no_process(f"a team of {self.run.team.workers} workers", error) from error
        self._lines = tuple(opened)
        return descriptor

    def fork(
        self, worker: int, resume_from: Path | None, descriptor: int, others: list[Member], incarnation: int = 0
    ) -> Member:
        """Starts the process of a worker, or of the server. `others` run already. Raises ResourceError."""
        run = self.run
        assignment = Assignment(
            recipe=self._recipe,
            team=run.team,
            folder=run.folder,
            fingerprints=run.fingerprints or (run.fingerprint,),
            resume_from=resume_from,
            began=run.began,
            lines=self._lines,
            incarnation=incarnation,
            first=resume_from is None and incarnation == 0 and not self.again,
            run_id=self.about.id if self.about is not None else None,
            identity=self.held.identity,
            written=tuple(sorted(self._written)),
        )
        try:
            ours, theirs = Channel.pair()
            with contextlib.closing(theirs):
                unused = [self.client, ours, *(other.pipe for other in others)]
                arguments = (unused, assignment, worker, theirs, self.board, descriptor)
                process = Handle(_worker_main, arguments, f"worker-{worker}")
        except OSError as error:
            raise no_process(f"process {worker + 1} of the {run.team.workers} workers", error) from error
        return Member(process, ours, incarnation)

    def orphans(self, workers: list[Member]) -> set[int]:
        """The living processes that the run's processes started and left behind. Dead ones are waited for."""
        found = children() - self._others - {worker.process.pid for worker in workers}
        reap(found)
        return found

    def end_orphans(self, workers: list[Member], but: set[int]) -> None:
        """Kills what a dead worker left behind; `workers` live, and `but` are orphans that are not its own."""
        end_children(self._others | but | {worker.process.pid for worker in workers})

    def pass_on_the_rest(self, pipe: Channel) -> None:
        """What a worker told before its end belongs on the tape: a checkpoint may hold those very steps."""
        with contextlib.suppress(EOFError, OSError, ClientGone):
            while pipe.poll():
                message: WorkerToSupervisor = pipe.recv()
                if isinstance(message, Events):
                    self.pass_on(message.events)
                elif isinstance(message, Written):
                    self._found.update(message.names)

    def record(self, kind: str, **fields: Any) -> None:
        """Writes an event of the supervisor's own to the tape and to the client."""
        t_s = round(time.monotonic() - self.run.began, 6)
        self.pass_on([{"t_s": t_s, "clock": "wall", "kind": kind, **fields}])

    def sync_tape(self) -> None:
        """Makes sure that what was told so far outlives this process, and a power cut."""
        self._tape.flush(sync=True)

    def pass_on(self, events: Sequence[dict[str, Any]]) -> None:
        """Writes events to the tape and sends them to the client. On the tape, ``run_started`` comes first; of a start
        that comes to nothing it holds none.
        """
        self._early += events
        for event in events:
            self._told.note(event)
        if self._started or any(event["kind"] == "run_started" for event in events):
            self._started = True
            for waiting in sorted(self._early, key=lambda early: early["kind"] != "run_started"):
                self._tape.write(waiting)
            self._early.clear()
        try:
            self.client.send(Events(events))
        except (BrokenPipeError, ConnectionResetError):
            raise ClientGone from None


def _worker_main(unused: list[Channel], *arguments: Any) -> None:
    from instep.team.process import main

    gc.freeze()  # what was inherited: the collector would write to it, and so copy it
    for pipe in unused:  # or a worker would keep its siblings' pipes open after the supervisor's end
        pipe.close()
    main(*arguments)


def main(descriptor: int) -> None:
    """Entry of the process: serves one run for the client at the other end of `descriptor`, and ends."""
    die_with_parent(signal.SIGCONT)  # it is woken, should it be stopped then, and ends its workers
    _serve(Channel.of(descriptor))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # nothing is open any more, and taking torch down in order costs a second


def _serve(client: Channel) -> None:
    try:
        run: ClientToSupervisor = client.recv()
    except EOFError:
        return
    assert isinstance(run, Request), f"a run begins with a Request, not {run}"
    import_before_forks()
    requests = Requests()
    requests.listen()
    try:
        client.send(Finished(Supervisor(run, client, requests).supervise()))
    except ClientGone:
        pass
    except Interrupted:
        _send_quietly(client, Cancelled())
    except InstepError as error:
        _send_quietly(client, Failed.of(error))
    except BaseException as error:
        sentence = f"the supervisor failed: {described(error)}; this is a fault of Instep, please report it."
        _send_quietly(client, Failed("InstepError", sentence, traceback.format_exc()))


def import_before_forks() -> None:
    """What every worker needs and takes seconds to import: each optimizer imports torch._dynamo when it is built."""
    for name in ("numpy.random", "torch._dynamo", "instep.team.process"):
        import_module(name)


def _send_quietly(client: Channel, message: SupervisorToClient) -> None:
    with contextlib.suppress(OSError):
        client.send(message)
