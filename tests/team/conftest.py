"""What several tests of teams need."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from instep.team.crew import LocalCrew
from support.patience import LONG_S


@pytest.fixture
def ordered(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Returns once the workers that are to go on have been told to do so in another group after the present step."""
    told_to, regroup = threading.Event(), LocalCrew.regroup

    def and_tell(*args: Any) -> None:
        regroup(*args)
        told_to.set()

    monkeypatch.setattr(LocalCrew, "regroup", and_tell)

    def wait() -> None:
        assert told_to.wait(LONG_S), "another group"
        told_to.clear()

    return wait
