"""What an agent that follows another trains where a run goes on: agent 0 tells, which has its folder. No torch."""

from __future__ import annotations

import contextlib
import sys
import time
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from instep.errors import WorkerError
from instep.recipe import Team
from instep.team import meeting
from instep.team.link import connect
from instep.team.meeting import SAY_S, Found
from instep.team.messages import Cancelled, Failed, Finished
from instep.team.place import Place
from instep.team.telling import met
from instep.team.wire_messages import AskRun, RunGiven, WireError

FIND_S = 30.0
"""Seconds to look for agent 0 at a time: the process that asks torchrun's store may have torch to import."""

PAUSE_S = 1.0
"""Seconds between two tries."""

ANSWER_S = 5.0
"""Seconds that agent 0 has to answer."""


@dataclass(frozen=True)
class RunToJoin:
    """A run of agent 0's. `table`: its recipe's, and the team's under ``team``, laid out like a recipe file."""

    table: Mapping[str, Any]
    import_paths: tuple[str, ...]


@met()
def run_to_join(place: Place, team: Team) -> RunToJoin:
    """Asks agent 0, until it answers. Raises WorkerError where it does not, and what has ended the run before."""
    began = said = time.monotonic()
    while (left := began + team.join_timeout_s - time.monotonic()) > 0:
        found = meeting.find(place, min(FIND_S, left))
        with contextlib.suppress(EOFError, OSError):
            if found is not None:
                return _asked(found, place)
        meeting.check_open(place)
        now = time.monotonic()
        if now - said >= SAY_S:
            said = now
            print(f"instep: agent {place.agent} has waited {now - began:.0f} s for agent 0.", file=sys.stderr)
        time.sleep(min(PAUSE_S, max(0.0, left)))
    raise WorkerError(
        f"agent {place.agent} ends: agent 0, which has the folder of the run to go on with, has not answered in "
        f"{time.monotonic() - began:.0f} s; see what it says on its host, or raise team.join_timeout_s."
    )


def _asked(found: Found, place: Place) -> RunToJoin:
    """Raises OSError and EOFError where agent 0 does not answer."""
    with contextlib.closing(connect(found.address, found.secret, ANSWER_S)) as link:
        match link.ask(AskRun(place.agent), ANSWER_S):
            case RunGiven(recipe_file, import_paths):
                return RunToJoin(tomllib.loads(recipe_file), tuple(import_paths))
            case Failed() as failed:
                raise failed.error()
            case Cancelled():
                raise KeyboardInterrupt
            case Finished():
                raise WorkerError(f"agent {place.agent} ends: the run has ended, as agent 0 says.")
            case _:
                raise WireError("agent 0 has answered something else")
