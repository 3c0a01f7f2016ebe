"""What one process computes by itself, with the environment of a run's workers: replays and simulations.

As in the launcher, torch is not imported here: the process that computes does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, assert_never

from instep.clock.recorded import RecordedTimes
from instep.descendants import Stopped
from instep.errors import RecordError, WorkerError, killed_by, no_process
from instep.offline.cluster import Cluster
from instep.recipe import Recipe, Team
from instep.record import tape
from instep.record.folder import About, RunFolder, remove
from instep.record.held import identity_of
from instep.record.result import Replayed
from instep.record.resuming import recorded
from instep.rules import UpdateRule
from instep.team.channel import Channel
from instep.team.client import (
    LOOK_S,
    Monitor,
    ended,
    folders_of,
    monitors_of,
    open_standard_files,
    pickled,
    saved,
    start_process,
)
from instep.team.messages import Call, ChildToCaller, Failed, Finished, PlainEvents
from instep.team.pickling import memory_file
from instep.team.signals import deaf

_SIMULATE = "instep.offline.simulation:simulate"


def replay(run: str | os.PathLike[str], recipe: Recipe | None = None) -> Replayed:
    """Computes a run again from its recipe and its tape, in one process, under any rule.

    >>> instep.replay(run.path, recipe).same
    True

    recipe: needed where the saved one holds objects without an address.
    Raises RecordError where the tape is damaged, of another recipe or not whole, and InstepError as the run would.
    """
    folder = RunFolder.open(Path(run))
    table, _, paths = saved(folder, recipe, None, f"replay({str(run)!r}, recipe)")
    recipe = recorded(folder, recipe, table, replaying=True)
    events = [event for event in tape.read(folder.tape_path) if event["kind"] not in ("computed", "evaluated")]
    found: Replayed = _in_child("instep.offline.tape_replay:replay", recipe, (events,), paths, ())
    return found


def replay_under(
    run: str | os.PathLike[str],
    rule: UpdateRule,
    recipe: Recipe | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    monitors: Iterable[Monitor] = (),
) -> dict[str, Any]:
    """The same arrivals under another rule: what would have happened. Returns the fields of ``result.json``.

    Each worker takes, for its contributions in turn, the times that it took a microbatch in the run; messages and
    updates take none. Raises RecordError where the tape lacks a worker's times, and InstepError.
    """
    folder = RunFolder.open(Path(run))
    table, team, paths = saved(folder, recipe, None, f"replay_under({str(run)!r}, rule, recipe)")
    recipe = recorded(folder, recipe, table, replaying=True)
    times = recorded_times(folder, team.workers)
    cluster = Cluster(workers=team.workers, times=times, merge_s=0.0, collective=False)
    changed = dataclasses.replace(recipe, rule=rule)
    return simulate(changed, cluster, out=out, monitors=monitors, import_paths=paths)


def recorded_times(folder: RunFolder, workers: int) -> RecordedTimes:
    """The seconds a microbatch of each worker, as the tape tells them. Raises RecordError."""
    times: dict[int, list[float]] = {}
    for event in tape.read(folder.tape_path):
        if event["kind"] == "computed":
            start, stop = event["microbatches"]
            count = (stop - start) * event.get("local_steps", 1)
            seconds = event["to_s"] - event["from_s"]
            if seconds < 0:
                raise RecordError(
                    f"worker {event['worker']} computed for {seconds:g} s, as the tape {folder.tape_path} tells, which "
                    f"cannot be; restore the file."
                )
            times.setdefault(event["worker"], []).append(seconds / max(1, count))
    return RecordedTimes.of(times, workers)


def simulate(
    recipe: Recipe,
    cluster: Cluster,
    *,
    gradients: bool = True,
    out: str | os.PathLike[str] | None = None,
    monitors: Iterable[Monitor] = (),
    import_paths: Sequence[str | os.PathLike[str]] = (),
) -> dict[str, Any]:
    """Runs `recipe` on a virtual clock, with the workers and the network of `cluster`. Returns the result's fields.

    >>> asynchronous = dataclasses.replace(recipe, rule="asynchronous")
    >>> found = instep.simulate(asynchronous, instep.Cluster(workers=4), gradients=False)
    >>> found["steps"]
    3

    gradients: False finds times, bytes, staleness and idle shares alone. out: the run folder to make, none if None.
    Raises InstepError.
    """
    watching = monitors_of(monitors)
    folder = None
    if out is not None:
        about = About("simulation", tuple(folders_of(import_paths)))
        folder = RunFolder.create(Path(out), about=about).path.resolve()
        identity = identity_of(folder)
    try:
        found: dict[str, Any] = _in_child(
            _SIMULATE, recipe, (cluster, gradients, folder), folders_of(import_paths), watching
        )
    except BaseException:
        if folder is not None:  # half a simulation is of no use, and would be in the way of the next
            remove(folder, identity)
        raise
    return found


def _in_child(
    address: str, recipe: Recipe, arguments: tuple[Any, ...], paths: Sequence[str], monitors: Iterable[Monitor]
) -> Any:
    """What the function at `address` gives for (recipe, *arguments), in a process as a run's workers are."""
    mark, sent, path = uuid.uuid4().hex, pickled(recipe, *arguments), [*paths, *sys.path]
    with contextlib.ExitStack() as stack:
        try:
            open_standard_files()
            line, theirs = map(stack.enter_context, map(contextlib.closing, Channel.pair()))
            log = stack.enter_context(open(memory_file(), "w+b"))
            process = start_process("instep.team.child", theirs.fileno(), path, recipe.threads, log, mark, sent)
        except OSError as error:
            raise no_process("the process that computes", error) from error
        theirs.close()
        try:
            line.send(Call(address, recipe.threads, sent))
            while isinstance(message := _next(line, process), PlainEvents):
                for event in message.events:
                    for monitor in monitors:
                        monitor(event)
        except (EOFError, OSError):
            status = ended(process, mark)
            log.seek(0)
            raise WorkerError(
                f"the process that computes {_how_it_ended(status, address)}.",
                detail=log.read().decode(errors="replace")[-4000:],
            ) from None
        finally:
            with deaf():
                line.hang_up()  # which ends it, with all that it started, where it has not ended yet
                ended(process, mark)
    match message:
        case Finished(found):
            return found
        case Failed():
            raise message.error()
        case _:
            assert_never(message)


def _next(line: Channel, process: subprocess.Popen[bytes]) -> ChildToCaller:
    """The next message of the process. Raises EOFError where there is none, and WorkerError where it is stopped."""
    stopped = Stopped(process.pid, Team().answer_timeout_s, children=True)
    while not line.poll(LOOK_S):
        why = stopped.look()
        if why:
            process.kill()
            raise WorkerError(f"the process that computes {why}; start it again.")
    message: ChildToCaller = line.recv()
    return message


def _how_it_ended(status: int, address: str) -> str:
    if status >= 0:
        return "ended early; its log follows"
    remedy = "its log follows"
    if -status == signal.SIGKILL and address == _SIMULATE:
        remedy = "a simulation of fewer workers takes less"
    elif -status == signal.SIGKILL:
        remedy = "a replay takes the memory of one worker, under local steps of all: replay it where there is more"
    return f"was {killed_by(status)}; {remedy}"
