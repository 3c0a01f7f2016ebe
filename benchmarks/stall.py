"""How long a team stands still when a worker is killed: ``python benchmarks/stall.py``.

The recipe `gpt` with one sample in each of 16 microbatches, 2 and 4 workers in step, of which one, drawn each time,
is killed with SIGKILL at a drawn moment, 30 times; and, on the same work in the same run, torchft's replicas
(`--torchft PYTHON`, one that has torchft and this project's packages) and torchrun, whose ranks all start again from
a checkpoint of every 10 steps. A stall is the longest time between two updates, of those around the kill, less the
median step of that run, so that it holds what the others compute in the dead one's place; beside it stands the time
from the kill to the next update, less a median step. A kill comes once the team is whole again, and some steps later.
Over two hosts, for which it must run as root (see benchmarks/machines.py), it is told besides how long all stand
still when the successor joins, and after a cable was out for 5 s, which is less than `team.lease_s` there.

Nobody is waited for in vain: who makes no update for 90 s, or takes longer than ``--within`` in all, has failed, which
is told beside the stalls that were seen until then.

To have torchft beside the pinned torch: ``python -m venv ft; ft/bin/pip install --no-deps torchft-nightly``, and a file
ft/lib/python*/site-packages/base.pth with the path of this project's site-packages. Each contender that has run takes
its place in benchmarks/results/stall.json; the others stay as they are. To see that all runs: ``--kills 3 --others 3
--cuts 1 --out /tmp/stall.json``.
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
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(ROOT), str(ROOT / "tests")]  # run as a file, Python would look for modules in benchmarks/ itself

from benchmarks.lockstep import commit, machine  # noqa: E402
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

LONG_S = 90.0
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


class Vain(Exception):
    """A contender does not go on, as this sentence tells."""


class Patience:
    """How long a contender is waited for. within_s: in all."""

    def __init__(self, contender: Contender, within_s: float):
        self._contender, self._within_s, self._began_s = contender, within_s, time.monotonic()

    def until(self, true: Callable[[], Any], what: str) -> Any:
        """Waits for it, and gives it. Raises Vain, with `what` it did not do."""
        contender, since_s = self._contender, time.monotonic()
        while not (found := true()):
            now_s = time.monotonic()
            if contender.processes[-1].poll() not in (None, -signal.SIGKILL):
                raise self._vain(f"{what}, for its process ended")
            if now_s > since_s + LONG_S:
                raise self._vain(f"{what}, for {LONG_S:.0f} s")
            if now_s > self._began_s + self._within_s:
                raise self._vain(f"{what} before its {self._within_s:.0f} s were over")
            time.sleep(0.002)
            contender.look()
        return found

    def _vain(self, why: str) -> Vain:
        """What it printed is for whoever looks on, not for the result."""
        for path in self._contender.folder.rglob("*.out"):
            print(f"{path}: {path.read_text()[-1000:]}", file=sys.stderr)
        return Vain(why)


def measured(
    kind: type[Any], workers: int, kills: int, interpreter: str, draw: random.Random, cuts: int, within_s: float
) -> dict[str, Any]:
    """The stalls of so many kills, and of cuts, in seconds, and why it are fewer."""
    killed, cut, failed = list[float](), list[float](), ""
    with going(kind, workers, interpreter) as contender:
        until = Patience(contender, within_s).until

        def suffer(fault: Callable[[], Callable[[], float | None]], what: str) -> float:
            time.sleep(draw.uniform(0, 2 * usual))
            contender.look()
            at: float = until(fault(), f"it did not go on with all its workers after {what}")
            there = len(contender.updates)
            until(lambda: len(contender.updates) > there + SETTLED, f"it made no more updates after {what}")
            return at

        try:
            begun = "it did not begin"
            until(lambda: len(contender.updates) > 2 * SETTLED and len(contender.pids) == workers, begun)
            usual = statistics.median(gaps_of(contender.updates[SETTLED:]))
            for number in range(kills):
                killed.append(suffer(lambda: contender.kill(draw.randrange(workers)), f"kill {number + 1}"))
            for number in range(cuts):
                cut.append(suffer(contender.cut, f"cut {number + 1}"))
        except Vain as vain:
            failed = str(vain)
        updates, joined = contender.updates, getattr(contender, "joined", [])
    found: dict[str, Any] = {"failed": failed} if failed else {}
    if not killed:
        return found
    usual = statistics.median(gaps_of(updates))
    found |= {"kills": len(killed), "step_s": round(usual, 4), **told([stall(updates, at, usual) for at in killed])}
    found["from_the_kill"] = told([until_next(updates, at, usual) for at in killed])
    if joined:
        found["when_a_successor_joins"] = told([stall(updates, at, usual) for at in joined])
    if cut:
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
    parser.add_argument("--within", type=float, default=900.0, help="seconds of a contender in all")
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what it has started ends too
    failed = False
    for workers, name in itertools.product(given.workers, given.only):
        if name == "torchft" and not given.torchft:
            continue
        ours = issubclass(CONTENDERS[name], ByInstep)
        interpreter = given.torchft if name == "torchft" else sys.executable
        kills, cuts = given.kills if ours else given.others, given.cuts if name == "Instep over 2 hosts" else 0
        load, began, draw = os.getloadavg(), time.monotonic(), random.Random(f"{SEED} {name} {workers}")
        one = measured(CONTENDERS[name], workers, kills, interpreter, draw, cuts, given.within)
        failed |= ours and "failed" in one
        print(name, workers, json.dumps(one), flush=True)
        keep(
            given.out, f"{name}, {workers} workers", {**one, **about(load), "seconds": round(time.monotonic() - began)}
        )
    sys.exit(failed)


def about(load: Sequence[float]) -> dict[str, Any]:
    """What was measured, and when."""
    date = time.strftime("%Y-%m-%d", time.gmtime())
    return {"commit": commit(), "date": date, "load": [round(each, 2) for each in load]}


def keep(path: Path, name: str, one: dict[str, Any]) -> None:
    """Puts it into the file of results, in the place of what was there of it."""
    found = json.loads(path.read_text())["found"] if path.exists() else {}
    found[name] = one
    path.write_text(json.dumps({"machine": machine(), "seed": SEED, "found": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
