"""What a checkpoint by the clock costs: ``python benchmarks/background_checkpoints.py``.

The recipe `gpt` and one of 4.8 M weights, with 1 and 2 workers: with checkpoints every few seconds that are written in
the background, and with some that are written in the step's way. Runs take turns, in an order drawn anew each round.

Counted, by the tape's word on each checkpoint of the background: the seconds that steps waited for the copy, `step_s`,
and those of a processor that it took to write, `cpu_s`; their sum is the share of step time at one checkpoint a minute
(target: at most 1 %). Seen, beside that: by how much the steps from the copy to the end of the writing, or the step
after a checkpoint in the step's way, were longer than the median step of the same run. Figures are medians over all
checkpoints. The result goes to benchmarks/results/background_checkpoints.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # run as a file, Python would look for modules in benchmarks/ itself

import instep  # noqa: E402
from benchmarks.lockstep import commit, machine  # noqa: E402
from instep.recipe import Recipe, parse  # noqa: E402
from instep.recipe_files import read  # noqa: E402
from instep.record import tape  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "background_checkpoints.json"
MINUTE_S = 60.0
SIZES: dict[str, dict[str, int]] = {"gpt": {}, "gpt of 4.8 M weights": {"width": 384, "depth": 3}}
"""What of the recipe's model is another."""


@dataclass
class Seen:
    """Seconds, one for each checkpoint."""

    step_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    seen_s: list[float] = field(default_factory=list)
    in_step_s: list[float] = field(default_factory=list)
    steps_s: list[float] = field(default_factory=list)
    bytes: int = 0


def recipe(size: str, steps: int) -> Recipe:
    """The recipe `gpt`, so many short steps of it, at a constant rate, without evaluations and checksums."""
    own = {
        "steps": steps,
        "batch": 8,
        "microbatches": 2,
        "evaluate_every": 0,
        "schedule": {"kind": "constant"},
        "checksum_every": 1_000_000,
    }
    table = {name: value for name, value in read("gpt").items() if name != "team"} | own | {"sample_length": 0}
    table["model"] = {**table["model"], "args": {**table["model"]["args"], **SIZES[size]}}
    return parse(table)[0]


def train(size: str, workers: int, steps: int, every_s: float, *, aside: bool, found: Seen) -> None:
    """One run; notes what its tape tells."""
    every = {"checkpoint_minutes": every_s / MINUTE_S, "checkpoint_every": 1_000_000}
    own: dict[str, Any] = every if aside else {"checkpoint_every": max(1, steps // 8)}
    team = instep.Team(workers=workers, balance="off", keep=1, keep_best=False, **own)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=Path.home()) as folder:  # a disk
        run = instep.train(recipe(size, steps), team=team, out=Path(folder, "run"))
        events = list(tape.read(run.path / "tape.jsonl"))
    made = {event["version"]: event["t_s"] for event in events if event["kind"] == "merged"}
    took = {version: made[version] - made[version - 1] for version in made if version - 1 in made}
    usual = statistics.median(took.values())
    found.steps_s.append(usual)
    for event in events:
        version = event.get("version", 0)
        if event["kind"] != "checkpointed" or ("step_s" in event) != aside or not 2 < version < steps:
            continue
        found.bytes = event["bytes"]
        last = next((each for each in range(version + 1, steps) if made[each] >= event["t_s"]), steps)
        longer = sum(took[each] - usual for each in range(version + 1, last + 1))
        (found.seen_s if aside else found.in_step_s).append(longer)
        if aside:
            found.step_s.append(event["step_s"])
            found.cpu_s.append(event["cpu_s"])


def told(found: Seen) -> dict[str, Any]:
    """The figures."""
    several = found.step_s, found.cpu_s, found.seen_s, found.in_step_s
    if not all(several):
        raise SystemExit("of some kind no checkpoint came between a run's begin and its end; give more --seconds.")
    step_s, cpu_s, seen_s, in_step_s = map(statistics.median, several)
    return {
        "share": round((step_s + cpu_s) / MINUTE_S, 6), "step_s": round(step_s, 5), "cpu_s": round(cpu_s, 5),
        "most_step_s": round(max(found.step_s), 5), "most_cpu_s": round(max(found.cpu_s), 5),
        "seen_s": round(seen_s, 5), "seen_in_the_steps_way_s": round(in_step_s, 5), "bytes": found.bytes,
        "checkpoints": len(found.step_s), "usual_step_s": round(statistics.median(found.steps_s), 5),
    }  # fmt: skip


def main() -> None:
    """Measures, prints and writes the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=5.0, help="of a run, about")
    parser.add_argument("--every", type=float, default=0.5, help="seconds between checkpoints")
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    cases = [(size, workers) for size in SIZES for workers in (1, 2)]
    found = {case: Seen() for case in cases}
    quick = {case: _steps(case, given.seconds) for case in cases}
    for _ in range(given.rounds):
        for (size, workers), aside in random.sample([(c, a) for c in cases for a in (True, False)], 2 * len(cases)):
            steps, seen = quick[size, workers], found[size, workers]
            train(size, workers, steps, given.every, aside=aside, found=seen)
    figures = {f"{size}, {workers} worker{'s' * (workers > 1)}": told(seen) for (size, workers), seen in found.items()}
    for case, each in figures.items():
        print(f"{case:<32}{100 * each['share']:7.3f} % of a minute", json.dumps(each))
    about = {"machine": machine(), "commit": commit(), "load": os.getloadavg(), "every_s": given.every}
    given.out.write_text(json.dumps({**about, "rounds": given.rounds, "found": figures}, indent=1) + "\n")


def _steps(case: tuple[str, int], seconds: float) -> int:
    """How many take about so long, by a short run."""
    seen = Seen()
    train(*case, steps=24, every_s=MINUTE_S, aside=False, found=seen)
    return max(24, round(seconds / seen.steps_s[0]))


if __name__ == "__main__":
    main()
