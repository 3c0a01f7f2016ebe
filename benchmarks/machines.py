"""Lockstep over two hosts, against DDP over gloo on the same ones: ``python benchmarks/machines.py``, as root.

The hosts are those of the tests (`tests/support/hosts.py`), namespaces of this machine on a bridge: links are real to
the processes, processors are shared, and nothing is left of a run that was killed. Each has one or two workers, started
by torchrun; the work is that of ``benchmarks/lockstep.py``. All contenders of a part are started first and take turns
at a gate, in blocks of steps, in an order drawn anew for each round; the first step of a block is not counted. DDP
comes with its options for speed and buckets of several sizes; the fastest counts. Bytes are those that the hosts'
interfaces have sent in the counted blocks, headers and all; processor seconds are of all that runs on the hosts.

Figures are medians over rounds, and for speed the median of the ratios within a round with its 95 % interval from
10,000 bootstrap samples of the rounds.

Parts
    2x1: a worker a host, a microbatch each.
    2x2: two workers a host, a microbatch each; ``2x2, M = 8``, two each, for the bytes.
    100 Mbit/s: as 2x1, each link held to that rate, each way; fewer and shorter blocks, for a step takes 1.6 s.
    DiLoCo, 100 Mbit/s: the same with DiLoCo, H = 20 and int4, in lockstep's place, which also takes its turns while
        links are held to nothing. Its steps are the workers' own, as many microbatches as DDP's.
    DiLoCo in fragments, 100 Mbit/s: 4 of them, each applied 2 steps after it was sent.
    DiLoCo, H = 500: bytes that hosts give to the network (`wire_bytes`) in a round of it with int4, beside 500 steps in
        lockstep; each is what a longer run has sent more than a shorter one, without their begins and ends.

Each part that has run takes its place in benchmarks/results/machines.json, with the commit, the date and what it was
measured on; the others stay as they are. The exit status does not depend on whether targets are met.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # run as a file, Python would look for modules in benchmarks/ itself
sys.path.append(str(ROOT / "tests"))

from benchmarks.gate import Team  # noqa: E402
from benchmarks.lockstep import DDP_OPTIONS, INSTEP, THREADS, TORCH, WARM_UP, machine  # noqa: E402
from benchmarks.versions import ratio  # noqa: E402
from benchmarks.work import CONTEXT, MODEL, SAMPLES, Options  # noqa: E402
from instep.engines.trial import TRIED  # noqa: E402
from instep.rules import parse  # noqa: E402
from support.hosts import WORK, Hosts  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "machines.json"

BUCKETS_MB = (1, 5, 25)
"""Sizes of DDP's buckets that are tried."""


@dataclass(frozen=True)
class Contender:
    """One way to do the work. `bucket_mb`: of DDP; 0 for Instep, with its `rule`. free: its links are not held.

    block: steps of its blocks, 0 for those of all.
    """

    bucket_mb: int = 0
    rule: str = "synchronous"
    free: bool = False
    block: int = 0

    @property
    def program(self) -> str:
        """The name of what runs, which those that differ in their links have in common."""
        if self.bucket_mb:
            return f"DDP, buckets of {self.bucket_mb} MB"
        return "Instep" if self.rule == "synchronous" else f"Instep, {self.rule}"

    @property
    def warm_up(self) -> int:
        """Steps before the first round; in them lockstep finds out how to use the link."""
        return WARM_UP if self.bucket_mb else max(WARM_UP, TRIED + 2)

    @property
    def name(self) -> str:
        """Of the tables."""
        return f"{self.program}, free" if self.free else self.program


@dataclass(frozen=True)
class Part:
    """Hosts, workers on each, microbatches of a step, and the rate of each link, "" for no limit.

    most: rounds, and steps of a block.
    """

    hosts: int
    workers: int
    microbatches: int
    rate: str = ""
    most: tuple[int, int] = (1000, 1000)
    contenders: tuple[Contender, ...] = field(default=(Contender(), *(Contender(size) for size in BUCKETS_MB)))


def with_diloco(rule: str) -> tuple[Contender, ...]:
    """Contenders that train under this rule and by DDP; a block has whole rounds."""
    block = 4 * parse(rule).local_steps
    return (Contender(rule=rule, block=block), Contender(rule=rule, block=block, free=True), *DDP)


DDP = tuple(Contender(size) for size in BUCKETS_MB)
DILOCO = "diloco:20,wire=int4"
FRAGMENTS = f"{DILOCO},fragments=4,overlap=2"
ROUND = 500
"""Steps of the round whose bytes are counted."""

PARTS = {
    "2x1": Part(2, 1, 2),
    "2x2": Part(2, 2, 4),
    "2x2, M = 8": Part(2, 2, 8),
    "100 Mbit/s": Part(2, 1, 2, "100mbit", (5, 2)),
    "DiLoCo, 100 Mbit/s": Part(2, 1, 2, "100mbit", (5, 2), with_diloco(DILOCO)),
    "DiLoCo in fragments, 100 Mbit/s": Part(2, 1, 2, "100mbit", (5, 2), with_diloco(FRAGMENTS)),
}
COUNTED = "DiLoCo, H = 500"

TARGETS = {
    "speed, 2x1": (1.03, True),
    "speed, 2x2": (1.15, True),
    "speed, 2x2, M = 8": (1.15, True),
    "speed, 100 Mbit/s": (0.97, True),
    "bytes, 2x1": (1.02, False),
    "bytes, 2x2, M = 8": (0.69, False),
    "gradients, 2x2, M = 8": (2.05, False),
    "speed, DiLoCo, 100 Mbit/s": (13, True),
    "of free links', DiLoCo, 100 Mbit/s": (0.78, True),
    "speed, DiLoCo in fragments, 100 Mbit/s": (13, True),
    "of free links', DiLoCo in fragments, 100 Mbit/s": (0.93, True),
    "fewer bytes, DiLoCo, H = 500": (3500, True),
}
"""What each figure should be, and whether at least. Speed and bytes are shares of DDP's; gradients, bytes a step."""


def start(
    contender: Contender, part: Part, hosts: Hosts, gate: Path, port: int, steps: int, source: Path = ROOT / "src"
) -> Team:
    """Starts a contender's programs, a torchrun on each host, with Instep from `source`; they write into the folder of
    its gate's name there.
    """
    workers, folder = part.hosts * part.workers, f"{WORK}/{gate.parent.name}"
    ddp = {**DDP_OPTIONS, "bucket_cap_mb": contender.bucket_mb} if contender.bucket_mb else {}
    if part.microbatches > workers:
        ddp.pop("static_graph", None)  # which does not go with `no_sync`
    options = Options(
        address=str(gate),
        folder=folder,
        steps=steps,
        workers=workers,
        microbatches=part.microbatches,
        ddp=ddp,
        rule=contender.rule,
    )
    module, each = (TORCH, part.workers) if contender.bucket_mb else (INSTEP, 1)
    programs = []
    for host in hosts:
        (host.path() / gate.parent.name).mkdir()
        where = f"--nnodes {part.hosts} --node-rank {host.number} --nproc-per-node {each}"
        meeting = f"--master-addr {hosts[0].address} --master-port {port}"
        run = [sys.executable, "-m", "torch.distributed.run", *where.split(), *meeting.split(), "-m", module]
        given = {**host.environment, **THREADS, "PYTHONPATH": f"{ROOT}:{source}"}
        if contender.bucket_mb:
            given["GLOO_SOCKET_IFNAME"] = host.interface
        names = [f"{name}={value}" for name, value in given.items()]
        programs.append(host.entering(["env", "--ignore-environment", *names, *run, json.dumps(asdict(options))]))
    return Team(programs, workers, gate, dict(os.environ))


def measure(part: Part, rounds: int, steps: int) -> dict[str, Any]:
    """Seconds, bytes and processor seconds of a step of each contender, [rounds] each, and what they came to."""
    blocks = {contender: contender.block or steps for contender in part.contenders}
    wanted = Counter[str]()
    for contender, block in blocks.items():
        wanted[contender.program] += rounds * (block + 1)
    programs = {contender.program: contender for contender in part.contenders}
    with ExitStack() as stack:
        hosts, place = on_hosts(part.hosts, stack)
        teams: dict[str, Team] = {}
        for program, contender in programs.items():
            steps = contender.warm_up + wanted[program] + 1
            teams[program] = begin(contender, part, hosts, place, steps, len(teams), stack)
        for host in hosts if part.rate else ():
            hosts.shape(host.number, part.rate)
        for program, team in teams.items():
            team.admit()
            team.work(programs[program].warm_up)
        names = [contender.name for contender in part.contenders]
        found: dict[str, Any] = {kind: {name: [] for name in names} for kind in ("step_s", "sent_bytes", "cpu_s")}
        order = random.Random(0)
        for _ in range(rounds):
            for contender in order.sample(part.contenders, len(part.contenders)):
                for host in hosts if part.rate else ():
                    hosts.heal(host.number) if contender.free else hosts.shape(host.number, part.rate)
                name, block = contender.name, blocks[contender]
                sent, spent_s = _sent_bytes(hosts), cpu_s(hosts)
                stamps = teams[contender.program].work(block + 1)
                found["sent_bytes"][name].append((_sent_bytes(hosts) - sent) / (block + 1))
                found["cpu_s"][name].append((cpu_s(hosts) - spent_s) / (block + 1))
                found["step_s"][name].append(statistics.mean((each[-1] - each[1]) / block for each in stamps))
        for team in teams.values():
            team.finish()
        found["outcomes"] = {name: outcome(hosts, number) for number, name in enumerate(teams)}
    return found


def on_hosts(count: int, stack: ExitStack) -> tuple[Hosts, Path]:
    """So many, and a folder where they have nothing of their own."""
    place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-", dir=Path.home())))
    return stack.enter_context(Hosts(count, place / "outputs")), place


def begin(
    contender: Contender,
    part: Part,
    hosts: Hosts,
    place: Path,
    steps: int,
    number: int,
    stack: ExitStack,
    source: Path = ROOT / "src",
) -> Team:
    """As `start`, with what is drawn from a number that no other has."""
    gate = Path(place, str(number), "gate")
    gate.parent.mkdir()
    team = start(contender, part, hosts, gate, 29500 + number, steps, source)
    stack.callback(team.close)
    return team


def outcome(hosts: Hosts, number: int) -> dict[str, Any]:
    """What the team of this number has left."""
    found: dict[str, Any] = json.loads((hosts[0].path() / str(number) / "outcome-0.json").read_text())
    return found


def bytes_of_a_round() -> dict[str, Any]:
    """Of DiLoCo, and of as many steps in lockstep; in total and for each host."""
    part, lengths = Part(2, 1, 2), {f"diloco:{ROUND},wire=int4": (ROUND, 2 * ROUND), "synchronous": (10, 60)}
    found: dict[str, Any] = {}
    for rule, (few, many) in lengths.items():
        wires = []
        for steps in (few, many):
            with ExitStack() as stack:
                hosts, place = on_hosts(part.hosts, stack)
                team = begin(Contender(rule=rule), part, hosts, place, steps, 0, stack)
                team.admit()
                for done in range(0, steps - 1, 100):  # nobody waits for longer than for a block
                    team.work(min(100, steps - 1 - done))
                team.finish()
                wires.append(outcome(hosts, 0)["wire_bytes"])
        scale = ROUND / (many - few)
        by_host = [round(scale * (b["sent"] - a["sent"])) for a, b in zip(*wires, strict=True)]
        found[rule] = {"sent": sum(by_host), "by_host": by_host, "whole_runs": wires}
    narrow, lockstep = (each["sent"] for each in found.values())
    return {"found": found, "fewer bytes": round(lockstep / narrow, 1)}


def _sent_bytes(hosts: Hosts) -> int:
    return sum(host.traffic()[1] for host in hosts)


def cpu_s(hosts: Hosts) -> float:
    """Processor seconds of all that runs on these hosts."""
    found = 0.0
    for host in hosts:
        for pid in host.processes():
            with suppress(psutil.NoSuchProcess):
                times = psutil.Process(pid).cpu_times()
                found += times.user + times.system
    return found


def figures(part: Part, found: dict[str, Any], parameters: int) -> dict[str, Any]:
    """Medians over rounds, and Instep's as shares of the fastest DDP's in the same round."""
    seconds, sent = found["step_s"], found["sent_bytes"]
    best = min((c.name for c in part.contenders if c.bucket_mb), key=lambda name: statistics.median(seconds[name]))
    own = part.contenders[0].name
    table = {
        name: {
            "ms": round(1000 * statistics.median(seconds[name]), 2),
            "gradients_sent": round(statistics.median(sent[name]) / (4 * parameters), 3),
            "cpu_ms": round(1000 * statistics.median(found["cpu_s"][name]), 1),
        }
        for name in seconds
    }
    speed = ratio(seconds[best], seconds[own])
    return {
        "found": table,
        "best_ddp": best,
        "speed": {kind: round(value, 4) for kind, value in speed.items()},
        "rounds": len(seconds[own]),
        "bytes": round(statistics.median(a / b for a, b in zip(sent[own], sent[best], strict=True)), 4),
        "of free links'": _of_free(part, seconds),
        "objectives": {name: each["objective"] for name, each in found["outcomes"].items()},
    }


def _of_free(part: Part, seconds: dict[str, list[float]]) -> dict[str, float] | None:
    """Speed as a share of that over links that are not held, where that was measured."""
    free = [contender for contender in part.contenders if contender.free]
    if not free:
        return None
    found = ratio(seconds[free[0].name], seconds[free[0].program])
    return {kind: round(value, 4) for kind, value in found.items()}


def run_part(part: Part, most_rounds: int, most_steps: int, parameters: int) -> dict[str, Any]:
    """Measures a part, and prints its figures."""
    rounds, steps = min(most_rounds, part.most[0]), min(most_steps, part.most[1])
    found = figures(part, measure(part, rounds, steps), parameters)
    for contender, row in found["found"].items():
        cpu = f"{row['cpu_ms']:8.1f} ms of processors"
        print(f"  {contender:<58}{row['ms']:8.1f} ms a step{row['gradients_sent']:8.3f} gradients sent{cpu}")
    low, middle, high = (found["speed"][kind] for kind in ("low", "median", "high"))
    print(f"  speed {middle:.3f} ({low:.3f} to {high:.3f}) of {found['best_ddp']}, bytes {found['bytes']:.4f}")
    if (share := found["of free links'"]) is not None:
        print(
            f"  {share['median']:.3f} ({share['low']:.3f} to {share['high']:.3f}) of its own over links held to nothing"
        )
    return found


def value_of(found: dict[str, Any], kind: str) -> float:
    """A figure of a part that there is a target for."""
    match kind:
        case "gradients":
            return float(found["found"][Contender().name]["gradients_sent"])
        case "speed" | "of free links'":
            return float(found[kind]["median"])
    return float(found[kind])


def judge(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """What a part's figures should be, and whether they are; prints it."""
    judged: dict[str, Any] = {}
    for target, (bound, at_least) in TARGETS.items():
        kind, _, of = target.partition(", ")
        if of == name:
            value = value_of(found, kind)
            met = value >= bound if at_least else value <= bound
            judged[kind] = {"value": value, "at_least" if at_least else "at_most": bound, "met": met}
            print(f"  {target}: {value:.3f}, {'at least' if at_least else 'at most'} {bound}: {_told(met)}")
    return judged


def _told(met: bool) -> str:
    return "met" if met else "MISSED"


def source() -> str:
    """The commit that is measured."""
    git = [subprocess.run(["git", *which], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
           for which in (("rev-parse", "HEAD"), ("status", "--porcelain", "--", "src"))]  # fmt: skip
    return git[0] + (" and changes" if git[1] else "")


def keep(name: str, found: dict[str, Any], result: Path, **head: Any) -> None:
    """Puts a part's figures into the file of results, in the place of those of before."""
    parts = json.loads(result.read_text())["parts"] if result.exists() else {}
    parts[name] = found
    ordered = {each: parts[each] for each in (*PARTS, COUNTED) if each in parts}
    result.write_text(json.dumps({**head, "parts": ordered}, indent=1) + "\n")


def main() -> None:
    """Measures, prints and keeps the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    names = [*PARTS, COUNTED]
    parser.add_argument("--parts", nargs="+", choices=names, default=names)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=20, help="in a block")
    parser.add_argument("--result", type=Path, default=RESULT, help="the file that keeps them")
    given = parser.parse_args()
    from instep.models import GPT

    parameters = sum(each.numel() for each in GPT(**MODEL).parameters())
    work = {"model": MODEL, "parameters": parameters, "samples": SAMPLES, "context": CONTEXT}
    for name in given.parts:
        began = time.monotonic()
        measured: dict[str, Any] = {
            "commit": source(), "date": time.strftime("%Y-%m-%d", time.gmtime()), "machine": machine(),
            "threads": THREADS, "load": os.getloadavg(), "rounds": given.rounds, "steps": given.steps,
        }  # fmt: skip
        print(name)
        if name == COUNTED:
            found = bytes_of_a_round()
            print(f"  {found['fewer bytes']} times fewer than {ROUND} steps in lockstep: {found['found']}")
        else:
            found = run_part(PARTS[name], given.rounds, given.steps, parameters)
        measured["seconds"] = round(time.monotonic() - began)
        keep(name, {"measured": measured, **found, "targets": judge(name, found)}, given.result, work=work)
        sys.stdout.flush()


if __name__ == "__main__":
    main()
