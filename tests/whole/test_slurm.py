"""Agents that Slurm starts, by its environment alone: the same bits as on one host, and one clean end for all."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.hosts import HOME, Host, Hosts
from support.patience import LONG_S
from support.processes import MODULE, RECIPE, command_of, wait_until
from support.slurm import Slurm, Submitted

pytestmark = [pytest.mark.processes, pytest.mark.slow]

FILES = {"mymodel.py": MODULE, "my.toml": RECIPE.replace("microbatches = 4", "microbatches = 8")}


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with Hosts(2, tmp_path_factory.mktemp("hosts")) as found:
        found.put(FILES)
        yield found


@pytest.fixture
def slurm(hosts: Hosts, tmp_path: Path) -> Slurm:
    return Slurm(hosts, tmp_path / "slurm")


@pytest.fixture(scope="module")
def alone(hosts: Hosts) -> str:
    """The digest of one process."""
    arguments = ["train", "my.toml", "--workers", "1", "--out", "alone"]
    hosts[1].run(sys.executable, "-m", "instep", *arguments, OMP_NUM_THREADS="1")
    return digest(hosts[1], "alone")


def digest(host: Host, run: str) -> str:
    return str(json.loads((host.path() / run / "result.json").read_text())["digest"])


def updates(hosts: Hosts, run: str) -> int:
    tape = hosts[0].path() / run / "tape.jsonl"
    return tape.read_text().count('"kind": "merged"') if tape.exists() else 0


def nothing_runs(hosts: Hosts) -> None:
    wait_until(lambda: not any(host.processes() for host in hosts), 60, "the end of all processes")
    for host in hosts:
        assert not list(host.path("/dev/shm").iterdir())
        assert not [each.name for each in host.path("/tmp").iterdir() if each.name.startswith("instep")]
        assert not list(host.path(HOME).glob(".instep/*"))


def test_with_a_secret_in_the_environment_hosts_need_no_home_in_common(hosts: Hosts, slurm: Slurm, alone: str) -> None:
    train = ["instep", "train", "my.toml", "--workers", "3"]
    refused = slurm.start("srun", *train, "--out", "apart", "--team.join_timeout_s", "20")
    assert refused.ends() == 1
    assert "host 1 does not see the file in /tmp/home/.instep that agent 0 has left" in refused.err
    assert "openssl rand" in refused.err
    assert "no word came within 20 s from agent 1 (host 1)" in refused.err
    nothing_runs(hosts)
    found = slurm.start("srun", *train, "--out", "secret", INSTEP_SECRET="0123456789abcdef")
    assert found.ends() == 0, found.err
    assert digest(hosts[0], "secret") == alone
    nothing_runs(hosts)


@pytest.fixture
def at_home(hosts: Hosts, slurm: Slurm) -> Slurm:
    """Whose hosts have the home in common."""
    slurm.share_home()
    return slurm


def test_srun_needs_its_environment_alone(hosts: Hosts, at_home: Slurm, alone: str) -> None:
    found = at_home.start("srun", "instep", "train", "my.toml", "--workers", "3", "--out", "run")
    assert found.ends() == 0, found.err
    assert digest(hosts[0], "run") == alone
    assert not (hosts[1].path() / "run").exists()
    assert found.out.count("digest") == 1, "progress is drawn once"
    more = at_home.start("srun", "--ntasks", "5", "instep", "train", "my.toml", "--out", "five")
    assert more.ends() == 0, more.err
    assert digest(hosts[0], "five") == alone
    assert "5 workers, one for each agent" in more.err
    nothing_runs(hosts)


def test_a_first_task_that_is_refused_ends_the_others(hosts: Hosts, at_home: Slurm) -> None:
    (hosts[0].path() / "taken").mkdir()
    (hosts[0].path() / "taken" / "file").touch()
    found = at_home.start("srun", "instep", "train", "my.toml", "--workers", "3", "--out", "taken")
    assert found.ends() == 1
    assert "instep: the run failed before it began, as agent 0 says on the first host." in found.err
    assert found.err.count("instep: ") == 2, found.err
    wait_until(lambda: not any(host.processes() for host in hosts), 60, "the end of all processes")
    for file in hosts[0].path(HOME).glob(".instep/*"):
        file.unlink()


def begun(hosts: Hosts, slurm: Slurm, run: str, *more: str, **environment: str) -> Submitted:
    line = ["srun", "instep", "train", "my.toml", "--workers", "3", "--out", run]
    found = slurm.start(*line, *more, **{"PAUSE_S": "0.02", **environment})
    wait_until(lambda: updates(hosts, run) > 5, LONG_S, "updates")
    return found


@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGINT, signal.SIGINT]], ids=["term", "ctrl-c"])
def test_a_signal_at_srun_saves_once_and_ends_all(hosts: Hosts, at_home: Slurm, signals: list[int]) -> None:
    run = f"ended{len(signals)}"
    found = begun(hosts, at_home, run, "--steps", "100000", "--team.lease_s", "60")  # none is lost, however slow
    for index, number in enumerate(signals):
        if index:
            wait_until(lambda: "one more" in found.err, 60, "srun's word")
        found.signal(number)
    assert found.ends() in (130, 143)
    assert (hosts[0].path() / run / "result.json").exists(), found.err
    result = json.loads((hosts[0].path() / run / "result.json").read_text())
    assert result["interrupted"]
    saved = sorted((hosts[0].path() / run / "checkpoints").glob("step-*"))
    assert saved[-1].name == f"step-{result['steps']:08d}"
    assert "Traceback" not in found.err
    nothing_runs(hosts)


def test_a_task_that_dies_costs_no_step(hosts: Hosts, at_home: Slurm, alone: str) -> None:
    found = begun(hosts, at_home, "dies", PAUSE_S="0.1", GO="go")
    clients = [pid for pid in hosts[1].processes() if "instep\0train" in command_of(pid)]
    os.kill(min(clients), signal.SIGKILL)
    for host in hosts:
        (host.path() / "go").touch()
    assert found.ends() == 137, found.err
    assert digest(hosts[0], "dies") == alone
    assert f"srun: error: {hosts[1].name}: task 1: Killed" in found.err
    assert f"host 1 ({hosts[1].name}) is lost" in (hosts[0].path() / "dies" / "tape.jsonl").read_text()
    nothing_runs(hosts)
