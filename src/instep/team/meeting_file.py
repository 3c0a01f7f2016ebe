"""A file in the user's home by which the agents of a run find each other, where its hosts have that folder in common.

Only its owner can read it, so that it may hold the run's secret.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from pathlib import Path

from instep.errors import RecipeError, ResourceError

MOST_BYTES = 4096

KEEP_S = 7 * 24 * 3600.0
"""Seconds after which one that was left, by an agent 0 that was killed, is taken away."""

_FOLDER = ".instep"


def folder() -> Path:
    """Where such files are."""
    return Path(os.path.expanduser("~"), _FOLDER)


def write(name: str, content: bytes) -> None:
    """Puts it in the place of what there was. Raises ResourceError."""
    path = folder() / name
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        _remove_old()
        new = path.with_name(f"{name}.{os.getpid()}")
        try:
            with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, path)
        finally:
            new.unlink(missing_ok=True)
    except OSError as error:
        raise ResourceError(
            f"the run's secret cannot be written to {path} ({error.strerror}), from where the other hosts take it; "
            f"make that possible, or put `export INSTEP_SECRET=$(openssl rand -hex 32)` before srun."
        ) from error


def read(name: str) -> bytes:
    """Its content; nothing where there is none. Raises RecipeError where another user may have written or read it."""
    try:
        if name not in os.listdir(
            folder()
        ):  # to list a folder of a network is to ask the server, unlike to open a file
            return b""
        descriptor = os.open(folder() / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        found = os.fstat(descriptor)
        if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
            raise RecipeError(
                f"{folder() / name}, which holds the run's secret, is not of this user alone; see who has made it, "
                f"take it away, and start the run again."
            )
        return os.read(descriptor, MOST_BYTES)
    except OSError:  # another took its place, or it is gone
        return b""
    finally:
        os.close(descriptor)


def remove(name: str) -> None:
    """Takes it away."""
    with contextlib.suppress(OSError):
        (folder() / name).unlink()


def _remove_old() -> None:
    with contextlib.suppress(OSError):
        for path in folder().glob("srun-*"):
            if time.time() - path.stat().st_mtime > KEEP_S:
                path.unlink(missing_ok=True)
