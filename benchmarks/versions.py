"""Step time of Instep in lockstep beside that of another version of it: ``python benchmarks/versions.py COMMIT``.

Both versions train the model of `benchmarks.lockstep` with 1 and with 2 workers, one microbatch a worker. The teams are
started first and take turns at a gate, in blocks of about `--seconds`, in an order drawn anew for each round; the first
step of a block is not counted. Worker i is pinned to core i. For each number of workers the figure is the median
over rounds of (time of a step here / time of a step there), with its 95 % interval from 10,000 bootstrap samples of the
rounds. Beside it stands the same ratio for the processor time of the workers, which other programs disturb less.

Then, `--memory` times for each version by turns, a team runs alone, and the ratio of what its largest worker occupies
at its peak (proportional set size) is shown the same way.

With ``--hosts 2``, as root, both train on two hosts instead, namespaces of this machine as in `benchmarks.machines`, a
worker on each and a microbatch a worker. Processor time is then of all that runs on the hosts; memory is that of the
largest process of each version after the last round, once.

The result goes to benchmarks/results/versions.json, or to `--out`.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # run as a file, Python would look for modules in benchmarks/ itself

from benchmarks import memory  # noqa: E402
from benchmarks.gate import Team  # noqa: E402
from benchmarks.lockstep import INSTEP, WARM_UP, Contender, commit, machine, pin  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "versions.json"
HERE, THERE = "here", "there"


@dataclass(frozen=True)
class Block:
    """One version's turn: wall and processor seconds of a step, the means of its workers."""

    wall_s: float
    cpu_s: float


def measure(sources: dict[str, Path], workers: int, rounds: int, seconds: float) -> dict[str, list[Block]]:
    """[rounds] blocks of each version."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, ExitStack() as stack:
        most = WARM_UP + 1 + int(rounds * (seconds / 0.02 + 2))  # a step takes 20 ms at least
        teams: dict[str, Team] = {}
        for name, source in sources.items():
            contender = Contender(f"{name}, W = {workers}", INSTEP, workers, workers)
            teams[name] = contender.start(Path(folder, name), most, source)
            stack.callback(teams[name].close)
        for team in teams.values():
            team.admit()
            for core, pid in enumerate(team.pids):
                pin(pid, core)
        return _by_turns(teams, lambda team: _cpu_s(team) / workers, rounds, seconds, f"W = {workers},")


def occupied(sources: dict[str, Path], workers: int, times: int) -> dict[str, list[float]]:
    """[times] peaks of the largest worker of each version, MiB, each of a team that runs alone."""
    found: dict[str, list[float]] = {name: [] for name in sources}
    order = random.Random(0)
    for _ in range(times):
        for name in order.sample(list(sources), len(sources)):
            contender = Contender(f"{name}, W = {workers}", INSTEP, workers, workers)
            with tempfile.TemporaryDirectory(prefix="bench-") as folder:
                team = contender.start(Path(folder, name), WARM_UP + 2 * memory.STEPS + 2, sources[name])
                try:
                    team.admit()
                    team.work(WARM_UP)
                    found[name].append(memory.measure(team)["pss"])
                finally:
                    team.close()
    return found


def measure_over_hosts(
    sources: dict[str, Path], count: int, rounds: int, seconds: float
) -> tuple[dict[str, list[Block]], dict[str, list[float]]]:
    """[rounds] blocks of each version, and MiB of its largest process."""
    from benchmarks import machines  # which needs root, and imports from here

    part, contender = machines.Part(count, 1, count), machines.Contender()
    with ExitStack() as stack:
        hosts, place = machines.on_hosts(count, stack)
        most = contender.warm_up + WARM_UP + 2 + int(rounds * (seconds / 0.05 + 2))  # a step takes 50 ms at least
        teams: dict[str, Team] = {}
        for number, (name, source) in enumerate(sources.items()):
            shutil.copytree(source, place / name)
            teams[name] = machines.begin(contender, part, hosts, place, most, number, stack, place / name)
        for team in teams.values():
            team.admit()
            team.work(contender.warm_up)

        found = _by_turns(teams, lambda _: machines.cpu_s(hosts) / count, rounds, seconds, f"{count} hosts,")
        mib: dict[str, list[float]] = {}
        for name in sources:
            own = f":{place / name}".encode()
            processes = [psutil.Process(pid) for host in hosts for pid in host.processes()]
            its = [each for each in processes if own in Path(f"/proc/{each.pid}/environ").read_bytes()]
            mib[name] = [max(each.memory_full_info().pss for each in its) / 2**20]
        return found, mib


def _by_turns(
    teams: dict[str, Team], cpu_s: Callable[[Team], float], rounds: int, seconds: float, what: str
) -> dict[str, list[Block]]:
    """[rounds] blocks of each team, of about so many seconds. cpu_s: that a worker of it has had until now."""

    def block(team: Team, steps: int) -> Block:
        before = cpu_s(team)
        stamps = team.work(steps + 1)
        wall_s = statistics.mean((worker[-1] - worker[1]) / steps for worker in stamps)
        return Block(wall_s, (cpu_s(team) - before) / (steps + 1))

    step_s = max(block(team, WARM_UP).wall_s for team in teams.values())
    steps = max(2, round(seconds / step_s))
    order = random.Random(0)
    found: dict[str, list[Block]] = {name: [] for name in teams}
    for number in range(rounds):
        for name in order.sample(list(teams), len(teams)):
            found[name].append(block(teams[name], steps))
        here, there = (1000 * found[name][-1].wall_s for name in (HERE, THERE))
        print(f"{what} round {number + 1} of {rounds}: {here:.1f} and {there:.1f} ms", file=sys.stderr)
    return found


def _cpu_s(team: Team) -> float:
    times = [psutil.Process(pid).cpu_times() for pid in team.pids]
    return float(sum(each.user + each.system for each in times))


def ratio(here: list[float], there: list[float]) -> dict[str, Any]:
    """The median ratio by round, and its 95 % interval."""
    ratios = [mine / other for mine, other in zip(here, there, strict=True)]
    chance = random.Random(0)
    medians = sorted(statistics.median(chance.choices(ratios, k=len(ratios))) for _ in range(10_000))
    return {"median": statistics.median(ratios), "low": medians[250], "high": medians[9749]}


def figures(blocks: dict[str, list[Block]], mib: dict[str, list[float]]) -> dict[str, Any]:
    """Ratios of seconds and memory, and the medians of which they are."""
    found: dict[str, Any] = {}
    for kind in ("wall_s", "cpu_s"):
        here, there = ([getattr(block, kind) for block in blocks[name]] for name in (HERE, THERE))
        found[kind] = ratio(here, there)
        found[kind]["ms"] = {name: 1000 * statistics.median(each) for name, each in ((HERE, here), (THERE, there))}
    if mib:
        found["memory"] = {
            **ratio(mib[HERE], mib[THERE]),
            "mib": {name: statistics.median(each) for name, each in mib.items()},
        }
    return found


def main() -> None:
    """Measures, prints, saves."""
    parser = argparse.ArgumentParser(description="Step time of Instep beside another version of it.")
    parser.add_argument("commit", help="the other version")
    parser.add_argument("--rounds", type=int, default=40, help="blocks of each version")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long a block lasts, about")
    parser.add_argument("--memory", type=int, default=5, help="teams of each version whose memory is looked at")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="numbers of workers")
    parser.add_argument("--hosts", type=int, default=0, help="train on so many hosts instead, as root")
    parser.add_argument("--out", type=Path, default=RESULT, help="where the result goes")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        archive = subprocess.run(["git", "archive", arguments.commit, "src"], cwd=ROOT, check=True, capture_output=True)
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        sources = {HERE: ROOT / "src", THERE: Path(folder, "src")}
        found: dict[str, Any] = {}
        for workers in () if arguments.hosts else arguments.workers:
            blocks = measure(sources, workers, arguments.rounds, arguments.seconds)
            mib = occupied(sources, workers, arguments.memory) if arguments.memory else {}
            found[f"{workers} workers"] = figures(blocks, mib)
        if arguments.hosts:
            blocks, mib = measure_over_hosts(sources, arguments.hosts, arguments.rounds, arguments.seconds)
            found[f"{arguments.hosts} hosts"] = figures(blocks, mib)
    print(json.dumps(found, indent=1))
    arguments.out.write_text(
        json.dumps(
            {
                "machine": machine(),
                "here": commit(),
                "there": arguments.commit,
                "rounds": arguments.rounds,
                "seconds_a_block": arguments.seconds,
                "ratios": found,
            },
            indent=1,
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
