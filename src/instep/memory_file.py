"""Memory without a name, as a file: no ending of the processes that hold it can leave it behind."""

from __future__ import annotations

import os
import tempfile


def memory_file() -> int:
    """A descriptor of it, which forked processes inherit. Raises OSError."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("instep")
    with tempfile.TemporaryFile() as file:  # elsewhere than on Linux: a file already unlinked
        return os.dup(file.fileno())


def let_go(descriptor: int) -> None:
    """What it was of is not held by it any more; its number stays taken."""
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, descriptor, inheritable=False)
    os.close(nothing)
