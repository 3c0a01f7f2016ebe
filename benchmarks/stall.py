"""How long a team stands still when a worker is killed: ``python benchmarks/stall.py``.

The recipe `gpt` with one sample in each of 16 microbatches, 2 and 4 workers in step, of which one, drawn each time, is
killed with SIGKILL at a drawn moment, 30 times; and, on the same work in the same run, torchft's replicas
(`--torchft PYTHON`, one that has torchft and this project's packages) and torchrun, whose ranks all start again from a
checkpoint of every 10 steps. A stall is the longest time between two updates, of those around the kill, less the median
step of that run. A kill comes once the team is whole again, and some steps later.

To have torchft beside the pinned torch: ``python -m venv ft; ft/bin/pip install --no-deps torchft-nightly``, and a file
ft/lib/python*/site-packages/base.pth with the path of this project's site-packages. The result goes to
benchmarks/results/stall.json.
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import itertools
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # run as a file, Python would look for modules in benchmarks/ itself

from benchmarks.lockstep import THREADS, machine  # noqa: E402
from instep.recipe import Recipe, Team, dumps, parse  # noqa: E402
from instep.recipe_files import read  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "stall.json"
MICROBATCHES, EVERY, SEED, SETTLED = 16, 10, 16, 8
"""Of a step; steps between torchrun's checkpoints; of the kills; steps between a team that is whole and a kill."""

LONG_S = 300.0
"""Seconds for what takes a few."""


def recipe() -> Recipe:
    """The recipe `gpt`, of one sample a microbatch, at a constant rate, without evaluations and checksums."""
    own = {"batch": MICROBATCHES, "microbatches": MICROBATCHES, "steps": 1_000_000, "evaluate_every": 0}
    table = read("gpt") | own | {"schedule": {"kind": "constant"}, "checksum_every": 1_000_000, "sample_length": 0}
    return parse({key: value for key, value in table.items() if key != "team"})[0]


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


class ByInstep:
    """Workers in lockstep, as the tape tells. Times are seconds since the run's start."""

    def __init__(self, folder: Path, workers: int, interpreter: str):
        self.folder = folder
        team = Team(workers=workers, checkpoint_every=1_000_000, restarts=1_000_000)
        (folder / "my.toml").write_text(dumps(recipe(), team))
        self._tape = Grown(folder / "run" / "tape.jsonl")
        self.updates: list[float] = []
        self.pids: dict[int, int] = {}
        self._lost: dict[int, float] = {}  # by pid
        self._vacant: set[int] = set()
        command = [interpreter, "-m", "instep", "train", "my.toml", "--out", "run"]
        self.processes = [_started(command, folder, "instep")]

    def look(self) -> None:
        """Reads what is new."""
        for event in map(json.loads, self._tape.lines()):
            match event["kind"]:
                case "merged":
                    self.updates.append(event["t_s"])
                case "joined":
                    self.pids[event["worker"]] = event["pid"]
                case "left":
                    self._lost[self.pids[event["worker"]]] = event["t_s"]
                    self._vacant.add(event["worker"])
                case "took_place":
                    self._vacant.discard(event["worker"])
                case "run_started" if event["version"]:
                    raise SystemExit("the team went back to a checkpoint, and was to go on in the step.")

    def kill(self, number: int) -> Callable[[], float | None]:
        """Kills one; gives when it was, once that is known and it is followed."""
        pid = self.pids[number]
        os.kill(pid, signal.SIGKILL)
        return lambda: None if pid not in self._lost or self._vacant else self._lost[pid]


class ByTorch:
    """Processes that write a line after each step. Times are those of the monotonic clock."""

    def __init__(self, folder: Path, workers: int):
        self.folder, self._workers = folder, workers
        self.processes: list[subprocess.Popen[bytes]] = []
        self._stamps, self._step = [Grown(folder / f"{number}.steps") for number in range(workers)], 0
        self.updates: list[float] = []
        self.stepped = [0.0] * workers

    @property
    def pids(self) -> dict[int, int]:
        """By number."""
        files = {number: self.folder / f"{number}.pid" for number in range(self._workers)}
        return {number: int(file.read_text() or 0) for number, file in files.items() if file.exists()}

    def look(self) -> None:
        """Reads what is new. An update is a step that nobody had made yet."""
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
    """Ranks, all of which torchrun starts again."""

    def __init__(self, folder: Path, workers: int, interpreter: str):
        super().__init__(folder, workers)
        run = ["--standalone", "--nproc-per-node", str(workers), "--max-restarts", "1000", "--monitor-interval", "0.1"]
        command = [interpreter, "-m", "torch.distributed.run", *run, "-m", "benchmarks.stall_by_torch", str(folder)]
        self.processes.append(_started(command, folder, "torchrun"))


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


@contextmanager
def going(kind: type, workers: int, interpreter: str) -> Iterator[Any]:
    """A contender at work, in a folder of its own; all its processes end with the block."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        contender = kind(Path(folder), workers, interpreter)
        try:
            yield contender
        finally:
            for process in contender.processes:
                for which in (signal.SIGTERM, signal.SIGKILL):  # torchrun's ranks are in sessions of their own
                    with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                        os.killpg(process.pid, which)
                        process.wait(30)


def until(contender: Any, true: Callable[[], Any]) -> Any:
    """Waits for it, and gives it."""
    last = time.monotonic() + LONG_S
    while not (found := true()):
        if time.monotonic() > last or contender.processes[-1].poll() not in (None, -signal.SIGKILL):
            told = [path.read_text()[-1000:] for path in contender.folder.glob("*.out")]
            raise SystemExit(f"waited in vain for {type(contender).__name__}: {told}")
        time.sleep(0.002)
        contender.look()
    return found


def measured(kind: type, workers: int, kills: int, interpreter: str, draw: random.Random) -> dict[str, Any]:
    """The stalls of so many kills, in seconds."""
    with going(kind, workers, interpreter) as contender:
        until(contender, lambda: len(contender.updates) > 2 * SETTLED and len(contender.pids) == workers)
        usual, told = statistics.median(gaps_of(contender.updates[SETTLED:])), []
        for _ in range(kills):
            time.sleep(draw.uniform(0, 2 * usual))
            contender.look()
            known = contender.kill(draw.randrange(workers))
            told.append(until(contender, known))
            there = len(contender.updates)
            until(contender, lambda: len(contender.updates) > there + SETTLED)  # noqa: B023
        usual = statistics.median(gaps_of(contender.updates))
        found = sorted(stall(contender.updates, at, usual) for at in told)
    return {
        "kills": kills,
        "step_s": round(usual, 4),
        "median_s": round(statistics.median(found), 4),
        "all_but_one_within_s": round(found[-2] if kills > 1 else found[-1], 4),
        "most_s": round(found[-1], 4),
        "each_s": [round(each, 4) for each in found],
    }


def gaps_of(updates: Sequence[float]) -> list[float]:
    """Seconds between each update and the next one."""
    return [after - before for before, after in itertools.pairwise(updates)]


def stall(updates: Sequence[float], at: float, usual: float) -> float:
    """The longer of two gaps, that in which somebody was killed and the one that follows, less a usual one."""
    place = max(1, min(bisect.bisect(updates, at), len(updates) - 2))
    return max(0.0, max(gaps_of(updates[place - 1 : place + 2])) - usual)


CONTENDERS = {"Instep": ByInstep, "torchft": ByTorchft, "torchrun": ByTorchrun}


def main() -> None:
    """Measures, prints and writes the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=30, help="of Instep's workers")
    parser.add_argument("--others", type=int, default=5, help="kills of each of the others")
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--torchft", default="", help="the Python that has torchft; without it, it is left out")
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what it has started ends too
    draw, found = random.Random(SEED), dict[str, Any]()
    for workers in given.workers:
        for name, kind in CONTENDERS.items():
            if name == "torchft" and not given.torchft:
                continue
            interpreter = given.torchft if name == "torchft" else sys.executable
            kills = given.kills if name == "Instep" else given.others
            found[f"{name}, {workers} workers"] = measured(kind, workers, kills, interpreter, draw)
            print(name, workers, json.dumps(found[f"{name}, {workers} workers"]), flush=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    about = {"machine": machine(), "commit": commit.strip(), "seed": SEED, "load": os.getloadavg()}
    given.out.write_text(json.dumps({**about, "found": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
