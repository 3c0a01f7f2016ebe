"""Another host's members, as agent 0 sees them: what is ordered comes there whole, in order, or anew."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from instep.recipe import Team
from instep.record.folder import RunFolder
from instep.team import received
from instep.team.crews import Heard
from instep.team.messages import Digest
from instep.team.orders import Member
from instep.team.remote import RemoteCrew
from instep.team.wire_messages import (
    CheckpointPart,
    EndMembers,
    EpochGone,
    FromMember,
    HelloAgain,
    MembersShown,
    StartMembers,
)

pytestmark = pytest.mark.pure


class Link:
    """Takes so many messages."""

    def __init__(self, room: int):
        self.room, self.sent = room, list[Any]()

    @property
    def full(self) -> bool:
        return len(self.sent) >= self.room

    def send(self, message: Any) -> None:
        self.sent.append(message)


@dataclass
class Assigned:
    """What a start has of an assignment."""

    network: Any
    serving: bool = False
    resume_from: Path | None = None
    team: Team = field(default_factory=Team)
    first: bool = False
    run_id: str | None = None
    written: tuple[str, ...] = ()
    folder: Path = Path("run")
    late: bool = False


def test_a_checkpoint_that_was_on_its_way_when_the_team_was_ended_is_sent_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one that has come whole is not."""
    monkeypatch.setattr(received, "PART_BYTES", 4)
    path = tmp_path / "step-00000003"
    path.mkdir()
    (path / "model.safetensors").write_bytes(b"0123456789")
    link, hello = Link(1), SimpleNamespace(host=1, name="b")
    crew = RemoteCrew(link, hello, RunFolder(tmp_path), lambda: 0.0, 5.0, None, None)  # type: ignore[arg-type]
    network = SimpleNamespace(workers=(1, 1), store=("here", 1), name="a")
    assignment: Any = Assigned(network, resume_from=path)
    for epoch in (1, 2, 3):
        crew.start([Member(epoch, 1, host=1)], assignment)
        crew.pump()
        link.room = 100  # it takes more from here on
        crew.end()
    kinds = [type(each) for each in link.sent]
    assert kinds == [
        CheckpointPart, EndMembers, *3 * [CheckpointPart], StartMembers, EndMembers, StartMembers, EndMembers,
    ]  # fmt: skip
    assert [each.offset for each in link.sent if isinstance(each, CheckpointPart)] == [0, 0, 4, 8]


def test_stacks_come_one_after_the_other_and_those_of_an_earlier_question_count_no_more(tmp_path: Path) -> None:
    link: Any = Link(100)
    crew = RemoteCrew(link, SimpleNamespace(host=1, name="b"), RunFolder(tmp_path), lambda: 0.0, 5.0, None, None)  # type: ignore[arg-type]
    for asked in (1, 2):
        crew.ask_for_stacks([0, 1])
        words = [(asked - 1, {"0": "old"}), (asked, {"0": f"zero {asked}"}), (asked, {"1": f"one {asked}"})]
        link.receive = lambda words=words: [MembersShown((), *word) for word in words]
        list(crew.hear([link]))
        assert crew.stacks() == {0: f"zero {asked}", 1: f"one {asked}"}


@pytest.mark.parametrize("epoch", [1, 2], ids=["the same epoch", "another"])
@pytest.mark.parametrize("how", ["a start", "more", "nothing, and then more"])
def test_of_a_host_that_is_back_too_late_the_old_workers_end_and_not_those_who_are_started_then(
    epoch: int, how: str, tmp_path: Path
) -> None:
    link: Any = Link(100)
    link.go_on = lambda other, came: None
    crew = RemoteCrew(link, SimpleNamespace(host=1, name="b"), RunFolder(tmp_path), lambda: 0.0, 5.0, None, None)  # type: ignore[arg-type]
    network = SimpleNamespace(workers=(1, 1), store=("here", 1), name="a")
    crew.return_(link, HelloAgain(1, "its own", 0, 7.0, (Member(1, 1, host=1),)))
    new, assignment = Member(epoch, 1, 1, 1), Assigned(network)
    if how.startswith("nothing"):
        crew.end_who_is_back()
    (crew.start if how == "a start" else crew.add)([new], assignment)  # type: ignore[arg-type]
    crew.end_who_is_back()
    ended = [EndMembers(1)] if how.startswith("nothing") else []
    *before, start = link.sent
    assert before == ended
    assert (start.epoch, start.members) == (epoch, (new,))
    link.receive = lambda: [EpochGone(1)] if ended else []
    list(crew.hear([link]))
    link.receive = lambda: [FromMember(new, Digest(3, "ab"))]
    assert list(crew.hear([link])) == [Heard(new, Digest(3, "ab"))]
