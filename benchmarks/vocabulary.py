"""Losses over a large vocabulary: time and memory of chunks against full logits and torch's own.

``python -m benchmarks.vocabulary`` measures each contender in processes of its own, in turn, and writes
``benchmarks/results/vocabulary.json``. Extra memory is the growth of the process's peak over what it held before the
loss: hidden states and head. It is measured apart from time. The memory of distillation and of the log-probabilities
that DPO takes is measured too, each by chunks and with full logits.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

VOCABULARY, TOKENS, WIDTH = 50_000, 2_048, 256
ROUNDS, REPEATS = 3, 2
CHUNKS = (128, 256, 512, 1024)
"""Rows that `F.linear_cross_entropy` is given, among which its best is looked for."""

OBJECTIVES = ("distillation", "log-probabilities")
"""Beside the cross entropy, each as `Instep` and as plain torch has it."""

RESULT = Path(__file__).parent / "results" / "vocabulary.json"
LIMITS = {"memory": 0.2, "time": 1.1, "gradient": 1e-6}


def main() -> int:
    """Runs all; the exit status is 1 where a limit is passed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", nargs=2, help="internal: contender and what is measured")
    parser.add_argument("--objectives", action="store_true", help="measure these alone, and keep the rest of the file")
    flags = parser.parse_args()
    if flags.one:
        print(json.dumps(_one(flags.one[0], flags.one[1], flags.threads)))
        return 0
    from benchmarks.lockstep import machine

    known = json.loads(RESULT.read_text()) if flags.objectives else _cross_entropy(flags.threads)
    known.pop("torch", None)  # a part of the machine
    result = {**known, "machine": machine(), "objectives": _objectives(flags.threads)}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    return _shown(result)


def _cross_entropy(threads: int) -> dict[str, Any]:
    """Time, memory and gradient of the cross entropy, of all contenders."""
    names = ["instep", "plain", *[f"linear_cross_entropy:{rows}" for rows in CHUNKS]]
    found: dict[str, dict[str, Any]] = {name: {"ms": []} for name in names}
    for _ in range(ROUNDS):
        for name in names:
            found[name]["ms"] += _measure(name, "time", threads)["ms"]
    for name in names:
        found[name] |= _measure(name, "memory", threads)
        found[name]["median_ms"] = round(statistics.median(found[name]["ms"]), 1)
    torchs = min((name for name in names if ":" in name), key=lambda name: found[name]["median_ms"])
    fastest = min(("plain", torchs), key=lambda name: found[name]["median_ms"])
    ratios = {
        "memory": found["instep"]["extra_mib"] / found["plain"]["extra_mib"],
        "time": found["instep"]["median_ms"] / found[fastest]["median_ms"],
        "gradient": _measure("instep", "gradient", threads)["off"],
    }
    return {
        "shapes": {"vocabulary": VOCABULARY, "tokens": TOKENS, "width": WIDTH},
        "threads": threads,
        "fastest_other": fastest,
        "ratios": {name: float(f"{value:.3g}") for name, value in ratios.items()},
        "limits": LIMITS,
        "contenders": found,
    }


def _objectives(threads: int) -> dict[str, dict[str, float]]:
    """Extra memory of the other objectives, by chunks and with full logits, and how far their gradients are apart."""
    found: dict[str, dict[str, float]] = {}
    for name in OBJECTIVES:
        chunks, plain = (_measure(f"{name}:{way}", "memory", threads)["extra_mib"] for way in ("instep", "plain"))
        off = _measure(f"{name}:instep", "gradient", threads)["off"]
        found[name] = {"extra_mib": chunks, "plain_extra_mib": plain} | {
            key: float(f"{value:.3g}") for key, value in (("memory", chunks / plain), ("gradient", off))
        }
    return found


def _shown(result: dict[str, Any]) -> int:
    """Prints the table; 1 where a limit is passed."""
    for name, of in result["contenders"].items():
        print(f"{name:28} {of['median_ms']:8.1f} ms {of['extra_mib']:8.1f} MiB")
    for name, of in result["objectives"].items():
        print(f"{name:28} {'':11} {of['extra_mib']:8.1f} MiB, with full logits {of['plain_extra_mib']:.1f} MiB")
    rows = [("cross entropy", result["ratios"]), *result["objectives"].items()]
    held = True
    for whose, ratios in rows:
        for name in (name for name in LIMITS if name in ratios):
            holds = ratios[name] <= LIMITS[name]
            held = held and holds
            verdict = "holds" if holds else "DOES NOT HOLD"
            print(f"{whose:18} {name:9} {ratios[name]:.3g} (limit {LIMITS[name]}): {verdict}")
    return 0 if held else 1


def _measure(name: str, what: str, threads: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.vocabulary", "--threads", str(threads), "--one", name, what]
    # Freed memory goes back at once, so that peaks are of what is held and not of what the allocator keeps.
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MALLOC_MMAP_THRESHOLD_": "262144"}
    if what != "memory":
        environment.pop("MALLOC_MMAP_THRESHOLD_")
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def _losses(hidden: Tensor, head: Any, targets: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The loss of every contender, by name, of hidden states [N, D], a head and targets [N]."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    from instep.objectives.cross_entropy import CrossEntropy
    from instep.objectives.language import Distillation
    from instep.objectives.preference import sequence_log_probabilities
    from instep.objectives.vocabulary import Predictions

    class Model(nn.Module):
        """Whose hidden states are known."""

        def __init__(self, states: Tensor, head: nn.Linear) -> None:
            super().__init__()
            self.states, self.head = states, head

        def hidden(self, tokens: Tensor) -> Tensor:
            return self.states.view(-1, tokens.shape[1], self.states.shape[1])[: len(tokens)]

        def forward(self, tokens: Tensor) -> Tensor:
            logits: Tensor = self.head(self.hidden(tokens))
            return logits

    texts = targets.view(16, -1)
    batch = texts, texts  # the tokens that go in are not looked at
    temperature = 2.0
    teacher = Model(torch.randn(TOKENS, WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False).requires_grad_(False))
    distillation, student = Distillation(teacher, temperature=temperature), Model(hidden, head)

    def torchs(rows: int) -> Tensor:
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows)
        return F.linear_cross_entropy(hidden, head.weight, targets, reduction="sum", options=options)

    def distilled() -> Tensor:
        with torch.no_grad():
            asked = F.log_softmax(teacher.head(teacher.states) / temperature, dim=1)
        own = F.log_softmax(head(hidden) / temperature, dim=1)
        return temperature**2 * F.kl_div(own, asked, reduction="sum", log_target=True)

    def by_text(log_probabilities: Tensor) -> Tensor:
        return -F.logsigmoid(log_probabilities.view(16, -1).sum(1) / TOKENS).sum()

    return {
        "instep": lambda: Predictions(hidden=hidden, head=head).total(CrossEntropy(), targets)[0],
        "plain": lambda: F.cross_entropy(head(hidden), targets, reduction="sum"),
        **{f"linear_cross_entropy:{rows}": partial(torchs, rows) for rows in CHUNKS},
        "distillation:instep": lambda: distillation(student, batch)["objective"],
        "distillation:plain": distilled,
        "log-probabilities:instep": lambda: by_text(sequence_log_probabilities(student, batch)),
        "log-probabilities:plain": lambda: by_text(-F.cross_entropy(head(hidden), targets, reduction="none")),
    }


def _one(name: str, what: str, threads: int) -> dict[str, Any]:
    import torch
    import torch.nn.functional as F
    from torch import nn

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, requires_grad=True)
    head = nn.Linear(WIDTH, VOCABULARY, bias=False)
    targets = torch.randint(0, VOCABULARY, (TOKENS,))
    losses = _losses(hidden, head, targets)

    def step(name: str) -> None:
        hidden.grad = head.weight.grad = None
        (losses[name]() / TOKENS).backward()

    if what == "gradient":
        found: list[list[Tensor]] = []
        for each in (name, name.replace("instep", "plain")):
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
