"""Is the virtual clock true? The same recipe for real and simulated: ``python benchmarks/clock.py``.

A tiny GPT whose objective sleeps `SLEEP_S` a microbatch trains for real, with teams of 2 to 8 workers, some slowed
down, and again on the virtual clock, which knows what a microbatch takes a worker that is alone, sleeping and
computing, and who is slow. Compared are the time from the first work given out to the last update, the bytes, and the
mean staleness. Workers that sleep need no core of their own, so a small machine will do. The result goes to
benchmarks/results/clock.json.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

import instep  # noqa: E402
from benchmarks.lockstep import machine  # noqa: E402
from instep.clock.slow import parse_slow  # noqa: E402
from instep.clock.times import WorkerTimes  # noqa: E402
from instep.record import tape  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "clock.json"
SLEEP_S = 0.2
MODEL = {"vocabulary": 256, "context": 16, "width": 16, "depth": 1, "heads": 2}

SCENARIOS = [
    ("synchronous", 2, ""),
    ("synchronous", 4, "1:3x"),
    ("backup_workers:1", 4, "1:3x"),
    ("bounded_staleness:2", 4, "1:3x"),
    ("bounded_staleness:4", 8, "25%:2x"),
    ("softsync:2", 4, "1:2x"),
    ("asynchronous", 2, "1:4x"),
    ("asynchronous", 4, "1:3x"),
    ("asynchronous", 8, ""),
    ("delay_compensated", 4, "1:2x"),
    ("local_sgd:4", 4, ""),
    ("post_local_sgd:4,after=4", 2, "1:2x"),
    ("diloco:4", 4, "1:3x"),
    ("async_diloco:4,buffer=8", 4, "1:3x"),
]


def recipe(rule: str, sleep_s: float) -> instep.Recipe:
    """16 global batches of 8 microbatches of 2 samples of 16 bytes."""
    return instep.Recipe(
        name="clock",
        model={"use": "instep.models:GPT", "args": MODEL},
        objective={"use": "benchmarks.parts:SleepyNextToken", "args": {"sleep_s": sleep_s}},
        data="benchmarks.parts:short_text",
        optimizer="instep.optimizers:adamw",
        batch=16,
        microbatches=8,
        steps=16,
        rule=instep.rules.parse(rule),
    )


def for_real(rule: str, workers: int, slow: str, folder: Path) -> dict[str, Any]:
    """One run with real workers: its figures."""
    team = instep.Team(workers=workers, slow=slow, balance="off", checkpoint_every=10_000)
    run = instep.train(recipe(rule, SLEEP_S), team=team, out=folder / "run")
    first_s, last_s, taken_s = None, 0.0, []
    for event in tape.read(run.path / "tape.jsonl"):
        if event["kind"] == "computed":
            first_s = event["from_s"] if first_s is None else min(first_s, event["from_s"])
            start, stop = event["microbatches"]
            taken_s.append((event["to_s"] - event["from_s"]) / (stop - start))
        elif event["kind"] == "merged":
            last_s = event["t_s"]
    assert first_s is not None
    figures = {key: run.result[key] for key in ("bytes_sent", "staleness_mean")}
    return {"wall_s": last_s - first_s, "microbatch_s": statistics.median(taken_s), **figures}


def simulated(rule: str, workers: int, slow: str, microbatch_s: float) -> dict[str, Any]:
    """The same on the virtual clock."""
    times = WorkerTimes.constant(microbatch_s, slow=parse_slow(slow) if slow else ())
    parsed = recipe(rule, 0.0)
    cluster = instep.Cluster(workers=workers, times=times, merge_s=0.0, collective=parsed.rule.synchronous)
    found = instep.simulate(parsed, cluster, gradients=False)
    return {key: found[key] for key in ("wall_s", "bytes_sent", "staleness_mean")}


def main() -> None:
    """Measures, prints, saves."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        alone_s = for_real("synchronous", 1, "", Path(folder))["microbatch_s"]
    print(f"a microbatch takes a worker alone {1000 * alone_s:.1f} ms, {1000 * SLEEP_S:.0f} ms of it asleep\n")
    print(
        f"{'rule':<26}{'workers':>8}{'slow':>8}{'real s':>9}{'virtual s':>10}{'error':>8}{'bytes':>7}{'staleness':>16}"
    )
    for rule, workers, slow in SCENARIOS:
        with tempfile.TemporaryDirectory() as folder:
            real = for_real(rule, workers, slow, Path(folder))
        virtual = simulated(rule, workers, slow, alone_s)
        error = virtual["wall_s"] / real["wall_s"] - 1
        same = "same" if real["bytes_sent"] == virtual["bytes_sent"] else "DIFFER"
        rows.append(
            {
                "rule": rule,
                "workers": workers,
                "slow": slow,
                "real": real,
                "virtual": virtual,
                "error": error,
                "bytes": same,
            }
        )
        stale = f"{real['staleness_mean']:.2f} / {virtual['staleness_mean']:.2f}"
        print(
            f"{rule:<26}{workers:>8}{slow:>8}{real['wall_s']:>9.2f}{virtual['wall_s']:>10.2f}{100 * error:>7.1f}%"
            f"{same:>7}{stale:>16}",
            flush=True,
        )
    mean = statistics.mean(abs(row["error"]) for row in rows)
    print(f"\nmean absolute error of the time: {100 * mean:.1f} % over {len(rows)} scenarios")
    found = {"machine": machine(), "method": (__doc__ or "").strip(), "rows": rows, "mean_absolute_error": mean}
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
