"""How long a team stands still when a worker is killed: ``python benchmarks/stall.py``.

The recipe `gpt` with one sample in each of 16 microbatches, 2 and 4 workers in step, of which one, drawn each time,
is killed with SIGKILL at a drawn moment, 30 times; and, on the same work in the same run, torchft's replicas
(`--torchft PYTHON`, one that has torchft and this project's packages) and torchrun, whose ranks all start again from
a checkpoint of every 10 steps. A stall is the longest time between two updates, of those around the kill, less the
median step of that run, so that it holds what the others compute in the dead one's place; beside it stands the time
from the kill to the next update, less a median step. A kill comes once the team is whole again, and some steps later.
Over two hosts, for which it must run as root (see benchmarks/machines.py), it is told besides how long all stand
still when the successor joins, and after a cable was out for 5 s, which is less than `team.lease_s` there.

To have torchft beside the pinned torch: ``python -m venv ft; ft/bin/pip install --no-deps torchft-nightly``, and a file
ft/lib/python*/site-packages/base.pth with the path of this project's site-packages. The result goes to
benchmarks/results/stall.json, after each contender. To see that all runs: ``--kills 2 --others 1 --cuts 1``.
"""

from __future__ import annotations

import argparse
import bisect
import itertools
import json
import os
import random
import signal
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
sys.path[:1] = [str(ROOT), str(ROOT / "tests")]  # run as a file, Python would look for modules in benchmarks/ itself

from benchmarks.lockstep import machine  # noqa: E402
from benchmarks.stall_contenders import (  # noqa: E402
    CUT_S,
    ByInstep,
    ByInstepOverHosts,
    ByTorchft,
    ByTorchrun,
    Contender,
)

RESULT = ROOT / "benchmarks" / "results" / "stall.json"
SEED, SETTLED = 16, 8
"""Of the kills; steps between a team that is whole and a kill."""

LONG_S = 300.0
"""Seconds for what takes a few."""


@contextmanager
def going(kind: type[Any], workers: int, interpreter: str) -> Iterator[Any]:
    """A contender at work, in a folder of its own; all its processes end with the block."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        contender = kind(Path(folder), workers, interpreter)
        try:
            yield contender
        finally:
            contender.end()


class Vain(SystemExit):
    """A contender does not go on."""


def until(contender: Contender, true: Callable[[], Any]) -> Any:
    """Waits for it, and gives it."""
    last = time.monotonic() + LONG_S
    while not (found := true()):
        if time.monotonic() > last or contender.processes[-1].poll() not in (None, -signal.SIGKILL):
            told = [path.read_text()[-1000:] for path in contender.folder.glob("*.out")]
            raise Vain(f"waited in vain for {type(contender).__name__}: {told}")
        time.sleep(0.002)
        contender.look()
    return found


def measured(
    kind: type[Any], workers: int, kills: int, interpreter: str, draw: random.Random, cuts: int = 0
) -> dict[str, Any]:
    """The stalls of so many kills, and of cuts, in seconds."""
    with going(kind, workers, interpreter) as contender:
        until(contender, lambda: len(contender.updates) > 2 * SETTLED and len(contender.pids) == workers)
        usual = statistics.median(gaps_of(contender.updates[SETTLED:]))

        def suffer(fault: Callable[[], Callable[[], float | None]]) -> float:
            time.sleep(draw.uniform(0, 2 * usual))
            contender.look()
            at: float = until(contender, fault())
            there = len(contender.updates)
            until(contender, lambda: len(contender.updates) > there + SETTLED)
            return at

        killed = [suffer(lambda: contender.kill(draw.randrange(workers))) for _ in range(kills)]
        cut = [suffer(contender.cut) for _ in range(cuts)]
        updates, joined = contender.updates, getattr(contender, "joined", [])
        usual = statistics.median(gaps_of(updates))
    found = {"kills": kills, "step_s": round(usual, 4), **told([stall(updates, at, usual) for at in killed])}
    found["from_the_kill"] = told([until_next(updates, at, usual) for at in killed])
    if joined:
        found["when_a_successor_joins"] = told([stall(updates, at, usual) for at in joined])
    if cuts:
        found[f"after_a_cut_of_{CUT_S:.0f}_s"] = told([stall(updates, at, usual) - CUT_S for at in cut])
    return found


def told(stalls: Sequence[float]) -> dict[str, Any]:
    """What is written down of some."""
    each = sorted(stalls)
    return {
        "median_s": round(statistics.median(each), 4),
        "all_but_one_within_s": round(each[-2] if len(each) > 1 else each[-1], 4),
        "most_s": round(each[-1], 4),
        "each_s": [round(one, 4) for one in each],
    }


def gaps_of(updates: Sequence[float]) -> list[float]:
    """Seconds between each update and the next one."""
    return [after - before for before, after in itertools.pairwise(updates)]


def stall(updates: Sequence[float], at: float, usual: float) -> float:
    """The longer of two gaps, that in which somebody was killed and the one that follows, less a usual one."""
    place = max(1, min(bisect.bisect(updates, at), len(updates) - 2))
    return max(0.0, max(gaps_of(updates[place - 1 : place + 2])) - usual)


def until_next(updates: Sequence[float], at: float, usual: float) -> float:
    """From when somebody was killed to the next update, beyond a usual step."""
    return max(0.0, updates[bisect.bisect(updates, at)] - at - usual)


CONTENDERS = {
    "Instep": ByInstep, "Instep over 2 hosts": ByInstepOverHosts, "torchft": ByTorchft, "torchrun": ByTorchrun
}  # fmt: skip


def main() -> None:
    """Measures, prints and writes the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=30, help="of Instep's workers")
    parser.add_argument("--others", type=int, default=5, help="kills of each of the others")
    parser.add_argument("--cuts", type=int, default=5, help="of a host's cable")
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--torchft", default="", help="the Python that has torchft; without it, it is left out")
    parser.add_argument("--only", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what it has started ends too
    draw, found = random.Random(SEED), dict[str, Any]()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    about = {"machine": machine(), "commit": commit.strip(), "seed": SEED, "load": os.getloadavg()}
    for workers, name in itertools.product(given.workers, given.only):
        if name == "torchft" and not given.torchft:
            continue
        interpreter = given.torchft if name == "torchft" else sys.executable
        kills = given.kills if issubclass(CONTENDERS[name], ByInstep) else given.others
        cuts, began = given.cuts if name == "Instep over 2 hosts" else 0, time.monotonic()
        try:
            one = measured(CONTENDERS[name], workers, kills, interpreter, draw, cuts)
        except Vain as error:
            if issubclass(CONTENDERS[name], ByInstep):
                raise
            one = {"failed": str(error)}
        found[f"{name}, {workers} workers"] = {**one, "seconds": round(time.monotonic() - began)}
        print(name, workers, json.dumps(found[f"{name}, {workers} workers"]), flush=True)
        given.out.write_text(json.dumps({**about, "found": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
