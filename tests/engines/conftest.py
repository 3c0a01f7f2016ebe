"""What holds for every test of an engine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.serving import alive


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """No test leaves a process, or a file of shared memory."""
    memory = set(os.listdir("/dev/shm"))
    yield
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    assert not [pid for pid in map(int, children) if alive(pid) and "worker" in Path(f"/proc/{pid}/comm").read_text()]
    assert not set(os.listdir("/dev/shm")) - memory
