"""Agents that torchrun starts on several hosts: the same bits as on one, and one clean end for all."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from support.hosts import Command, Host, Hosts
from support.patience import LONG_S
from support.processes import MODULE, RECIPE, wait_until

pytestmark = [pytest.mark.processes, pytest.mark.slow]

FILES = {"mymodel.py": MODULE, "my.toml": RECIPE.replace("microbatches = 4", "microbatches = 8")}

TRAIN_PY = """\
import sys
import instep
recipe = instep.Recipe(model="mymodel:Net", objective="mymodel:squares", data="mymodel:numbers", batch=8,
                       microbatches=4, steps=20)
run = instep.train(recipe, team=instep.Team(workers=int(sys.argv[1])), out=sys.argv[2])
print(run.digest, run.objective, run.result["steps"])
try:
    print(sum(1 for _ in run.model().parameters()), run.path.name)
except instep.InstepError as error:
    print(error)
"""


@pytest.fixture(scope="module", params=[2, 3])
def hosts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with Hosts(request.param, tmp_path_factory.mktemp("hosts")) as found:
        found.put(FILES)
        yield found


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Hosts]:
    with Hosts(2, tmp_path / "hosts") as found:
        found.put(FILES)
        yield found


def instep(host: Host, *arguments: str) -> str:
    return host.run(sys.executable, "-m", "instep", *arguments, OMP_NUM_THREADS="1")


def alone(host: Host) -> str:
    """The digest of a run of one process."""
    if not (host.path() / "alone").exists():
        instep(host, "train", "my.toml", "--workers", "1", "--out", "alone")
    return digest_in(host, "alone")


def digest_in(host: Host, folder: str) -> str:
    return str(json.loads((host.path() / folder / "result.json").read_text())["digest"])


def torchrun(hosts: Hosts, *arguments: str, endpoint: str = "", options: Sequence[Sequence[str]] = ()) -> list[Command]:
    """One on each host, which trains; `options`: of each host's own."""
    return [
        host.start(
            sys.executable, "-m", "torch.distributed.run", "--nnodes", str(len(hosts)), "--nproc-per-node", "1",
            "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint or f"{hosts[0].name}:29400",
            *(options[host.number] if options else ()), "-m", "instep", "train", "my.toml", *arguments,
            OMP_NUM_THREADS="1",
        )
        for host in hosts
    ]  # fmt: skip


def all_end(commands: Sequence[Command], within_s: float = LONG_S) -> list[int]:
    return [command.ends(within_s) for command in commands]


def holder(hosts: Hosts, folder: str) -> Host:
    """The host that has the run folder, which one has alone: torchrun's c10d says which is the first."""
    (found,) = (host for host in hosts if (host.path() / folder).exists())
    return found


def nothing_runs(hosts: Hosts) -> None:
    wait_until(lambda: not any(host.processes() for host in hosts), 60, "the end of all processes")
    for host in hosts:
        assert not list(host.path("/dev/shm").iterdir())
        assert not [each.name for each in host.path("/tmp").iterdir() if each.name.startswith("instep")]


@pytest.mark.parametrize("workers", [5])  # others: tests/whole/test_bits_over_hosts.py
def test_hosts_give_the_digest_of_one_process(hosts: Hosts, workers: int) -> None:
    folder = f"run{workers}"
    commands = torchrun(hosts, "--workers", str(workers), "--out", folder)
    assert all_end(commands) == [0] * len(hosts), [each.err for each in commands]
    assert digest_in(holder(hosts, folder), folder) == alone(hosts[0])
    assert sum("digest" in each.out for each in commands) == 1, "progress is drawn once"
    nothing_runs(hosts)


def test_hosts_may_have_different_numbers_of_agents(two: Hosts) -> None:
    """And one clock, though theirs are 1,000 s apart; what workers elsewhere print comes to the run folder."""
    two.put({"mymodel.py": MODULE + "\nprint('this is for the log')\n"})
    options = [["--nproc-per-node", "2"], ["--nproc-per-node", "1"]]
    commands = torchrun(two, "--out", "run", options=options)
    assert all_end(commands) == [0, 0], [each.err for each in commands]
    first = holder(two, "run")
    assert digest_in(first, "run") == alone(two[0])
    assert sum(each.err.count("instep: 3 workers, one for each agent") for each in commands) == 1
    events = [json.loads(line) for line in (first.path() / "run" / "tape.jsonl").read_text().splitlines()]
    hosts = events[0]["hosts"]
    assert {each["name"]: each["workers"] for each in hosts} == {two[0].name: 2, two[1].name: 1}
    assert [each["clock_error_s"] > 0 for each in hosts] == [False, True]
    assert all(0 <= event["t_s"] < 900 for event in events)
    off_s = max(each["clock_error_s"] for each in hosts) + 1e-5
    spans = {(e["version"], e["worker"]): (e["from_s"], e["to_s"]) for e in events if e["kind"] == "computed"}
    for (version, worker), (from_s, _) in spans.items():  # which all have waited for the step before
        before = [spans[version - 1, each][1] for each in range(3) if (version - 1, each) in spans]
        assert all(to_s <= from_s + off_s for to_s in before), (version, worker)
    (other,) = (host for host in two if host is not first)
    elsewhere = [number for number in range(3) if number >= hosts[0]["workers"]]
    for number in elsewhere:
        assert "this is for the log" in (first.path() / "run" / "logs" / f"{other.name}-{number}.txt").read_text()
    nothing_runs(two)


def test_a_name_that_only_its_own_host_knows_is_no_obstacle(tmp_path: Path) -> None:
    """Under c10d torchrun tells all of the first host's own name, MASTER_ADDR, that here nobody else can resolve."""
    with Hosts(2, tmp_path / "hosts", named=False) as hosts:
        hosts.put(FILES)
        options = [["--rdzv-conf", f"is_host={is_host}"] for is_host in (1, 0)]
        endpoint = f"{hosts[0].address}:29400"
        commands = torchrun(hosts, "--workers", "3", "--out", "run", endpoint=endpoint, options=options)
        assert all_end(commands) == [0, 0], [each.err for each in commands]
        assert digest_in(holder(hosts, "run"), "run") == alone(hosts[0])


@pytest.mark.parametrize(("number", "at"), [(signal.SIGTERM, 1), (signal.SIGINT, 0)])
def test_a_signal_at_one_torchrun_saves_and_ends_all(number: signal.Signals, at: int, two: Hosts) -> None:
    commands = torchrun(two, "--workers", "3", "--steps", "100000", "--out", "run")
    tape = [host.path() / "run" / "tape.jsonl" for host in two]
    wait_until(lambda: any(path.exists() and '"merged"' in path.read_text() for path in tape), LONG_S, "an update")
    commands[at].signal(number)
    all_end(commands)
    saved = sorted((holder(two, "run").path() / "run" / "checkpoints").glob("step-*"))
    assert saved, "a checkpoint"
    result = json.loads((holder(two, "run").path() / "run" / "result.json").read_text())
    assert result["interrupted"]
    assert saved[-1].name == f"step-{result['steps']:08d}"
    said = f"instep: the run ended after step {result['steps']}, and is saved by agent 0."
    assert sum(each.err.count(said) for each in commands) == 1, "the other host says so too"
    nothing_runs(two)


def test_a_script_gets_an_equal_run_on_each_host_and_the_first_has_the_folder(two: Hosts) -> None:
    two.put({"train.py": TRAIN_PY})
    commands = [
        host.start(
            sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--node-rank",
            str(host.number), "--master-addr", two[0].name, "--master-port", "29400", "train.py", "3", "runs/py",
            OMP_NUM_THREADS="1",
        )
        for host in two
    ]  # fmt: skip
    assert all_end(commands) == [0, 0], [each.err for each in commands]
    alone = two[0].run(sys.executable, "train.py", "1", "runs/alone", OMP_NUM_THREADS="1").splitlines()
    here, there = (each.out.splitlines()[-2:] for each in commands)
    assert (here[0], there[0]) == (alone[0], alone[0])
    assert here[1] == "4 py"
    assert there[1].endswith(".")
    assert "agent 0" in there[1]
    assert (two[0].path() / "runs" / "py").exists()
    assert not (two[1].path() / "runs").exists()


def test_other_code_on_one_host_is_refused_by_its_module_and_the_host(two: Hosts) -> None:
    """Whoever computes with it, its numbers would be in all weights, and in the digest, unseen."""
    there = two[1].path() / "mymodel.py"
    there.write_text(MODULE.replace(".square().sum()", ".square().sum() * 2"))
    assert there.read_text() != MODULE
    commands = torchrun(two, "--workers", "2", "--out", "run", endpoint=f"{two[0].name}:29400")
    assert all_end(commands) == [1, 1]
    told = "".join(each.err for each in commands)
    assert "has another module mymodel than worker 0" in told
    assert two[1].name in told or two[0].name in told
    assert not any((host.path() / "run").exists() for host in two)
    nothing_runs(two)


@pytest.mark.parametrize("broken", [[0], [1], [0, 1]])
def test_a_recipe_that_cannot_be_read_on_one_host_ends_all(broken: list[int], two: Hosts) -> None:
    """The first agent may be any: c10d says which."""
    for number in broken:
        (two[number].path() / "my.toml").write_text(FILES["my.toml"].replace("steps =", "stepps ="))
    commands = torchrun(two, "--workers", "2", "--out", "run")
    assert all_end(commands) == [1, 1]
    lines = [[line for line in each.err.splitlines() if line.startswith("instep: ")] for each in commands]
    told = [[line for line in each if "has waited" not in line] for each in lines]
    assert any("stepps" in line for number in broken for line in told[number]), told
    first = f"host 1 ({two[broken[0]].name}), agent 1: unknown key 'stepps'"
    healthy = [line for number in (0, 1) if number not in broken for line in told[number][-1:]]
    for line in healthy:  # none where its torchrun, which has lost the other one, was quicker to end it
        assert first in line or "before it began, as agent 0 says" in line or "has ended before agent 0" in line
    nothing_runs(two)
