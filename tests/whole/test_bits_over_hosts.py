"""Hosts, made of namespaces, give the bits of one process, whatever has started their agents."""

from __future__ import annotations

import random
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest

from instep.recipe import Team
from support import workloads
from support.harness import train_here
from support.hosts import Hosts
from support.over_hosts import ALL, Case, Session, sessions, train_cases
from support.proved import save

pytestmark = pytest.mark.processes

SEED = 15

A_TENTH = [
    *(Case(Session(2, "c10d", 1), model, 3) for model in workloads.ALL),  # which does not divide the microbatches
    Case(Session(3, "static", 1), "convnet", 2),  # the third host stands by
    Case(Session(3, "static", 1), "gpt", 5),
    Case(Session(2, "static", 2), "gpt", 5),
    Case(Session(2, "static", 2), "convnet", 8),
    Case(Session(2, "srun", 2), "gpt", 3),
    Case(Session(2, "srun", 2), "convnet", 2),  # the second host stands by
]
"""Of `support.over_hosts.ALL`, which `make prove` runs whole; a run that is resumed comes to them."""

_alone: dict[str, dict[int, str]] = {}


def alone(model: str, folder: Path) -> dict[int, str]:
    """The digests of one process, by version."""
    if model not in _alone:
        team = Team(checkpoint_every=1, keep=0)
        _alone[model] = train_here(workloads.ALL[model](), team, folder / f"alone-{model}").digests
    return _alone[model]


@pytest.mark.slow
@pytest.mark.parametrize(("session", "cases"), sessions(A_TENTH), ids=repr)
def test_every_step_on_hosts_is_that_of_one_process(session: Session, cases: list[Case], tmp_path: Path) -> None:
    with Hosts(session.hosts, tmp_path / "hosts") as hosts:
        for case, found in zip(cases, train_cases(hosts, cases), strict=True):
            assert found.digests == alone(case.model, tmp_path), case
            assert found.agree, f"{case}: all agents have the same result"


def keep_only(folder: Path, version: int) -> None:
    """Takes away the checkpoints of later versions."""
    for path in (folder / "checkpoints").glob("step-*"):
        if int(path.name[5:]) > version:
            shutil.rmtree(path)


def resumed_there_and_back(model: str, folder: Path) -> bool:
    """Whether a run of one machine goes on on three hosts, and then on one again, with the same bits."""
    case = Case(Session(3, "static", 1), model, 5)
    team, expected = Team(workers=2, checkpoint_every=1, keep=0), alone(model, folder)
    local = train_here(workloads.ALL[model](), team, folder / "local")
    keep_only(local.path, 2)
    with Hosts(3, folder / "hosts") as hosts:
        shutil.copytree(local.path, hosts[0].path() / case.folder)
        (there,) = train_cases(hosts, [case], resumed=True)
        shutil.copytree(hosts[0].path() / case.folder, folder / "back")
    keep_only(folder / "back", 4)
    back = train_here(workloads.ALL[model](), replace(team, workers=3), folder / "back", resume=True)
    return (
        there.agree
        and there.digests == {version: expected[version] for version in range(3, 8)}
        and back.digests == {version: expected[version] for version in range(5, 8)}
        and back.result["items"] == local.result["items"]
    )


@pytest.mark.slow
def test_a_run_of_one_machine_goes_on_on_three_hosts_and_back_with_the_same_bits(tmp_path: Path) -> None:
    assert resumed_there_and_back("gpt", tmp_path)


@pytest.mark.prove
def test_all_cases(tmp_path: Path) -> None:
    """The cases of a session come in an order that is drawn. Those of the first have new Pythons, as with a user."""
    began, draw, lines = time.monotonic(), random.Random(SEED), []
    for number, (session, cases) in enumerate(sessions(ALL)):
        draw.shuffle(cases)
        with Hosts(session.hosts, tmp_path / f"hosts-{number}") as hosts:
            for case, found in zip(cases, train_cases(hosts, cases, forked=number > 0), strict=True):
                held = found.agree and found.digests == alone(case.model, tmp_path)
                lines.append({**case.line(), "digest": found.digests[max(found.digests)], "held": held})
    for model in workloads.ALL:
        (tmp_path / model).mkdir()
        held = resumed_there_and_back(model, tmp_path / model)
        lines.append({"hosts": 3, "workers": 5, "model": model, "launcher": "static", "agents_a_host": 1,
                      "resumed": "of one machine, and then on one", "held": held})  # fmt: skip
    save("bits_over_machines", lines, seed=SEED, began=began)
    assert [line for line in lines if not line["held"]] == []
