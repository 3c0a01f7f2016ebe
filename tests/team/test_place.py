"""Which agent a process is, from the environment that torchrun or srun gives it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from instep.errors import RecipeError
from instep.team import place as of_place
from instep.team.place import from_environment, nodes_of


def torchrun(rank: int = 3, here: int = 2, hosts: int = 2, **other: Any) -> dict[str, str]:
    found = {
        "TORCHELASTIC_RUN_ID": "none", "RANK": rank, "WORLD_SIZE": here * hosts, "LOCAL_RANK": rank % here,
        "LOCAL_WORLD_SIZE": here, "GROUP_RANK": rank // here, "GROUP_WORLD_SIZE": hosts, "MASTER_ADDR": "n1",
        "MASTER_PORT": 29500, **other,
    }  # fmt: skip
    return {name: str(value) for name, value in found.items() if value is not None}


def srun(task: int = 3, counts: tuple[int, ...] = (2, 2), **other: Any) -> dict[str, str]:
    host_of = [node for node, count in enumerate(counts) for _ in range(count)]
    found = {
        "SLURM_STEP_ID": 0, "SLURM_PROCID": task, "SLURM_NTASKS": len(host_of), "SLURM_NODEID": host_of[task],
        "SLURM_LOCALID": task - host_of.index(host_of[task]), "SLURM_JOB_NODELIST": f"n[01-{len(counts):02}]",
        "SLURM_JOB_ID": 77, "SLURM_STEP_TASKS_PER_NODE": ",".join(map(str, counts)), **other,
    }  # fmt: skip
    return {name: str(value) for name, value in found.items() if value is not None}


@pytest.mark.pure
def test_torchrun_tells_an_agent_its_place() -> None:
    place = from_environment(torchrun())
    assert place is not None
    assert (place.agent, place.agents, place.host, place.hosts, place.local) == (3, 4, 1, 2, 1)
    assert (place.launcher, place.agents_by_host, place.here, place.port) == ("torchrun", (0, 2), 2, 0)
    assert place.stores == (("n1", 29500),)


@pytest.mark.pure
@pytest.mark.parametrize(
    "given",
    [
        ["--rdzv-backend", "c10d", "--rdzv-endpoint", "h:1234"],
        ["--rdzv_backend=c10d", "--rdzv_endpoint=h:1234", "--nnodes=2"],
        ["--rdzv-endpoint=[::1]:1234", "--rdzv-backend=c10d"],
    ],
)
def test_under_c10d_torchruns_endpoint_is_a_store_that_all_reach(
    given: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(of_place, "_arguments_of_torchrun", lambda: given)
    place = from_environment(torchrun())
    assert place is not None
    host = "::1" if "[::1]" in given[0] else "h"
    assert place.stores == ((host, 1234), ("n1", 29500))
    monkeypatch.setattr(of_place, "_arguments_of_torchrun", lambda: [])
    by_environment = from_environment(torchrun(PET_RDZV_BACKEND="c10d", PET_RDZV_ENDPOINT="h:9"))
    assert by_environment is not None
    assert by_environment.stores == (("h", 9), ("n1", 29500))
    for nothing in ({"PET_RDZV_BACKEND": "etcd"}, {"PET_RDZV_BACKEND": "c10d", "PET_RDZV_ENDPOINT": "h:0"}):
        place = from_environment(torchrun(**nothing))
        assert place is not None
        assert place.stores == (("n1", 29500),)


@pytest.mark.processes
def test_torchruns_endpoint_is_found_through_a_script_between(tmp_path: Path) -> None:
    code = "from instep.team.place import _arguments_of_torchrun as a; print(a())"
    script = tmp_path / "run.sh"
    script.write_text(f"{sys.executable} -c '{code}'\ntrue\n")  # the shell stays
    shell = shutil.which("sh")
    found = subprocess.run(
        [sys.executable, "-c", f"import subprocess; subprocess.run([{shell!r}, {str(script)!r}])",
         "--rdzv-endpoint", "h:1234"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert "'--rdzv-endpoint', 'h:1234'" in found.stdout


@pytest.mark.pure
def test_srun_tells_an_agent_its_place() -> None:
    place = from_environment(srun(4, (3, 1, 2)))
    assert place is not None
    assert (place.agent, place.agents, place.host, place.hosts, place.local) == (4, 6, 2, 3, 0)
    assert (place.launcher, place.agents_by_host, place.head, place.others) == (
        "srun", (3, 1, 2), "n01", ("n01", "n02"),
    )  # fmt: skip
    same_port = {from_environment(srun(task)).port for task in range(4)}  # type: ignore[union-attr]
    assert same_port == {16384 + 77}
    assert from_environment(srun(SLURM_STEP_ID=3)).port not in same_port  # type: ignore[union-attr]
    compact = from_environment(srun(3, SLURM_STEP_TASKS_PER_NODE="2(x2)", INSTEP_PORT=12345))
    assert compact is not None
    assert (compact.agents_by_host, compact.port) == ((2, 2), 12345)
    unsaid = from_environment(srun(3, SLURM_STEP_TASKS_PER_NODE=None))
    assert unsaid is not None
    assert unsaid.agents_by_host == (2, 2)


@pytest.mark.pure
def test_one_agent_alone_is_an_ordinary_run() -> None:
    assert from_environment({}) is None
    assert from_environment(torchrun(0, 1, 1)) is None
    assert from_environment(srun(0, (1,))) is None
    assert from_environment(torchrun(), "local") is None
    batch_script = {name: value for name, value in srun(0).items() if name != "SLURM_STEP_ID"}
    assert from_environment(batch_script) is None, "which srun did not start"
    torchrun_in_srun = from_environment({**srun(0, (1, 1)), **torchrun(3)})
    assert torchrun_in_srun is not None
    assert torchrun_in_srun.launcher == "torchrun"


WRONG: list[tuple[dict[str, str], str, str]] = [
    ({}, "torchrun", "WORLD_SIZE is missing in the environment, which torchrun sets"),
    ({}, "srun", "SLURM_STEP_NUM_TASKS is missing in the environment, which srun sets"),
    (torchrun(RANK="x"), "auto", "RANK is 'x', which is no number"),
    (torchrun(RANK="-1"), "auto", "RANK is '-1', which is no number"),
    (torchrun(GROUP_RANK=None), "auto", "GROUP_RANK is missing"),
    (torchrun(RANK=1), "auto", "RANK 1 of 4, GROUP_RANK 1 of 2 and LOCAL_RANK 1 don't go together"),
    (torchrun(WORLD_SIZE=2), "auto", "RANK 3 of 2, GROUP_RANK 1 of 2 and LOCAL_RANK 1 don't go together"),
    (torchrun(2, GROUP_RANK=0), "auto", "RANK 2 of 4, GROUP_RANK 0 of 2 and LOCAL_RANK 0 don't go together"),
    (torchrun(0, GROUP_RANK=1), "auto", "RANK 0 of 4, GROUP_RANK 1 of 2 and LOCAL_RANK 0 don't go together"),
    (torchrun(GROUP_WORLD_SIZE=1), "auto", "GROUP_RANK 1 of 1"),
    (torchrun(0, 2, 1, WORLD_SIZE=3), "auto", "together with LOCAL_WORLD_SIZE 2"),
    (torchrun(MASTER_ADDR=None), "auto", "MASTER_ADDR is missing"),
    (srun(SLURM_JOB_NODELIST=None), "auto", "SLURM_JOB_NODELIST is missing"),
    (srun(SLURM_JOB_NODELIST="n[1-x]"), "auto", "list of hosts is n[1-x], which Instep does not read"),
    (srun(SLURM_STEP_TASKS_PER_NODE="two"), "auto", "SLURM_TASKS_PER_NODE is 'two'"),
    (srun(SLURM_NODEID=0), "auto", "--distribution=block"),
    (srun(SLURM_PROCID=1, SLURM_NODEID=1, SLURM_LOCALID=0), "auto", "--distribution=block"),
]


@pytest.mark.pure
@pytest.mark.parametrize(("environ", "launcher", "why"), WRONG, ids=lambda each: each if isinstance(each, str) else "")
def test_an_environment_that_is_not_whole_is_named(environ: dict[str, str], launcher: str, why: str) -> None:
    with pytest.raises(RecipeError) as raised:
        from_environment(environ, launcher)
    assert why in raised.value.message
    assert raised.value.message.endswith((".", '"."'))


@pytest.mark.pure
@pytest.mark.parametrize(
    ("text", "nodes"),
    [
        ("n[01-03,7],m4", ["n01", "n02", "n03", "n7", "m4"]),
        ("a", ["a"]),
        ("", []),
        ("gpu-[08-10]", ["gpu-08", "gpu-09", "gpu-10"]),
        ("r[1-2]n[1,3]-x,b.c", ["r1n1-x", "r1n3-x", "r2n1-x", "r2n3-x", "b.c"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
    ],
)
def test_lists_of_hosts_are_read_as_slurm_writes_them(text: str, nodes: list[str]) -> None:
    assert nodes_of(text) == nodes


@pytest.mark.pure
@given(st.text("n0123-,[]x", max_size=30))
@example("n[0-999999999]")
@example("n[1-9999][1-9999][1-9999]")
@example(",".join(["n[1-9999]"] * 1000))
def test_no_list_of_hosts_does_more_than_be_refused(text: str) -> None:
    try:
        found = nodes_of(text)
    except RecipeError:
        return
    assert all("[" not in node and "," not in node for node in found)
