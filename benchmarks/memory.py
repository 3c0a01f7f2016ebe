"""What the processes of a team occupy, as Linux counts it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from benchmarks.gate import Team

STEPS = 10
"""Steps over which the peak is looked for, after as many that are not looked at."""

LOOK_S = 0.005
"""Seconds between two looks."""


def sizes(pid: int) -> dict[str, float]:
    """MiB of one process, by kind, from ``/proc/PID/smaps_rollup``.

    Proportional set size, ``pss``: each page divided by the number of processes that map it; and of it, ``anonymous``
    (heap), ``files`` (libraries) and ``shared_memory``. ``private``: pages that no other process maps.
    """
    mib: dict[str, float] = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, kib, *_ = line.replace(":", " ").split()
        mib[name] = int(kib) / 1024
    return {
        "pss": mib["Pss"],
        "private": mib["Private_Clean"] + mib["Private_Dirty"],
        "anonymous": mib["Pss_Anon"],
        "files": mib["Pss_File"],
        "shared_memory": mib["Pss_Shmem"],
    }


def measure(team: Team) -> dict[str, float]:
    """`sizes` of the worker, at the moment, with the largest Pss, while the team trains.

    ``others`` is the Pss of the team's other processes, ``looks`` how many samples there were, ``strangers`` how many
    processes outside the team mapped torch's library, whose pages they then shared.
    """
    team.work(STEPS)
    looks: list[dict[str, float]] = []

    def look() -> None:
        looks.extend(sizes(pid) for pid in team.pids)
        time.sleep(LOOK_S)

    team.work(STEPS, meanwhile=look)
    processes = [process.pid for process in team.processes()]
    return {
        **max(looks, key=lambda found: found["pss"]),
        "others": sum(sizes(pid)["pss"] for pid in processes if pid not in team.pids),
        "looks": len(looks),
        "strangers": _mapping_torch(processes),
    }


def _mapping_torch(known: Sequence[int]) -> int:
    found = 0
    for pid in psutil.pids():
        with contextlib.suppress(OSError):
            found += pid not in known and "libtorch_cpu" in Path(f"/proc/{pid}/maps").read_text()
    return found
