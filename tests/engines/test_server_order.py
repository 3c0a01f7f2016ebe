"""The server engine: what happens in which order when much happens at once."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from instep.engines import server
from instep.recipe import Team
from instep.rules import UpdateRule
from instep.rules import presets as p
from instep.team.session import Session
from instep.worker.milestones import Progress
from support import workloads
from support.harness import train_here
from support.processes import children_of
from support.serving import alive, check_tape, replayed

pytestmark = pytest.mark.processes


@pytest.mark.slow
def test_the_only_worker_dies_and_is_replaced_while_the_server_is_busy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its successor is there before the server can hear of the death."""
    evaluate, mark = server.evaluate_alone, tmp_path / "struck"

    def busy(*arguments: Any) -> Any:
        if not mark.exists():
            mark.touch()
            (worker,) = (pid for pid in children_of(os.getppid()) if pid != os.getpid() and alive(pid))
            os.kill(worker, signal.SIGKILL)
            time.sleep(6)
        return evaluate(*arguments)

    monkeypatch.setattr(server, "evaluate_alone", busy)
    recipe = workloads.gpt(rule=p.asynchronous(), steps=4, evaluate_every=1)
    run = train_here(recipe, Team(workers=1, engine="server", keep_best=False), tmp_path / "run")
    assert mark.exists()
    assert [event["kind"] for event in run.events].count("joined") == 2
    check_tape(run.events, recipe)
    assert replayed(recipe, run.path).same


@pytest.mark.slow
def test_a_checkpoint_never_stands_between_two_updates_of_one_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ledger, which a checkpoint holds, has made all of them; so must the weights have."""
    save, seen = Session.save, tmp_path / "seen"

    def note(self: Session, progress: Progress, *states: Any, **meta: Any) -> None:
        with seen.open("a") as file:
            file.write(f"{progress.version} {meta['ledger']['version']}\n")
        save(self, progress, *states, **meta)

    monkeypatch.setattr(Session, "save", note)
    recipe = workloads.gpt(rule=UpdateRule(quorum="all", order="round", max_lead=2), steps=8)
    run = train_here(recipe, Team(workers=2, engine="server", slow="0:8x", checkpoint_every=1), tmp_path / "run")
    pairs = [line.split() for line in seen.read_text().splitlines()]
    assert all(weights == ledger for weights, ledger in pairs)
    assert len(pairs) < run.result["versions"], "some event made several updates"
