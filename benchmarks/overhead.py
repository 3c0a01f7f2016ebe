"""What a library adds to each step of a tiny model: ``python benchmarks/overhead.py``.

An MLP of 26,122 weights, batches of 32 rows of a TensorDataset, AdamW (fused), one process, one thread: a step takes
half a millisecond, so that what is done around it shows. Contenders: a plain loop over torch's DataLoader, Hugging
Face's Accelerate and Lightning's Fabric around the same loop, and Instep with one worker, tape and supervision and all.
They are started first and take turns at a gate, in blocks of `--steps` steps, in an order drawn anew for each round, on
core 0; the first step of a block is not counted. Shown: medians over rounds of a step's time, and of what each takes
beyond the plain loop in the same round. The result goes to benchmarks/results/overhead.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # run as a file, Python would look for modules in benchmarks/ itself

from benchmarks.gate import Team  # noqa: E402
from benchmarks.lockstep import THREADS, WARM_UP, machine, pin  # noqa: E402
from benchmarks.work import Options  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "overhead.json"
KINDS = ("plain", "accelerate", "fabric", "instep")


def start(kind: str, folder: Path, steps: int) -> Team:
    """Starts one contender, which will make so many steps."""
    folder.mkdir()
    options = Options(address=str(folder / "gate"), folder=str(folder), steps=steps, workers=1, microbatches=1)
    command = [sys.executable, "-m", "benchmarks.small", kind, json.dumps(asdict(options))]
    environment = {**os.environ, **THREADS, "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}"}
    return Team([command], 1, folder / "gate", environment)


def measure(kinds: list[str], rounds: int, steps: int) -> dict[str, list[float]]:
    """Milliseconds of a step, [rounds] for each of `kinds`."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, ExitStack() as stack:
        teams: dict[str, Team] = {}
        for kind in kinds:
            teams[kind] = start(kind, Path(folder, kind), WARM_UP + 1 + rounds * (steps + 1))
            stack.callback(teams[kind].close)
        for team in teams.values():
            team.admit()
            for pid in team.pids:
                pin(pid, 0)
            team.work(WARM_UP)
        found: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(rounds):
            for kind in random.sample(kinds, len(kinds)):
                (times,) = teams[kind].work(steps + 1)
                found[kind].append(1000 * (times[-1] - times[1]) / steps)
        return found


def main() -> None:
    """Measures, prints and writes the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--steps", type=int, default=200, help="in a block")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS))
    given = parser.parse_args()
    found = measure(given.kinds, given.rounds, given.steps)
    table = {
        kind: {
            "ms": round(statistics.median(found[kind]), 4),
            "beyond_plain_ms": round(
                statistics.median(a - b for a, b in zip(found[kind], found["plain"], strict=True)), 4
            ),
        }
        for kind in given.kinds
    }
    for kind, figures in table.items():
        print(f"{kind:<12}{figures['ms']:8.3f} ms a step{figures['beyond_plain_ms']:+9.3f}")
    if set(given.kinds) == set(KINDS):
        libraries = {name: version(name) for name in ("accelerate", "lightning-fabric")}
        how = {"machine": machine(), "libraries": libraries, "rounds": given.rounds, "steps": given.steps}
        RESULT.write_text(json.dumps({**how, "found": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
