"""A cluster of Ray's for tests: several of its nodes, all on this machine."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any

import pytest

from support.hosts import Command, Hosts
from support.patience import LONG_S
from support.processes import parent_of, wait_until

QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}


class RayCluster:
    """So many processors on each node, the first of which, with the GPUs, is that of commands here. Skips the test
    without Ray.
    """

    def __init__(self, *processors: int, gpus: int = 0):
        utils = pytest.importorskip("ray.cluster_utils", reason="Ray is not installed: pip install 'instep[ray]'")
        self._folder = tempfile.mkdtemp(prefix="ray-")  # short, as names of sockets must be
        self._mark = f"INSTEP_CLUSTER={uuid.uuid4()}"
        name, _, value = self._mark.partition("=")
        added = {**QUIET, name: value}
        os.environ.update(added)
        handler = signal.getsignal(signal.SIGTERM)
        os.makedirs("/tmp/ray", exist_ok=True)  # where Ray notes the cluster, and which it takes to be there
        try:
            first, *others = processors
            arguments = {"num_cpus": first, "num_gpus": gpus, "include_dashboard": False, "temp_dir": self._folder}
            self._cluster: Any = utils.Cluster(initialize_head=True, head_node_args=arguments)
            self._others = [self._cluster.add_node(num_cpus=each) for each in others]
        finally:
            signal.signal(signal.SIGTERM, handler)  # Ray has put its own in the place
            for each in added:
                del os.environ[each]
        self.environment = {"RAY_ADDRESS": self._cluster.address, "OMP_NUM_THREADS": "1"}

    def agents(self) -> list[int]:
        """The processes of a run that Ray's actors have started."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                ours = self._mark.encode() in (path / "environ").read_bytes().split(b"\0")
                if ours and b"instep.team.agent_process" in (path / "cmdline").read_bytes():
                    found.append(int(path.name))
        return found

    def actor(self) -> int:
        """The process of the one actor that has an agent."""
        found: set[int] = set()

        def one() -> bool:
            agents = self.agents()
            found.clear()
            found.update({parent_of(pid) for pid in agents} - {*agents, 0, 1})  # of one that ends, it is 0 or 1
            return len(found) == 1

        wait_until(one, LONG_S, "one actor that has an agent")
        return found.pop()

    def lose(self, node: int) -> None:
        """Kills one of the other nodes, with all that runs there."""
        self._cluster.remove_node(self._others.pop(node), allow_graceful=False)

    def nothing_runs(self) -> None:
        """Waits until no agent and no worker is left on any node."""
        wait_until(lambda: not self.agents(), LONG_S, "the end of all agents and workers")

    def close(self) -> None:
        self._cluster.shutdown()
        shutil.rmtree(self._folder, ignore_errors=True)


def started_on(hosts: Hosts, processors: int) -> list[Command]:
    """Ray on each of these hosts, one cluster, by its own command."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'instep[ray]'")
    found: list[Command] = []
    for host in hosts:
        how = (
            ["--head", "--port=6379", "--include-dashboard=false"]
            if not found
            else [f"--address={hosts[0].address}:6379"]
        )
        command = host.start(
            sys.executable, "-m", "ray.scripts.scripts", "start", *how, f"--node-ip-address={host.address}",
            f"--num-cpus={processors}", f"--object-store-memory={100 << 20}", "--block", **QUIET,
        )  # fmt: skip
        found.append(command)
        wait_until(lambda: "Ray runtime started" in found[-1].out or found[-1].process.poll() is not None, 240, "Ray")
        assert command.process.poll() is None, command.err
    return found
