"""The run's clock, on a host that is not agent 0's."""

from __future__ import annotations

import time


class Clock:
    """The run's clock on this host, from round trips to agent 0: the quickest tells the most."""

    def __init__(self, began: float):
        self.began, self.error_s = began, float("inf")
        """When the run began, on this host's monotonic clock, and by how much that may be wrong."""
        self._sent = began

    def begin(self) -> None:
        """A message is sent that will be answered; of another agent 0, maybe."""
        self._sent, self.error_s = time.monotonic(), float("inf")

    def heard(self, clock_s: float, sent_s: float | None = None) -> None:
        """An answer has come: agent 0's clock, to what was sent then."""
        now = time.monotonic()
        sent = self._sent if sent_s is None else sent_s
        if (error := (now - sent) / 2) < self.error_s:
            self.error_s, self.began = error, (now + sent) / 2 - clock_s
