"""Processes that compute one thing as a run's workers would, with their environment: replays and simulations."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

from instep.descendants import adopting_orphans, die_with_parent, end_children, take_care_of_helpers
from instep.errors import InstepError
from instep.team.channel import Channel
from instep.team.messages import CallerToChild, Failed, Finished, PlainEvents
from instep.team.signals import leave_to_others

_LOOK_MS = 500
"""Between two looks at what no descriptor tells: another process may hold the parent's end open."""

Tell = Callable[[dict[str, Any]], None]
"""Hands an event to the parent process."""


def main(descriptor: int) -> None:
    """Entry of the process: reads (address of a function, threads, arguments) from `descriptor`, has a process of its
    own call the function with the arguments and `Tell` and answer there, and ends as that one does.

    It stays behind to end what the user's code starts, and all of it once nobody waits for an answer any more.
    """
    guard, parent = os.getpid(), os.getppid()
    with adopting_orphans():
        pid = os.fork()
        if not pid:
            die_with_parent()
            if os.getppid() != guard:
                os._exit(1)
            _compute(descriptor)  # never returns
        die_with_parent(signal.SIGCONT)  # it is woken, should it be stopped then, and ends its child
        _wait(pid, descriptor, parent)
        _, status = os.waitpid(pid, 0)
        end_children()  # now that its own children are children here
    if os.WIFSIGNALED(status):
        _die_of(os.WTERMSIG(status))
    os._exit(os.WEXITSTATUS(status))


def _wait(pid: int, descriptor: int, parent: int) -> None:
    """Waits for the end of the process `pid`, and ends it if the parent ends, or closes its end of `descriptor`."""
    death = os.pidfd_open(pid) if hasattr(os, "pidfd_open") else None
    poll = select.poll()
    poll.register(descriptor, getattr(select, "POLLRDHUP", 0))  # what arrives there is for the child
    if death is not None:
        poll.register(death, select.POLLIN)
    while True:
        ready = poll.poll(_LOOK_MS)
        if os.getppid() != parent or any(where == descriptor for where, _ in ready):
            os.kill(pid, signal.SIGKILL)
            return
        if ready or os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return


def _die_of(number: int) -> None:
    """Ends this process as its child ended, so that the parent sees how."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError, ValueError):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    os.kill(os.getpid(), number)


def _compute(descriptor: int) -> None:
    status = 1
    try:
        line = Channel.of(descriptor)
        take_care_of_helpers([line.close])
        leave_to_others(lambda: None)
        _answer(line)
        status = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())  # into the log
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _answer(line: Channel) -> None:
    import torch

    try:
        call: CallerToChild = line.recv()
        arguments = call.arguments.load()
        os.close(call.arguments.descriptor)  # what is mapped stays
        torch.set_num_threads(call.threads)
        module, _, name = call.address.partition(":")
        function = getattr(import_module(module), name)
        line.send(Finished(function(*arguments, lambda event: _tell(line, event))))
    except InstepError as error:
        line.send(Failed.of(error))


def _tell(line: Channel, event: dict[str, Any]) -> None:
    try:
        line.send(PlainEvents([event]))
    except OSError:  # the parent is gone
        os._exit(1)
