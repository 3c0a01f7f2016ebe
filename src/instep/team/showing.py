"""What an agent that follows another tells it of its workers, and no message of theirs does: what they do, and stacks.

No torch.
"""

from __future__ import annotations

import time

from instep.team.crews import Crew
from instep.team.wire_messages import MembersShown, StacksWanted

SHOW_S = 1.0
"""Seconds between two words on what the workers do."""

STACKS_BYTES = 4 << 20
"""Bytes at most that the stacks of one question come to: of many each is cut, and keeps its innermost calls."""


class Showing:
    """Of one host's workers. Each stack is told once for each question, as soon as it is there."""

    def __init__(self) -> None:
        self._told_s, self._asked = 0.0, 0
        self._awaited, self._most = set[int](), 0  # whose stacks are to be told yet, and bytes of each at most

    def ask(self, question: StacksWanted, crew: Crew) -> None:
        """Has the workers show their stacks."""
        self._asked, self._awaited = question.asked, set(question.numbers)
        self._most = STACKS_BYTES // max(1, len(self._awaited))
        crew.ask_for_stacks(question.numbers)

    def word(self, crew: Crew) -> MembersShown | None:
        """What is to be told now, if it is time for that."""
        found = crew.stacks() if self._awaited else {}
        new = {number: text for number, text in found.items() if number in self._awaited}
        now = time.monotonic()
        if not new and now - self._told_s < SHOW_S:
            return None
        self._told_s = now
        self._awaited.difference_update(new)
        stacks = {str(number): self._cut(text) for number, text in new.items()}
        return MembersShown(crew.shown(), self._asked, stacks, crew.loaders_shown())

    def _cut(self, text: str) -> str:
        return text.encode(errors="replace")[: self._most].decode(errors="ignore")
