"""The end of gloo's connections, in one process and in another."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._C import _distributed_c10d as c10d

from instep.transport import wire as of_wire
from instep.transport.posts import Posts
from instep.transport.wire import Wire
from support.patience import LONG_S
from support.processes import wait_until

pytestmark = pytest.mark.processes

LENGTH = 16_000_000
"""More numbers than systems take at once."""


def wire(folder: Path, rank: int) -> Wire:
    """One of two that meet in a folder."""
    return Wire(lambda: c10d.FileStore(str(folder / "store"), 2), "w", rank, 2, torch.device("cpu"), "127.0.0.1")


@pytest.fixture
def other(tmp_path: Path) -> Iterator[int]:
    """The pid of a process that awaits a message, as the second of two."""
    if not (pid := os.fork()):
        of_other = wire(tmp_path, 1)
        of_other.take(0, torch.empty(LENGTH), [LENGTH, 0])
        (tmp_path / "awaits").touch()
        threading.Event().wait()
    yield pid
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_who_leaves_while_another_takes_no_more_of_a_message_waits_once_and_not_for_long(
    other: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of such a message gloo never tells the end, also when its connections are shut."""
    here, waited, unended, close = wire(tmp_path, 0), list[float](), list[Any](), Posts.close

    def noted(posts: Posts, within_s: float) -> bool:
        waited.append(within_s if posts._thread is not None else 0.0)
        return close(posts, within_s)

    monkeypatch.setattr(Posts, "close", noted)
    monkeypatch.setattr(of_wire, "_UNENDED", unended)
    wait_until((tmp_path / "awaits").exists, LONG_S, "who awaits it")
    os.kill(other, signal.SIGSTOP)
    (post,) = here.give(0, torch.ones(LENGTH), [0, LENGTH])
    time.sleep(0.2)  # for the system to take what it does
    here.leave()
    here.leave()
    assert post.ended() or len(unended) == 1
    assert 0 < sum(waited) <= of_wire.AT_MOST_S < 0.3
