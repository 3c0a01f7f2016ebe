"""The caller's side of a run: at whatever point Ctrl-C interrupts it, the run ends as it was asked to."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from instep.recipe import Team
from instep.record.folder import RunFolder
from instep.team import client
from instep.team.channel import Channel
from instep.team.messages import Finished, HeldUp, PlainEvents, Request, StopRun
from support import workloads
from support.agents import request_of

RESULT = {"interrupted": True}


class Supervisor:
    """Stands in for the process: it tells of two updates with a silence between them, and ends when it is asked to."""

    def __init__(self, *_: Any):
        self.channel, self._theirs = Channel.pair()
        self.pid = 0
        self._thread = threading.Thread(target=self._supervise, daemon=True)
        self._thread.start()

    def _supervise(self) -> None:
        assert isinstance(self._theirs.recv(), Request)
        self._theirs.send(PlainEvents([{"kind": "merged"}]))
        self._theirs.poll(5 * client.LOOK_S)
        self._theirs.send(PlainEvents([{"kind": "merged"}]))
        with contextlib.suppress(EOFError, OSError):
            assert isinstance(self._theirs.recv(), StopRun)
            self._theirs.send(Finished(RESULT))
        self._theirs.close()

    def end(self) -> None:
        self.channel.hang_up()
        self._thread.join()


class Interrupting:
    """Raises Ctrl-C before the nth line that is run of what hands events to monitors."""

    def __init__(self, nth: int):
        self._left, self.where = nth, ""

    def __call__(self, frame: FrameType, kind: str, _: Any) -> Any:
        if frame.f_code is client._Client._pass_on_the_next.__code__:
            return self._line
        return None

    def _line(self, frame: FrameType, kind: str, _: Any) -> Any:
        if kind == "line" and not self.where:
            self._left -= 1
            if not self._left:
                self.where = f"line {frame.f_lineno}"
                signal.raise_signal(signal.SIGINT)
        return self._line


def test_wherever_ctrl_c_comes_the_run_is_asked_to_end_and_its_result_is_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "NewPython", Supervisor)
    monkeypatch.setattr(client, "LOOK_S", 0.002)
    (tmp_path / "logs").mkdir()
    request = request_of(workloads.gpt(steps=4), Team(), tmp_path, None)
    for nth in range(1, 60):
        interrupting = Interrupting(nth)
        sys.settrace(interrupting)
        try:
            result = client.supervised(RunFolder(tmp_path), request, 1, [lambda event: None])
        except KeyboardInterrupt:
            pytest.fail(f"the run was left alone by Ctrl-C at {interrupting.where} of {client.__file__}")
        finally:
            sys.settrace(None)
        assert result == RESULT


def test_a_monitor_that_raises_as_it_is_told_for_whom_the_others_wait_hears_no_more_and_the_run_ends_saved() -> None:
    class Raising:
        def __call__(self, event: dict[str, Any]) -> None:
            pytest.fail("it hears no more")

        def held_up(self, who: str, doing: str, seconds: float) -> None:
            raise ValueError("a pity")

    told: list[dict[str, Any]] = []
    watching = client._Watching([Raising(), told.append])
    watching.held_up(HeldUp("worker 1", "computing step 2", 2.0))
    watching.see({"kind": "merged"})
    assert isinstance(watching.failed, ValueError), "for which the supervisor is asked to end the run"
    assert told == [{"kind": "merged"}]
