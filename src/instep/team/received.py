"""The parts of a checkpoint that one agent sends another, and who takes them up as they come."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from instep.errors import WorkerError
from instep.record.files import disk_error
from instep.team.wire_messages import CheckpointPart

PART_BYTES = 1 << 20
"""Bytes of a part of a checkpoint that is sent."""

_ELSEWHERE = "TMPDIR in the environment says where"


class Received:
    """In a folder for scratch. A file is hashed as it comes: one of gigabytes keeps no agent from its signs of life.

    sender: for sentences.
    """

    def __init__(self, folder: Path, *, sender: str = "agent 0"):
        self._folder, self._sender = folder, sender
        self._hashed = hashlib.sha256()
        self._file, self._size = "", 0  # that comes now, and bytes of it so far

    def write(self, part: CheckpointPart) -> None:
        """A part; of checkpoints before its own none is needed any more.

        Raises WorkerError where it is not what was sent, and ResourceError where the disk refuses it.
        """
        folder = self._folder / part.name
        path = (folder / part.file).resolve()
        if not path.is_relative_to(folder.resolve()):
            raise WorkerError(
                f"{self._sender} has sent a part of {part.file!r}, which no checkpoint has; it is refused."
            )
        if not part.offset:
            self._file, self._size, self._hashed = part.file, 0, hashlib.sha256()
        try:
            if not folder.exists():
                shutil.rmtree(self._folder, ignore_errors=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab" if part.offset else "wb") as file:
                file.write(part.content)
        except OSError as error:
            raise disk_error(
                f"the checkpoint {part.name} from {self._sender} cannot be kept in {folder}", error, also=_ELSEWHERE
            ) from error
        in_turn = (part.file, part.offset) == (self._file, self._size)
        self._size += len(part.content)
        self._hashed.update(part.content)
        if not in_turn or (part.last and self._hashed.hexdigest() != part.sha256):
            raise WorkerError(f"the checkpoint {part.name} was damaged on its way here; start the run again.")


def parts_of(path: Path) -> Iterator[CheckpointPart]:
    """A checkpoint's files. Raises WorkerError where it cannot be read."""
    try:
        for file in sorted(each for each in path.rglob("*") if each.is_file()):
            name, size, offset, hashed = file.relative_to(path).as_posix(), file.stat().st_size, 0, hashlib.sha256()
            with file.open("rb") as opened:
                while True:
                    content = opened.read(PART_BYTES)
                    hashed.update(content)
                    last = offset + len(content) >= size or not content
                    yield CheckpointPart(path.name, name, offset, content, last, hashed.hexdigest() if last else "")
                    offset += len(content)
                    if last:
                        break
    except OSError as error:
        raise WorkerError(f"the checkpoint {path} cannot be read to be sent to another host: {error}.") from None
