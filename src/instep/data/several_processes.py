"""Pieces of work done by processes that are forked for them, and end with this one."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from instep.data.encoder import one_thread
from instep.descendants import die_with_parent
from instep.errors import InstepError, WorkerError


def in_processes(work: Callable[[int], None], numbers: Sequence[int], processes: int) -> Iterator[int]:
    """Does `work` of each number, and gives each as it is done; by one process, here.

    Raises what `work` raised, an InstepError or OSError, and WorkerError where a process dies.
    """
    if processes == 1 or len(numbers) < 2:
        with one_thread():
            for number in numbers:
                work(number)
                yield number
        return
    left = iter(numbers)
    serving: dict[Connection, Any] = {}
    try:
        for number in (next(left) for _ in range(min(processes, len(numbers)))):
            pipe, process = _started(work)
            serving[pipe] = process
            pipe.send(number)
        while serving:
            ready = wait(list(serving))
            for pipe in [pipe for pipe in serving if pipe in ready]:
                yield _answer(pipe, serving[pipe])
                if (more := next(left, None)) is None:
                    _ended(serving.pop(pipe), pipe)
                else:
                    pipe.send(more)
    except BrokenPipeError as error:
        raise WorkerError(_DIED.format("")) from error
    finally:
        for pipe, process in serving.items():
            _ended(process, pipe)


def call_apart(work: Callable[[], None], processes: int) -> None:
    """Calls it in a process of its own, where it may start threads, unless `processes` is 1. Raises as the other."""
    if processes == 1:
        with one_thread():
            work()
        return
    pipe, process = _started(lambda _: work(), threads=processes)
    try:
        pipe.send(0)
        _answer(pipe, process)
    finally:
        _ended(process, pipe)


_DIED = (
    "a process that makes texts tokens died{}, as where memory is short; start again with the same --out, maybe with "
    "fewer --processes: what is done is not done again."
)


def _started(work: Callable[[int], None], threads: int = 1) -> tuple[Connection, Any]:
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(work, here, there, os.getpid(), threads), daemon=True)
    process.start()
    there.close()
    return here, process


def _serve(work: Callable[[int], None], theirs: Connection, pipe: Connection, parent: int, threads: int) -> None:
    theirs.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one that started this ends it
    die_with_parent()
    os.environ["TOKENIZERS_PARALLELISM"] = "false" if threads == 1 else "true"
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    try:
        while True:
            while not pipe.poll(1.0):
                if os.getppid() != parent:
                    return
            number = pipe.recv()
            try:
                work(number)
            except (InstepError, OSError) as error:
                pipe.send(error)
            else:
                pipe.send(number)
    except (EOFError, BrokenPipeError):
        return


def _answer(pipe: Connection, process: Any) -> int:
    try:
        said = pipe.recv()
    except (EOFError, ConnectionResetError):
        process.join()
        raise WorkerError(_DIED.format(f" (exit status {process.exitcode})")) from None
    if isinstance(said, BaseException):
        raise said
    assert isinstance(said, int), "a number is what was sent"
    return said


def _ended(process: Any, pipe: Connection) -> None:
    process.kill()
    process.join()
    process.close()
    pipe.close()
