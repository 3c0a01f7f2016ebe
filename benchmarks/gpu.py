"""What Instep does on a GPU, in a few minutes: ``PYTHONPATH=src python benchmarks/gpu.py``.

It runs from the tree, with whatever torch there is; pure packages that are missing may lie in a folder named by
``--packages``. Parts come in the order of their worth, each in processes of its own and with the time that is left of
``--budget-s``; what one came to is written at once, so that a run that is cut short keeps what it has. On a machine
without a GPU ``--device cpu`` goes through the same motions at a small size: a rehearsal, whose figures mean nothing.

Parts
    tests: ``tests/whole/test_gpu.py``, where pytest is there.
    speed: tokens a second of a GPT of 124 M weights in bfloat16, compiled, AdamW (fused): Instep with one worker, a
        bare loop, the same with deterministic kernels, and DDP with NCCL at world size 1. All are started and compile
        at once, then take turns at a gate, in an order drawn anew for each round; the first step of a block is not
        counted.
    digests: a small GPT with dropout trained three times in bfloat16, and once more from the middle: one digest.
    workers: the same by one worker, and by two that share the GPU: one digest.
    memory: the plan of gradient checkpointing for a budget of 60 %, on the large model: bytes predicted and measured,
        and what the allocator has counted at most.
    more digests: as those of digests and workers, in float32, and in bfloat16 with ``torch.compile``.

Where there are cores enough, all but speed are made at the same time, before or after it as their order says: what they
come to does not hang on the time. Some may take a share of the time at most, see `MOST`.

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
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import groupby
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

MOST = {"tests": 0.3, "speed": 0.5}
"""Of all the seconds, what a part may take at most: the next ones are worth something, too."""


@dataclass
class Bench:
    """One run of the script. `paths`: where Python looks for modules; `deadline`: on the monotonic clock."""

    device: Literal["cpu", "cuda"]
    paths: str
    deadline: float
    rounds: int
    steps: int
    compiles: bool
    at_once: int
    budget_s: float

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
        if self.left_s < 1:
            raise subprocess.TimeoutExpired(command, 0)
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, cwd=ROOT, env=self.environment,
            timeout=self.left_s,
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


def workers(bench: Bench) -> dict[str, Any]:
    """Whether one worker and two, who share the device, come to equal weights."""
    return {"bfloat16": _digests(bench, "bfloat16", compiles=False, kind="workers")}


def more_digests(bench: Bench) -> dict[str, Any]:
    """The same in float32, and compiled."""
    found = {}
    for kind in ("digests", "workers"):
        found[f"{kind}, float32"] = _digests(bench, "float32", compiles=False, kind=kind)
        if bench.compiles:
            found[f"{kind}, bfloat16, compiled"] = _digests(bench, "bfloat16", compiles=True, kind=kind)
    return found


def _digests(
    bench: Bench, precision: Literal["float32", "bfloat16"], *, compiles: bool, kind: str = "digests"
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        seen = bench.run(bench.task(kind, folder, precision=precision, compiles=compiles))
    return {**seen, "one": len(set(seen.values())) == 1}


def speed(bench: Bench) -> dict[str, Any]:
    """Tokens a second of each contender, medians over rounds, and as a share of the bare loop's in the same round."""
    from benchmarks import gate
    from benchmarks.gate import Team

    gate.PATIENCE_S = bench.left_s  # to compile takes as long as it takes
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
        for team in teams.values():
            team.grant(WARM_UP)
        for team in teams.values():
            team.wait()
        times: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for _ in range(bench.rounds):
            for kind in random.sample(KINDS, len(KINDS)):
                (stamps,) = teams[kind].work(bench.steps + 1)
                times[kind].append((stamps[-1] - stamps[1]) / bench.steps)
            if bench.left_s < LEAST_S / 4:
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
    options = ["-o", "addopts=", "-o", "minversion=0", "-p", "no:cacheprovider"]  # of whatever pytest there is
    if bench.at_once > 1:
        options += ["-n", str(bench.at_once)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-ra", "--tb=short", *options, "tests/whole/test_gpu.py"],
        check=False, capture_output=True, text=True, cwd=ROOT, env=bench.environment, timeout=bench.left_s,
    )  # fmt: skip
    lines = (done.stdout + done.stderr).strip().splitlines()
    return {"status": done.returncode, "end": lines[-1:], **({"printed": lines[-60:]} if done.returncode else {})}


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "tests": tests,
    "speed": speed,
    "digests": digests,
    "workers": workers,
    "memory": memory,
    "more digests": more_digests,
}
"""In the order of their worth."""


def main() -> None:
    """Makes the parts, prints and writes what they come to."""
    given = _given()
    began = time.monotonic()
    paths = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "src"), given.packages, os.environ.get("PYTHONPATH")]))
    bench = Bench(
        given.device,
        paths,
        began + given.budget_s,
        given.rounds,
        given.steps,
        not given.no_compile,
        given.at_once,
        given.budget_s,
    )
    try:
        machine = bench.run(bench.task("machine", ""))
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        raise SystemExit(f"nothing can be measured here: {error}") from None
    result: dict[str, Any] = {"machine": machine, "python": platform.python_version()}
    result |= {"size": asdict(SIZES[given.device]), "commit": _commit(), "parts": {}}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    for name, found in made(bench, given.parts):
        result["parts"][name] = found
        result["took_s"] = round(time.monotonic() - began, 1)
        given.out.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{name}: {json.dumps(found)}", flush=True)


def _given() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=sorted(SIZES), default="cuda")
    parser.add_argument("--budget-s", type=float, default=220.0, help="for everything together")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--packages", default="", help="a folder with packages that this Python lacks")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10, help="in a block of a contender")
    parser.add_argument("--at-once", type=int, default=max(1, (os.cpu_count() or 1) // 3), help="parts, but for speed")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULT)
    return parser.parse_args()


def made(bench: Bench, parts: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """What the parts come to, by name, as it comes: speed has the machine for itself."""
    for alone, group in groupby(parts, key=lambda name: name == "speed"):
        with ThreadPoolExecutor(1 if alone else bench.at_once) as pool:
            futures = {pool.submit(_timed, bench, name): name for name in group}
            for each in as_completed(futures):
                yield futures[each], each.result()


def _timed(bench: Bench, name: str) -> dict[str, Any]:
    began = time.monotonic()
    own = replace(bench, deadline=min(bench.deadline, began + MOST.get(name, 1.0) * bench.budget_s))
    try:
        found = PARTS[name](own) if bench.left_s > LEAST_S else {"left_out": "no time was left"}
    except subprocess.TimeoutExpired as error:
        printed = str(error.stdout or b"", "utf-8", "replace") if not isinstance(error.stdout, str) else error.stdout
        found = {"left_out": f"it was not done after {time.monotonic() - began:.0f} s, when its time was up"}
        found |= {"printed": printed[-1500:]} if printed else {}
    except (RuntimeError, SystemExit, OSError) as error:
        found = {"failed": str(error)}
    return {**found, "took_s": round(time.monotonic() - began, 1)}


def _commit() -> str:
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False)
    except OSError:
        return ""
    return done.stdout.strip()


if __name__ == "__main__":
    main()
