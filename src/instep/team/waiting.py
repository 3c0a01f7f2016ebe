"""Waiting for what several descriptors bring or take. No threads."""

from __future__ import annotations

import contextlib
import selectors
from collections.abc import Sequence
from typing import Any, Protocol


class Sender(Protocol):
    """What has something left to send."""

    def fileno(self) -> int:
        """Its descriptor."""

    def flush(self) -> None:
        """Sends what the system takes now."""


def ready_of(sources: Sequence[Any], senders: Sequence[Sender], within_s: float) -> list[Any]:
    """Waits so long for any of the `sources` to be ready to read; those that are. The `senders` send meanwhile."""
    with selectors.DefaultSelector() as selector:
        for source in sources:
            selector.register(source, selectors.EVENT_READ)
        for sender in senders:
            try:
                selector.register(sender, selectors.EVENT_WRITE)
            except KeyError:
                selector.modify(sender, selectors.EVENT_READ | selectors.EVENT_WRITE)
        found = selector.select(within_s)
    for key, events in found:
        if events & selectors.EVENT_WRITE:
            with contextlib.suppress(OSError):  # it is lost, as who reads there will see
                key.fileobj.flush()  # type: ignore[union-attr]
    return [key.fileobj for key, events in found if events & selectors.EVENT_READ]
