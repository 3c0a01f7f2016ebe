"""What processes say to each other: every message arrives as it was sent, and has a direction."""

from __future__ import annotations

import dataclasses
import inspect
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
from msgspec import UNSET

from instep.errors import DataError, ResourceError
from instep.recipe import Team
from instep.record.events import WarnedEvent
from instep.rules import presets as p
from instep.team import messages as m
from instep.team.pickling import dump
from instep.team.regroup_messages import LeftGroup, NextGroup, NotRegrouped, PeersLost, Regrouped, TakePlace
from instep.transport.memory import Region
from instep.worker.contribution import Facts
from instep.worker.milestones import Progress
from support.patience import LONG_S

RECIPE = dump(["a recipe"])
REGIONS = {"weights": Region((2, 64), "uint8")}
FACTS = Facts(((0, 2), (2, 3)), {"loss": 7}, {"loss": (1.0, 2.0, 0.5)}, 3, (0, 1), (0,), ends={0: (1, 2)})

MESSAGES = [
    m.Events([WarnedEvent(t_s=0.5, why="slow")]),
    m.PlainEvents([{"t_s": 0.5, "clock": "wall", "kind": "merged", "version": 1}]),
    m.Failed.of(ResourceError("there is no room", detail="a trace")),
    m.Finished({"digest": "ab", "objective_last": float("inf")}),
    m.StopRun(),
    m.Request(
        RECIPE, {"name": "x"}, "x", "f", Team(workers=2), p.asynchronous(), "server", Path("run"), False, (), 1.5
    ),
    m.Cancelled(),
    m.Assignment(RECIPE, Team(), Path("run"), ("f",), None, 1.5, (1, 2), written=("w",)),
    m.HostNetwork((1, 2), ("10.0.0.1", 4711), "start 1", "10.0.0.2"),
    m.Ready({"data": "ab", "samples": 3}, REGIONS),
    m.Agreed({"data": "ab", "samples": 3}, REGIONS),
    m.Digest(3, "ab"),
    m.Sync(),
    m.Synced(),
    m.FoundWritten(["w"], "a first forward"),
    m.FoundWrong(1, 7, 2, 6, 5, "worker 0 and worker 2"),
    m.HeldUp("worker 1", "computing step 3", 1.5),
    PeersLost("rank 1 of 2 has lost another one"),
    m.KeepState(),
    m.KeepingState(),
    m.StateKept(5, "step-00000005", "ab", (WarnedEvent(why="w"),)),
    m.HandedOver(1, 2, b"state"),
    m.EndedFor(1, m.Ended({"version": 7}, "d", left={"sample": "to be"})),
    m.NotStoodIn(1, "worker 1 died while it saved"),
    NextGroup(2, (0, 2), (0, 1), (0, 1), 7, 5, 12),
    TakePlace(3),
    NotRegrouped(2, "no host has the weights of a version whole"),
    Regrouped(2),
    LeftGroup(2),
    m.SeatHanded(b"state"),
    m.StoppedAt(4),
    m.Ended(dataclasses.asdict(Progress(version=3)), "ab", True, {"sample": "text"}, {"bytes_sent": 8}),
    m.Left(1, "worker 1 was killed"),
    m.Hello(1, 4321, "here"),
    m.Compute(1, 5, 0, (2,), 4, 1.0),
    m.Pushed(1, FACTS, 0.5, 0.75, {"verify_s": 0.1}),
    m.NoMore(),
    m.Call("module:name", 2, RECIPE),
]

HOMES = m.__name__, NotRegrouped.__module__

UNIONS = {
    name: set(get_args(union) or (union,))
    for name, union in vars(m).items()
    if "To" in name and not inspect.isfunction(union)
}

CLASSES = {each for each in vars(m).values() if dataclasses.is_dataclass(each) and each.__module__ in HOMES}


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_every_message_arrives_as_it_was_sent(message: Any) -> None:
    found = pickle.loads(pickle.dumps(message))
    assert found == message
    assert type(found) is type(message)


def test_what_an_event_leaves_out_is_looked_for_where_it_is_from() -> None:
    content = pickle.dumps(UNSET)
    assert b"msgspec" in content
    assert b"UnsetType" in content, "not the first module that has its value"
    assert pickle.loads(content) is UNSET


def test_every_message_is_tried_above_and_frozen() -> None:
    assert {type(message) for message in MESSAGES} == CLASSES
    assert all(each.__dataclass_params__.frozen for each in CLASSES)


def test_every_message_has_a_direction_and_only_what_is_passed_on_has_several() -> None:
    assert len(UNIONS) == 8
    assert set().union(*UNIONS.values()) == CLASSES - {m.Assignment, m.HostNetwork}, "which are handed over at the fork"
    several = {each for each in CLASSES if sum(each in union for union in UNIONS.values()) > 1}
    assert several == {m.PlainEvents, m.Failed, m.Finished, m.StopRun}


def test_an_error_comes_out_as_it_went_in() -> None:
    found = m.Failed.of(DataError("sample 3 is empty", detail="a trace")).error()
    assert (type(found), found.message, found.detail) == (DataError, "sample 3 is empty", "a trace")


@pytest.mark.processes
def test_messages_need_no_torch() -> None:
    code = "import sys, instep.team.messages; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=LONG_S)
