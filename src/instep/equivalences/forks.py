"""Copies of this process that compute aside, several at once: forks with a state of their own, as workers are."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from instep.descendants import die_with_parent
from instep.errors import InstepError, WorkerError, by_name, described, killed_by, place
from instep.reduce.written import FirstWrite
from instep.worker.device import not_deterministic
from instep.worker.replica import Replica

Say = Callable[[Any], Any]
"""Gives the original something, and returns what it answers."""


class Body:
    """What a copy does: `run` is called with its rank and what asks the original. `replica`: for messages."""

    replica: Replica | None = None

    def run(self, rank: int, ask: Say) -> Any:
        raise NotImplementedError


def in_copies(bodies: Sequence[Body], answer: Callable[[list[Any]], Any] = lambda asked: None) -> list[Any]:
    """What each body gives, by rank. `answer`: to what all of them ask, by rank; each gets it.

    Raises the InstepError that one raises, WorkerError for other errors and deaths, and FirstWrite.
    """
    context = multiprocessing.get_context("fork")
    lines: list[Connection] = []
    processes = []
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        for rank, body in enumerate(bodies):
            ours, theirs = context.Pipe()
            process = context.Process(target=_main, args=(body, rank, theirs, os.getpid()))
            process.start()
            theirs.close()
            lines.append(ours)
            processes.append(process)
        return _answers(lines, processes, answer)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
        for line in lines:
            line.close()


def alone(body: Body) -> Any:
    """What one copy gives."""
    return in_copies([body])[0]


def _answers(lines: Sequence[Connection], processes: Sequence[Any], answer: Callable[[list[Any]], Any]) -> list[Any]:
    found: dict[int, Any] = {}
    asked: dict[int, Any] = {}
    while len(found) < len(lines):
        for line in wait([line for rank, line in enumerate(lines) if rank not in found]):
            assert isinstance(line, Connection)
            rank = lines.index(line)
            try:
                kind, *content = pickle.loads(line.recv_bytes())
            except EOFError:
                raise _died(rank, processes[rank]) from None
            if kind == "done":
                found[rank] = content[0]
            elif kind == "asks":
                asked[rank] = content[0]
            elif kind == "wrote":
                raise FirstWrite(*content)
            else:
                raise by_name(content[0])(content[1], detail=content[2])
        if asked and len(asked) == len(lines):
            told = answer([asked[rank] for rank in range(len(lines))])
            asked = {}
            for line in lines:
                line.send_bytes(pickle.dumps(told))
    return [found[rank] for rank in range(len(lines))]


def _died(rank: int, process: Any) -> WorkerError:
    process.join()
    status = process.exitcode or 0
    how = f"was {killed_by(status)}" if status < 0 else f"ended with exit status {status}"
    return WorkerError(f"worker {rank} {how} in the middle of its work.")


def _main(body: Body, rank: int, line: Connection, parent: int) -> None:
    die_with_parent()
    if os.getppid() != parent:
        os._exit(1)
    torch.set_num_threads(1)  # a copy has none of the threads that its original computes with

    def say(*parts: Any) -> None:
        line.send_bytes(pickle.dumps(parts))  # not as torch would: in memory that ends with this process

    def ask(question: Any) -> Any:
        say("asks", question)
        return pickle.loads(line.recv_bytes())

    try:
        say("done", body.run(rank, ask))
    except FirstWrite as found:
        say("wrote", found.names, found.where)
    except InstepError as error:
        say("failed", type(error).__name__, error.message, error.detail)
    except BaseException as error:
        doing = f" while {body.replica.doing}" if body.replica is not None else ""
        sentence = not_deterministic(error, f"worker {rank}", doing + place(error))
        sentence = sentence or f"worker {rank} raised {described(error)}{doing}{place(error)}."
        say("failed", "WorkerError", sentence, traceback.format_exc())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
