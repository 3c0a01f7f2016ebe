"""The caller's side of a run's socket, see `instep.team.control`: what its owner asks while it goes on. No torch."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from instep.errors import RecordError, WorkerError, cut
from instep.record.folder import CONTROL, RunFolder
from instep.record.tape import read as read_tape
from instep.team.control import PATIENCE_S, AskTeam, Question, connected
from instep.team.standing import ended

ANSWER_BYTES = 64 << 20


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


def ask(folder: RunFolder, question: Question) -> dict[str, Any] | None:
    """The answer of the run's agent; None where none is there. Raises RecordError and WorkerError."""
    with _opened(folder) as opened:
        if opened is None:
            _check_idle(folder)
            return None
        try:
            end = connected(opened)
        except (FileNotFoundError, ConnectionRefusedError):  # of an agent that was killed, or is ending
            _check_idle(folder)
            return None
        except OSError as error:
            raise _no_answer(folder, error.strerror or str(error)) from error
        with end:
            try:
                with contextlib.suppress(BrokenPipeError):  # it has said why before it hung up
                    end.sendall(msgspec.json.encode(question) + b"\n")
                with end.makefile("rb") as file:
                    line = file.readline(ANSWER_BYTES)
            except TimeoutError:
                raise _no_answer(folder, f"no answer came within {PATIENCE_S:g} s") from None
            except OSError as error:
                raise _no_answer(folder, error.strerror or str(error)) from error
    if not line.endswith(b"\n"):  # it has ended meanwhile, or is busy with that
        raise _no_answer(folder, "it has hung up")
    found: dict[str, Any] = json.loads(line)
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
