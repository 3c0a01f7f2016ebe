"""What Instep does on a GPU, in a few minutes: ``PYTHONPATH=src python benchmarks/gpu.py``.

It runs from the tree, with whatever torch there is; pure packages that are missing may lie in a folder named by
``--packages``. Parts come in the order of their worth, each in processes of its own and with the time that is left of
``--budget-s``; what one came to is written at once, so that a run that is cut short keeps what it has. On a machine
without a GPU ``--device cpu`` goes through the same motions at a small size: a rehearsal, whose figures mean nothing.

Parts
    digests: a small GPT with dropout trained three times in bfloat16, and once more from the middle: one digest.
    speed: tokens a second of a GPT of 124 M weights in bfloat16, compiled, AdamW (fused): Instep with one worker, a
        bare loop, the same with deterministic kernels, and DDP with NCCL at world size 1. All are started first and
        take turns at a gate, in an order drawn anew for each round; the first step of a block is not counted.
    memory: the plan of gradient checkpointing for a budget of 60 %, on the same model: bytes predicted and measured.
    more digests: as the first, in float32, and in bfloat16 with ``torch.compile``.
    tests: ``tests/whole/test_gpu.py``, where pytest is there.

The result goes to benchmarks/results/gpu.json, or where ``--out`` says.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # run as a file, Python would look for modules in benchmarks/ itself

from benchmarks.on_gpu import KINDS, Size, Task  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "gpu.json"

SIZES = {
    "cuda": Size(vocabulary=50304, context=1024, width=768, depth=12, heads=12, samples=16),
    "cpu": Size(vocabulary=256, context=32, width=32, depth=2, heads=2, samples=4),
}
"""Of the model and a step: on the GPU that of GPT-2, its vocabulary rounded up to a multiple of 128."""

WARM_UP = 5
"""Steps of each contender before the first round."""

LEAST_S = 20.0
"""Seconds that must be left for a part to begin."""


@dataclass
class Bench:
    """One run of the script. `paths`: where Python looks for modules; `deadline`: on the monotonic clock."""

    device: Literal["cpu", "cuda"]
    paths: str
    deadline: float
    rounds: int
    steps: int
    compiles: bool

    @property
    def left_s(self) -> float:
        """Seconds left."""
        return self.deadline - time.monotonic()

    @property
    def environment(self) -> dict[str, str]:
        """Of the processes that it starts."""
        threads = {"OMP_NUM_THREADS": "1"} if self.device == "cpu" else {}
        return {**os.environ, **threads, "PYTHONPATH": self.paths}

    def run(self, task: Task) -> dict[str, Any]:
        """What the task gives. Raises RuntimeError where it fails, and TimeoutExpired."""
        command = [sys.executable, "-m", "benchmarks.on_gpu", json.dumps(asdict(task))]
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, cwd=ROOT, env=self.environment,
            timeout=max(1.0, self.left_s),
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError((done.stderr or done.stdout)[-1500:])
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    def task(self, kind: str, folder: str, **more: Any) -> Task:
        """A task of this kind, at this device's size."""
        return Task(kind, self.device, folder, SIZES[self.device], **{"compiles": self.compiles, **more})


def digests(bench: Bench) -> dict[str, Any]:
    """Whether equal runs come to equal weights, and whether the one that was resumed does."""
    return {"bfloat16": _digests(bench, "bfloat16", compiles=False)}


def more_digests(bench: Bench) -> dict[str, Any]:
    """The same in float32, and compiled."""
    found = {"float32": _digests(bench, "float32", compiles=False)}
    if bench.compiles:
        found["bfloat16, compiled"] = _digests(bench, "bfloat16", compiles=True)
    return found


def _digests(bench: Bench, precision: Literal["float32", "bfloat16"], *, compiles: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        seen = bench.run(bench.task("digests", folder, precision=precision, compiles=compiles))
    return {**seen, "one": len({*seen["runs"], seen["resumed"]}) == 1}


def speed(bench: Bench) -> dict[str, Any]:
    """Tokens a second of each contender, medians over rounds, and as a share of the bare loop's in the same round."""
    from benchmarks.gate import Team

    size = SIZES[bench.device]
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder, ExitStack() as stack:
        teams: dict[str, Team] = {}
        total = WARM_UP + bench.rounds * (bench.steps + 1) + 1
        for kind in KINDS:
            place = Path(folder, kind.replace(" ", "-"))
            place.mkdir()
            task = bench.task(kind, str(place), steps=total, gate=str(place / "gate"))
            command = [sys.executable, "-m", "benchmarks.on_gpu", json.dumps(asdict(task))]
            teams[kind] = Team([command], 1, place / "gate", bench.environment)
            stack.callback(teams[kind].close)
        for team in teams.values():
            team.admit()
            team.work(WARM_UP)
        times: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for _ in range(bench.rounds):
            for kind in random.sample(KINDS, len(KINDS)):
                (stamps,) = teams[kind].work(bench.steps + 1)
                times[kind].append((stamps[-1] - stamps[1]) / bench.steps)
            if bench.left_s < LEAST_S:
                break
    bare = times["bare loop"]
    return {
        kind: {
            "tokens_per_s": round(size.tokens / statistics.median(each)),
            "of_bare_loop": round(statistics.median(b / a for a, b in zip(each, bare, strict=True)), 4),
            "rounds": len(each),
        }
        for kind, each in times.items()
    }


def memory(bench: Bench) -> dict[str, Any]:
    """Bytes of activations at their peak, as planned and as measured."""
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        return bench.run(bench.task("memory", folder, compiles=False))


def tests(bench: Bench) -> dict[str, Any]:
    """How the tests of this device end."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n0", "tests/whole/test_gpu.py"],
        check=False, capture_output=True, text=True, cwd=ROOT, env=bench.environment, timeout=max(1.0, bench.left_s),
    )  # fmt: skip
    return {"status": done.returncode, "end": done.stdout.strip().splitlines()[-1:]}


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "digests": digests,
    "speed": speed,
    "memory": memory,
    "more digests": more_digests,
    "tests": tests,
}


def main() -> None:
    """Runs the parts, prints and writes what they come to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=sorted(SIZES), default="cuda")
    parser.add_argument("--budget-s", type=float, default=220.0, help="for everything together")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--packages", default="", help="a folder with packages that this Python lacks")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10, help="in a block of a contender")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    began = time.monotonic()
    paths = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "src"), given.packages, os.environ.get("PYTHONPATH")]))
    bench = Bench(given.device, paths, began + given.budget_s, given.rounds, given.steps, compiles=not given.no_compile)
    result: dict[str, Any] = {"machine": bench.run(bench.task("machine", "")), "python": platform.python_version()}
    result |= {"size": asdict(SIZES[given.device]), "commit": _commit(), "parts": {}}
    for name in given.parts:
        part_began = time.monotonic()
        try:
            found = PARTS[name](bench) if bench.left_s > LEAST_S else {"left_out": "no time was left"}
        except subprocess.TimeoutExpired:
            found = {"left_out": f"it was not done after {time.monotonic() - part_began:.0f} s, when the time was up"}
        except (RuntimeError, SystemExit, OSError) as error:
            found = {"failed": str(error)}
        result["parts"][name] = {**found, "took_s": round(time.monotonic() - part_began, 1)}
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{name}: {json.dumps(result['parts'][name])}", flush=True)


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False)
    return done.stdout.strip()


if __name__ == "__main__":
    main()
