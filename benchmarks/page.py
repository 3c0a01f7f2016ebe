"""Time, memory and size of the report: ``python benchmarks/page.py [--events N] [--rounds N]``.

Tapes of eight runs are written, as a server with 16 workers writes them: asynchronous ones of GPT, four events an
update. Then ``instep report`` makes the page, in a process of its own: of tapes with 10,000 events each, whose page is
weighed, and of tapes with N events together (a million by default), in so many rounds. Shown are seconds of the whole
command, those of them that it had a processor, its largest resident set, and the bytes of the page. The result goes to
benchmarks/results/page.json. Targets: 6 MB; 20 s and 1 GB.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # run as a file, Python would look for modules in benchmarks/ itself

from benchmarks.lockstep import machine  # noqa: E402
from instep.recipe import Recipe, Team, dumps  # noqa: E402
from instep.recipe import parse as parsed  # noqa: E402
from instep.recipe_files import read  # noqa: E402
from instep.record import events as ev  # noqa: E402
from instep.record.folder import About, RunFolder  # noqa: E402
from instep.rules import parse  # noqa: E402
from instep.tables import to_table  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "page.json"
RUNS, WORKERS, TENSORS = 8, 16, 28
PAGE_BYTES, TARGET_S, TARGET_BYTES = 6e6, 20.0, 1e9
RULES = ("asynchronous", "bounded_staleness:4")


def write_run(folder: Path, recipe: Recipe, team: Team, count: int) -> None:
    """A run's folder with a tape of `count` events or a few more."""
    run = RunFolder.create(folder, dumps(recipe, team), About())
    with run.tape_path.open("w", encoding="utf-8") as tape:
        for place, event in enumerate(tape_of(recipe, team, count // 4 - 10)):
            tape.write(json.dumps(ev.plain(event)) + "\n")
            assert place < count + 1000


def tape_of(recipe: Recipe, team: Team, updates: int) -> Iterator[ev.Event]:
    """What such a run would tell; an evaluation every hundredth of it."""
    draw = random.Random(recipe.seed)
    yield ev.RunStartedEvent(
        t_s=1.0, schema=ev.SCHEMA, folder="", run="0" * 32, recipe=recipe.to_table(), team=to_table(team),
        fingerprint="f" * 64, data_digest="d" * 64, samples=1000, engine="server", cut=WORKERS, parameters=1_000_000,
        version=0, digest="0" * 64, step=0, steps=updates, resumed=False, libraries={"torch": "2.13.0"},
        import_paths=[],
    )  # fmt: skip
    for worker in range(WORKERS):
        yield ev.JoinedEvent(t_s=2.0, worker=worker, pid=worker, host="here")
    based, since = [0] * WORKERS, [2.0] * WORKERS
    sums, terms = [f"{draw.getrandbits(32):08x}" for _ in range(TENSORS)], {"cross_entropy": 1.0}
    for version in range(1, updates + 1):
        worker, t_s = draw.randrange(WORKERS), 2.0 + version * 0.05
        whose: dict[str, Any] = {"worker": worker, "version": based[worker]}
        covers: dict[str, Any] = {"batch": version // 8, "local_steps": 1, "microbatches": [0, 1]}
        yield ev.ComputedEvent(t_s=t_s, **whose, from_s=since[worker], to_s=t_s - 0.01, **covers)
        yield ev.PushedToServerEvent(
            t_s=t_s, seq=version, piece=version, items=1024, bytes=4_000_000, checksum=sums, **whose, **covers
        )
        part = ev.MergedContribution(seq=version, piece=version, **whose)
        yield ev.MergedByServerEvent(
            t_s=t_s, version=version, step=version // 8, contributions=[part], weights=[1.0],
            staleness=[version - 1 - based[worker]], train_s=t_s, lr=0.1,
            objective=5 * math.exp(-3 * version / updates), terms=terms, items=1024, grad_norm=1.0, checksum=sums,
        )  # fmt: skip
        if version % (updates // 100 or 1) == 0:
            held_out = 5.1 * math.exp(-3 * version / updates)
            yield ev.EvaluatedEvent(t_s=t_s, version=version, objective=held_out, terms=terms, items=9, took_s=0.01)
        yield ev.ReleasedEvent(t_s=t_s, worker=worker, version=version, piece=version + 1, lead=0)
        based[worker], since[worker] = version, t_s + 0.002
    result = {"digest": "a" * 64, "bytes_sent": 0, "interrupted": False, "steps": updates}
    yield ev.RunEndedEvent(t_s=t_s + 1, version=updates, digest="a" * 64, result=result, interrupted=False)


def measure(folder: Path, events_each: int, rounds: int) -> dict[str, Any]:
    """The command on eight runs with so many events each."""
    runs = []
    for number in range(RUNS):
        recipe, _ = parsed(read("gpt"))
        runs.append(folder / f"{events_each}-{number}")
        rule = parse(RULES[number % len(RULES)])
        recipe = replace(recipe, rule=rule, seed=number // len(RULES))
        write_run(runs[-1], recipe, Team(workers=WORKERS), events_each)
    tape_bytes = sum((run / "tape.jsonl").stat().st_size for run in runs)
    page = folder / "report.html"
    seconds, cpu, peaks = [], [], []
    for _ in range(rounds):
        command = [sys.executable, "-m", "instep", "report", *map(str, runs), "--out", str(page)]
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = status
        assert status == 0
        seconds.append(round(time.perf_counter() - began, 2))
        cpu.append(round(used.ru_utime + used.ru_stime, 2))
        peaks.append(used.ru_maxrss * 1024)
    return {
        "events": events_each * RUNS, "tape_bytes": tape_bytes, "seconds": seconds, "cpu_s": cpu,
        "median_s": statistics.median(seconds), "peak_bytes": max(peaks), "page_bytes": page.stat().st_size,
    }  # fmt: skip


def main() -> None:
    """Measures both, and prints them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=1_000_000, help="of all runs together")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        small = measure(Path(folder), 10_000, 1)
        large = measure(Path(folder), options.events // RUNS, options.rounds)
    for each in (small, large):
        print(
            f"{each['events']:>9,} events, {each['tape_bytes'] / 1e6:.0f} MB of tapes: {each['median_s']:.1f} s, "
            f"{statistics.median(each['cpu_s']):.1f} s of a processor, "
            f"{each['peak_bytes'] / 1e6:.0f} MB at most, a page of {each['page_bytes'] / 1e6:.2f} MB"
        )
    met = small["page_bytes"] <= PAGE_BYTES and max(large["seconds"]) <= TARGET_S
    met = met and large["peak_bytes"] <= TARGET_BYTES
    print("targets met" if met else "targets not met")
    if options.events == parser.get_default("events"):
        told = {"machine": machine(), "met": met, "size": small, "speed": large}
        RESULT.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
