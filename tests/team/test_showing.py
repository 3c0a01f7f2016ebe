"""What an agent tells the first of its workers: each stack once for each question, and no more than a message takes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import pytest

from instep.team import showing
from instep.team.orders import Member
from instep.team.showing import Showing
from instep.team.wire_format import MESSAGE_BYTES, encode
from instep.team.wire_messages import LoaderShown, MembersShown, Shown, StacksWanted

pytestmark = pytest.mark.pure


class Workers:
    """A crew whose workers show what they are told to."""

    def __init__(self, count: int):
        self.found: dict[int, str] = {}
        self.asked: list[Collection[int]] = []
        self.members = tuple(Shown(Member(1, n, host=1), 100 + n, 0.0, 0.0, "computing", 0.0) for n in range(count))

    def shown(self) -> tuple[Shown, ...]:
        return self.members

    def loaders_shown(self) -> tuple[LoaderShown, ...]:
        return (LoaderShown(1, 2, 200, 7, 3, 99, 0, ""),)

    def ask_for_stacks(self, numbers: Collection[int]) -> None:
        self.asked.append(numbers)
        self.found = {}

    def stacks(self) -> Mapping[int, str]:
        return self.found


def words(one: Showing, crew: Any, count: int) -> list[MembersShown]:
    return [word for _ in range(count) if (word := one.word(crew)) is not None]


def test_a_stack_is_told_once_for_each_question_and_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(showing, "SHOW_S", 1e9)  # nothing else is to be told, after the first word
    crew: Any = Workers(3)
    one = Showing()
    one._told_s = -2e9
    assert [word.stacks for word in words(one, crew, 5)] == [{}]
    one.ask(StacksWanted(7, (0, 2)), crew)
    assert words(one, crew, 5) == [], "there is nothing yet"
    crew.found = {2: "two"}
    assert [(word.asked, word.stacks) for word in words(one, crew, 5)] == [(7, {"2": "two"})]
    crew.found = {2: "two", 0: "zero"}
    assert [(word.asked, word.stacks) for word in words(one, crew, 5)] == [(7, {"0": "zero"})]
    one.ask(StacksWanted(8, (2,)), crew)
    crew.found = {2: "two, later"}
    assert [(word.asked, word.stacks) for word in words(one, crew, 5)] == [(8, {"2": "two, later"})]
    assert crew.asked == [(0, 2), (2,)]


def test_stacks_of_any_number_of_workers_can_be_sent_and_keep_their_innermost_calls() -> None:
    crew: Any = Workers(3000)
    one, numbers = Showing(), tuple(range(3000))
    one.ask(StacksWanted(1, numbers), crew)
    crew.found = dict.fromkeys(numbers, "innermost\n" + "é" * (1 << 14))
    (word,) = words(one, crew, 1)
    assert len(encode(word)) < MESSAGE_BYTES // 2
    assert len(word.stacks) == 3000
    assert all(text.startswith("innermost\né") for text in word.stacks.values())
