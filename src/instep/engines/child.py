"""A process that computes one thing as a run's workers would, with their environment: replays and simulations."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import import_module
from multiprocessing.connection import Connection, wait
from threading import Thread
from typing import Any

import cloudpickle
import torch

from instep.errors import InstepError

Tell = Callable[[dict[str, Any]], None]
"""Hands an event to the parent process."""


def main(descriptor: int) -> None:
    """Entry of the process: reads (address of a function, threads, arguments) from `descriptor`, calls the function
    with the arguments and `Tell`, answers there, and ends.
    """
    with Connection(descriptor) as line:
        try:
            address, threads, arguments = cloudpickle.loads(line.recv_bytes())
            Thread(target=_end_with_parent, args=(line,), daemon=True).start()
            torch.set_num_threads(threads)
            module, _, name = address.partition(":")
            line.send(("done", getattr(import_module(module), name)(*arguments, lambda event: _tell(line, event))))
        except InstepError as error:
            line.send(("failed", type(error).__name__, error.message, error.detail))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _end_with_parent(line: Connection) -> None:
    """Ends this process once its parent is gone, which sends nothing more: nobody waits for what it computes."""
    wait([line])
    os._exit(1)


def _tell(line: Connection, event: dict[str, Any]) -> None:
    try:
        line.send(("event", event))
    except OSError:  # the parent is gone
        os._exit(1)
