"""What a worker in lockstep over several hosts and its agent tell each other when the team goes on in another group of
the same processes. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class NextGroup:
    """Go on in the group of this generation; those of one epoch count from 0, for that of its start.

    By rank: numbers and incarnations of its workers, and the hosts on which they are, neighbours. told, saved: the last
    update and checkpoint that the tape has. memory: in the process of their agent, the descriptor of what the workers
    of one host are to share, a file of this `inode`; negative for one that is alone there. fresh: the numbers of those
    that have been in no group before. remembered: where one keeps its state that is alone, descriptors of the agent's.
    """

    generation: int
    numbers: tuple[int, ...]
    incarnations: tuple[int, ...]
    hosts: tuple[int, ...]
    told: int = 0
    saved: int = 0
    memory: int = -1
    inode: int = 0
    fresh: frozenset[int] = frozenset()
    remembered: Any = None


@dataclass(frozen=True, slots=True)
class LeftGroup:
    """The worker has left the group of this generation with all others of it that live: after a step, as all were asked
    to, or before it was formed, since one of them died. So it is where they share memory.
    """

    generation: int


@dataclass(frozen=True, slots=True)
class Regrouped:
    """All workers are in the group of this generation, and need nobody any more who is not."""

    generation: int


@dataclass(frozen=True, slots=True)
class NotRegrouped:
    """The workers cannot go on in the group of this generation, and `why`; who tells it waits for its end."""

    generation: int
    why: str


@dataclass(frozen=True, slots=True)
class PeersLost:
    """A worker cannot reach the others of its group any more, or form it. silent: the address of one that is, or ""."""

    why: str
    silent: str = ""
    generation: int = 0
    forming: bool = False


@dataclass(frozen=True, slots=True)
class TakePlace:
    """For a process that was built to take a worker's place, and has waited: it has it, in a team of so many."""

    workers: int
