"""What a slow worker costs: ``python benchmarks/dial.py [--rounds N]``.

2 workers train a GPT of 4.8 M weights, one microbatch a contribution, and worker 1 is slowed 4 times, by sleeping.
Compared are contributions a second under the asynchronous rule, under the synchronous one and with DDP over gloo
(slowed likewise), and those of each worker alone under the asynchronous rule, with a server too, as they are and
slowed. Each contender works by itself, in rounds, in an order drawn anew; shown are medians over rounds, and the
median of the ratios within a round. A worker's speed is that between its third contribution and its last. The result
goes to benchmarks/results/dial.json. Target: asynchronous at least 0.95 of the sum of both workers' own speeds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # run as a file, Python would look for modules in benchmarks/ itself

import instep  # noqa: E402
from benchmarks.gate import Team  # noqa: E402
from benchmarks.lockstep import DDP_OPTIONS, THREADS, machine  # noqa: E402
from benchmarks.work import MODEL, SAMPLES, SEED, Options  # noqa: E402
from instep.record import tape  # noqa: E402
from instep.rules import parse  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "dial.json"
SLOW = 4
SECONDS = 8.0
"""That a contender trains in a round, about."""
TARGET = 0.95


def instep_rate(rule: str, workers: int, slow: str, contributions: int) -> float:
    """Contributions a second, of all workers together."""
    recipe = instep.Recipe(
        model={"use": "instep.models:GPT", "args": MODEL},
        objective="instep.objectives.language:NextToken",
        data="benchmarks.parts:text",
        optimizer="instep.optimizers:adamw",
        rule=parse(rule),
        batch=SAMPLES * workers,
        microbatches=workers,
        steps=contributions // workers,
        seed=SEED,
        evaluate_samples=1,
    )
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        team = instep.Team(workers=workers, slow=slow, balance="off", checkpoint_every=1_000_000)
        run = instep.train(recipe, team=team, out=Path(folder, "run"), import_paths=[str(ROOT)])
        pushed = [event for event in tape.read(run.path / "tape.jsonl") if event["kind"] == "pushed"]
    total = 0.0
    for worker in range(workers):
        times = [event["t_s"] for event in pushed if event["worker"] == worker][2:]
        total += (len(times) - 1) / (times[-1] - times[0])
    return total


def ddp_rate(steps: int) -> float:
    """Contributions a second of DDP with 2 workers, the second one slowed."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        options = Options(
            address=f"{folder}/gate", folder=folder, steps=steps + 6, workers=2, microbatches=2, ddp=DDP_OPTIONS,
            slow=SLOW,
        )  # fmt: skip
        command = [sys.executable, "-m", "benchmarks.by_torch", json.dumps(asdict(options))]
        environment = {**os.environ, **THREADS, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
        team = Team([command], 2, Path(folder, "gate"), environment)
        try:
            team.admit()
            team.work(5)
            stamps = team.work(steps)
            team.finish()
        finally:
            team.close()
    return 2 * steps / statistics.mean(worker[-1] - worker[0] for worker in stamps)


CONTENDERS = {
    "asynchronous": lambda: instep_rate("asynchronous", 2, f"1:{SLOW}x", int(SECONDS * 11)),
    "synchronous": lambda: instep_rate("synchronous", 2, f"1:{SLOW}x", int(SECONDS * 5)),
    "DDP over gloo": lambda: ddp_rate(int(SECONDS * 2.5)),
    "worker 0 alone": lambda: instep_rate("asynchronous", 1, "", int(SECONDS * 9)),
    "worker 1 alone": lambda: instep_rate("asynchronous", 1, f"0:{SLOW}x", int(SECONDS * 2.5)),
}


def main() -> None:
    """Measures, prints, saves."""
    parser = argparse.ArgumentParser(description="What a slow worker costs.")
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    rates: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(CONTENDERS), len(CONTENDERS)):
            rates[name].append(CONTENDERS[name]())
    own = [a + b for a, b in zip(rates["worker 0 alone"], rates["worker 1 alone"], strict=True)]
    found: dict[str, Any] = {"machine": machine(), "slow": SLOW, "rounds": rounds, "contenders": {}}
    print(f"{'contributions/s':<20}{'median':>8}{'of own speeds':>15}")
    for name, values in rates.items():
        share = statistics.median(value / both for value, both in zip(values, own, strict=True))
        found["contenders"][name] = {"median": statistics.median(values), "share": share, "rounds": values}
        print(f"{name:<20}{statistics.median(values):>8.2f}{share:>15.3f}")
    met = found["contenders"]["asynchronous"]["share"] >= TARGET
    print(f"target {TARGET}: {'met' if met else 'MISSED'}")
    RESULT.write_text(json.dumps({**found, "target": TARGET, "met": met}, indent=1) + "\n")


if __name__ == "__main__":
    main()
