"""What holds for every test of an engine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.processes import no_shared_memory_since, shared_memory
from support.serving import alive


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """No test leaves a process, or a file of shared memory."""
    memory = shared_memory()
    yield
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    assert not [pid for pid in map(int, children) if alive(pid) and "worker" in Path(f"/proc/{pid}/comm").read_text()]
    no_shared_memory_since(memory)
