"""What is tried aside: in a forked copy of this process, which leaves no trace in it."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from instep.descendants import die_with_parent
from instep.errors import InstepError, by_name, described, killed_by


def in_a_copy(function: Callable[[], Any]) -> Any:
    """What `function` gives in a copy of this process, which ends with it. The copy has one thread, and no GPU.

    Raises the InstepError that it raises, and `CopyLost` where the copy gives no answer.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_main, args=(function, theirs, os.getpid()), daemon=True)
    process.start()
    theirs.close()
    try:
        kind, *content = ours.recv()
    except EOFError:
        process.join()
        status = process.exitcode or 0
        raise CopyLost(f"it was {killed_by(status)}" if status < 0 else f"it ended with exit status {status}") from None
    finally:
        ours.close()
    process.join()
    if kind == "failed":
        raise by_name(content[0])(content[1], detail=content[2])
    if kind == "raised":
        raise CopyLost(content[0], content[1])
    return content[0]


class CopyLost(Exception):
    """The copy gave no answer; `why`, as a clause, and perhaps a traceback."""

    def __init__(self, why: str, detail: str = ""):
        super().__init__(why)
        self.why, self.detail = why, detail


def _main(function: Callable[[], Any], line: Connection, parent: int) -> None:
    die_with_parent()
    if os.getppid() != parent:
        os._exit(1)
    torch.set_num_threads(1)  # a copy has none of the threads that its original computes with
    try:
        line.send(("done", function()))
    except InstepError as error:
        line.send(("failed", type(error).__name__, error.message, error.detail))
    except Exception as error:
        line.send(("raised", described(error), traceback.format_exc()))
    os._exit(0)
