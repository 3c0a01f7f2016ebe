"""What a host's workers print, into a log, and on its way to agent 0."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path

from instep.team.wire_messages import LOG_BYTES, LogPart


def redirect_output(path: Path) -> None:
    """Sends what the user's code prints, at any level, to this log, line by line: the killed flush nothing."""
    path.parent.mkdir(exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)


class Logs:
    """Those that lie in this folder."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._sent: dict[str, int] = {}  # bytes of each

    def send(self, tell: Callable[[LogPart], None], may_tell: Callable[[], bool] = lambda: True) -> None:
        """Sends what was printed since, as long as it may."""
        for path in sorted(self._folder.glob("*-*.log")):
            sent = self._sent.get(path.name, 0)
            with path.open("rb") as file:
                file.seek(sent)
                while may_tell() and (content := file.read(LOG_BYTES)):
                    tell(LogPart(path.stem.replace("-", " "), content))
                    sent += len(content)
            self._sent[path.name] = sent
