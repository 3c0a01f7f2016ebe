"""The server engine: workers and servers that die, stop or raise, and bad input."""

from __future__ import annotations

import math
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from instep.errors import InstepError, NonFiniteError, ObjectiveError, WorkerError
from instep.rules import presets as p
from instep.team.journal import ClientGone
from support.harness import Client, train_here
from support.regression import held, numbers, regression, squares
from support.sentences import one_sentence
from support.serving import (
    alive,
    at,
    check_tape,
    kill,
    server_pid,
    serving,
)

pytestmark = pytest.mark.processes

ASYNC = p.asynchronous()


def test_a_killed_worker_is_replaced_and_the_others_do_not_stop(tmp_path: Path) -> None:
    again = tmp_path / "its successor is there"  # which is waited for, so that it takes part
    recipe = regression(rule=ASYNC, steps=20, objective=held(again, 30))
    when: list[float] = []
    named: list[float] = []
    strike = at("released", 3, lambda pids: (when.append(time.monotonic()), kill(1)(pids)), worker=1)  # type: ignore[func-returns-value]

    def see(event: dict[str, Any]) -> None:
        strike(event)
        if event["kind"] == "left":
            named.append(time.monotonic())
        if event["kind"] == "joined" and named:
            again.touch()

    run = train_here(recipe, serving(), tmp_path / "run", client=Client(see))
    check_tape(run.events, recipe)
    (left,) = (event for event in run.events if event["kind"] == "left")
    assert one_sentence(left["why"])
    assert "worker 1 (pid" in left["why"]
    assert named[0] - when[0] < 60
    pids = [event["pid"] for event in run.events if event["kind"] == "joined"]
    assert len(set(pids)) == 3
    assert not any(alive(pid) for pid in pids)
    assert run.result["restarts"] == 1


def test_a_stopped_worker_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    recipe = regression(rule=ASYNC, steps=100_000)
    stopped: list[bool] = []
    merged_between: list[int] = []
    strike = at("released", 3, lambda pids: (stopped.append(True), kill(1, signal.SIGSTOP)(pids)), worker=1)  # type: ignore[func-returns-value]

    def see(event: dict[str, Any]) -> None:
        strike(event)
        if event["kind"] == "left":
            stopped.clear()
            client.ask_to_stop()
        if event["kind"] == "merged" and stopped:
            merged_between.append(event["version"])

    client = Client(see)
    run = train_here(recipe, serving(slow="0:5x", answer_timeout_s=2.0), tmp_path / "run", client=client)
    (left,) = (event for event in run.events if event["kind"] == "left")
    assert "worker 1 (pid" in left["why"]
    assert "it is stopped (SIGSTOP or a debugger)" in left["why"]
    assert len(merged_between) > 2
    check_tape(run.events, recipe, finished=False)


def test_a_worker_that_raises_ends_the_run_with_its_sentence(tmp_path: Path) -> None:
    def faulty(model: nn.Module, batch: Any) -> Tensor:
        if torch.is_grad_enabled() and bool((batch[0] == numbers()[7][0]).all(1).any()):
            raise KeyError("no such thing")
        return squares(model, batch)

    client = Client()
    with pytest.raises(WorkerError, match=r"worker \d raised KeyError: 'no such thing' while computing step") as caught:
        train_here(regression(objective=faulty, rule=ASYNC), serving(3), tmp_path / "run", client=client)
    assert one_sentence(caught.value.message)
    assert "in faulty" in caught.value.detail
    assert client.events[-1]["kind"] == "failed"
    assert not any(event["kind"] == "left" for event in client.events)


def test_nothing_outlives_the_client(tmp_path: Path) -> None:
    pids: list[int] = []

    def leave(event: dict[str, Any]) -> None:
        if event["kind"] == "joined":
            pids.append(event["pid"])
        if event["kind"] == "merged" and len(pids) == 2:
            pids.append(server_pid(2))
            client.leave()

    client = Client(leave)
    with pytest.raises(ClientGone):
        train_here(regression(steps=1000, rule=ASYNC), serving(), tmp_path / "run", client=client)
    assert len(set(pids)) >= 3
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def infinite(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    return {"fit": squares(model, batch), "bar": model(batch[0]).sum() * (math.inf if len(batch[0]) else 1)}


def nothing(model: nn.Module, batch: Any) -> Tensor:
    return squares(model, batch)


nothing.counts = lambda batch: 0  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        ({"objective": infinite, "rule": ASYNC}, NonFiniteError, "term 'bar' of the objective is .* in step 1, micro"),
        ({"objective": infinite, "rule": p.local_sgd(2)}, NonFiniteError, "term 'bar' .* in step 1, microbatch"),
        ({"objective": nothing}, ObjectiveError, "step 1 has no items to learn from"),
        ({"objective": lambda m, b: (m(b[0]) - b[1]).square().mean()}, ObjectiveError, "is a mean, not a sum"),
    ],
    ids=["not finite", "not finite in a local step", "no items", "a mean"],
)
def test_bad_input_is_one_sentence(
    changes: dict[str, Any], error: type[InstepError], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=sentence) as caught:
        train_here(regression(**changes), serving(2), tmp_path / "run")
    assert one_sentence(caught.value.message), caught.value.message
