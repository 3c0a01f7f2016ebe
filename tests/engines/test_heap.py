"""What a worker has freed is given back to the system once it trains."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import pytest
import torch

from engines.test_sharding import placed
from instep.engines import sharding
from instep.engines.heap import give_back
from support import workloads

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="this C library cannot do it"
)


def heap_mib() -> float:
    """Private memory of this process."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) / 1024


def test_holes_in_the_heap_are_given_back() -> None:
    kept = [torch.ones(25_000) for _ in range(800)]  # 100 kB each, fewer than the library asks the system for by itself
    del kept[::2]
    before = heap_mib()
    give_back()
    assert heap_mib() < before - 30


def test_a_worker_gives_back_what_it_has_left_once_it_has_made_two_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[None] = []
    monkeypatch.setattr(sharding, "give_back", lambda: given.append(None))
    placement = placed(workloads.gpt(), workers=1)
    after = []
    for _ in range(4):
        placement.settle()
        after.append(len(given))
    assert after == [0, 1, 1, 1]
