"""A host's disk, copied to the one that it has after another start."""

from __future__ import annotations

import os
import shutil
import stat


def copy_all(source: str, target: os.PathLike[str]) -> None:
    """All that lies in a folder, sockets that nobody listens at any more too."""
    shutil.copytree(source, target, dirs_exist_ok=True, copy_function=_copy)


def _copy(source: str, target: str) -> None:
    if stat.S_ISSOCK(os.stat(source).st_mode):
        os.mknod(target, stat.S_IFSOCK | 0o600)
    else:
        shutil.copy2(source, target)
