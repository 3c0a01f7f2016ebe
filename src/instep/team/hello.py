"""What an agent tells of itself, for the first to compare. No torch."""

from __future__ import annotations

import os
import socket
import uuid

from instep.record.computed_by import libraries, processor
from instep.record.hardware import hardware
from instep.team.hosts_there import room_of
from instep.team.messages import Request
from instep.team.wire_messages import HelloAgent


def hello_of(run: Request, address: str) -> HelloAgent:
    """What this agent has to agree on with the others, and who it is."""
    assert run.place is not None, "others are there"
    place = run.place
    return HelloAgent(
        agent=place.agent,
        host=place.host,
        local=place.local,
        here=place.here,
        name=socket.gethostname(),
        session=uuid.uuid4().hex,
        pid=os.getpid(),
        versions=libraries(),
        processor=processor(),
        fingerprint=run.fingerprint,
        recipe=dict(run.recipe_table),
        address=address,
        hardware=hardware(),
        room=room_of(place, run.recipe_table),
    )
