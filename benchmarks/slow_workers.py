"""What slow workers cost, in step: ``python benchmarks/slow_workers.py``.

The recipe `gpt` with one sample in each of 16 microbatches, 2 workers, one of which is 4 times as slow, by sleeping:
Instep, whose microbatches follow speed, and DistributedDataParallel over gloo, whose slow rank sleeps by the same rule;
then slowness that goes from one worker to the other every 100 steps; and no slowness, with `team.balance` "auto" and
"off". All are started one after the other in each round, in an order drawn anew, and are compared within it.

Figures are steps a second once ranges have settled, and how much that is of what whole microbatches allow: the step's
end if the workers, as fast as they were in this run, had the ranges that are best for them and did nothing but compute;
and, beside it, if each step took besides what it takes without slowness. The result goes to
benchmarks/results/slow_workers.json, after each round.

With ``--pairs N`` instead: N times, by turns, no slowness with `team.balance` "auto" and "off", about 5 s each once
ranges have settled, the workers pinned to a core each: the median ratio of their steps a second with its 95 % interval,
how many ranges moved, and, counted, which share of a step deciding takes. It becomes "pairs" of that file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # run as a file, Python would look for modules in benchmarks/ itself

import instep  # noqa: E402
from benchmarks.lockstep import THREADS, commit, machine, pin  # noqa: E402
from benchmarks.versions import ratio  # noqa: E402
from instep.engines.balance import Balance, soonest  # noqa: E402
from instep.errors import RecordError  # noqa: E402
from instep.recipe import Recipe, parse  # noqa: E402
from instep.recipe_files import read  # noqa: E402
from instep.record import tape  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "slow_workers.json"
MICROBATCHES, SLOW = 16, 4
"""Microbatches of a step, and times as slow."""


@dataclass(frozen=True)
class Size:
    """How much is done in a round. steps: with a slow worker, half as many by DistributedDataParallel; even: without
    slowness; settled: steps that are not counted; turn: those after which slowness goes on, so many times.
    """

    rounds: int
    steps: int
    even: int
    settled: int
    turn: int
    turns: int


PARTS = ("slow", "DDP", "moving", "even", "held")
"""All that are compared."""

PAIR_STEPS, PAIR_SETTLED = 32, 12
"""Of a run of `--pairs`, and of these those that are not counted."""

NEEDED = ("slow", "DDP", "held")
"""Those without which nothing can be said of the others."""

WHOLE, QUICK = Size(3, 80, 120, 10, 100, 3), Size(1, 8, 6, 2, 4, 2)
"""About 11 minutes on two cores with nothing else to do; and the least, to see that all runs."""


def recipe(steps: int) -> Recipe:
    """The recipe `gpt`, of one sample a microbatch, without evaluations."""
    table = read("gpt") | {"batch": MICROBATCHES, "microbatches": MICROBATCHES, "steps": steps, "evaluate_every": 0}
    return parse({key: value for key, value in table.items() if key != "team"} | {"sample_length": 0})[0]


def by_instep(
    steps: int, counted: int, slow: str = "", balance: str = "auto", *, pinned: bool = False
) -> dict[str, Any]:
    """Steps a second from `counted` on, by the tape, and what the fast worker needs for a microbatch."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        team = instep.Team(workers=2, slow=slow, balance=balance, checkpoint_every=1_000_000)  # type: ignore[arg-type]
        over = threading.Event()
        if pinned:
            threading.Thread(target=pin_workers, args=(Path(folder, "run"), over), daemon=True).start()
        run = instep.train(recipe(steps), team=team, out=Path(folder, "run"))
        over.set()
        events = [e for e in tape.read(run.path / "tape.jsonl") if e["kind"] in ("merged", "computed")]
    merged = {e["version"]: e["t_s"] for e in events if e["kind"] == "merged"}
    spans = [e for e in events if e["kind"] == "computed" and e["version"] >= counted]
    each_s = [(e["to_s"] - e["from_s"]) / (e["microbatches"][1] - e["microbatches"][0]) for e in spans]
    by_worker = [[s for s, e in zip(each_s, spans, strict=True) if e["worker"] == worker] for worker in range(2)]
    last_s: dict[int, float] = {}
    for event in spans:
        last_s[event["version"]] = max(last_s.get(event["version"], 0.0), event["to_s"] - event["from_s"])
    took = {version: merged[version + 1] - merged[version] for version in range(counted, steps)}
    return {
        "steps_per_s": (steps - counted) / (merged[steps] - merged[counted]),
        "microbatch_s": statistics.median(sorted(each_s)[: len(each_s) // 2]) if slow else statistics.median(each_s),
        "microbatch_s_by_worker": [statistics.median(of_one or [0.0]) for of_one in by_worker],
        "rest_s": statistics.median(took[version] - last_s[version] for version in took),
        "moves": run.result["moves"],
        "digest": run.digest,
    }


def by_ddp(steps: int, counted: int, slow: float) -> dict[str, Any]:
    """Steps a second of DistributedDataParallel, the second rank slowed."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        environment = {**os.environ, **THREADS, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
        given = {"steps": steps, "counted": counted, "slow": slow, "folder": folder}
        options = [text for name, value in given.items() for text in (f"--{name}", str(value))]
        ranks = [
            subprocess.Popen([sys.executable, __file__, "--rank", str(rank), *options], env=environment)
            for rank in range(2)
        ]
        if any(rank.wait() for rank in ranks):
            raise SystemExit("a rank of DistributedDataParallel has failed.")
        found: dict[str, Any] = json.loads(Path(folder, "found.json").read_text())
        return found


def rank_of_ddp(rank: int, steps: int, counted: int, slow: float, folder: Path) -> None:
    """The life of one: as many microbatches as the other, whose gradients are exchanged in the last one's backward."""
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils.data import default_collate

    from instep.data.cursor import Cursor
    from instep.randomness import key, seed_all

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    made = recipe(steps)
    seed_all(key(made.seed, "model"))
    module = DistributedDataParallel(made.model.build())
    optimizer, samples = made.optimizer.build(module.parameters()), made.data.build().train
    cursor = Cursor(len(samples), made.batch, MICROBATCHES, made.seed, order=made.order)
    own, stamps = range(rank * MICROBATCHES // 2, (rank + 1) * MICROBATCHES // 2), list[float]()
    for step in range(steps):
        stamps.append(time.monotonic())
        optimizer.zero_grad(set_to_none=True)
        began = time.monotonic()
        for microbatch in own:
            if microbatch == own[-1] and rank == 1:  # of those before, and as long for the last one
                time.sleep((slow - 1) * (time.monotonic() - began) * len(own) / (len(own) - 1))
            module.require_backward_grad_sync = microbatch == own[-1]
            tokens = default_collate([samples[index] for index in cursor.microbatch(step, microbatch)])
            logits = module(tokens[:, :-1])
            (F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()) / len(own)).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), made.clip_norm or torch.inf)
        optimizer.step()
    stamps.append(time.monotonic())
    if rank == 0:
        rate = (steps - counted) / (stamps[-1] - stamps[counted])
        (folder / "found.json").write_text(json.dumps({"steps_per_s": rate}))
    dist.destroy_process_group()


def moving(size: Size) -> str:
    """The second worker is slow, after a turn the first, and so on."""
    return ",".join(
        f"{(turn + 1) % 2}:{SLOW}x@{turn * size.turn}..{(turn + 1) * size.turn}" for turn in range(size.turns)
    )


def pin_workers(folder: Path, over: threading.Event) -> None:
    """Holds each worker of the run in this folder to a core of its own, once the tape tells that it is there."""
    left = {0, 1}
    while left and not over.wait(0.2):
        with contextlib.suppress(RecordError, psutil.NoSuchProcess):
            for event in tape.read(folder / "tape.jsonl"):
                if event["kind"] == "joined" and event["worker"] in left:
                    pin(event["pid"], event["worker"])
                    left.discard(event["worker"])


def pairs(count: int) -> dict[str, Any]:
    """So many of "auto" and "off", by turns, and the ratio of their steps a second."""
    sides: dict[str, list[dict[str, Any]]] = {"auto": [], "off": []}
    for number in range(count):
        for balance in random.sample(list(sides), 2):
            sides[balance].append(by_instep(PAIR_STEPS, PAIR_SETTLED, balance=balance, pinned=True))
        here, there = (sides[balance][-1] for balance in sides)
        check_same(here, there)
        print(f"{number} {here['steps_per_s']:.3f} and {there['steps_per_s']:.3f}, {here['moves']} moves", flush=True)
    each_s = {balance: [1 / side["steps_per_s"] for side in of_one] for balance, of_one in sides.items()}
    decides_s = deciding_s()
    return {
        "of_off": ratio(each_s["off"], each_s["auto"]),
        "moves": [side["moves"] for side in sides["auto"]],
        "decides_s": decides_s,
        "share_of_a_step": decides_s / statistics.median(each_s["auto"]),
        "step_s": each_s,
    }


def check_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Ends the benchmark where two runs of one recipe came to different weights."""
    if one["digest"] != other["digest"]:
        raise SystemExit("the digest depends on who computed what: contract C1 is broken.")


def deciding_s(steps: int = 10_000) -> float:
    """Seconds that a step's decision takes a worker, of two that are as fast but for noise."""
    balance, draw = Balance([MICROBATCHES // 2] * 2), random.Random(0)
    seconds = [[0.03 * draw.uniform(0.9, 1.1) for _ in range(2)] for _ in range(steps)]
    began = time.perf_counter()
    for each in seconds:
        balance.decide(each)
    return (time.perf_counter() - began) / steps


def one_round(size: Size, wanted: Sequence[str] = PARTS) -> dict[str, Any]:
    """These contenders once, `NEEDED` among them."""
    settled, steps = size.settled, size.turn * size.turns
    contenders = {
        "slow": lambda: by_instep(size.steps, settled, f"1:{SLOW}x"),
        "DDP": lambda: by_ddp(size.steps // 2, settled, SLOW),
        "moving": lambda: by_instep(steps, size.turn, moving(size)),
        "even": lambda: by_instep(size.even, settled),
        "held": lambda: by_instep(size.even, settled, balance="off"),
    }
    found = {name: contenders[name]() for name in random.sample(list(wanted), len(wanted))}
    for name in [name for name in ("slow", "moving") if name in found]:
        each_s = found[name]["microbatch_s"]
        best = soonest([each_s, SLOW * each_s], MICROBATCHES)
        allowed_s = max(best[0], SLOW * best[1]) * each_s
        found[name]["of_whole_microbatches"] = allowed_s * found[name]["steps_per_s"]
        found[name]["of_whole_microbatches_and_rest"] = (allowed_s + found["held"]["rest_s"]) * found[name][
            "steps_per_s"
        ]
    found["slow"]["times_ddp"] = found["slow"]["steps_per_s"] / found["DDP"]["steps_per_s"]
    if "even" not in found:
        return found
    found["even"]["of_held"] = found["even"]["steps_per_s"] / found["held"]["steps_per_s"]
    check_same(found["even"], found["held"])
    return found


def main() -> None:
    """Measures, prints and writes the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=0, help=f"{WHOLE.rounds} unless given")
    parser.add_argument("--quick", action="store_true", help="as little as can be, to see that all runs")
    parser.add_argument("--needed", action="store_true", help=f"of all contenders only {', '.join(NEEDED)}")
    parser.add_argument("--pairs", type=int, default=0, help="only so many pairs without slowness")
    parser.add_argument("--out", type=Path, default=RESULT)
    of_a_rank = {"rank": int, "steps": int, "counted": int, "slow": float, "folder": Path}
    for name, kind in of_a_rank.items():
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank is not None:
        return rank_of_ddp(*(getattr(given, name) for name in of_a_rank))
    known = json.loads(given.out.read_text()) if given.out.exists() else {}
    if given.pairs:
        found = {"machine": machine(), "commit": commit(), "load": os.getloadavg(), **pairs(given.pairs)}
        print(json.dumps({name: found[name] for name in ("of_off", "moves", "share_of_a_step")}))
        given.out.write_text(json.dumps({**known, "pairs": found}, indent=1) + "\n")
        return None
    size, began = QUICK if given.quick else WHOLE, time.monotonic()
    how = {"machine": machine(), "commit": commit(), "size": asdict(size), "load": os.getloadavg()}
    kept = {"pairs": known["pairs"]} if "pairs" in known else {}
    rounds: list[dict[str, Any]] = []
    for number in range(given.rounds or size.rounds):
        rounds.append(one_round(size, NEEDED if given.needed else PARTS))
        print(number, json.dumps(rounds[-1]), flush=True)
        done = {**kept, **how, "seconds": round(time.monotonic() - began), "median": medians(rounds), "each": rounds}
        given.out.write_text(json.dumps(done, indent=1) + "\n")
    print(json.dumps(medians(rounds), indent=1))


def medians(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Over the rounds."""
    wanted = {
        "slow": ("steps_per_s", "times_ddp", "of_whole_microbatches", "of_whole_microbatches_and_rest", "moves"),
        "DDP": ("steps_per_s",),
        "moving": ("steps_per_s", "of_whole_microbatches", "of_whole_microbatches_and_rest", "moves"),
        "even": ("steps_per_s", "of_held", "moves"),
        "held": ("steps_per_s", "rest_s"),
    }
    return {
        name: {field: round(statistics.median(each[name][field] for each in rounds), 4) for field in fields}
        for name, fields in wanted.items()
        if name in rounds[0]
    }


if __name__ == "__main__":
    main()
