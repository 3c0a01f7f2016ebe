"""What an agent tells the others that fails before it has met them: what is wrong on one host ends the run on all."""

from __future__ import annotations

import contextlib
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from importlib import import_module

from instep.errors import InstepError, described
from instep.team import meeting
from instep.team.link import connect
from instep.team.messages import Failed
from instep.team.place import Place, place_of
from instep.team.signals import interrupting
from instep.team.wire_messages import NotComing

TELL_S = 60.0
"""Seconds that agent 0 has to be there, which may have torch to import."""

PAUSE_S = 0.5
"""Seconds between two tries."""

ANSWER_S = 5.0
"""Seconds that agent 0 has to take a connection, and then to answer."""


class _State:
    """This process's: the last error that the others know of, and whether it has trained, or tried to."""

    known: BaseException | None = None
    met = False


@contextlib.contextmanager
def telling_the_others(launcher: str = "auto", told: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """In the block, an error of this agent ends the others too, which wait for it.

    launcher: the team's, as far as it is known. told: whether the others have heard of it.
    """
    try:
        yield
    except (InstepError, OSError) as error:
        if not told():
            _tell(error, launcher)
        raise


@contextlib.contextmanager
def met() -> Iterator[None]:
    """In the block, the others learn of errors in the course of the run."""
    _State.met = True
    try:
        yield
    except BaseException as error:
        _State.known = error
        raise


def tell_of_what_ended(error: BaseException) -> None:
    """An exception has ended this program, which a launcher has started and which has trained nothing yet."""
    if isinstance(error, Exception) and not _State.met:
        _tell(error, "auto")


def _tell(error: Exception, launcher: str) -> None:
    if error is _State.known:
        return
    _State.known = error
    with contextlib.suppress(InstepError):  # of an environment, which is the error itself then
        if (place := place_of(launcher)) is not None:
            tell(place, error)


def tell(place: Place, error: Exception) -> None:
    """Tells the others that this agent does not come, as far as they can be reached. A signal ends the try."""
    if isinstance(error, InstepError):
        failed = Failed.of(error)
    else:
        trace = "".join(traceback.format_exception(error))
        failed = Failed("WorkerError", f"its program failed before it trained: {described(error)}.", trace)
    with contextlib.suppress(InstepError, KeyboardInterrupt), interrupting():
        if place.agent == 0:
            meeting.say_ended(place)
        else:
            _tell_agent_0(place, failed)


def _tell_agent_0(place: Place, failed: Failed) -> None:
    word = NotComing(place.agent, place.host, socket.gethostname(), failed.name, failed.sentence, failed.detail)
    if place.launcher == "torchrun":
        with contextlib.suppress(ImportError):
            import_module("torch")  # once, and not in each process that asks torchrun's store
    until = time.monotonic() + TELL_S
    while (left := until - time.monotonic()) > 0:
        if (found := meeting.find(place, min(ANSWER_S, left))) is not None:
            with contextlib.suppress(OSError):
                link = connect(found.address, found.secret, ANSWER_S)
                with contextlib.closing(link), contextlib.suppress(EOFError, OSError):
                    link.ask(word, ANSWER_S)
                return
        meeting.check_open(place)
        time.sleep(PAUSE_S)
