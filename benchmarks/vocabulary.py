"""Losses over a large vocabulary: time and memory of chunks against full logits and torch's own.

``python -m benchmarks.vocabulary`` measures each contender in processes of its own, in turn, and writes
``benchmarks/results/vocabulary.json``. Extra memory is the growth of the process's peak over what it held before the
loss: hidden states and head. It is measured apart from time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

VOCABULARY, TOKENS, WIDTH = 50_000, 2_048, 256
ROUNDS, REPEATS = 3, 2
CHUNKS = (128, 256, 512, 1024)
"""Rows that `F.linear_cross_entropy` is given, among which its best is looked for."""

RESULT = Path(__file__).parent / "results" / "vocabulary.json"
LIMITS = {"memory": 0.2, "time": 1.1, "gradient": 1e-6}


def main() -> int:
    """Runs all; the exit status is 1 where a limit is passed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", nargs=2, help="internal: contender and what is measured")
    flags = parser.parse_args()
    if flags.one:
        print(json.dumps(_one(flags.one[0], flags.one[1], flags.threads)))
        return 0
    names = ["instep", "plain", *[f"linear_cross_entropy:{rows}" for rows in CHUNKS]]
    found: dict[str, dict[str, Any]] = {name: {"ms": []} for name in names}
    for _ in range(ROUNDS):
        for name in names:
            found[name]["ms"] += _measure(name, "time", flags.threads)["ms"]
    for name in names:
        found[name] |= _measure(name, "memory", flags.threads)
        found[name]["median_ms"] = round(statistics.median(found[name]["ms"]), 1)
    torchs = min((name for name in names if ":" in name), key=lambda name: found[name]["median_ms"])
    fastest = min(("plain", torchs), key=lambda name: found[name]["median_ms"])
    ratios = {
        "memory": found["instep"]["extra_mib"] / found["plain"]["extra_mib"],
        "time": found["instep"]["median_ms"] / found[fastest]["median_ms"],
        "gradient": _measure("instep", "gradient", flags.threads)["off"],
    }
    result = {
        "shapes": {"vocabulary": VOCABULARY, "tokens": TOKENS, "width": WIDTH},
        "threads": flags.threads,
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "torch": _version(),
        "fastest_other": fastest,
        "ratios": {name: float(f"{value:.3g}") for name, value in ratios.items()},
        "limits": LIMITS,
        "contenders": found,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    for name in names:
        print(f"{name:28} {found[name]['median_ms']:8.1f} ms {found[name]['extra_mib']:8.1f} MiB")
    passed = {name: value <= LIMITS[name] for name, value in ratios.items()}
    for name, value in ratios.items():
        print(f"{name:10} {value:.3g} (limit {LIMITS[name]}): {'holds' if passed[name] else 'DOES NOT HOLD'}")
    return 0 if all(passed.values()) else 1


def _measure(name: str, what: str, threads: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.vocabulary", "--threads", str(threads), "--one", name, what]
    # Freed memory goes back at once, so that peaks are of what is held and not of what the allocator keeps.
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MALLOC_MMAP_THRESHOLD_": "1048576"}
    if what != "memory":
        environment.pop("MALLOC_MMAP_THRESHOLD_")
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def _version() -> str:
    import torch

    return str(torch.__version__)


def _one(name: str, what: str, threads: int) -> dict[str, Any]:
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn

    from instep.objectives.vocabulary import CrossEntropy, Predictions

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, requires_grad=True)
    head = nn.Linear(WIDTH, VOCABULARY, bias=False)
    targets = torch.randint(0, VOCABULARY, (TOKENS,))

    def step(name: str) -> None:
        hidden.grad = head.weight.grad = None
        if name == "instep":
            loss = Predictions(hidden=hidden, head=head).total(CrossEntropy(), targets)[0]
        elif name == "plain":
            loss = F.cross_entropy(head(hidden), targets, reduction="sum")
        else:
            options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=int(name.split(":")[1]))
            loss = F.linear_cross_entropy(hidden, head.weight, targets, reduction="sum", options=options)
        (loss / TOKENS).backward()

    if what == "gradient":
        found: list[list[Tensor]] = []
        for each in ("instep", "plain"):
            step(each)
            assert hidden.grad is not None
            assert head.weight.grad is not None
            found.append([hidden.grad.clone(), head.weight.grad.clone()])
        pairs = zip(*found, strict=True)
        return {"off": max(float((one - other).norm() / other.norm()) for one, other in pairs)}
    if what == "memory":
        small = torch.randn(8, WIDTH, requires_grad=True)
        F.cross_entropy(small @ torch.randn(WIDTH, 8), torch.zeros(8, dtype=torch.long)).backward()  # libraries loaded
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        step(name)
        return {"extra_mib": round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, 1)}
    step(name)
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        step(name)
        times.append(round(1000 * (time.perf_counter() - began), 1))
    return {"ms": times}


if __name__ == "__main__":
    sys.exit(main())
