"""Speed and memory of Instep in lockstep, against DDP over gloo and against plain PyTorch loops: ``make bench``.

What is trained
    A GPT of 4.8 M weights on text, float32, AdamW (fused), no clipping, 1 thread a process, one microbatch of 2
    samples of 80 tokens a worker: a step takes about 100 ms. All contenders start from the same weights and take the
    same batches; that they come to the same objective, and teams of Instep to the same digest, is checked at the end.

Contenders
    Instep: `instep.train` as a user calls it, tape, supervision and all; no checkpoint falls into a timed step.
    DDP: processes started by `torch.multiprocessing.spawn`, gloo on this machine, once with its defaults and once
    with its options for speed (`DDP_OPTIONS`); the faster one counts.
    No communication: two plain loops, each with its own microbatch and weights: the limit of two workers here.
    In step: the same two loops, which wait for each other after every step and give each other nothing: what waiting
    alone costs here, which nothing synchronous can avoid.
    Plain loop: one process; with 2 microbatches it accumulates gradients.

Time
    All contenders are started first and then take turns, in blocks of steps, in an order drawn anew for each round;
    only one works at a time, the others sleep at a gate (`benchmarks.gate`) at the top of a step: in the plain loops
    before anything else, in Instep before the first forward. The first step of a block is not counted. A block's
    figure is its mean time of a step, the mean of its workers. Shown are medians over rounds and, for ratios, the
    median of the ratios within a round. ``others`` is the share of the processors that went to other programs.

Memory
    Each team runs alone. Proportional set size while it trains, of the worker and moment where it is largest.

The result goes to benchmarks/results/lockstep.json. The exit status does not depend on whether targets are met.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # run as a file, Python would look for modules in benchmarks/ itself

from benchmarks.gate import Team  # noqa: E402
from benchmarks.memory import measure  # noqa: E402
from benchmarks.work import CONTEXT, MODEL, SAMPLES, Options  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "lockstep.json"

WARM_UP = 5
"""Steps of each contender before the first round."""

DDP_OPTIONS: dict[str, Any] = {"gradient_as_bucket_view": True, "static_graph": True}
"""Of DDP's options, those that could make it faster."""

DDP_LEAN: dict[str, Any] = {"gradient_as_bucket_view": True}
"""That which makes it leaner; static graphs don't go with `no_sync`."""

THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Contender:
    """One way to do the work. `apart`: each worker is a program of its own and does only its own microbatches.

    `in_step`: these programs wait for each other after every step.
    """

    name: str
    module: str
    workers: int
    microbatches: int
    apart: bool = False
    in_step: bool = False
    ddp: dict[str, Any] = field(default_factory=dict)

    def start(self, folder: Path, steps: int, source: Path = ROOT / "src") -> Team:
        """Starts its programs, which will do `steps` steps in all, with Instep from `source`. `folder` is made."""
        folder.mkdir()
        programs = []
        share = self.microbatches // self.workers
        for worker in range(self.workers if self.apart else 1):
            own = tuple(range(worker * share, (worker + 1) * share)) if self.apart else ()
            options = Options(
                address=str(folder / "gate"),
                folder=str(folder),
                steps=steps,
                workers=1 if self.apart else self.workers,
                microbatches=self.microbatches,
                own=own,
                in_step=self.workers if self.in_step else 0,
                ddp=self.ddp,
            )
            programs.append([sys.executable, "-m", self.module, json.dumps(asdict(options))])
        environment = {**os.environ, **THREADS, "PYTHONPATH": f"{ROOT}:{source}", "GLOO_SOCKET_IFNAME": "lo"}
        return Team(programs, self.workers, folder / "gate", environment)


INSTEP, TORCH = "benchmarks.by_instep", "benchmarks.by_torch"
TWO = Contender("Instep, 2 workers", INSTEP, 2, 2)
DDP = Contender("DDP, defaults", TORCH, 2, 2)
DDP_TUNED = Contender("DDP, tuned", TORCH, 2, 2, ddp=DDP_OPTIONS)
SEPARATE = Contender("2 plain loops, no communication", TORCH, 2, 2, apart=True)
WAITING = Contender("2 plain loops that wait for each other", TORCH, 2, 2, apart=True, in_step=True)
ONE = {m: Contender(f"Instep, 1 worker, M = {m}", INSTEP, 1, m) for m in (1, 2)}
PLAIN = {m: Contender(f"plain loop, M = {m}", TORCH, 1, m) for m in (1, 2)}
TIMED = [TWO, DDP, DDP_TUNED, SEPARATE, WAITING, ONE[1], PLAIN[1], ONE[2], PLAIN[2]]


@dataclass(frozen=True)
class Target:
    """A figure, what it should be, and whether it is."""

    what: str
    found: float
    bound: float
    at_least: bool
    unit: str = ""

    @property
    def met(self) -> bool:
        """Whether the figure is what it should be."""
        return self.found >= self.bound if self.at_least else self.found <= self.bound


@contextmanager
def _folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="bench-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def time_help(runs: int = 10) -> list[float]:
    """Wall times, in seconds, of ``instep --help``, after one that is not counted."""
    command = [str(Path(sys.executable).with_name("instep")), "--help"]
    times = []
    for _ in range(runs + 1):
        began = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - began)
    return times[1:]


def time_steps(rounds: int, block: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Step times of all contenders in s, [rounds] each, and what they came to."""
    with _folder() as folder, ExitStack() as stack:
        steps = WARM_UP + rounds * (block + 1) + 1
        folders = {contender.name: folder / str(place) for place, contender in enumerate(TIMED)}
        teams = {contender.name: contender.start(folders[contender.name], steps) for contender in TIMED}
        for team in teams.values():
            stack.callback(team.close)
        for team in teams.values():
            team.admit()
        for team in teams.values():
            team.work(WARM_UP)
        times: dict[str, list[float]] = {name: [] for name in teams}
        others: list[float] = []
        order = random.Random(0)
        for number in range(rounds):
            with _Others(teams.values()) as noise:
                for name in order.sample(list(teams), len(teams)):
                    stamps = teams[name].work(block + 1)
                    times[name].append(statistics.mean((worker[-1] - worker[1]) / block for worker in stamps))
            others.append(noise.share)
            say(f"round {number + 1} of {rounds}: {TWO.name} {1000 * times[TWO.name][-1]:.1f} ms a step")
        for team in teams.values():
            team.finish()
        outcomes = {name: _outcome(path) for name, path in folders.items()}
    return {"step_s": times, "others": others, "outcomes": outcomes, "steps": steps}


class _Others:
    """Measures the share of all processors that went to other programs than `teams` and this one."""

    def __init__(self, teams: Iterable[Team]):
        self._known = [psutil.Process(), *(process for team in teams for process in team.processes())]

    def __enter__(self) -> _Others:
        self._busy, self._own, self._began = self._times()
        return self

    def __exit__(self, *_: object) -> None:
        busy, own, now = self._times()
        spent = (busy - self._busy) - (own - self._own)
        self.share = max(0.0, spent / ((now - self._began) * (os.cpu_count() or 1)))

    def _times(self) -> tuple[float, float, float]:
        all_times = psutil.cpu_times()
        busy = sum(all_times) - all_times.idle - getattr(all_times, "iowait", 0.0)
        own = 0.0
        for process in self._known:
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                own += times.user + times.system
        return busy, own, time.monotonic()


def _outcome(folder: Path) -> dict[str, Any]:
    """What the contender's processes left: the mean of their objectives, and the digest where there is one."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("outcome-*.json"))]
    return {**found[0], "objective": statistics.mean(each["objective"] for each in found)}


def measure_memory(say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Of Instep and DDP with 2 workers, for 1, 2 and 4 microbatches a worker."""
    found = []
    for share in (1, 2, 4):
        for contender in (
            Contender("Instep", INSTEP, 2, 2 * share),
            Contender("DDP, defaults", TORCH, 2, 2 * share),
            Contender("DDP, tuned", TORCH, 2, 2 * share, ddp=DDP_LEAN),
        ):
            with _folder() as folder:
                team = contender.start(folder / "team", 1000)
                try:
                    team.admit()
                    row = {"contender": contender.name, "microbatches_per_worker": share, **measure(team)}
                finally:
                    team.close()
            found.append(row)
            say(f"memory, {share} microbatches a worker, {contender.name}: {row['pss']:.0f} MiB a worker")
    return found


def machine() -> dict[str, Any]:
    """What it was measured on and with."""
    model = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor() or "unknown",
    )
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": version("torch"),
        "numpy": version("numpy"),
        "instep": version("instep"),
    }


def pin(pid: int, core: int) -> None:
    """Holds all threads that a process has now to one core."""
    for thread in psutil.Process(pid).threads():
        os.sched_setaffinity(thread.id, {core})


def commit() -> str:
    """That the working tree is at."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def ratios(step_s: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Speeds as shares of the others', by round: quartiles. Of both kinds of DDP the faster one is taken."""
    best = min((DDP.name, DDP_TUNED.name), key=lambda name: statistics.median(step_s[name]))
    pairs = {
        "2 workers / DDP": (TWO.name, best),
        "2 workers / no communication": (TWO.name, SEPARATE.name),
        "2 workers / only waiting": (TWO.name, WAITING.name),
        "only waiting / no communication": (WAITING.name, SEPARATE.name),
        "1 worker / plain loop, M = 1": (ONE[1].name, PLAIN[1].name),
        "1 worker / plain loop, M = 2": (ONE[2].name, PLAIN[2].name),
    }
    return {
        what: _quartiles([other / own for own, other in zip(step_s[name], step_s[beside], strict=True)])
        for what, (name, beside) in pairs.items()
    }


def _quartiles(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high}


def targets(speed: dict[str, dict[str, float]], memory: list[dict[str, Any]], help_s: float) -> list[Target]:
    """All figures with a target."""
    at_one = {row["contender"]: row["pss"] for row in memory if row["microbatches_per_worker"] == 1}
    instep = at_one.pop("Instep")
    bounds = {
        "2 workers / DDP": 1.15,
        "2 workers / no communication": 0.97,
        "1 worker / plain loop, M = 1": 0.98,
        "1 worker / plain loop, M = 2": 0.98,
    }
    return [
        *(Target(f"speed, {what}", speed[what]["median"], bound, True) for what, bound in bounds.items()),
        Target("memory a worker (Pss), Instep / leaner DDP, M = W", instep / min(at_one.values()), 1.25, False),
        Target("instep --help, s", help_s, 0.3, False),
    ]


def check(outcomes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """That contenders with the same 2 microbatches a step came to the same. Raises SystemExit."""
    same = {
        name: outcomes[name]["objective"] for name in (TWO.name, DDP.name, DDP_TUNED.name, ONE[2].name, PLAIN[2].name)
    }
    spread = max(same.values()) - min(same.values())
    digests = {outcomes[name]["digest"] for name in (TWO.name, ONE[2].name)}
    if spread > 0.02:
        raise SystemExit(f"the contenders did not do the same work: their last objectives are {same}.")
    if len(digests) > 1:
        raise SystemExit("Instep's digest with 2 workers differs from that with 1: contract C1 is broken.")
    return {"objectives": same, "spread": spread, "digest": digests.pop()}


def report(found: dict[str, Any], goals: list[Target]) -> str:
    """The tables, plain."""
    here, work = found["machine"], found["work"]
    lines = [
        f"{here['processor']}, {here['cores']} cores, {here['memory_gib']} GiB; {here['system']}; "
        f"Python {here['python']}, torch {here['torch']}; 1 thread a process",
        f"GPT of {work['parameters']:,} weights, float32, AdamW (fused), no clipping; microbatches of {SAMPLES} x "
        f"{CONTEXT} tokens; {work['rounds']} rounds of {work['steps_per_block']} steps each",
        "",
        f"{'step time, ms':<39}{'median':>9}{'quartiles':>17}",
    ]
    for name, step in found["step_ms"].items():
        lines.append(f"{name:<39}{step['median']:>9.1f}{step['low']:>9.1f}{step['high']:>8.1f}")
    lines += ["", f"{'speed, median over rounds':<39}{'ratio':>9}{'quartiles':>17}"]
    for name, ratio in found["speed"].items():
        lines.append(f"{name:<39}{ratio['median']:>9.3f}{ratio['low']:>9.3f}{ratio['high']:>8.3f}")
    lines += [
        "",
        f"{'memory of a worker, MiB':<24}{'M/W':>4}{'Pss':>7}{'private':>9}{'heap':>7}{'files':>7}"
        f"{'shared':>8}{'other processes':>17}",
    ]
    for row in found["memory"]:
        lines.append(
            f"{row['contender']:<24}{row['microbatches_per_worker']:>4}{row['pss']:>7.0f}{row['private']:>9.0f}"
            f"{row['anonymous']:>7.0f}{row['files']:>7.0f}{row['shared_memory']:>8.0f}{row['others']:>17.0f}"
        )
    lines += ["", f"{'':<52}{'found':>8}{'target':>10}"]
    for goal in goals:
        sign = ">=" if goal.at_least else "<="
        verdict = "met" if goal.met else "MISSED"
        lines.append(f"{goal.what:<52}{goal.found:>8.3f}{sign:>5} {goal.bound:<5g} {verdict}")
    same = found["same_work"]
    lines += [
        "",
        f"Same work: with M = 2, after {work['steps']} steps, all have objective {same['objectives'][TWO.name]:.4f}, "
        f"within {same['spread']:.4f}; Instep with 1 and 2 workers has one digest.",
        f"Other programs took {100 * statistics.median(found['others']):.1f} % of the processors (median of rounds, at "
        f"most {100 * max(found['others']):.1f} %).",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measures, prints, saves."""
    parser = argparse.ArgumentParser(description="Speed and memory of Instep beside DDP and plain PyTorch loops.")
    parser.add_argument("--rounds", type=int, default=10, help="rounds in which all contenders take turns")
    parser.add_argument("--steps", type=int, default=10, help="steps of a contender in a round")
    parser.add_argument("--result", type=Path, default=RESULT, help="where to save the JSON")
    arguments = parser.parse_args()
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:4.0f} s] {text}", file=sys.stderr, flush=True)

    help_s = time_help()
    say(f"instep --help: {statistics.median(help_s):.3f} s; starting {len(TIMED)} contenders")
    timed = time_steps(arguments.rounds, arguments.steps, say)
    memory = measure_memory(say)
    speed = ratios(timed["step_s"])
    goals = targets(speed, memory, statistics.median(help_s))
    found = {
        "machine": machine(),
        "work": {
            "model": MODEL,
            "parameters": next(each["parameters"] for each in timed["outcomes"].values() if "parameters" in each),
            "samples_per_microbatch": SAMPLES,
            "precision": "float32",
            "optimizer": "AdamW, fused",
            "clip_norm": None,
            "threads_per_process": 1,
            "ddp_tuned": {"timed": DDP_OPTIONS, "memory": DDP_LEAN},
            "steps": timed["steps"],
            "rounds": arguments.rounds,
            "steps_per_block": arguments.steps,
        },
        "method": (__doc__ or "").strip(),
        "step_ms": {name: _quartiles([1000 * s for s in values]) for name, values in timed["step_s"].items()},
        "speed": speed,
        "memory": memory,
        "help_s": _quartiles(help_s),
        "targets": [{**asdict(goal), "met": goal.met} for goal in goals],
        "same_work": check(timed["outcomes"]),
        "others": timed["others"],
        "rounds_ms": {name: [1000 * s for s in values] for name, values in timed["step_s"].items()},
        "wall_s": time.monotonic() - began,
    }
    print(report(found, goals))
    arguments.result.parent.mkdir(parents=True, exist_ok=True)
    arguments.result.write_text(json.dumps(_rounded(found), indent=1) + "\n")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
