"""Lockstep over two machines, against DDP over gloo on the same ones: ``python benchmarks/machines.py``, as root.

The machines are network namespaces of this one, joined by a bridge: links are real to the processes, processors are
shared. Each has one or two workers, started by torchrun; the work is that of ``benchmarks/lockstep.py``. All contenders
of a part are started first and take turns at a gate, in blocks of steps, in an order drawn anew for each round; the
first step of a block is not counted. DDP comes with its options for speed and buckets of several sizes; the fastest
counts. Bytes are those that the machines' interfaces have sent in the counted blocks, headers and all.

Parts
    2x1: a worker a machine, a microbatch each.
    2x2: two workers a machine, a microbatch each; ``2x2, M = 8``, two each, for the bytes.
    100 Mbit/s: as 2x1, each link held to that rate, each way.

The result goes to benchmarks/results/machines.json. The exit status does not depend on whether targets are met.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # run as a file, Python would look for modules in benchmarks/ itself

from benchmarks.gate import Team  # noqa: E402
from benchmarks.lockstep import DDP_OPTIONS, INSTEP, THREADS, TORCH, WARM_UP, machine  # noqa: E402
from benchmarks.work import CONTEXT, MODEL, SAMPLES, Options  # noqa: E402

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
    """Machines, workers on each, microbatches of a step, and the rate of each link, "" for no limit."""

    machines: int
    workers: int
    microbatches: int
    rate: str = ""
    contenders: tuple[Contender, ...] = field(default=(Contender(), *(Contender(size) for size in BUCKETS_MB)))


PARTS = {
    "2x1": Part(2, 1, 2),
    "2x2": Part(2, 2, 4),
    "2x2, M = 8": Part(2, 2, 8),
    "100 Mbit/s": Part(2, 1, 2, "100mbit"),
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


class Machines:
    """So many namespaces on a bridge, each with an interface ``eth0`` and a loopback."""

    def __init__(self, count: int):
        token = secrets.token_hex(2)
        self.names = [f"ib{token}m{number}" for number in range(count)]
        self._bridge, self._ends = f"ib{token}", [f"ib{token}v{number}" for number in range(count)]
        subnet = f"10.{secrets.randbelow(100) + 100}.{secrets.randbelow(250)}"
        self.addresses = [f"{subnet}.{number + 1}" for number in range(count)]

    @contextmanager
    def up(self) -> Iterator[Machines]:
        """In the block, they are there."""
        try:
            _ip(f"link add {self._bridge} type bridge")
            _ip(f"link set {self._bridge} up")
            for name, end, address in zip(self.names, self._ends, self.addresses, strict=True):
                _ip(f"netns add {name}")
                _ip(f"link add {end} type veth peer name eth0 netns {name}")
                _ip(f"link set {end} master {self._bridge} up")
                _ip(f"-n {name} addr add {address}/24 dev eth0")
                _ip(f"-n {name} link set eth0 up")
                _ip(f"-n {name} link set lo up")
            yield self
        finally:
            for name in self.names:
                subprocess.run(["ip", "netns", "del", name], check=False, stderr=subprocess.DEVNULL)
            subprocess.run(["ip", "link", "del", self._bridge], check=False, stderr=subprocess.DEVNULL)

    def shape(self, rate: str) -> None:
        """Holds what each sends to this rate."""
        for name in self.names:
            shaper = f"qdisc replace dev eth0 root tbf rate {rate} burst 256k latency 50ms"
            subprocess.run(["tc", "-n", name, *shaper.split()], check=True)

    def sent_bytes(self) -> int:
        """Bytes that all have sent so far."""
        counts = (Path(f"/sys/class/net/{end}/statistics/rx_bytes").read_text() for end in self._ends)
        return sum(int(count) for count in counts)  # what comes in at the bridge's end of the cable


def _ip(command: str) -> None:
    subprocess.run(["ip", *command.split()], check=True)


def start(contender: Contender, part: Part, machines: Machines, folder: Path, port: int, steps: int) -> Team:
    """Starts a contender's programs, a torchrun on each machine."""
    folder.mkdir()
    workers = part.machines * part.workers
    ddp = {**DDP_OPTIONS, "bucket_cap_mb": contender.bucket_mb} if contender.bucket_mb else {}
    if part.microbatches > workers:
        ddp.pop("static_graph", None)  # which does not go with `no_sync`
    options = Options(
        address=str(folder / "gate"), folder=str(folder), steps=steps, workers=workers,
        microbatches=part.microbatches, ddp=ddp,
    )  # fmt: skip
    module, each = (TORCH, part.workers) if contender.bucket_mb else (INSTEP, 1)
    programs = []
    for number, name in enumerate(machines.names):
        where = f"--nnodes {part.machines} --node-rank {number} --nproc-per-node {each}"
        meeting = f"--master-addr {machines.addresses[0]} --master-port {port}"
        run = [sys.executable, "-m", "torch.distributed.run", *where.split(), *meeting.split(), "-m", module]
        programs.append(["ip", "netns", "exec", name, *run, json.dumps(asdict(options))])
    environment = {**os.environ, **THREADS, "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}"}
    if contender.bucket_mb:
        environment["GLOO_SOCKET_IFNAME"] = "eth0"
    return Team(programs, workers, folder / "gate", environment)


def measure(part: Part, rounds: int, block: int) -> dict[str, Any]:
    """Seconds and bytes of a step of each contender, [rounds] each, and what they came to."""
    machines = Machines(part.machines)
    with tempfile.TemporaryDirectory(prefix="bench-") as place, ExitStack() as stack:
        stack.enter_context(machines.up())
        steps = WARM_UP + rounds * (block + 1) + 1
        teams: dict[str, Team] = {}
        for number, contender in enumerate(part.contenders):
            folder = Path(place, str(number))
            teams[contender.name] = start(contender, part, machines, folder, 29500 + number, steps)
            stack.callback(teams[contender.name].close)
        for team in teams.values():
            team.admit()
            team.work(WARM_UP)
        if part.rate:
            machines.shape(part.rate)
        seconds: dict[str, list[float]] = {name: [] for name in teams}
        sent: dict[str, list[float]] = {name: [] for name in teams}
        order = random.Random(0)
        for _ in range(rounds):
            for name in order.sample(list(teams), len(teams)):
                before = machines.sent_bytes()
                stamps = teams[name].work(block + 1)
                sent[name].append((machines.sent_bytes() - before) / (block + 1))
                seconds[name].append(statistics.mean((each[-1] - each[1]) / block for each in stamps))
        for team in teams.values():
            team.finish()
        outcomes = {
            contender.name: json.loads(Path(place, str(number), "outcome-0.json").read_text())
            for number, contender in enumerate(part.contenders)
        }
    return {"step_s": seconds, "sent_bytes": sent, "outcomes": outcomes}


def figures(part: Part, found: dict[str, Any], parameters: int) -> dict[str, Any]:
    """Medians over rounds, and Instep's as shares of the fastest DDP's in the same round."""
    seconds, sent = found["step_s"], found["sent_bytes"]
    best = min((c.name for c in part.contenders if c.bucket_mb), key=lambda name: statistics.median(seconds[name]))
    own = Contender().name
    table = {
        name: {
            "ms": round(1000 * statistics.median(seconds[name]), 2),
            "gradients_sent": round(statistics.median(sent[name]) / (4 * parameters), 3),
        }
        for name in seconds
    }
    speed = [other / mine for mine, other in zip(seconds[own], seconds[best], strict=True)]
    low, middle, high = statistics.quantiles(speed, n=4, method="inclusive")
    return {
        "found": table,
        "best_ddp": best,
        "speed": {"median": round(middle, 4), "low": round(low, 4), "high": round(high, 4)},
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
    result: dict[str, Any] = {
        "machine": machine(),
        "work": {"model": MODEL, "parameters": parameters, "samples": SAMPLES, "context": CONTEXT},
        "rounds": given.rounds, "steps": given.steps, "parts": {},
    }  # fmt: skip
    for name in given.parts:
        part = PARTS[name]
        found = figures(part, measure(part, given.rounds, given.steps), parameters)
        result["parts"][name] = found
        print(name)
        for contender, row in found["found"].items():
            print(f"  {contender:<24}{row['ms']:8.1f} ms a step{row['gradients_sent']:8.2f} gradients sent")
        print(f"  speed {found['speed']['median']:.3f} of {found['best_ddp']}, bytes {found['bytes']:.3f}", flush=True)
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
