"""Simulations with real gradients: ``python benchmarks/virtual.py``.

Batched: 512 virtual workers train an MLP of about 7,000 weights on made data under several rules, once with the
gradients of all workers in hand computed at once (``--batched``), and once one worker at a time. Both do the same
updates; shown is the median time for all of it, without starting the process. The data are a TensorDataset, whose rows
are taken for many workers at once, or the same samples with a collate of one's own, which is called for each worker.

Overhead: the built-in recipe ``gpt``, 30 global batches under several rules with 4 workers, beside a plain PyTorch loop
that computes the same gradients, clips them and makes as many updates. Both take turns in one process with 1 thread;
shown is the median of the ratios. The result goes to benchmarks/results/virtual.json.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # run as a file, Python would look for modules in benchmarks/ itself

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils.data import TensorDataset  # noqa: E402

import instep  # noqa: E402
from benchmarks.lockstep import machine  # noqa: E402
from instep.clock.times import WorkerTimes  # noqa: E402
from instep.offline.cluster import Cluster  # noqa: E402
from instep.offline.simulation import simulate  # noqa: E402
from instep.recipe import Recipe, parse  # noqa: E402
from instep.recipe_files import read  # noqa: E402
from instep.rules import parse as parse_rule  # noqa: E402
from instep.rules.work import Pieces  # noqa: E402
from instep.worker.replica import Replica  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "virtual.json"
WORKERS = 512
ROUNDS = 5
BATCHED_ROUNDS = 3
TARGET = 5.0  # times faster
BATCHED = (
    ("synchronous", "TensorDataset"), ("softsync:8", "TensorDataset"), ("asynchronous", "TensorDataset"),
    ("synchronous", "own collate"),
)  # fmt: skip
OVERHEAD_RULES = ("synchronous", "asynchronous", "diloco:5")


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))


def _rows() -> TensorDataset:
    inputs = torch.randn(WORKERS * 16, 32)
    return TensorDataset(inputs, (inputs @ torch.randn(32, 10)).argmax(1))


def _collated() -> instep.Data:
    inputs, classes = _rows().tensors
    indices: Any = range(len(inputs))  # a batch is taken out of the tensors at once
    return instep.Data(train=indices, collate=lambda chosen: (inputs[chosen], classes[chosen]))


@instep.objective
def _classes(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")


def batched(rule: str, data: str) -> dict[str, Any]:
    """Seconds with and without batching, which take turns."""
    recipe = Recipe(
        model=_mlp, objective=_classes, data=_rows if data == "TensorDataset" else _collated,
        optimizer={"use": "torch.optim:SGD", "args": {"lr": 0.05}},
        rule=parse_rule(rule), batch=8 * WORKERS, microbatches=WORKERS, steps=6,
    )  # fmt: skip
    times = WorkerTimes.lognormal(1.0, 0.3, persistence=0.5)
    few = dataclasses.replace(recipe, steps=1)  # what torch imports when it is first needed is not counted
    simulate(few, Cluster(workers=WORKERS, times=times, merge_s=0.0, batched=True), True, None, lambda event: None)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for together in (True, False) * BATCHED_ROUNDS:
        cluster = Cluster(workers=WORKERS, times=times, merge_s=0.0, batched=together)
        began = time.perf_counter()
        result = simulate(recipe, cluster, True, None, lambda event: None)
        seconds[together].append(time.perf_counter() - began)
    at_once_s, one_by_one_s = statistics.median(seconds[True]), statistics.median(seconds[False])
    return {
        "rule": rule,
        "data": data,
        "batched_s": round(at_once_s, 3),
        "one_at_a_time_s": round(one_by_one_s, 3),
        "times_faster": round(one_by_one_s / at_once_s, 2),
        "contributions": result["contributions"],
        "updates": result["versions"],
    }


def overhead(rule: str, rounds: int = ROUNDS) -> dict[str, Any]:
    """Time of a simulation over that of a plain loop with the same gradients and updates."""
    recipe, _ = parse({**read("gpt"), "rule": rule, "steps": 30, "evaluate_every": 0, "evaluate_samples": 1})
    recipe = dataclasses.replace(recipe, sample_length=0)
    cluster = Cluster(workers=4, times=WorkerTimes.constant(0.1), merge_s=0.0)
    simulated, plain = [], []
    for _ in range(rounds):
        result = simulate(recipe, cluster, True, None, lambda event: None)
        simulated.append(result["simulated_in_s"] - result["scheduled_in_s"])
        plain.append(_plain(recipe, result["versions"]))
    ratios = [a / b for a, b in zip(simulated, plain, strict=True)]
    return {
        "simulated_s": round(statistics.median(simulated), 3),
        "plain_s": round(statistics.median(plain), 3),
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
    }


def _plain(recipe: Recipe, versions: int) -> float:
    """Seconds of the gradients and updates alone, as one writes them in PyTorch."""
    replica = Replica(recipe, "cpu")
    replica.learn_terms(0)
    pieces = Pieces(recipe.rule, 4, recipe.microbatches, recipe.steps)
    inner = recipe.rule.local_steps > 1
    updates = sum(pieces.work(p).local_steps for p in range(pieces.count)) if inner else versions
    every = recipe.steps * recipe.microbatches / updates
    began, due = time.perf_counter(), 0.0
    for step in range(recipe.steps):
        for microbatch in range(recipe.microbatches):
            tokens = replica.batch(step, microbatch)
            loss = replica.objective.sums(replica.module, tokens)["objective"] / 1024
            loss.backward()
            due += 1
            if due >= every:
                if recipe.clip_norm is not None:
                    torch.nn.utils.clip_grad_norm_(replica.parameters, recipe.clip_norm)
                replica.optimizer.each[0].of_torch.step()
                replica.optimizer.each[0].of_torch.zero_grad(set_to_none=True)
                due -= every
    return time.perf_counter() - began


def main() -> None:
    """Measures, prints, saves."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {"machine": machine(), "workers": WORKERS, "batched": [], "overhead": {}}
    print(f"{'512 workers, MLP':<20}{'data':<15}{'batched s':>11}{'alone s':>9}{'faster by':>11}{'':>3}target")
    for rule, data in BATCHED:
        row = batched(rule, data)
        found["batched"].append(row)
        figures = f"{row['batched_s']:>11.2f}{row['one_at_a_time_s']:>9.2f}{row['times_faster']:>10.1f}x"
        print(f"{rule:<20}{data:<15}{figures}{'':>3}{'reached' if row['times_faster'] >= TARGET else 'missed'}")
    print(f"\n{'GPT, 4 workers':<20}{'simulated s':>12}{'plain s':>9}{'ratio':>8}")
    for rule in OVERHEAD_RULES:
        row = overhead(rule)
        found["overhead"][rule] = row
        print(f"{rule:<20}{row['simulated_s']:>12.2f}{row['plain_s']:>9.2f}{row['ratio']:>8.3f}", flush=True)
    RESULT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
