"""Cases of one recipe on several hosts, and what they come to; torchrun, or what srun sets, has started the agents."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, product
from pathlib import Path
from typing import Any, Literal

from support import workloads
from support.hosts import WORK, Command, Host, Hosts

Launcher = Literal["c10d", "static", "srun"]
"""torchrun with one of its two ways to meet, or srun, of which there is only the environment."""

PROGRAM = Path(__file__).with_name("trains_there.py")
ANSWER_S = 1000


@dataclass(frozen=True)
class Session:
    """What starts the agents. agents: on each host."""

    hosts: int
    launcher: Launcher
    agents: int


@dataclass(frozen=True)
class Case:
    """One run. More agents than workers: the last stand by."""

    session: Session
    model: str
    workers: int

    @property
    def folder(self) -> str:
        """Of the run."""
        return f"{self.model}-{self.workers}"

    def line(self) -> dict[str, Any]:
        """For a file of results."""
        session = self.session
        return {"hosts": session.hosts, "workers": self.workers, "model": self.model, "launcher": session.launcher,
                "agents_a_host": session.agents}  # fmt: skip


WORKERS = [2, 3, 5, 8]
SESSIONS = [Session(*each) for each in product([2, 3], ["c10d", "static", "srun"], [1, 2])]  # type: ignore[arg-type]
ALL = [Case(session, model, workers) for session in SESSIONS for model in workloads.ALL for workers in WORKERS]


@dataclass(frozen=True)
class Found:
    """What a run has come to: digests by version, of those after which it began, and whether all agents agree."""

    digests: dict[int, str]
    agree: bool


def sessions(cases: Iterable[Case]) -> list[tuple[Session, list[Case]]]:
    """Cases that follow each other and have the same agents, together."""
    return [(session, list(those)) for session, those in groupby(cases, lambda case: case.session)]


def train_cases(hosts: Hosts, cases: Sequence[Case], *, resumed: bool = False, forked: bool = True) -> list[Found]:
    """Runs of one session, one after the other. Fails if one does. `resumed`: their folders are there.

    forked: what Instep starts is forked from the program, without the seconds of a new Python.
    """
    ((session, _),) = sessions(cases)
    runs = [[case.model, case.workers, case.folder, resumed] for case in cases]
    wanted = json.dumps({"forked": forked, "runs": runs})
    commands = [command for host in hosts for command in _start(hosts, host, session, wanted)]
    ended = [command.ends(ANSWER_S) for command in commands]
    assert not any(ended), [command.err for command in commands]
    lines = [json.loads(line) for command in commands for line in command.out.splitlines() if line.startswith("{")]
    return [_found(session, [line for line in lines if line["folder"] == case.folder]) for case in cases]


def trained(hosts: Hosts, *arguments: str) -> list[Command]:
    """``instep train gpt`` with these arguments, started by torchrun on each host."""
    meet = f"--nnodes {len(hosts)} --nproc-per-node 1 --master-addr {hosts[0].name} --master-port 29400"
    return [
        host.start(
            sys.executable, "-m", "torch.distributed.run", *meet.split(), "--node-rank", str(host.number),
            "-m", "instep", "train", "gpt", *arguments,
        )
        for host in hosts
    ]  # fmt: skip


def _found(session: Session, answers: Sequence[dict[str, Any]]) -> Found:
    (digests,) = (dict(answer["steps"]) for answer in answers if answer["steps"])
    same = {(answer["digest"], answer["items"]) for answer in answers} == {(digests[max(digests)], answers[0]["items"])}
    return Found(digests, same and len(answers) == session.hosts * session.agents)


def _start(hosts: Hosts, host: Host, session: Session, wanted: str) -> list[Command]:
    """The commands of a host."""
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"/tmp/hook:{WORK}:{PROGRAM.parents[1]}"}
    if session.launcher == "srun":
        return [
            host.start(sys.executable, str(PROGRAM), wanted, **environment, **_by_srun(hosts, host, session, local))
            for local in range(session.agents)
        ]
    meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{hosts[0].name}:29400"]
    if session.launcher == "static":
        meet = ["--node-rank", str(host.number), "--master-addr", hosts[0].name, "--master-port", "29400"]
    return [
        host.start(
            sys.executable, "-m", "torch.distributed.run", "--nnodes", str(session.hosts), "--nproc-per-node",
            str(session.agents), *meet, str(PROGRAM), wanted, **environment,
        )
    ]  # fmt: skip


def _by_srun(hosts: Hosts, host: Host, session: Session, local: int) -> dict[str, str]:
    return {
        "INSTEP_SECRET": "of agents in a test", "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0",
        "SLURM_PROCID": str(host.number * session.agents + local), "SLURM_LOCALID": str(local),
        "SLURM_NTASKS": str(session.hosts * session.agents), "SLURM_NODEID": str(host.number),
        "SLURM_TASKS_PER_NODE": f"{session.agents}(x{session.hosts})",
        "SLURM_JOB_NODELIST": ",".join(each.name for each in hosts),
    }  # fmt: skip
