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

The result goes to benchmarks/results/machines.json. The exit status does not depend on whether targets are met.
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
from support.hosts import WORK, Hosts  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "machines.json"

BUCKETS_MB = (1, 5, 25)
"""Sizes of DDP's buckets that are tried."""


@dataclass(frozen=True)
class Contender:
    """One way to do the work. `bucket_mb`: of DDP; 0 for Instep."""

    bucket_mb: int = 0

    @property
    def name(self) -> str:
        """Of the tables."""
        return f"DDP, buckets of {self.bucket_mb} MB" if self.bucket_mb else "Instep"


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


PARTS = {
    "2x1": Part(2, 1, 2),
    "2x2": Part(2, 2, 4),
    "2x2, M = 8": Part(2, 2, 8),
    "100 Mbit/s": Part(2, 1, 2, "100mbit", (5, 2)),
}

TARGETS = {
    "speed, 2x1": (1.03, True),
    "speed, 2x2": (1.15, True),
    "speed, 100 Mbit/s": (0.97, True),
    "bytes, 2x1": (1.02, False),
    "bytes, 2x2, M = 8": (0.69, False),
    "gradients, 2x2, M = 8": (2.05, False),
}
"""What each figure should be, and whether at least. Speed and bytes are shares of DDP's; gradients, bytes a step."""


def start(contender: Contender, part: Part, hosts: Hosts, gate: Path, port: int, steps: int) -> Team:
    """Starts a contender's programs, a torchrun on each host; they write into the folder of its gate's name there."""
    workers, folder = part.hosts * part.workers, f"{WORK}/{gate.parent.name}"
    ddp = {**DDP_OPTIONS, "bucket_cap_mb": contender.bucket_mb} if contender.bucket_mb else {}
    if part.microbatches > workers:
        ddp.pop("static_graph", None)  # which does not go with `no_sync`
    options = Options(
        address=str(gate), folder=folder, steps=steps, workers=workers, microbatches=part.microbatches, ddp=ddp
    )
    module, each = (TORCH, part.workers) if contender.bucket_mb else (INSTEP, 1)
    programs = []
    for host in hosts:
        (host.path() / gate.parent.name).mkdir()
        where = f"--nnodes {part.hosts} --node-rank {host.number} --nproc-per-node {each}"
        meeting = f"--master-addr {hosts[0].address} --master-port {port}"
        run = [sys.executable, "-m", "torch.distributed.run", *where.split(), *meeting.split(), "-m", module]
        given = {**host.environment, **THREADS, "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}"}
        if contender.bucket_mb:
            given["GLOO_SOCKET_IFNAME"] = host.interface
        names = [f"{name}={value}" for name, value in given.items()]
        programs.append(host.entering(["env", "--ignore-environment", *names, *run, json.dumps(asdict(options))]))
    return Team(programs, workers, gate, dict(os.environ))


def measure(part: Part, rounds: int, block: int) -> dict[str, Any]:
    """Seconds, bytes and processor seconds of a step of each contender, [rounds] each, and what they came to."""
    with tempfile.TemporaryDirectory(prefix="bench-", dir=Path.home()) as place, ExitStack() as stack:
        hosts = stack.enter_context(Hosts(part.hosts, Path(place, "outputs")))
        teams: dict[str, Team] = {}
        for number, contender in enumerate(part.contenders):
            gate = Path(place, str(number), "gate")  # where hosts have nothing of their own
            gate.parent.mkdir()
            steps = WARM_UP + rounds * (block + 1) + 1
            teams[contender.name] = start(contender, part, hosts, gate, 29500 + number, steps)
            stack.callback(teams[contender.name].close)
        for team in teams.values():
            team.admit()
            team.work(WARM_UP)
        for host in hosts if part.rate else ():
            hosts.shape(host.number, part.rate)
        found: dict[str, Any] = {kind: {name: [] for name in teams} for kind in ("step_s", "sent_bytes", "cpu_s")}
        order = random.Random(0)
        for _ in range(rounds):
            for name in order.sample(list(teams), len(teams)):
                sent, cpu_s = _sent_bytes(hosts), _cpu_s(hosts)
                stamps = teams[name].work(block + 1)
                found["sent_bytes"][name].append((_sent_bytes(hosts) - sent) / (block + 1))
                found["cpu_s"][name].append((_cpu_s(hosts) - cpu_s) / (block + 1))
                found["step_s"][name].append(statistics.mean((each[-1] - each[1]) / block for each in stamps))
        for team in teams.values():
            team.finish()
        found["outcomes"] = {
            contender.name: json.loads((hosts[0].path() / str(number) / "outcome-0.json").read_text())
            for number, contender in enumerate(part.contenders)
        }
    return found


def _sent_bytes(hosts: Hosts) -> int:
    return sum(host.traffic()[1] for host in hosts)


def _cpu_s(hosts: Hosts) -> float:
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
    own = Contender().name
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
        "objectives": {name: each["objective"] for name, each in found["outcomes"].items()},
    }


def main() -> None:
    """Measures, prints and writes the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=20, help="in a block")
    given = parser.parse_args()
    from instep.models import GPT

    parameters = sum(each.numel() for each in GPT(**MODEL).parameters())
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, check=True, capture_output=True, text=True)
    result: dict[str, Any] = {
        "machine": machine(), "commit": commit.stdout.strip(), "threads": THREADS, "load": os.getloadavg(),
        "work": {"model": MODEL, "parameters": parameters, "samples": SAMPLES, "context": CONTEXT},
        "rounds": given.rounds, "steps": given.steps, "parts": {},
    }  # fmt: skip
    for name in given.parts:
        part = PARTS[name]
        most_rounds, most_steps = part.most
        rounds, steps = min(given.rounds, most_rounds), min(given.steps, most_steps)
        found = figures(part, measure(part, rounds, steps), parameters)
        result["parts"][name] = found
        print(name)
        for contender, row in found["found"].items():
            cpu = f"{row['cpu_ms']:8.1f} ms of processors"
            print(f"  {contender:<24}{row['ms']:8.1f} ms a step{row['gradients_sent']:8.2f} gradients sent{cpu}")
        low, middle, high = (found["speed"][kind] for kind in ("low", "median", "high"))
        print(f"  speed {middle:.3f} ({low:.3f} to {high:.3f}) of {found['best_ddp']}, bytes {found['bytes']:.3f}")
        sys.stdout.flush()
    for name, (bound, at_least) in TARGETS.items():
        kind, _, of = name.partition(", ")
        if of not in result["parts"]:
            continue
        found = result["parts"][of]
        value = {"speed": found["speed"]["median"], "bytes": found["bytes"]}.get(
            kind, found["found"][Contender().name]["gradients_sent"]
        )
        met = value >= bound if at_least else value <= bound
        print(f"{name}: {value:.3f}, {'at least' if at_least else 'at most'} {bound}: {'met' if met else 'MISSED'}")
    if set(given.parts) == set(PARTS):
        RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
