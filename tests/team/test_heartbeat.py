"""Signs of life: who is blamed for silence or for getting nowhere, and who is not."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from instep.data import Data
from instep.recipe import Team
from instep.team import crew
from instep.team.heartbeat import Heartbeat, HeartbeatBoard, Liveness, process_state
from support import workloads
from support.harness import train_here
from support.processes import wait_until
from support.workloads import Sentences, padded


class World:
    """A clock and a table of processes that tests set, and the looks of a supervisor at them."""

    def __init__(self, workers: int = 2) -> None:
        self.now_s = 100.0
        self.board = HeartbeatBoard(workers)
        self.states = ["S"] * workers
        self.ticks = [50] * workers
        pids = [1000 + worker for worker in range(workers)]
        self.active = list(range(workers))
        self.watch = Liveness(self.board, pids, answer_timeout_s=4.0, stall_timeout_s=60.0, now_s=self.now_s)

    def look(self) -> tuple[int, str] | None:
        states = {worker: (self.states[worker], self.ticks[worker]) for worker in self.active}
        return self.watch.look(self.now_s, states)

    def passes(self, seconds: float, alive: tuple[int, ...] = (), busy: tuple[int, ...] = ()) -> tuple[int, str] | None:
        """Looks five times a second. Workers `alive` beat, `busy` ones use the processor. The first finding."""
        for _ in range(round(seconds * 5)):
            self.now_s += 0.2
            for worker in alive:
                self.board.beats[worker] += 1
            for worker in busy:
                self.ticks[worker] += 20
            found = self.look()
            if found:
                return found
        return None


@pytest.fixture
def world() -> World:
    return World()


def test_workers_that_beat_are_left_alone(world: World) -> None:
    assert world.passes(50, alive=(0, 1)) is None


def test_a_silent_worker_is_named_after_its_time(world: World) -> None:
    assert world.passes(10, alive=(0, 1)) is None
    assert world.passes(3.8, alive=(0,)) is None
    found = world.passes(0.6, alive=(0,))
    assert found is not None
    worker, why = found
    assert worker == 1
    assert why.startswith("worker 1 (pid 1001) has not answered for 4.")
    assert why.endswith("; team.answer_timeout_s is 4.")


def test_one_beat_is_enough(world: World) -> None:
    for _ in range(5):
        assert world.passes(3.8, alive=(0,)) is None
        assert world.passes(0.2, alive=(0, 1)) is None


def test_a_stopped_worker_is_told_apart(world: World) -> None:
    world.states[0] = "T"
    found = world.passes(5, alive=(1,), busy=(0,))
    assert found is not None
    assert found[0] == 0
    assert "it is stopped (SIGSTOP or a debugger)" in found[1]


def test_a_silent_worker_that_uses_the_processor_is_not_blamed(world: World) -> None:
    """It may be inside C code that holds the interpreter's lock, where no thread of it can beat."""
    assert world.passes(2, alive=(0, 1)) is None
    assert world.passes(30, alive=(0,), busy=(1,)) is None
    assert world.passes(2, alive=(0, 1)) is None
    assert world.passes(5, alive=(0,)) is not None, "its time is counted anew after it answered"


def test_a_silent_worker_that_waits_for_a_processor_is_not_blamed(world: World) -> None:
    """Others may keep all of them busy."""
    world.states[1] = "R"
    assert world.passes(30, alive=(0,)) is None
    world.states[1] = "S"
    assert world.passes(5, alive=(0,)) is not None


def test_a_supervisor_that_was_suspended_blames_nobody(world: World) -> None:
    """Nor does a laptop that was closed for an hour: workers slept as well, and need a moment to beat again."""
    assert world.passes(2, alive=(0, 1)) is None
    world.now_s += 3600
    assert world.look() is None
    assert world.passes(3, alive=()) is None
    assert world.passes(5, alive=(0, 1)) is None
    for _ in range(20):  # and if it is stopped again and again, in the midst of its looks
        world.now_s += 1000
        assert world.passes(0.2, alive=(0, 1)) is None


def test_a_worker_that_finishes_nothing_is_named(world: World) -> None:
    def getting_on(seconds: float) -> None:
        for _ in range(round(seconds)):
            world.board.progress[:] += 1
            assert world.passes(1, alive=(0, 1)) is None

    getting_on(100)
    world.board.progress[0] += 1
    assert world.passes(59, alive=(0, 1)) is None
    world.board.progress[0] += 1
    found = world.passes(2, alive=(0, 1))
    assert found is not None
    assert found == (1, "worker 1 (pid 1001) answers, but has finished nothing for 60 s; "
                        "if its steps take that long, raise team.stall_timeout_s, now 60.")  # fmt: skip


def test_who_waits_for_others_is_not_blamed_for_finishing_nothing(world: World) -> None:
    heartbeats = [Heartbeat(world.board, worker, os.getpid()) for worker in range(2)]
    heartbeats[0].waiting(True)
    found = world.passes(61, alive=(0, 1))
    assert found is not None
    assert found[0] == 1
    heartbeats[0].waiting(False)
    heartbeats[1].advance()
    assert world.passes(59, alive=(0, 1)) is None
    heartbeats[1].advance()
    found = world.passes(2, alive=(0, 1))
    assert found is not None
    assert found[0] == 0, "its own time began when it no longer waited"


def test_a_worker_that_has_done_its_part_may_fall_silent(world: World) -> None:
    """It has ended while others still save or write a sample."""
    world.active.remove(1)
    world.states[1] = "Z"
    assert world.passes(59, alive=(0,)) is None
    world.board.progress[0] += 1
    assert world.passes(30, alive=(0,)) is None
    found = world.passes(5)
    assert found is not None
    assert found[0] == 0


def but_for_the_loaded(state_of: Callable[[int], tuple[str, int]]) -> Callable[[int], tuple[str, int]]:
    """All look dead, but for those that wait for a processor."""
    return lambda pid: found if (found := state_of(pid))[0] == "R" else ("Z", 0)


@pytest.mark.processes
def test_a_team_waits_for_the_one_that_writes_the_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow:
        bytes_per_token = 1.0

        def encode(self, text: str) -> list[int]:
            return [0]

        def decode(self, tokens: list[int]) -> str:
            time.sleep(2.5)
            return "a sample"

    monkeypatch.setattr(crew, "process_state", but_for_the_loaded(crew.process_state))
    recipe = workloads.gpt(steps=1, sample_length=1, data=lambda: Data(Sentences(40), collate=padded, codec=Slow()))
    run = train_here(recipe, Team(workers=2, answer_timeout_s=1.5, restarts=0), tmp_path / "run")
    assert run.result["sample"] == "a sample"


@pytest.mark.processes
def test_a_stop_is_seen_by_all() -> None:
    board = HeartbeatBoard(3)
    heartbeats = [Heartbeat(board, worker, os.getpid()) for worker in range(3)]
    assert not any(each.stop_wanted() for each in heartbeats)
    child = os.fork()
    if not child:
        board.ask_to_stop()
        os._exit(0)
    os.waitpid(child, 0)
    assert all(each.stop_wanted() for each in heartbeats)


# ------------------------------------------------------------------------------------------------------ real processes


@contextlib.contextmanager
def worker(board: HeartbeatBoard, work: Callable[[], None]) -> Iterator[int]:
    """A forked worker 0 that beats and does `work`. Gives its pid."""
    supervisor = os.getpid()
    pid = os.fork()
    if not pid:
        Heartbeat(board, 0, supervisor).start()
        work()
        os._exit(0)
    try:
        yield pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def looks(watch: Liveness, pid: int, for_s: float) -> tuple[int, str] | None:
    until = time.monotonic() + for_s
    while time.monotonic() < until:
        found = watch.look(time.monotonic(), {0: process_state(pid)})
        if found:
            return found
        time.sleep(0.05)
    return None


def until_it_beats(board: HeartbeatBoard) -> None:
    until, before = time.monotonic() + 60, int(board.beats[0])
    while board.beats[0] == before:
        assert time.monotonic() < until, "no beat"
        time.sleep(0.01)


@pytest.mark.processes
@pytest.mark.slow
def test_a_real_worker_that_is_stopped_and_goes_on() -> None:
    board = HeartbeatBoard(1)
    with worker(board, lambda: time.sleep(60)) as pid:
        until_it_beats(board)
        watch = Liveness(board, [pid], 1.0, 60, now_s=time.monotonic())
        assert looks(watch, pid, 1.6) is None
        os.kill(pid, signal.SIGSTOP)
        found = looks(watch, pid, 60)
        assert found is not None
        assert f"worker 0 (pid {pid})" in found[1]
        assert "SIGSTOP" in found[1]
        os.kill(pid, signal.SIGCONT)
        until_it_beats(board)
        assert looks(watch, pid, 1.6) is None


def hold_the_interpreter() -> None:
    sum(range(1_000_000_000))  # one call of C code: half a minute


@pytest.mark.processes
def test_a_real_worker_that_holds_the_interpreter() -> None:
    board = HeartbeatBoard(1)

    def work() -> None:
        until_it_beats(board)
        board.progress[0] = 1  # and at once:
        hold_the_interpreter()

    with worker(board, work) as pid:
        wait_until(lambda: board.progress[0] == 1, 60, "the call of C code")
        beats = int(board.beats[0])
        assert looks(Liveness(board, [pid], 0.5, 60, now_s=time.monotonic()), pid, 1.5) is None
        assert board.beats[0] <= beats + 1, "it could beat, so this test shows nothing"


@pytest.mark.processes
def test_the_state_of_a_process() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)  # (a) b"]) as process:
        try:
            state, ticks = process_state(process.pid)
            assert state in "RSD"
            assert ticks >= 0
            os.kill(process.pid, signal.SIGSTOP)
            wait_until(lambda: process_state(process.pid)[0] == "T", 60, "the stop")
        finally:
            process.kill()
    assert process_state(process.pid) == ("?", 0)
    if Path("/proc/self/stat").exists():
        began = process_state(os.getpid())[1]
        end = time.process_time() + 0.1
        while time.process_time() < end:
            pass
        assert process_state(os.getpid())[1] >= began + 5


@pytest.mark.processes
def test_who_sleeps_while_a_thread_of_its_waits_for_a_processor_is_not_asleep() -> None:
    """It could not beat in time on a machine with much else to do, and would be taken for dead."""
    board = HeartbeatBoard(1)

    def spin() -> None:
        board.progress[0] = 1
        while True:
            pass

    def work() -> None:
        threading.Thread(target=spin, daemon=True).start()
        time.sleep(600)

    with worker(board, work) as pid:
        wait_until(lambda: board.progress[0] == 1, 60, "the thread")
        main_thread = Path(f"/proc/{pid}/task/{pid}/stat")
        wait_until(lambda: main_thread.read_text().rpartition(")")[2].split()[0] == "S", 60, "the main thread's sleep")
        assert {process_state(pid)[0] for _ in range(20)} == {"R"}
        os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: process_state(pid)[0] == "T", 60, "the stop")


@pytest.mark.processes
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_ends_with_its_supervisor_even_if_it_is_stopped(how: signal.Signals, tmp_path: Path) -> None:
    read, write = os.pipe()
    supervisor = os.fork()
    if not supervisor:
        board = HeartbeatBoard(2)
        parent = os.getpid()
        for number in range(2):
            child = os.fork()
            if not child:
                Heartbeat(board, number, parent).start()
                os.write(write, f"{os.getpid()}\n".encode())
                time.sleep(60)
                os._exit(0)
        time.sleep(60)
        os._exit(0)
    with os.fdopen(read) as lines:
        pids = [int(next(lines)), int(next(lines))]
    os.close(write)
    os.kill(pids[0], signal.SIGSTOP)
    os.kill(supervisor, how)
    os.waitpid(supervisor, 0)
    wait_until(lambda: all(process_state(pid)[0] in "?ZX" for pid in pids), 60, "the end of workers with it")
