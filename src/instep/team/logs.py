"""What a host's workers print, on its way to agent 0."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from instep.team.wire_messages import LOG_BYTES, LogPart


class Logs:
    """Those that lie in this folder."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._sent: dict[str, int] = {}  # bytes of each

    def send(self, tell: Callable[[LogPart], None]) -> None:
        """Sends what was printed since."""
        for path in sorted(self._folder.glob("worker-*.log")):
            sent = self._sent.get(path.name, 0)
            with path.open("rb") as file:
                file.seek(sent)
                while content := file.read(LOG_BYTES):
                    tell(LogPart(path.stem.replace("-", " "), content))
                    sent += len(content)
            self._sent[path.name] = sent
