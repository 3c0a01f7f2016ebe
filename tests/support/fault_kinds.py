"""Which faults of machines there are, what is told of one, and in which order a campaign has them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

KINDS = {
    "host killed": 5,
    "host stopped": 5,
    "host cut off for good": 4,
    "host cut off and back before its lease": 5,
    "host cut off and back after its lease": 5,
    "link cut one way: what it sends": 2,
    "link cut one way: what it is sent": 1,
    "link cut one way: what it sends to one other": 2,
    "worker killed": 6,
    "agent 0: supervisor killed": 1,
    "agent 0: its client killed": 1,
    "agent 0: host killed": 1,
    "agent 0: host stopped": 1,
    "agent 0: host cut off": 1,
}
"""How many there are of each in a whole campaign."""

LOST = ("agent 0: supervisor killed", "agent 0: its client killed", "agent 0: host killed")
"""Those after which another agent 0 takes up what the other hosts' workers have kept: of the steps that the tape tells
of one at most is done again."""

FAULTS = sum(KINDS.values())


@dataclass
class Fault:
    """One, and what came of it. `named_after_s`: since it happened; None where nobody is to be named.

    again: steps that were done again, over all starts that followed it; before_checkpoint: those of them that were done
    before the newest checkpoint, of which there are to be none. most_again: of all, if there is a limit. commit_s: of a
    lost agent 0, from the command that has started it again to the next update.
    """

    number: int
    kind: str
    host: int
    t_s: float
    how: str = ""
    named: str = ""
    named_after_s: float | None = None
    starts: list[int] = field(default_factory=list)
    again: int = 0
    before_checkpoint: int = 0
    whole_after_s: float = 0.0
    commit_s: float | None = None
    most_again: int | None = None

    @property
    def lost_none(self) -> bool:
        """Whether no more was done again than it may cost."""
        return not self.before_checkpoint and (self.most_again is None or self.again <= self.most_again)


def plan(draw: random.Random, count: int, of: Sequence[str] = tuple(KINDS)) -> list[str]:
    """So many kinds in a drawn order; few are of as many kinds as can be, at least one of agent 0."""
    if not count:
        return []
    if count < FAULTS:
        of_agent_0 = [kind for kind in of if kind.startswith("agent 0")]
        others = [kind for kind in of if kind not in of_agent_0]
        kinds = [draw.choice(of_agent_0), *draw.sample(others, min(count - 1, len(others)))]
        kinds += draw.sample([kind for kind in of_agent_0 if kind not in kinds], count - len(kinds))
    else:
        kinds = [kind for kind, times in KINDS.items() for _ in range(times)]
    draw.shuffle(kinds)
    return kinds
