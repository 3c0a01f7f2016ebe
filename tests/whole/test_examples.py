"""What lies in examples/, as it stands, with namespaces for hosts and stubs for schedulers."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.hosts import WORK, Command, Host, Hosts
from support.patience import LONG_S
from support.processes import command_of, wait_until
from support.slurm import Slurm, Submitted

pytestmark = [pytest.mark.processes, pytest.mark.slow]

EXAMPLES = Path(__file__).parents[2] / "examples"

TRAINER = {
    "args": list, "command": list, "env": list, "image": str, "numNodes": int, "numProcPerNode": int,
    "resourcesPerNode": {"limits": dict, "requests": dict},
}  # fmt: skip
TRAIN_JOB = {
    "apiVersion": str,
    "kind": str,
    "metadata": {"name": str, "namespace": str, "labels": dict, "annotations": dict},
    "spec": {
        "runtimeRef": {"name": str, "apiGroup": str, "kind": str}, "initializer": dict, "trainer": TRAINER,
        "runtimePatches": list, "suspend": bool, "activeDeadlineSeconds": int, "managedBy": str,
    },
}  # fmt: skip
"""The fields of Kubeflow Trainer's v1alpha1."""


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with Hosts(2, tmp_path_factory.mktemp("hosts")) as found:
        for example in EXAMPLES.iterdir():
            found.put({f"examples/{example.name}": example.read_bytes()})
        yield found


def installed(host: Host) -> dict[str, str]:
    """An environment that has torchrun and instep, of this Python."""
    for program, module in (("torchrun", "torch.distributed.run"), ("instep", "instep")):
        file = host.path() / "bin" / program
        file.parent.mkdir(exist_ok=True)
        file.write_text(f'#!/bin/sh\nexec {sys.executable} -m {module} "$@"\n')
        file.chmod(0o755)
    return {"PATH": f"{WORK}/bin:{host.environment['PATH']}", "OMP_NUM_THREADS": "1"}


def trains(hosts: Hosts, run: str, commands: Sequence[Command | Submitted], beyond: int = 0) -> None:
    """Waits for updates beyond so many, and ends the run as a scheduler does, by a SIGTERM for all."""
    tape = hosts[0].path() / run / "tape.jsonl"

    def trained() -> bool:
        assert all(command.process.poll() is None for command in commands), [command.err for command in commands]
        return tape.exists() and tape.read_text().count('"kind": "merged"') > beyond + 1

    wait_until(trained, LONG_S, "updates")
    for host in hosts:
        for pid in host.processes():
            if "instep\0train" in command_of(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)


def saved(hosts: Hosts, run: str) -> int:
    """The steps of a run that was ended, which is all right, and of which nothing is left."""
    result = json.loads((hosts[0].path() / run / "result.json").read_text())
    assert result["interrupted"]
    assert not (hosts[1].path() / run).exists()
    wait_until(lambda: not any(host.processes() for host in hosts), 60, "the end of all processes")
    assert "the replay is exact" in hosts[0].run(sys.executable, "-m", "instep", "replay", run, OMP_NUM_THREADS="1")
    return int(result["steps"])


def test_slurms_script_is_saved_before_its_time_ends_and_goes_on_in_the_next_job(hosts: Hosts, tmp_path: Path) -> None:
    """Without a folder of the run on the second node."""
    slurm = Slurm(hosts, tmp_path / "slurm")
    slurm.share_home()
    steps = 0
    for _ in range(2):
        job = slurm.start("sbatch", "--wait", "examples/slurm.sh")
        trains(hosts, "runs/gpt-4711", [job], steps)
        assert job.ends() in (130, 143), job.err
        assert "one processor each" not in job.err
        before, steps = steps, saved(hosts, "runs/gpt-4711")
        assert steps > before


def test_a_shell_on_each_of_two_hosts_starts_one_run(hosts: Hosts) -> None:
    commands = [
        host.start("bash", "examples/two_hosts.sh", str(host.number), hosts[0].name, **installed(host))
        for host in hosts
    ]
    trains(hosts, "runs/two-hosts", commands)
    for command in commands:
        command.ends()
    assert saved(hosts, "runs/two-hosts") > 0


def test_the_manifest_for_kubernetes_has_its_fields_and_starts_one_run(hosts: Hosts) -> None:
    manifest = yaml.safe_load((EXAMPLES / "trainjob.yaml").read_text())
    check(manifest, TRAIN_JOB, "")
    assert (manifest["apiVersion"], manifest["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    assert manifest["spec"]["runtimeRef"] == {"name": "torch-distributed"}
    trainer = manifest["spec"]["trainer"]
    assert trainer["numNodes"] == len(hosts)
    pods = [  # with the variables that the runtime sets for torchrun
        host.start(
            *trainer["command"], *trainer["args"], PET_NNODES=str(len(hosts)), PET_NODE_RANK=str(host.number),
            PET_NPROC_PER_NODE=str(trainer["numProcPerNode"]), PET_MASTER_ADDR=hosts[0].name, PET_MASTER_PORT="29500",
            **installed(host),
        )
        for host in hosts
    ]  # fmt: skip
    trains(hosts, "runs/gpt", pods)
    for pod in pods:
        pod.ends()
    assert saved(hosts, "runs/gpt") > 0


def check(value: Any, wanted: Any, where: str) -> None:
    """Fails where a manifest has a field that its kind has not, or one of another type."""
    if not isinstance(wanted, Mapping):
        assert isinstance(value, wanted), where
        return
    for name, each in value.items():
        assert name in wanted, f"there is no field {where}.{name}"
        check(each, wanted[name], f"{where}.{name}")
