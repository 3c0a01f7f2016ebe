"""How the workers of one start reach each other over several hosts, or their server."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from itertools import groupby

from instep.errors import ResourceError
from instep.team.link import listening_at
from instep.team.messages import HostNetwork
from instep.team.orders import Member


@contextlib.contextmanager
def network_of(
    members: Sequence[Member], address: str, key: bytes = b"", *, needed: bool = False
) -> Iterator[HostNetwork | None]:
    """How these workers reach each other or, with a `key`, their server, if they are on several hosts or it is
    `needed`; the processes of this one must be forked in the block.
    """
    counts = [len(list(those)) for _, those in groupby(member.host for member in members)]
    if len(counts) == 1 and not needed:
        yield None
        return
    try:
        listener = listening_at((address, 0), 4 * len(members))
    except OSError as error:
        raise ResourceError(f"no port can be had at {address}: {error.strerror}; look at team.interface.") from error
    with listener:
        store, name = listener.getsockname()[:2], f"start {members[0].epoch}"
        yield HostNetwork(tuple(counts), store, name, address, listener.fileno(), key)
