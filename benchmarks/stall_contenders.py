"""Those whose stalls `benchmarks.stall` measures: Instep on one machine and over two hosts, torchrun, torchft."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.lockstep import ROOT, THREADS
from benchmarks.stall_work import recipe
from instep.recipe import Team, dumps
from support.present import Process
from support.step_places import Machines

CUT_S, LEASE_S = 5.0, 20.0
"""Seconds that a cable is out; that a host may be silent."""


class Grown:
    """The lines of a file, as it grows."""

    def __init__(self, path: Path):
        self._path, self._offset = path, 0

    def lines(self) -> list[bytes]:
        """Those that are new and whole; none where there is no file yet."""
        with contextlib.suppress(FileNotFoundError), self._path.open("rb") as file:
            file.seek(self._offset)
            whole = file.read().rpartition(b"\n")[0]
            self._offset += len(whole) + 1 if whole else 0
            return whole.splitlines()
        return []


class Contender:
    """What trains, and suffers. processes: that it has started, the first of all at last."""

    folder: Path
    updates: list[float]

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []

    def look(self) -> None:
        """Reads what is new."""
        raise NotImplementedError

    def end(self) -> None:
        """Ends all its processes."""
        for process in self.processes:
            for which in (signal.SIGTERM, signal.SIGKILL):  # torchrun's ranks are in sessions of their own
                with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                    os.killpg(process.pid, which)
                    process.wait(30)


class ByInstep(Contender):
    """Workers in lockstep, as the tape tells. Times are seconds since the run's start."""

    lease_s = Team().lease_s

    def __init__(self, folder: Path, workers: int, interpreter: str):
        super().__init__()
        self.folder, self._workers = folder, workers
        team = Team(workers=workers, checkpoint_every=1_000_000, restarts=1_000_000, lease_s=self.lease_s)
        self.updates: list[float] = []
        self.pids: dict[int, Process] = {}
        self.joined: list[float] = []
        """Of successors."""
        self._lost: dict[Process, float] = {}
        self._why = ""
        self._vacant: set[int] = set()
        self._start(dumps(recipe(), team), interpreter)
        self._tape = Grown(self._run / "tape.jsonl")

    def _start(self, text: str, interpreter: str) -> None:
        (self.folder / "my.toml").write_text(text)
        command = [interpreter, "-m", "instep", "train", "my.toml", "--out", "run"]
        self.processes.append(_started(command, self.folder, "instep"))
        self._run = self.folder / "run"

    def look(self) -> None:
        for event in map(json.loads, self._tape.lines()):
            match event["kind"]:
                case "merged":
                    self.updates.append(event["t_s"])
                case "joined":
                    self.pids[event["worker"]] = Process(event["worker"], event["host"], event["pid"])
                case "left":
                    self._lost[self.pids[event["worker"]]], self._why = event["t_s"], event["why"]
                    self._vacant.add(event["worker"])
                case "took_place":
                    self._vacant.discard(event["worker"])
                case "regrouped":
                    if self._vacant & set(event["workers"]):
                        self.joined.append(event["t_s"])
                    self._vacant -= set(event["workers"])
                case "run_started" if event["version"]:
                    raise SystemExit("the team went back to a checkpoint, and was to go on in the step.")

    def kill(self, number: int) -> Callable[[], float | None]:
        """Kills one; gives when it was, once that is known and it is followed."""
        process = self.pids[number]
        self._signal(process)
        return lambda: None if process not in self._lost or self._vacant else self._lost[process]

    def _signal(self, process: Process) -> None:
        os.kill(process.pid, signal.SIGKILL)


class ByInstepOverHosts(ByInstep):
    """The same over two hosts, whose cables can be taken out."""

    lease_s = LEASE_S

    def _start(self, text: str, interpreter: str) -> None:
        self._there = Machines(self.folder, 2)
        self._there.start({"my.toml": text}, "--workers", str(self._workers))  # else one for each agent
        self.processes += [command.process for command in self._there.commands]
        self._run = self._there.run

    def _signal(self, process: Process) -> None:
        self._there.signal(process, signal.SIGKILL)

    def cut(self) -> Callable[[], float | None]:
        """Takes the second host's cable out for a while; gives when it was, once all go on in the same processes."""
        before, lost = dict(self.pids), len(self._lost)
        self._there.cut(self._there.hosts[1].name, CUT_S)
        self.look()
        at, updates = self.updates[-1], len(self.updates)

        def known() -> float | None:
            if self.pids != before or len(self._lost) > lost:
                raise SystemExit(f"a cut that is shorter than the lease has cost a process: {self._why}")
            return at if len(self.updates) > updates else None

        return known

    def end(self) -> None:
        self._there.end()


class ByTorch(Contender):
    """Processes that write a line after each step. Times are those of the monotonic clock."""

    def __init__(self, folder: Path, workers: int):
        super().__init__()
        self.folder, self._workers = folder, workers
        self._stamps, self._step = [Grown(folder / f"{number}.steps") for number in range(workers)], 0
        self.updates: list[float] = []
        self.stepped = [0.0] * workers

    @property
    def pids(self) -> dict[int, int]:
        """By number."""
        files = {number: self.folder / f"{number}.pid" for number in range(self._workers)}
        return {number: int(file.read_text() or 0) for number, file in files.items() if file.exists()}

    def look(self) -> None:
        """An update is a step that nobody had made yet."""
        found = []
        for number, stamps in enumerate(self._stamps):
            own = [(float(t), int(step)) for step, t in map(bytes.split, stamps.lines())]
            found += own
            self.stepped[number] = own[-1][0] if own else self.stepped[number]
        for t, step in sorted(found):
            if step > self._step:
                self._step = step
                self.updates.append(t)

    def kill(self, number: int) -> Callable[[], float | None]:
        """As those of Instep."""
        pid, at, updates = self.pids[number], time.monotonic(), len(self.updates)
        os.kill(pid, signal.SIGKILL)
        self.followed(number)
        return lambda: at if self._again(number, pid) and len(self.updates) > updates + 1 else None

    def _again(self, number: int, pid: int) -> bool:
        pids = self.pids
        written = (self.folder / f"{number}.pid").stat().st_mtime - time.time() + time.monotonic()
        return pids[number] not in (0, pid) and self.stepped[number] > written

    def followed(self, number: int) -> None:
        """Has a process come in the place of one that was killed, if nobody else does."""


class ByTorchrun(ByTorch):
    """Ranks, all of which torchrun starts again. Each start meets in a store of its own: in the one that all starts
    share by default in torch 2.13 ranks find the addresses of those before, and some starts are in vain.
    """

    def __init__(self, folder: Path, workers: int, interpreter: str):
        super().__init__(folder, workers)
        run = ["--standalone", "--nproc-per-node", str(workers), "--max-restarts", "1000", "--monitor-interval", "0.1"]
        command = [interpreter, "-m", "torch.distributed.run", *run, "-m", "benchmarks.stall_by_torch", str(folder)]
        self.processes.append(_started(command, folder, "torchrun", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1"))


class ByTorchft(ByTorch):
    """Replicas of one process each, and a lighthouse, as in its example: 5 s until one that is silent is given up."""

    def __init__(self, folder: Path, workers: int, interpreter: str):
        super().__init__(folder, workers)
        self._interpreter = interpreter
        lighthouse = str(Path(interpreter).with_name("torchft_lighthouse"))
        options = ["--min_replicas", "1", "--quorum_tick_ms", "100", "--join_timeout_ms", "10000"]
        bind = f"127.0.0.1:{(port := _free_port())}"
        self._address = f"http://localhost:{port}"
        self.processes.append(_started([lighthouse, *options, "--bind", bind], folder, "lighthouse"))
        for number in range(workers):
            self.followed(number)

    def followed(self, number: int) -> None:
        """Starts a replica."""
        own = {"REPLICA": str(number), "REPLICAS": str(self._workers), "TORCHFT_LIGHTHOUSE": self._address}
        command = [self._interpreter, "-m", "benchmarks.stall_by_torch", str(self.folder)]
        self.processes.append(_started(command, self.folder, f"replica-{number}", **own))


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def _started(command: Sequence[str], folder: Path, name: str, **more: str) -> subprocess.Popen[bytes]:
    own = {**os.environ, **THREADS, "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}", "GLOO_SOCKET_IFNAME": "lo", **more}
    with (folder / f"{name}.out").open("ab") as out:
        return subprocess.Popen(command, cwd=folder, env=own, stdout=out, stderr=out, start_new_session=True)
