"""The caller's side of a run's socket, see `instep.team.control`: what its owner asks while it goes on. No torch."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from instep.errors import RecordError, WorkerError, cut
from instep.record.folder import CONTROL, RunFolder
from instep.record.tape import read as read_tape
from instep.team.control import PATIENCE_S, PAUSE_S, AskStacks, AskTeam, AskWorkers, Question, connected, process_of
from instep.team.standing import ended

ANSWER_BYTES = 64 << 20

STUCK_S = 1.0
"""Seconds at one thing, that is not to wait for others, for which a member counts as stuck."""

SPY_S = 10.0
"""Seconds that py-spy has."""


def standing_of(path: Path) -> dict[str, Any]:
    """How the team of the run at `path` stands or, where the run does not go on, how it has ended.

    Raises RecordError where it is no run, or another user's, and WorkerError where its agent does not answer.
    """
    folder = RunFolder.open(path)
    answer = ask(folder, AskTeam())
    if answer is None:
        result = folder.read_result() if folder.result_path.exists() else None
        answer = ended(read_tape(folder.tape_path) if folder.tape_path.exists() else (), result)
    return {**answer, "run": str(path)}


def resized(path: Path, workers: int) -> dict[str, Any]:
    """Has the run at `path` go on with so many workers: `workers`, and how many it was to have `before`.

    Raises RecordError where it is no run, another user's, does not go on or cannot have so many, and WorkerError where
    its agent does not answer.
    """
    folder = RunFolder.open(path)
    answer = ask(folder, AskWorkers(workers))
    if answer is None:
        raise RecordError(
            f"{path} does not go on, so its team cannot change; resume it with {workers} workers, or start it again."
        )
    return answer


def stacks_of(path: Path, worker: int | None = None) -> dict[str, Any]:
    """As `standing_of`; of a run that goes on with the Python stacks of this worker or, with None, of all members that
    are stuck: that are stopped, or at one thing for more than `STUCK_S` while they wait for nobody.

    By py-spy where it is installed and may look, which takes none of the worker's time; else that shows it itself.
    Raises as that does, and RecordError where there is no such worker.
    """
    table = standing_of(path)
    members = table["members"]
    wanted = [each for each in members if (_is_stuck(each) if worker is None else each["worker"] == worker)]
    if worker is not None and members and not wanted:
        raise RecordError(f"{path} has no worker {worker} now; {_numbers(members)} are there.")
    spied = {each["number"]: text for each in wanted if (text := _spied(each, table.get("supervisor")))}
    numbers = [each["number"] for each in wanted if each["number"] not in spied]
    if numbers:
        answer = ask(RunFolder.open(path), AskStacks(numbers))
        table = {**answer, "run": str(path)} if answer is not None else table
    for each in table["members"]:
        number = each["number"]
        own = each.get("stack") if number in numbers else None
        each["stack"], each["stack_by"] = (
            spied.get(number, own),
            "py-spy" if number in spied else own and "faulthandler",
        )
        each["stack_wanted"] = number in spied or number in numbers
    return table


def _is_stuck(member: Mapping[str, Any]) -> bool:
    idle = member["waits_for"] or member["doing"] in ("done", "waiting for workers")
    return bool(member["stopped"] or (not idle and member["doing_for_s"] > STUCK_S))


def _numbers(members: Sequence[Mapping[str, Any]]) -> str:
    found = [str(each["worker"]) for each in members if each["worker"] is not None]
    return ", ".join(found) if len(found) <= 8 else f"{found[0]} to {found[-1]}"


def _spied(member: Mapping[str, Any], supervisor: int | None) -> str:
    """What py-spy tells of a process of this machine, without stopping it; "" where it is not there, or may not."""
    program, pid = shutil.which("py-spy"), member["pid"]
    with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
        parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
        if program is None or member["host"] or supervisor is None or int(parent) != supervisor:
            return ""  # it is elsewhere, or its number is another process's here
        command = [program, "dump", "--nonblocking", "--pid", str(pid)]
        told = subprocess.run(command, capture_output=True, text=True, timeout=SPY_S, check=True).stdout
        return told[max(0, told.find("Thread ")) :]  # what is before is the command line
    return ""


def ask(folder: RunFolder, question: Question) -> dict[str, Any] | None:
    """The answer of the run's agent; None where none is there. Raises RecordError and WorkerError.

    Who is turned away, because too many ask at a time, or because the agent is ending, asks again for `PATIENCE_S`.
    """
    until = time.monotonic() + PATIENCE_S
    while True:
        with _opened(folder) as opened:
            try:
                answer = None if opened is None else _asked(folder, opened, question)
            except _TurnedAway as why:
                if time.monotonic() > until:
                    raise _no_answer(folder, str(why)) from None
                time.sleep(PAUSE_S)
                continue
        if answer is None:
            _check_idle(folder)
        return answer


class _TurnedAway(Exception):
    """The connection was closed before a word of the answer."""


def _asked(folder: RunFolder, opened: int, question: Question) -> dict[str, Any] | None:
    """As `ask`, once. opened: a descriptor of the folder of the socket."""
    try:
        end = connected(opened)
    except (FileNotFoundError, ConnectionRefusedError):  # of an agent that was killed, or is ending
        return None
    except OSError as error:
        raise _no_answer(folder, error.strerror or str(error)) from error
    with end:
        supervisor = process_of(end)
        try:
            with contextlib.suppress(BrokenPipeError):  # it has said why before it hung up
                end.sendall(msgspec.json.encode(question) + b"\n")
            with end.makefile("rb") as file:
                line = file.readline(ANSWER_BYTES)
        except ConnectionResetError as error:
            raise _TurnedAway(error.strerror) from None
        except TimeoutError:
            raise _no_answer(folder, f"no answer came within {PATIENCE_S:g} s") from None
        except OSError as error:
            raise _no_answer(folder, error.strerror or str(error)) from error
    if not line:
        raise _TurnedAway("it has hung up")
    if not line.endswith(b"\n"):  # it has ended meanwhile, or is busy with that
        raise _no_answer(folder, "it has hung up")
    found: dict[str, Any] = {**json.loads(line), "supervisor": supervisor}
    if "error" in found:
        raise RecordError(f"{folder.path}: {cut(found['error'])}")
    return found


@contextlib.contextmanager
def _opened(folder: RunFolder) -> Iterator[int | None]:
    """A descriptor of the folder of the socket; None where there is none. Raises RecordError."""
    try:
        descriptor = os.open(folder.path / CONTROL, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except PermissionError:
        raise RecordError(f"{folder.path} is a run of another user, who alone may ask it.") from None
    except OSError:
        yield None
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _check_idle(folder: RunFolder) -> None:
    """Raises WorkerError where somebody trains there who has no socket."""
    with contextlib.suppress(FileNotFoundError, PermissionError):
        descriptor = os.open(folder.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # let go at once
        except BlockingIOError:
            raise WorkerError(
                f"{folder.path} is being trained, and cannot be asked: it starts or ends just now, or its folder is on "
                f"a disk that takes no sockets; ask again."
            ) from None
        finally:
            os.close(descriptor)


def _no_answer(folder: RunFolder, why: str) -> WorkerError:
    return WorkerError(
        f"{folder.path} is being trained, and the supervisor of the run does not answer: {cut(why)}; ask again."
    )
