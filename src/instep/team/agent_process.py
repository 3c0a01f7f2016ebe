"""The agent's process: a new Python, that serves one run for the client which has started it, and ends."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import traceback

from instep.descendants import die_with_parent
from instep.errors import InstepError, described
from instep.team import messages
from instep.team.agent import Agent
from instep.team.channel import Channel
from instep.team.follower import Follower
from instep.team.journal import ClientGone
from instep.team.messages import Request
from instep.team.processes import import_before_forks
from instep.team.signals import Interrupted, Requests
from instep.team.telling import telling_the_others


def main(descriptor: int) -> None:
    """Entry of the process: serves one run for the client at the other end of `descriptor`, and ends."""
    die_with_parent(signal.SIGCONT)  # it is woken, should it be stopped then, and ends its workers
    _serve(Channel.of(descriptor))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # nothing is open any more, and taking torch down in order costs a second


def _serve(client: Channel) -> None:
    try:
        run: messages.ClientToSupervisor = client.recv()
    except EOFError:
        return
    assert isinstance(run, Request), f"a run begins with a Request, not {run}"
    os.environ.update(run.environment)
    import_before_forks()
    requests = Requests()
    requests.listen()
    try:
        if run.place is not None and run.place.agent > 0:
            client.send(messages.Finished(Follower(run, client, requests).follow()))
        else:
            agent = Agent(run, client, requests)
            launcher = "local" if run.place is None else run.team.launcher
            with telling_the_others(launcher, told=lambda: agent.met):
                client.send(messages.Finished(agent.supervise()))
    except ClientGone:
        if run.place is not None and run.place.agent > 0:
            shutil.rmtree(run.folder, ignore_errors=True)  # for scratch; who has made it is gone
    except Interrupted:
        _send_quietly(client, messages.Cancelled())
    except InstepError as error:
        _send_quietly(client, messages.Failed.of(error))
    except BaseException as error:
        sentence = f"the supervisor of the run failed: {described(error)}; this is a fault of Instep, please report it."
        _send_quietly(client, messages.Failed("InstepError", sentence, traceback.format_exc()))


def _send_quietly(client: Channel, message: messages.SupervisorToClient) -> None:
    with contextlib.suppress(OSError):
        client.send(message)
