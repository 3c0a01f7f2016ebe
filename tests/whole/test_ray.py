"""Agents that Ray starts: the same bits on several of its nodes, and one clean end for all."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.hosts import WORK, Command, Hosts
from support.patience import LONG_S
from support.processes import INSTEP, MODULE, RECIPE, Started, command_of, complaint, wait_until
from support.ray_cluster import RayCluster, started_on

pytestmark = [pytest.mark.processes, pytest.mark.slow]

EXAMPLES = Path(__file__).parents[2] / "examples"
ENDLESS = ["--steps", "1000000", "--team.checkpoint_every", "20"]

SCRIPT = """\
import instep, ray
def squares(model, batch):
    return (model(batch[0]) - batch[1]).square().sum()
if __name__ == "__main__":
    ray.init(log_to_driver=False, logging_level="ERROR")
    recipe = instep.Recipe(model="mymodel:Net", objective=squares, data="mymodel:numbers", batch=8, microbatches=4,
                           steps=10)
    events = []
    run = instep.train(recipe, team=instep.Team(workers=3, launcher="ray"), monitors=[events.append])
    alone = instep.train(recipe, team=instep.Team(workers=1))
    print(run.digest == alone.digest, run.path.name, len(events) > 3, ray.is_initialized(), run.agent)
"""


GPUS = """\
import instep
from instep.team.ray_nodes import ray_nodes
with ray_nodes(instep.Team(workers=2, device="cuda", launcher="ray")) as nodes:
    print(nodes.environment, nodes.place)
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    found = RayCluster(3, 3)
    yield found
    found.close()


@pytest.fixture
def two() -> Iterator[RayCluster]:
    found = RayCluster(3, 3)
    yield found
    found.close()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "mymodel.py").write_text(MODULE)
    (tmp_path / "my.toml").write_text(RECIPE.replace("microbatches = 4", "microbatches = 8"))
    return tmp_path


def train(project: Path, cluster: RayCluster, *arguments: str, **environment: str) -> Started:
    # Unless the test says otherwise, a machine with much to do loses no host.
    lease = [] if "--team.lease_s" in arguments else ["--team.lease_s", "60"]
    command = [*INSTEP, "train", "my.toml", "--team.launcher", "ray", "--out", "run", *lease, *arguments]
    return Started(command, project, **{**cluster.environment, **environment})


def begun(project: Path, started: Started, updates: int = 1) -> None:
    """Waits for so many updates."""
    tape = project / "run" / "tape.jsonl"
    wait_until(lambda: tape.exists() and tape.read_text().count('"merged"') >= updates, 240, "updates", started)


def told(project: Path, kind: str) -> list[dict[str, Any]]:
    """The tape's events of this kind."""
    events = map(json.loads, (project / "run" / "tape.jsonl").read_text().splitlines())
    return [event for event in events if event["kind"] == kind]


def hosts(project: Path) -> list[list[int]]:
    """The workers of each host, in each start of the team."""
    return [[each["workers"] for each in event["hosts"]] for event in told(project, "run_started")]


def result(project: Path, run: str = "run") -> dict[str, object]:
    found: dict[str, object] = json.loads((project / run / "result.json").read_text())
    return found


def digest_of_one(project: Path, *arguments: str) -> object:
    alone = Started([*INSTEP, "train", "my.toml", "--workers", "1", "--out", "alone", *arguments], project)
    assert alone.ends() == 0, alone.err
    return result(project, "alone")["digest"]


def test_workers_on_rays_nodes_give_the_digest_of_one_process(project: Path, cluster: RayCluster) -> None:
    alone = digest_of_one(project)
    for workers, shares in (("2", [1, 1]), ("3", [1, 2])):
        started = train(project, cluster, "--workers", workers)
        assert started.ends(240) == 0, started.err
        cluster.nothing_runs()
        assert (result(project)["digest"], hosts(project)) == (alone, [shares])
        assert all("waited" in line for line in started.err.splitlines()), "until the run before has left its nodes"
        os.rename(project / "run", project / workers)


def test_without_workers_each_of_rays_nodes_has_one(project: Path, cluster: RayCluster) -> None:
    started = train(project, cluster, "--steps", "2")
    assert started.ends(240) == 0, started.err
    assert hosts(project) == [[1, 1]]
    assert started.err.startswith("instep: 2 workers, ")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_at_the_command_saves_and_ends_all(project: Path, cluster: RayCluster, number: int) -> None:
    started = train(project, cluster, "--workers", "3", *ENDLESS)
    begun(project, started)
    os.kill(started.process.pid, number)
    assert started.ends(240) in (130, 143), started.err
    cluster.nothing_runs()
    found = result(project)
    assert found["interrupted"]
    assert (project / "run" / "checkpoints" / f"step-{found['steps']:08}").exists()


def test_a_command_that_is_killed_leaves_no_agent_and_no_worker(project: Path, cluster: RayCluster) -> None:
    started = train(project, cluster, "--workers", "3", *ENDLESS)
    begun(project, started)
    assert cluster.agents()
    started.process.kill()
    cluster.nothing_runs()
    started.ends()


def test_an_actor_that_dies_is_started_again_and_the_bits_stay(project: Path, cluster: RayCluster) -> None:
    steps = ["--steps", "120", "--team.checkpoint_every", "5"]
    alone = digest_of_one(project, *steps)
    started = train(project, cluster, "--workers", "3", *steps, "--team.when_lost", "wait", PAUSE_S="0.05")
    begun(project, started, 10)
    os.kill(cluster.actor(), signal.SIGKILL)
    assert started.ends(240) == 0, started.err
    cluster.nothing_runs()
    assert hosts(project) == [[1, 2], [1, 2]]
    assert result(project)["digest"] == alone


def test_the_others_take_over_from_a_node_of_rays_that_is_lost(project: Path, two: RayCluster) -> None:
    steps = ["--steps", "120", "--team.checkpoint_every", "5"]
    alone = digest_of_one(project, *steps)
    started = train(project, two, "--workers", "3", *steps, "--team.lease_s", "5", PAUSE_S="0.05")
    begun(project, started, 10)
    two.lose(0)
    assert started.ends(240) == 0, started.err
    two.nothing_runs()
    assert hosts(project)[0] == [1, 2]
    assert hosts(project)[-1] == [3] or told(project, "regrouped"), "they start again, or go on as they are"
    assert result(project)["digest"] == alone


def test_more_workers_than_rays_processors_are_refused_with_what_there_is(project: Path, cluster: RayCluster) -> None:
    started = train(project, cluster, "--workers", "8")
    assert started.ends(240) == 1
    told = complaint(started)
    assert "8 workers need a processor each" in told
    assert told.count(" 3") == 2, "what each node has"
    assert not (project / "run").exists()


def test_what_others_use_is_awaited_and_then_told(project: Path, cluster: RayCluster) -> None:
    first = train(project, cluster, "--workers", "6", *ENDLESS)
    begun(project, first)
    command = [*INSTEP, "train", "my.toml", "--team.launcher", "ray", "--workers", "2", "--team.join_timeout_s", "2"]
    second = Started(command, project, **cluster.environment)
    assert second.ends(240) == 1
    assert "2 nodes of Ray's with 1 processors each were not free" in complaint(second)
    first.press_ctrl_c()
    first.ends(240)


def test_a_program_of_rays_trains_by_it_and_gets_the_run(project: Path, cluster: RayCluster) -> None:
    (project / "train.py").write_text(SCRIPT)
    started = Started([sys.executable, "train.py"], project, **cluster.environment)
    assert started.ends(240) == 0, started.err
    assert started.out.splitlines()[-1] == "True custom True True 0"
    cluster.nothing_runs()


def test_the_first_agent_has_the_gpus_that_ray_reserves_for_it(project: Path) -> None:
    """Which need not be there for that."""
    cluster = RayCluster(2, gpus=3)
    try:
        (project / "gpus.py").write_text(GPUS)
        started = Started([sys.executable, "gpus.py"], project, **cluster.environment)
        assert started.ends(240) == 0, started.err
        assert started.out.strip() == "{'CUDA_VISIBLE_DEVICES': '0,1'} None"
    finally:
        cluster.close()


def test_without_a_cluster_ray_is_started_for_the_run(project: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'instep[ray]'")
    command = [*INSTEP, "train", "my.toml", "--team.launcher", "ray", "--workers", "5", "--out", "run"]
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:  # short, as of sockets
        started = Started(command, project, RAY_ADDRESS="local", RAY_TMPDIR=folder)
        assert started.ends(240) == 0, started.err
    assert result(project)["digest"] == digest_of_one(project)


@pytest.fixture(scope="module")
def two_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """With a cluster of Ray's on both."""
    with Hosts(2, tmp_path_factory.mktemp("hosts")) as found:
        found.put({"mymodel.py": MODULE, "my.toml": RECIPE, "examples/ray.sh": (EXAMPLES / "ray.sh").read_bytes()})
        started_on(found, 8)
        yield found


def test_ray_on_two_hosts_gives_the_digest_of_one_process(two_hosts: Hosts) -> None:
    digests = []
    for name, arguments in {"run": ["--workers", "3", "--team.launcher", "ray"], "alone": ["--workers", "1"]}.items():
        command = [sys.executable, "-m", "instep", "train", "my.toml", *arguments, "--out", name]
        two_hosts[0].run(*command, within_s=240, OMP_NUM_THREADS="1")
        digests.append(result(two_hosts[0].path(), name)["digest"])
    assert digests[0] == digests[1]
    assert hosts(two_hosts[0].path()) == [[1, 2]]
    assert not (two_hosts[1].path() / "run").exists()


def test_the_example_for_ray_trains_on_two_hosts_and_goes_on_where_it_stands(two_hosts: Hosts) -> None:
    here = two_hosts[0].path()
    file = here / "bin" / "instep"
    file.parent.mkdir()
    file.write_text(f'#!/bin/sh\nexec {sys.executable} -m instep "$@"\n')
    file.chmod(0o755)
    tape, before = here / "runs" / "ray" / "tape.jsonl", 0
    for _ in range(2):
        path = f"{WORK}/bin:{two_hosts[0].environment['PATH']}"
        command = two_hosts[0].start("bash", "examples/ray.sh", PATH=path, OMP_NUM_THREADS="1")

        def trained(command: Command = command, beyond: int = before) -> bool:
            assert command.process.poll() is None, command.err
            return tape.exists() and tape.read_text().count('"merged"') > beyond + 1

        wait_until(trained, 240, "updates")
        for host in two_hosts:
            for pid in host.processes():
                if "instep\0train" in command_of(pid):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGTERM)
        assert command.ends(240) in (130, 143), command.err
        found = result(here, "runs/ray")
        assert found["interrupted"]
        steps = int(str(found["steps"]))
        assert steps > before
        before = steps
    wait_until(lambda: not agents_on(two_hosts), LONG_S, "the end of the agents")


def agents_on(hosts: Hosts) -> list[int]:
    lines = {pid: command_of(pid) for host in hosts for pid in host.processes()}
    return [pid for pid, line in lines.items() if "instep.team.agent_process" in line]
