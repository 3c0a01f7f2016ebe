"""Agents that torchrun has started: one run, with one machine's bits; Python and the command."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from support.patience import LONG_S
from support.processes import INSTEP, RECIPE, Started, command_of, free_port, only_child, wait_until, write_project

pytestmark = [pytest.mark.processes, pytest.mark.slow]

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]

TRAIN = """\
import sys
import instep
from instep.errors import RecordError
if __name__ == "__main__":
    recipe = instep.Recipe(model="mymodel:Net", objective="mymodel:squares", data="mymodel:numbers", batch=8, steps=5)
    seen = []
    run = instep.train(recipe, out="run", monitors=[lambda e: seen.append(e["kind"])])
    try:
        where = run.path.name if run.model() else ""
    except RecordError as error:
        where = f"{error} {run!r:.12}"
    print(f"{run.digest} {run.objective} {bool(seen)} {run.agent} {where}", flush=True)
"""


def digest_alone(folder: Path) -> str:
    done = Started([*INSTEP, "train", "my.toml", "--workers", "1", "--out", "alone"], folder)
    assert done.process.wait(LONG_S) == 0, done.err
    return str(result(folder / "alone")["digest"])


def result(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


def two_hosts(
    folder: Path, *command: str, restarts: int = 0, other: Path | None = None, **environment: str
) -> list[Started]:
    """Both in the same folder, unless the `other` has one of its own."""
    port = str(free_port())
    options = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", port]
    options += ["--max-restarts", str(restarts)]
    return [
        Started([*TORCHRUN, *options, "--node-rank", str(rank), *command], at, OMP_NUM_THREADS="1", **environment)
        for rank, at in enumerate((folder, other or folder))
    ]


def test_a_script_gets_an_equal_run_in_every_agent(tmp_path: Path) -> None:
    write_project(tmp_path)
    (tmp_path / "train.py").write_text(TRAIN)
    done = Started([*TORCHRUN, "--nproc-per-node", "2", "train.py"], tmp_path)
    assert done.process.wait(LONG_S) == 0, done.err
    lines = sorted(line.split(" ", 4) for line in done.out.splitlines() if line)
    assert len(lines) == 2
    assert lines[0][:2] == lines[1][:2], "digest and objective"
    by_agent = {agent: (seen, where) for _, _, seen, agent, where in lines}
    assert by_agent["0"] == ("True", "run")
    seen, where = by_agent["1"]
    assert seen == "False"
    assert "where run.agent is 0. Run(agent=1," in where
    assert result(tmp_path / "run")["workers"] == 2, "one for each agent, where no team is given"


def test_two_hosts_give_the_digest_of_one_and_a_stop_of_one_ends_both(tmp_path: Path) -> None:
    write_project(tmp_path)
    expected = digest_alone(tmp_path)
    hosts = two_hosts(tmp_path, "-m", "instep", "train", "my.toml", "--workers", "3", "--out", "run")
    assert [host.process.wait(LONG_S) for host in hosts] == [0, 0], hosts[0].err
    assert result(tmp_path / "run")["digest"] == expected

    command = ["-m", "instep", "train", "my.toml", "--workers", "3", "--recipe.steps", "5000", "--out", "long"]
    hosts = two_hosts(tmp_path, *command)
    tape = tmp_path / "long" / "tape.jsonl"
    wait_until(lambda: tape.exists() and '"merged"' in tape.read_text(), LONG_S, "an update", hosts[0])
    os.kill(hosts[1].process.pid, signal.SIGTERM)
    for host in hosts:
        host.process.wait(LONG_S)
    assert result(tmp_path / "long")["interrupted"]
    for host in hosts:
        wait_until(lambda host=host: not host.pids(), LONG_S, "no process is left", host)


@pytest.mark.parametrize("out", ["run", ""])
def test_a_first_agent_that_is_killed_is_started_again_and_goes_on(out: str, tmp_path: Path) -> None:
    write_project(tmp_path)
    expected = digest_alone(tmp_path)
    command = ["-m", "instep", "train", "my.toml", "--workers", "3", *(["--out", out] if out else [])]
    go = tmp_path / "one is killed"
    every = ["--team.checkpoint_every", "100"]
    hosts = two_hosts(tmp_path, *command, *every, restarts=2, PAUSE_S="0.2", GO=str(go))
    folder = tmp_path / (out or "runs/my")
    tape = folder / "tape.jsonl"
    wait_until(lambda: tape.exists() and tape.read_text().count('"merged"') > 3, LONG_S, "some updates", hosts[0])
    started = json.loads(tape.read_text().splitlines()[0])
    assert started["hosts"][1]["workers"] == 2
    client = next(
        pid for pid in hosts[0].pids() if "my.toml" in command_of(pid) and "distributed" not in command_of(pid)
    )
    os.kill(client, signal.SIGKILL)
    go.touch()
    assert [host.process.wait(LONG_S) for host in hosts] == [0, 0], hosts[0].err + hosts[1].err
    assert result(folder)["digest"] == expected
    events = [json.loads(line) for line in tape.read_text().splitlines()]
    told = [(event["kind"], event["version"]) for event in events if event["kind"] in ("run_started", "merged")]
    (_, start), (again, version) = [(at, version) for at, (kind, version) in enumerate(told) if kind == "run_started"]
    assert start == 0
    assert [one for _, one in told[1:again]] == list(range(1, again)), "the tape is whole"
    assert version in (again - 1, again - 2), "no step is done again but the one that was on its way"


@pytest.mark.parametrize("host", [0, 1])
def test_a_run_whose_torchrun_was_killed_is_saved_and_ends(host: int, tmp_path: Path) -> None:
    """Nobody would be left to end it by."""
    write_project(tmp_path)
    command = ["-m", "instep", "train", "my.toml", "--workers", "2", "--recipe.steps", "100000", "--out", "run"]
    hosts = two_hosts(tmp_path, *command)
    tape = tmp_path / "run" / "tape.jsonl"
    wait_until(lambda: tape.exists() and '"merged"' in tape.read_text(), LONG_S, "an update", hosts[0])
    os.kill(hosts[host].process.pid, signal.SIGKILL)
    wait_until(lambda: (tmp_path / "run" / "result.json").exists(), LONG_S, "the result")
    assert result(tmp_path / "run")["interrupted"]
    for each in hosts:
        wait_until(lambda each=each: not runs_instep(each), LONG_S, "no process of the run is left")
    assert "the torchrun that started this has ended" in hosts[host].out + hosts[host].err


def test_who_loses_its_supervisor_says_that_the_first_host_tells_how_the_run_goes_on(tmp_path: Path) -> None:
    write_project(tmp_path)
    command = ["-m", "instep", "train", "my.toml", "--workers", "2", "--recipe.steps", "200", "--out", "run"]
    go = tmp_path / "one is killed"
    hosts = two_hosts(tmp_path, *command, PAUSE_S="0.1", GO=str(go))
    tape = tmp_path / "run" / "tape.jsonl"
    wait_until(lambda: tape.exists() and '"merged"' in tape.read_text(), LONG_S, "an update", hosts[0])
    client = next(
        pid for pid in hosts[1].pids() if "my.toml" in command_of(pid) and "distributed" not in command_of(pid)
    )
    os.kill(only_child(client), signal.SIGKILL)
    go.touch()
    assert hosts[1].process.wait(LONG_S) == 1
    assert "the first host, which tells how the run goes on, has lost this one" in hosts[1].err
    assert "nothing was trained" not in hosts[1].err
    wait_until(lambda: (tmp_path / "run" / "result.json").exists(), LONG_S, "the result")
    os.kill(hosts[0].process.pid, signal.SIGTERM)  # it would wait for the other one


@pytest.fixture
def apart(tmp_path: Path) -> tuple[Path, Path]:
    """A folder of each of two hosts, the first with the folder of a run that goes on."""
    here, there = (tmp_path / each for each in ("here", "there"))
    for folder in (here, there):
        folder.mkdir()
        write_project(folder)
    begun = Started([*INSTEP, "train", "my.toml", "--steps", "12", "--out", "run"], here, forked=True)
    assert begun.process.wait(LONG_S) == 0, begun.err
    return here, there


def test_a_run_goes_on_where_the_first_agent_alone_has_its_folder(apart: tuple[Path, Path]) -> None:
    here, there = apart
    command = ["-m", "instep", "train", "--resume", "run", "--workers", "3", "--steps", "20"]
    hosts = two_hosts(here, *command, other=there)
    assert [host.process.wait(LONG_S) for host in hosts] == [0, 0], hosts[0].err + hosts[1].err
    whole = Started([*INSTEP, "train", "my.toml", "--out", "alone"], here, forked=True)
    assert whole.process.wait(LONG_S) == 0, whole.err
    assert result(here / "run")["digest"] == result(here / "alone")["digest"]
    assert not (there / "run").exists()


def test_a_first_agent_that_is_refused_ends_the_others(apart: tuple[Path, Path]) -> None:
    here, there = apart
    command = ["-m", "instep", "train", "--resume", "run", "--recipe.clip_norm", "2.0"]
    hosts = two_hosts(here, *command, other=there)
    assert [host.process.wait(LONG_S) for host in hosts] == [1, 1]
    assert "run goes on with its own recipe, and recipe.clip_norm is 2.0" in hosts[0].err
    assert "agent 1 ends: the torchrun that all meet at" in hosts[1].err


def test_an_error_is_one_sentence_of_the_first_and_a_short_one_elsewhere(tmp_path: Path) -> None:
    write_project(tmp_path)
    command = ["-m", "instep", "train", "my.toml", "--workers", "3", "--recipe.objective.use", "mymodel:nothing"]
    hosts = two_hosts(tmp_path, *command, "--out", "run")
    assert [host.process.wait(LONG_S) for host in hosts] == [1, 1]
    assert "instep: " in hosts[0].err
    assert "nothing" in hosts[0].err.partition("instep: ")[2].splitlines()[0]
    assert "Traceback (most recent call last):\n  File" not in hosts[0].err.partition("torch")[0]
    for host in hosts:
        wait_until(lambda host=host: not host.pids(), LONG_S, "no process is left", host)


READS = """\
import instep
from pathlib import Path
if __name__ == "__main__":
    steps = int(Path("steps.txt").read_text())
    names = {"model": "mymodel:Net", "objective": "mymodel:squares", "data": "mymodel:numbers"}
    instep.train(instep.Recipe(**names, batch=8, steps=steps), team=instep.Team(workers=2), out="run")
"""


@pytest.mark.parametrize("breaks", ["the recipe", "the program", "the command"])
def test_an_agent_that_fails_before_it_meets_the_first_ends_the_run_by_its_sentence(
    breaks: str, tmp_path: Path
) -> None:
    here, there = (tmp_path / each for each in ("here", "there"))
    for folder in (here, there):
        folder.mkdir()
        write_project(folder)
        (folder / "train.py").write_text(READS)
        (folder / "steps.txt").write_text("5")
    command = ["-m", "instep", "train", "my.toml", "--workers", "2", "--out", "run"]
    if breaks == "the recipe":
        (there / "my.toml").write_text(RECIPE.replace("steps = 20", "stepps = 20"))
        cause = "stepps"
    elif breaks == "the program":
        (there / "steps.txt").unlink()
        command, cause = ["train.py"], "its program failed before it trained: FileNotFoundError: "
    else:
        (there / "my.toml").unlink()
        cause = "my.toml"
    hosts = two_hosts(here, *command, other=there)
    assert [host.process.wait(LONG_S) for host in hosts] == [1, 1], hosts[0].err + hosts[1].err
    (line,) = (line for line in hosts[0].err.splitlines() if f"host 1 ({socket.gethostname()}), agent 1: " in line)
    assert cause in line
    assert cause.removeprefix("its program failed before it trained: ") in hosts[1].err, "it says so itself"
    assert not (here / "run").exists()
    for host in hosts:
        wait_until(lambda host=host: not host.pids(), LONG_S, "no process is left", host)


def runs_instep(host: Started) -> bool:
    """Whether processes of it are left; torchrun, which waits for the other one, aside."""
    return any("instep" in command_of(pid) and "distributed" not in command_of(pid) for pid in host.pids())


@pytest.mark.parametrize("bounds", ["1..4", "3..4"])
def test_a_team_with_bounds_has_what_hosts_have_room_for_and_one_that_cannot_have_it_ends_with_a_sentence(
    bounds: str, tmp_path: Path
) -> None:
    write_project(tmp_path)
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(mine)})  # what is started has room for one
    try:
        hosts = two_hosts(tmp_path, "-m", "instep", "train", "my.toml", "--workers", bounds, "--out", "run")
    finally:
        os.sched_setaffinity(0, mine)
    ended = [host.process.wait(LONG_S) for host in hosts]
    if bounds == "1..4":
        assert ended == [0, 0], hosts[0].err
        found = result(tmp_path / "run")
        assert (found["digest"], found["workers"]) == (digest_alone(tmp_path), 2)
        return
    assert ended == [1, 1]
    told = "instep: 'team.bounds' asks for at least 3 workers, and all 2 hosts together have room for 2; lower"
    assert told in hosts[0].err
    assert "instep: the run failed, as agent 0 says on host 0" in hosts[1].err
    assert not (tmp_path / "run").exists()
