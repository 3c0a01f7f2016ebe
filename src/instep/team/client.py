"""The caller's side of the processes that it starts: the supervisor of a run, and a process that computes alone.

It imports no torch, computes nothing and prints nothing.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any, Protocol, assert_never

from instep.descendants import Stopped
from instep.errors import ComponentError, InstepError, WorkerError, described, killed_by, no_process
from instep.memory_file import memory_file
from instep.monitors import Monitor, ShowsWaits
from instep.recipe import Recipe, Team
from instep.record.events import WarnedEvent, plain
from instep.record.files import disk_error
from instep.record.folder import RunFolder, remove
from instep.record.held import identity_of
from instep.team import messages
from instep.team.launcher import NewPython
from instep.team.messages import Cancelled, Failed, Finished, HeldUp, PlainEvents, Request
from instep.team.pickling import Pickled, dump
from instep.team.signals import Stop, deaf, interrupting
from instep.team.telling import tell

LOOK_S = 0.5
"""Seconds without news after which a caller looks whether the process that it started is stopped."""

_ALONE = "the {launcher} that started this has ended, and so does the run, after the present step, saved."


class Others(Protocol):
    """A run's other agents, for the client of the first."""

    def begin(self) -> None:
        """Has them started. Raises InstepError."""

    def see(self, event: dict[str, Any]) -> None:
        """Is told of all events."""

    def look(self) -> None:
        """Looks at them, several times a second. What it raises, InstepError, ends the run at once."""

    def end(self) -> None:
        """Waits for their end, after the run's, for a while."""


def supervised(
    folder: RunFolder,
    request: Request,
    threads: int,
    monitors: Sequence[Monitor],
    others: Others | None = None,
) -> dict[str, Any]:
    """Has a supervisor do what is requested. Returns the result. Raises InstepError, and what a monitor raises.

    others: the other agents, where it is this process that has them started.

    The folder of a new run that has trained nothing is removed then: its name is free again. So is, at any end, that of
    an agent that follows another, which is for scratch.
    """
    identity, client = identity_of(folder.path), None
    try:
        client = _Client(folder, request, threads)
        with interrupting() as stop, stop.noting():
            if others is not None:
                others.begin()
                monitors = [*monitors, others.see]
            result = client.serve(monitors, stop, others)
    except BaseException:
        with deaf():
            if client is not None:
                client.close()  # first, or a worker would still write there
            if others is not None:
                others.end()
            if follows(request) or (not request.resumed and (client is None or not client.trained)):
                remove(folder.path, identity)
        raise
    client.close()
    if follows(request):
        remove(folder.path, identity)
    if others is not None:
        others.end()
    return result


def follows(request: Request) -> bool:
    """Whether the run is that of another agent, whose folder it is."""
    return request.place is not None and request.place.agent > 0


def say(event: Mapping[str, Any]) -> None:
    """What an agent that follows another tells, as a monitor: who it waits for."""
    print(f"instep: {event['why']}", file=sys.stderr, flush=True)


class _Client:
    """The supervisor's process, as its client sees it. Raises ResourceError where it cannot be started."""

    def __init__(self, folder: RunFolder, request: Request, threads: int):
        self.trained = False
        self._folder, self._request, self._parent = folder, request, os.getppid()
        self._log = folder.logs / "supervisor.log"
        self._events: queue.SimpleQueue[dict[str, Any] | HeldUp | None] = queue.SimpleQueue()  # None: no more come
        self._final: Finished | Failed | Cancelled | None = None
        self._receiver = threading.Thread(target=self._receive, name="instep-client", daemon=True)
        path = [*request.import_paths, *sys.path]
        try:
            with self._opened_log() as log:
                self._process = NewPython("instep.team.agent_process", path, threads, log, request.recipe)
        except OSError as error:
            raise no_process("the supervisor of the run", error) from error

    def _opened_log(self) -> IO[bytes]:
        try:
            self._log.parent.mkdir(exist_ok=True)
            return self._log.open("ab")
        except OSError as error:
            raise disk_error(f"the log {self._log} cannot be written", error) from error

    def serve(self, monitors: Sequence[Monitor], stop: Stop, others: Others | None) -> dict[str, Any]:
        """Hands events to the monitors until the run ends. Returns the result. Raises InstepError."""
        self._tell(self._request)
        self._receiver.start()
        watching = _Watching(monitors)
        pressed = self._pass_on_events(watching, stop, others)
        failed = None if pressed or stop.wanted else watching.failed
        try:
            result = self._ending()
        except KeyboardInterrupt:
            if failed is not None:
                raise failed from None
            raise
        if failed is not None:
            if result["interrupted"]:
                failed.add_note(f"The run ended after the step that it was at, and is saved: {self._request.folder}.")
            raise failed
        return result

    def _pass_on_events(self, watching: _Watching, stop: Stop, others: Others | None) -> bool:
        """Hands events to the monitors until no more come. Returns whether Ctrl-C was pressed, which `stop` misses."""
        pressed, stopped = False, Stopped(self._process.pid, self._request.team.answer_timeout_s)
        while True:
            try:  # around all of it: an interrupt may come at any point, between two looks too
                self._pass_on_the_next(watching, stop, others, stopped)
                return pressed
            except KeyboardInterrupt:
                if pressed or stop.terminated:
                    raise
                pressed = stop.wanted = True

    def _pass_on_the_next(self, watching: _Watching, stop: Stop, others: Others | None, stopped: Stopped) -> None:
        by, asked = self._request.place.launcher if self._request.place is not None else "", False
        while True:
            if others is not None:
                others.look()
            if by not in ("", "ray") and os.getppid() != self._parent and not stop.wanted:
                stop.wanted = True
                watching.see(plain(WarnedEvent(why=_ALONE.format(launcher=by))))
            if (stop.wanted or watching.failed is not None) and not asked:
                asked = True  # to ask twice does no harm
                self._tell(messages.StopRun())
            try:
                event = self._events.get(timeout=LOOK_S)
            except queue.Empty:
                if not self._receiver.is_alive() and self._events.empty():
                    return  # an interrupt has swallowed the word that there are no more
                if why := stopped.look():
                    self._process.kill()
                    raise WorkerError(f"the supervisor of the run {why}; {self._remedy()}.") from None
                continue
            if event is None:
                return
            if isinstance(event, HeldUp):
                watching.held_up(event)
            else:
                watching.see(event)

    def _tell(self, message: Request | messages.StopRun) -> None:
        with contextlib.suppress(OSError):  # it could not start, or is ending already: `_ending` says so
            self._process.channel.send(message)

    def _ending(self) -> dict[str, Any]:
        match self._final:
            case Finished(result):
                return dict(result)
            case Failed():
                raise self._final.error()
            case Cancelled():
                raise KeyboardInterrupt
        status = self._process.wait()
        if status > 0:
            why = f"the supervisor of the run could not start (exit status {status}); its log follows."
            error = WorkerError(why, detail=self._tail())
            if self._request.place is not None:
                tell(self._request.place, error)
            raise error
        how = f"was {killed_by(status)}" if status else "ended early"
        raise WorkerError(
            f"the supervisor of the run (pid {self._process.pid}) {how}, and its workers with it; {self._remedy()}.",
            detail=self._tail(),
        )

    def _remedy(self) -> str:
        """What to do after the supervisor was killed. The folder of a run that has trained nothing is removed."""
        if follows(self._request):
            return "the first host, which tells how the run goes on, has lost this one"
        if self.trained or self._request.resumed:
            return f"go on with {self._folder.how_to_resume()}"
        return "nothing was trained, and no folder is left of it: start the run again"

    def _tail(self) -> str:
        return self._log.read_text(errors="replace")[-2000:] if self._log.exists() else ""

    def _receive(self) -> None:
        """Reads in a thread of its own, so that an interrupt never tears a message."""
        try:
            while True:
                message: messages.SupervisorToClient = self._process.channel.recv()
                if isinstance(message, PlainEvents):
                    for event in message.events:
                        self.trained |= event["kind"] == "merged"
                        self._events.put(event)
                elif isinstance(message, HeldUp):
                    self._events.put(message)
                else:
                    self._final = message
        except (EOFError, OSError):
            pass
        finally:
            self._events.put(None)

    def close(self) -> None:
        """Ends the supervisor if it still runs; it ends its workers."""
        self._process.end()
        if self._receiver.is_alive():
            self._receiver.join()
        self._process.channel.close()


class _Watching:
    """Monitors. One that raises hears no more, as after Ctrl-C; the others still see the run's end."""

    def __init__(self, monitors: Sequence[Monitor]):
        self._monitors = list(monitors)
        self.failed: Exception | None = None
        """What the first of them has raised."""

    def held_up(self, word: HeldUp) -> None:
        """Hands it to those who show it."""
        self._hand(lambda one: one.held_up(word.who, word.doing, word.seconds) if isinstance(one, ShowsWaits) else None)

    def see(self, event: dict[str, Any]) -> None:
        """Hands it to each."""
        self._hand(lambda monitor: monitor(event))

    def _hand(self, call: Callable[[Any], None]) -> None:
        for place, monitor in enumerate(self._monitors):
            try:
                call(monitor)
            except Exception as error:
                self._monitors[place] = lambda event: None
                self.failed = self.failed or error


def computed(
    address: str,
    recipe: Recipe,
    arguments: tuple[Any, ...],
    import_paths: Sequence[str],
    monitors: Sequence[Monitor],
    *,
    if_killed: str,
) -> Any:
    """What the function at `address` gives for (recipe, *arguments), in a process as a run's workers are.

    Raises InstepError, and at once what a monitor raises. `if_killed`: what to do where the system kills the process.
    """
    sent = pickled(recipe, *arguments)
    with contextlib.ExitStack() as stack:
        try:
            log = stack.enter_context(open(memory_file(), "w+b"))
            path = [*import_paths, *sys.path]
            process = NewPython("instep.team.child", path, recipe.threads, log, sent)
        except OSError as error:
            raise no_process("the process that computes", error) from error
        try:
            with contextlib.suppress(OSError):  # it could not start: there is no answer then
                process.channel.send(messages.Call(address, recipe.threads, sent))
            while isinstance(message := _answer(process), PlainEvents):
                for event in message.events:
                    for monitor in monitors:
                        monitor(event)
            if message is None:
                raise _ended_early(process, log, if_killed)
        finally:
            with deaf():
                process.end()
                process.channel.close()
    match message:
        case Finished(result):
            return result
        case Failed():
            raise message.error()
        case _:
            assert_never(message)


def _answer(process: NewPython) -> messages.ChildToCaller | None:
    """The next message of the process; None where none comes any more. Raises WorkerError where it is stopped."""
    stopped = Stopped(process.pid, Team().answer_timeout_s, children=True)
    while not process.channel.poll(LOOK_S):
        why = stopped.look()
        if why:
            process.kill()
            raise WorkerError(f"the process that computes {why}; start it again.")
    try:
        message: messages.ChildToCaller = process.channel.recv()
    except (EOFError, OSError):
        return None
    return message


def _ended_early(process: NewPython, log: IO[bytes], if_killed: str) -> WorkerError:
    status = process.wait()
    log.seek(0)
    how = "ended early" if status >= 0 else f"was {killed_by(status)}"
    remedy = if_killed if -status == signal.SIGKILL else "its log follows"
    return WorkerError(
        f"the process that computes {how}; {remedy}.", detail=log.read().decode(errors="replace")[-4000:]
    )


def pickled(recipe: Recipe, *more: Any) -> Pickled:
    """(recipe, *more), or the recipe alone, for other processes. Raises ComponentError and ResourceError."""
    try:
        return dump((recipe, *more) if more else recipe)
    except InstepError:
        raise
    except Exception:
        for key in ("model", "objective", "data", "optimizer", "artifacts"):
            try:
                dump(getattr(recipe, key))
            except InstepError:
                raise
            except Exception as error:
                raise ComponentError(
                    f"the {key} {getattr(recipe, key).describe()} cannot be sent to workers ({described(error)}); "
                    f"give a callable that builds it there."
                ) from error
        raise
