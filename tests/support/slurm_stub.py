"""What stands in for Slurm's `sbatch` and `srun` in tests: `python slurm_stub.py sbatch|srun ARGUMENTS`.

An option that Slurm does not know is refused. Tasks get the variables that Slurm sets, and signals as it sends them.
The environment's STUB_HOSTS names the hosts: JSON, of each its name and the words that run a command there.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_COMMON = {
    "account": str, "chdir": str, "cpus-per-task": int, "exclusive": None, "gpus-per-task": str, "gres": str,
    "job-name": str, "mem": str, "no-kill": None, "nodes": int, "ntasks": int, "ntasks-per-node": int, "partition": str,
    "signal": str, "time": str,
}  # fmt: skip
_OPTIONS: dict[str, dict[str, Any]] = {
    "sbatch": {**_COMMON, "error": str, "open-mode": str, "output": str, "requeue": None, "wait": None},
    "srun": {**_COMMON, "distribution": str, "export": str, "kill-on-bad-exit": str, "label": None, "unbuffered": None},
}

_TWICE_S = 60.0
"""Within which `srun` must get a second SIGINT to send it on: the real one's second may pass on a loaded machine."""


def _parsed(program: str, words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(program, allow_abbrev=False, add_help=False)
    for name, kind in _OPTIONS[program].items():
        parser.add_argument(f"--{name}", **({"action": "store_true"} if kind is None else {"type": kind}))
    parser.add_argument("command", nargs=argparse.REMAINDER)
    return parser.parse_args(words)


def sbatch(words: Sequence[str]) -> int:
    """Runs a script with a job's variables, as its first host does."""
    script = Path(_parsed("sbatch", words).command[0])
    lines = script.read_text().splitlines()
    assert lines[0].startswith("#!"), "This does not look like a batch script."
    directives = [word for line in lines if line.startswith("#SBATCH ") for word in line.split("#")[1].split()[1:]]
    given, hosts = _parsed("sbatch", [*directives, *words]), json.loads(os.environ["STUB_HOSTS"])
    nodes, each = given.nodes or 1, given.ntasks_per_node or 1
    assert nodes == len(hosts), "the test has other hosts than the script asks for"
    names = ",".join(name for name, _ in hosts)
    job = {
        "SLURM_JOB_ID": "4711", "SLURM_JOBID": "4711", "SLURM_JOB_NODELIST": names, "SLURM_NODELIST": names,
        "SLURM_JOB_NAME": given.job_name or script.name, "SLURM_NNODES": nodes, "SLURM_JOB_NUM_NODES": nodes,
        "SLURM_NTASKS": nodes * each, "SLURM_NPROCS": nodes * each, "SLURM_NTASKS_PER_NODE": each,
        "SLURM_TASKS_PER_NODE": f"{each}(x{nodes})", "SLURM_PROCID": 0, "SLURM_LOCALID": 0, "SLURM_NODEID": 0,
        "SLURM_SUBMIT_DIR": os.getcwd(),
    }  # fmt: skip
    if given.cpus_per_task:
        job["SLURM_CPUS_PER_TASK"] = given.cpus_per_task
    return subprocess.run(
        ["bash", str(script)], env={**os.environ, **{name: str(value) for name, value in job.items()}}, check=False
    ).returncode


def srun(words: Sequence[str]) -> int:
    """Runs a command as the tasks of a job's step, on its hosts. Returns the greatest exit status."""
    given, hosts = _parsed("srun", words), json.loads(os.environ["STUB_HOSTS"])
    count = given.ntasks or int(os.environ.get("SLURM_NTASKS", len(hosts)))
    share = [count // len(hosts) + (node < count % len(hosts)) for node in range(len(hosts))]
    if "SLURM_CPUS_PER_TASK" in os.environ and given.cpus_per_task is None:
        print("srun: the tasks have one processor each, for srun takes no number from sbatch", file=sys.stderr)
    tasks = []
    for node, (name, entering) in enumerate(hosts):
        for local in range(share[node]):
            variables = _of_task(len(tasks), node, local, share, hosts)
            command = [*entering, "env", *(f"{key}={value}" for key, value in variables.items()), *given.command]
            tasks.append((name, subprocess.Popen(command, env=_passed_on(), start_new_session=True)))
    _pass_signals_on([process for _, process in tasks])
    statuses = []
    for number, (name, process) in enumerate(tasks):
        status = process.wait()
        if status:
            how = signal.strsignal(-status) if status < 0 else f"Exited with exit code {status}"
            print(f"srun: error: {name}: task {number}: {how}", file=sys.stderr, flush=True)
        statuses.append(128 - status if status < 0 else status)
    return max(statuses)


def _of_task(task: int, node: int, local: int, share: list[int], hosts: list[Any]) -> dict[str, object]:
    job = os.environ.get("SLURM_JOB_ID", "4711")
    names, per_node = ",".join(name for name, _ in hosts), ",".join(map(str, share))
    return {
        "SLURM_JOB_ID": job, "SLURM_JOBID": job, "SLURM_STEP_ID": 0, "SLURM_STEPID": 0, "SLURM_PROCID": task,
        "SLURM_LOCALID": local, "SLURM_NODEID": node, "SLURM_NTASKS": sum(share), "SLURM_NPROCS": sum(share),
        "SLURM_STEP_NUM_TASKS": sum(share), "SLURM_NNODES": len(hosts), "SLURM_STEP_NUM_NODES": len(hosts),
        "SLURM_JOB_NUM_NODES": len(hosts), "SLURM_JOB_NODELIST": names, "SLURM_NODELIST": names,
        "SLURM_STEP_NODELIST": names, "SLURM_TASKS_PER_NODE": per_node, "SLURM_STEP_TASKS_PER_NODE": per_node,
        "SLURMD_NODENAME": hosts[node][0], "SLURM_DISTRIBUTION": "block", "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1",
    }  # fmt: skip


def _passed_on() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("STUB_")}


def _pass_signals_on(processes: list[subprocess.Popen[bytes]]) -> None:
    interrupted = [-_TWICE_S]

    def send(number: int, _: object) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and now - interrupted[0] > _TWICE_S:
            interrupted[0] = now
            print("srun: interrupt (one more within 1 sec to abort)", file=sys.stderr, flush=True)
            return
        for process in processes:
            for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
                os.kill(int(child), number)  # the task itself: what has entered the host waits for it

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, send)


if __name__ == "__main__":
    sys.exit({"sbatch": sbatch, "srun": srun}[sys.argv[1]](sys.argv[2:]))
