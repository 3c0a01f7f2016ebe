"""The socket in a run folder: who may ask, and what strangers, torn lines and floods do: nothing."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from instep.errors import RecordError, WorkerError
from instep.record.folder import About, RunFolder
from instep.team import asking, control
from instep.team.asking import ask, standing_of
from instep.team.control import CALLERS, QUESTION_BYTES, SOCKET, AskTeam, Control, connected
from instep.team.waiting import ready_of
from support.patience import LONG_S

LONG = "a folder with a name of some length, of which several follow"


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / LONG / LONG / "run", "seed = 1\n", About())


@contextlib.contextmanager
def served(folder: RunFolder, answer: Any = None) -> Iterator[Control]:
    """An agent that does nothing else, in a thread."""
    with folder.locked() as held:
        one, over = Control(held.descriptor), threading.Event()

        def serve() -> None:
            while not over.is_set():
                for asked in one.hear(ready_of(one.sources(), one.senders(), 0.02)):
                    asked.answer({"state": "training"} if answer is None else answer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield one
        finally:
            over.set()
            thread.join()
            one.close()


def state(folder: RunFolder) -> str:
    """What the agent tells."""
    answer = ask(folder, AskTeam())
    assert answer is not None
    return str(answer["state"])


@contextlib.contextmanager
def calling(folder: RunFolder) -> Iterator[socket.socket]:
    descriptor = os.open(folder.path / control.CONTROL, os.O_RDONLY)
    try:
        with connected(descriptor) as end:
            end.settimeout(LONG_S)
            yield end
    finally:
        os.close(descriptor)


def test_the_owner_asks_and_is_answered_however_long_the_path_of_the_folder(folder: RunFolder) -> None:
    assert len(os.fsencode(folder.path)) > 108
    with served(folder):
        assert state(folder) == "training"
        assert standing_of(folder.path) == {"state": "training", "run": str(folder.path), "supervisor": os.getpid()}
    assert not (folder.path / control.CONTROL).exists(), "it is taken away at the end"
    assert ask(folder, AskTeam()) is None


def test_an_answer_longer_than_a_socket_holds_comes_whole(folder: RunFolder) -> None:
    long = {"text": "x" * (4 << 20)}
    with served(folder, long):
        assert ask(folder, AskTeam()) == {**long, "supervisor": os.getpid()}


def test_the_socket_is_for_its_owner_alone(folder: RunFolder) -> None:
    place = folder.path / control.CONTROL
    place.mkdir(mode=0o777)
    with served(folder):
        assert stat.S_IMODE(place.stat().st_mode) == 0o700
        assert stat.S_IMODE((place / SOCKET).stat().st_mode) == 0o600


def test_a_caller_of_another_user_is_refused_even_where_the_file_lets_it_in(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(folder):
        monkeypatch.setattr(control, "_user", lambda end: os.geteuid() + 1)
        with pytest.raises(RecordError, match=r"the run is another user's, who alone may ask\."):
            ask(folder, AskTeam())


def test_a_caller_that_hangs_up_in_the_midst_of_an_answer_is_let_go(folder: RunFolder) -> None:
    """And not waited for, with a socket that is ready all the time."""
    with folder.locked() as held:
        one = Control(held.descriptor)
        with calling(folder) as caller:
            caller.sendall(b'{"ask": "team"}\n')
            while not (asked := list(one.hear(ready_of(one.sources(), one.senders(), 0.1)))):
                pass
            asked[0].answer({"text": "x" * (4 << 20)})
            assert one.senders(), "it is not taken whole"
        ready_of([], one.senders(), LONG_S)
        assert not one.senders()
        while one.opened != [one._listener]:
            list(one.hear(ready_of(one.sources(), one.senders(), 0.1)))
        one.close()


@pytest.mark.processes
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_is_told_so() -> None:
    with tempfile.TemporaryDirectory() as name:  # whose parents all may enter, unlike those of pytest's
        os.chmod(name, 0o755)
        folder = RunFolder.create(Path(name) / "run", "seed = 1\n", About())
        _told_to_another_user(folder)


def _told_to_another_user(folder: RunFolder) -> None:
    with served(folder):
        read, write = os.pipe()
        pid = os.fork()
        if not pid:
            os.setresuid(65534, 65534, 65534)
            try:
                told = str(ask(folder, AskTeam()))
            except BaseException as error:
                told = f"{type(error).__name__}: {error}"
            os.write(write, told.encode())
            os._exit(0)
        os.waitpid(pid, 0)
        told = os.read(read, 1 << 16).decode()
        assert told == f"RecordError: {folder.path} is a run of another user, who alone may ask it."


@pytest.mark.parametrize(
    "sent",
    [
        b"what?\n", b'{"ask": "nothing"}\n', b'{"ask": "team", "more": 1}\n', b"\x80\x04\x95.\n", b"[" * 4000 + b"\n",
        b'{"ask": "\xff"}\n', b'{"more": ' + b"[" * 50000 + b"\n",
    ],
    ids=lambda sent: repr(sent[:20]),
)  # fmt: skip
def test_what_is_no_question_is_answered_with_an_error_and_harms_nobody(sent: bytes, folder: RunFolder) -> None:
    with served(folder):
        with calling(folder) as stranger:
            stranger.sendall(sent)
            assert b'"error"' in stranger.recv(1 << 16)
            assert stranger.recv(1) == b"", "and the connection is closed"
        assert state(folder) == "training"


def test_a_line_without_an_end_is_cut_off_and_a_torn_one_waits_for_its_rest(folder: RunFolder) -> None:
    with served(folder), calling(folder) as torn:
        torn.sendall(b'{"ask": ')
        with calling(folder) as flood, contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while True:
                flood.sendall(b"x" * QUESTION_BYTES)
        assert state(folder) == "training"
        torn.sendall(b'"team"}\n')
        assert torn.recv(1 << 16) == b'{"state": "training"}\n'


def test_callers_without_end_keep_nobody_from_asking_later(folder: RunFolder) -> None:
    with served(folder) as one:
        with contextlib.ExitStack() as stack:
            for _ in range(3 * CALLERS):
                with contextlib.suppress(ConnectionResetError):
                    stack.enter_context(calling(folder))
            assert len(one.opened) <= CALLERS + 1
        while len(one.opened) > 1:
            pass
        assert state(folder) == "training"


def test_who_is_turned_away_asks_again(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(folder) as one, contextlib.ExitStack() as stack:
        for count in range(CALLERS):
            stack.enter_context(calling(folder))
            while len(one.opened) < count + 2:
                pass
        waits: list[float] = []

        def sleep(seconds: float) -> None:
            waits.append(seconds)
            stack.close()

        monkeypatch.setattr(asking.time, "sleep", sleep)
        assert state(folder) == "training"
        assert waits, "it was turned away"


def test_who_is_turned_away_for_good_is_told_in_time(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "PATIENCE_S", 0.1)
    with served(folder) as one, contextlib.ExitStack() as stack:
        for count in range(CALLERS):
            stack.enter_context(calling(folder))
            while len(one.opened) < count + 2:
                pass
        with pytest.raises(WorkerError, match="does not answer: .*; ask again"):
            ask(folder, AskTeam())


def test_a_caller_is_not_heard_without_a_pause_however_much_it_asks(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "PAUSE_S", LONG_S)
    with folder.locked() as held:
        one = Control(held.descriptor)
        with calling(folder) as caller:
            caller.sendall(b'{"ask": "team"}\n' * 20)
            while not (asked := list(one.hear(ready_of(one.sources(), [], 0.1)))):
                pass
            assert len(asked) == 1
            assert one.sources() == [one._listener], "the next look at it comes later"
        one.close()


def test_the_socket_of_a_killed_agent_is_known_for_what_it_is_and_replaced(folder: RunFolder) -> None:
    with folder.locked() as held:
        one = Control(held.descriptor)
        one._listener.close()  # as where its process was killed: the file stays
    assert (folder.path / control.CONTROL / SOCKET).exists()
    assert ask(folder, AskTeam()) is None
    assert standing_of(folder.path)["state"] == "nothing"
    with served(folder):
        assert state(folder) == "training"


def test_a_run_without_a_socket_is_told_from_one_that_does_not_go_on(folder: RunFolder) -> None:
    with folder.locked(), pytest.raises(WorkerError, match="is being trained, and cannot be asked: it starts or ends"):
        ask(folder, AskTeam())


def test_an_agent_that_does_not_answer_is_told_in_time(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "PATIENCE_S", 0.1)
    monkeypatch.setattr(asking, "PATIENCE_S", 0.1)
    with folder.locked() as held:
        one = Control(held.descriptor)
        with pytest.raises(WorkerError, match="does not answer: no answer came within"):
            ask(folder, AskTeam())
        one.close()


def test_what_is_no_run_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="is not the folder of a run"):
        standing_of(tmp_path)
    with pytest.raises(RecordError, match="there is no folder"):
        standing_of(tmp_path / "nothing")
