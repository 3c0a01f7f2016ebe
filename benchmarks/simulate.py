"""Time and memory of the virtual clock: ``python benchmarks/simulate.py [--workers N] [--contributions N] [--rule R]``.

Every update rule runs in a process of its own, without gradients, until each worker has made so many contributions
(100 by default): once where messages take no time, and once over a network, with pulls and pushes that share the
server's links. Times of workers are lognormal, with a deviation of 0.3 of the mean and a persistence of 0.5; 5 % of
them are 4 times slower. Shown are the seconds from the call of `simulate` to its return, those of them that the
process had a processor, and its largest resident set. The result goes to benchmarks/results/simulate.json. Targets, for
the runs without a network: 15 s and 2 GB.

With ``--tape ROUNDS`` it measures the command ``instep simulate gpt --rule RULE --no-gradients`` instead, so many times
with ``--out`` and without, one after the other: processor seconds of its processes, and the bytes of the run folder
beside those of its tape in JSON lines. That goes to benchmarks/results/tape.json. Targets: twice the time, a third of
the bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # run as a file, Python would look for modules in benchmarks/ itself

from benchmarks.lockstep import machine  # noqa: E402
from instep.clock.network import Network  # noqa: E402
from instep.clock.slow import parse_slow  # noqa: E402
from instep.clock.times import WorkerTimes  # noqa: E402
from instep.offline.schedule import simulate  # noqa: E402
from instep.rules import PRESETS, parse  # noqa: E402
from instep.rules.work import Pieces  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "simulate.json"
TARGET_S, TARGET_BYTES = 15.0, 2e9
CONTRIBUTION_BYTES = 1_000_000
TAPE_RESULT = RESULT.with_name("tape.json")
TARGET_TIME, TARGET_SHARE = 2.0, 1 / 3


def measure(name: str, workers: int, contributions: int, network: bool) -> dict[str, Any]:
    """One run, in this process."""
    rule = parse(f"{name},local_after={contributions // 2}" if name == "post_local_sgd" else name)
    after = rule.local_after
    pieces = Pieces(rule, workers, workers, after + (contributions - after) * rule.local_steps)
    times = WorkerTimes.lognormal(1.0, 0.3, persistence=0.5, slow=parse_slow("5%:4x"))
    began, began_cpu = time.perf_counter(), time.process_time()
    schedule = simulate(
        rule,
        pieces,
        times,
        Network(bandwidth_bytes_per_s=CONTRIBUTION_BYTES * workers, latency_s=1e-3) if network else None,
        contribution_bytes=CONTRIBUTION_BYTES,
        weights_bytes=CONTRIBUTION_BYTES,
    )
    seconds, cpu_s = time.perf_counter() - began, time.process_time() - began_cpu
    assert schedule.contributions - schedule.dropped == workers * contributions
    return {
        "seconds": round(seconds, 2),
        "cpu_s": round(cpu_s, 2),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "contributions": schedule.contributions,
        "dropped": schedule.dropped,
        "versions": schedule.versions,
        "virtual_s": round(schedule.wall_s, 3),
        "staleness_mean": round(schedule.staleness_mean, 3),
        "idle_share_mean": round(float(schedule.idle_share.mean()), 4),
    }


def main() -> None:
    """Measures all rules, each in a process of its own, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=10_000)
    parser.add_argument("--contributions", type=int, default=100, help="of each worker")
    parser.add_argument("--rule", choices=sorted(PRESETS), help="one rule instead of all; nothing is saved")
    parser.add_argument("--only", choices=("local", "network"), help=argparse.SUPPRESS)  # in this process
    parser.add_argument("--tape", type=int, metavar="ROUNDS", help="what a tape costs")
    options = parser.parse_args()
    if options.tape:
        tape(options.rule or "asynchronous", options)
        return
    if options.only:
        print(json.dumps(measure(options.rule, options.workers, options.contributions, options.only == "network")))
        return
    rules: dict[str, Any] = {}
    print(f"{options.workers} workers x {options.contributions} contributions; on the right over a network")
    print(f"{'rule':<20}" + f"{'seconds':>9}{'cpu s':>8}{'MB':>6}    " * 2)
    for name in [options.rule] if options.rule else PRESETS:
        rules[name] = {mode: _apart(name, mode, options) for mode in ("local", "network")}
        cells = [
            f"{r['seconds']:>9.2f}{r['cpu_s']:>8.2f}{r['peak_bytes'] / 1e6:>6.0f}    " for r in rules[name].values()
        ]
        print(f"{name:<20}" + "".join(cells), flush=True)
    runs = [modes["local"] for modes in rules.values()]
    slowest, largest = max(run["seconds"] for run in runs), max(run["peak_bytes"] for run in runs)
    met = slowest <= TARGET_S and largest <= TARGET_BYTES
    print(f"without a network: slowest {slowest:.2f} s, largest {largest / 1e6:.0f} MB:", "met" if met else "not met")
    if options.rule:
        return
    work = {"workers": options.workers, "contributions": options.contributions}
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps({"machine": machine(), "work": work, "met": met, "rules": rules}, indent=1) + "\n")


def tape(rule: str, options: argparse.Namespace) -> None:
    """Measures the command with a run folder and without."""
    command = [sys.executable, "-m", "instep", "simulate", "gpt", "--rule", rule, "--no-gradients"]
    command += ["--workers", str(options.workers), "--contributions", str(options.contributions)]
    without, with_out = [], []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.tape):
            run = Path(folder, str(number))
            without.append(_cpu_s(command))
            with_out.append(_cpu_s([*command, "--out", str(run)]))
        size = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
        with subprocess.Popen([sys.executable, "-m", "instep", "tape", str(run)], stdout=subprocess.PIPE) as printing:
            assert printing.stdout is not None
            lines = sum(map(len, printing.stdout))
    found = {
        "rule": rule,
        "rounds": options.tape,
        "without_cpu_s": statistics.median(without),
        "with_cpu_s": statistics.median(with_out),
        "ratio": round(statistics.median(with_out) / statistics.median(without), 3),
        "ratios": [round(b / a, 3) for a, b in zip(without, with_out, strict=True)],
        "folder_bytes": size,
        "json_lines_bytes": lines,
        "share": round(size / lines, 3),
    }
    met = found["ratio"] <= TARGET_TIME and found["share"] <= TARGET_SHARE
    print(json.dumps(found, indent=1), "met" if met else "not met", sep="\n")
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], check=True, cwd=ROOT, capture_output=True, text=True
    )
    work = {"workers": options.workers, "contributions": options.contributions, "commit": commit.stdout.strip()}
    before = json.loads(TAPE_RESULT.read_text())["runs"] if TAPE_RESULT.exists() else []
    runs = [run for run in before if run["work"] | {"commit": ""} != work | {"commit": ""}] + [
        {"work": work, "met": met, **found}
    ]
    TAPE_RESULT.write_text(json.dumps({"machine": machine(), "runs": runs}, indent=1) + "\n")


def _cpu_s(command: list[str]) -> float:
    """Of the command and of all that it waited for."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 3)


def _apart(name: str, mode: str, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--rule", name, "--only", mode]
    command += ["--workers", str(options.workers), "--contributions", str(options.contributions)]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


if __name__ == "__main__":
    main()
