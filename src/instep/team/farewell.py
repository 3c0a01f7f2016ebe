"""The end of a run, as agent 0 tells it to all the others. No torch."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

from instep.errors import InstepError
from instep.team.link import AgentLink, Listener
from instep.team.meeting import FAREWELL_S
from instep.team.messages import Cancelled, Failed, Finished
from instep.team.remote import RemoteCrew
from instep.team.waiting import ready_of
from instep.team.wire_messages import HelloAgain, HelloAgent, NotComing


def say_farewell(
    message: Finished | Failed | Cancelled,
    listener: Listener,
    crews: Mapping[AgentLink, RemoteCrew],
    others: Sequence[AgentLink],
    awaited: set[int],
) -> None:
    """Tells those who are there, and those too who come only now, and waits a while for them to end. awaited: agents
    that have not come yet.
    """
    links = [*crews, *others]
    for link in links:
        _send(link, message)
    until = time.monotonic() + FAREWELL_S
    while (links or awaited) and time.monotonic() < until:
        senders = [link for link in links if link.wants_write]
        for link in listener.accept():
            _send(link, message)
            links.append(link)
        for link in ready_of([*links, *listener.sources()], senders, 0.2):
            if link in links and _has_ended(link, crews.get(link), awaited):
                links.remove(link)
                link.close()


def _send(link: AgentLink, message: Any) -> None:
    with contextlib.suppress(OSError):
        link.send(message)


def _has_ended(link: AgentLink, crew: RemoteCrew | None, awaited: set[int]) -> bool:
    if crew is not None:
        with contextlib.suppress(InstepError):
            list(crew.hear([link]))  # logs still come
        return not crew.sources()
    try:
        for message in link.receive():
            if isinstance(message, HelloAgent | HelloAgain | NotComing):
                awaited.discard(message.agent)
    except (EOFError, OSError):
        return True
    return False
