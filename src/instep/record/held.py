"""A run folder that is held by a descriptor: whether its path still leads to it, and if not, what became of it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from instep.errors import RecordError

Identity = tuple[int, int]
"""What tells a folder from every other one while somebody holds it: the numbers of its device and inode."""


@dataclass(frozen=True)
class Held:
    """The run folder at `path`, held open by `descriptor`: as long as it is, nothing else can have its identity."""

    path: Path
    descriptor: int

    @property
    def identity(self) -> Identity:
        """See `Identity`."""
        found = os.fstat(self.descriptor)
        return found.st_dev, found.st_ino

    def check(self) -> None:
        """Raises RecordError, which says where the run lies now, unless its folder still lies at its path."""
        if is_there(self.path, self.identity):
            return
        now = self._lies_now()
        if now is None:
            raise RecordError(
                f"the run folder {self.path} was deleted while the run trained in it, so the run was ended and nothing "
                f"of it is left; start it again."
            )
        raise RecordError(
            f"the run folder {self.path} was moved to {now} while the run trained in it, so the run was ended; resume "
            f"it from {now}, where its last checkpoint is."
        )

    def _lies_now(self) -> Path | None:
        """Its path now; None where it has none."""
        if not os.fstat(self.descriptor).st_nlink:
            return None
        try:
            now = Path(os.readlink(f"/proc/self/fd/{self.descriptor}"))
        except OSError:  # elsewhere than on Linux
            return Path("another place")
        return now if is_there(now, self.identity) else None


def identity_of(path: Path) -> Identity:
    """The identity of the folder at `path`. Raises OSError."""
    found = os.stat(path)
    return found.st_dev, found.st_ino


def is_there(path: Path, identity: Identity) -> bool:
    """Whether the folder of this identity lies at `path`; so taken where the system does not say."""
    try:
        return identity_of(path) == identity
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:  # such as a share that is away for a moment: whatever reads or writes there says more
        return True
