"""What a roster hears of a team's processes, and what it has the agent do. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from instep.errors import InstepError
from instep.team.messages import (
    Digest,
    Ended,
    EndedFor,
    Failed,
    FoundWritten,
    FoundWrong,
    HandedOver,
    NotStoodIn,
    Ready,
    StoppedAt,
)
from instep.team.regroup_messages import LeftGroup, NotRegrouped, Regrouped


@dataclass(frozen=True, order=True)
class Member:
    """A process of the team. Workers count from 0, and a server comes after them; `incarnation` counts the processes
    that had its place before in its epoch. host: where it is; hosts count from 0, where the server and worker 0 are.
    """

    epoch: int
    number: int
    incarnation: int = 0
    host: int = 0


Word = (
    Ready | Digest | FoundWritten | FoundWrong | HandedOver | EndedFor | NotStoodIn | NotRegrouped | Regrouped
    | LeftGroup
    | StoppedAt | Failed | Ended
)  # fmt: skip
"""What of a process's messages means something for the team."""

# Events


@dataclass(frozen=True)
class Resumed:
    """What the checkpoint that an epoch starts from tells. None of the epoch's processes has started yet.

    written: parameters that forwards are known to write. unlooked: whether others may have been written, unseen.
    """

    epoch: int
    written: tuple[str, ...] = ()
    unlooked: bool = False


@dataclass(frozen=True)
class Said:
    """What a process has sent."""

    member: Member
    message: Word


@dataclass(frozen=True)
class Lost:
    """It died, does not answer, or gets nowhere, as the sentence `why` says. detail: what it printed last. whole_host:
    it is one of those of a host that is gone; may_return: which may come back with its processes.
    """

    member: Member
    why: str
    detail: str = ""
    whole_host: bool = False
    may_return: bool = False


@dataclass(frozen=True)
class StopAsked:
    """The run is to end: after the present step, with a checkpoint, or at once.

    within: one of the team's own processes asked for it, and all of them know already.
    """

    at_once: bool = False
    within: bool = False


@dataclass(frozen=True)
class EpochEnded:
    """All processes of an epoch have ended, and their last words are read. written: parameters that those tell of."""

    epoch: int
    written: tuple[str, ...] = ()


@dataclass(frozen=True)
class HostCame:
    """A host, called `name`, is there to take workers: the first time, or again. agents: how many it has, if that is
    news. room: for how many workers it has room, where their number follows that. members: those that live there, where
    it was cut off.
    """

    host: int
    name: str = ""
    agents: int = 0
    room: int = 0
    members: tuple[Member, ...] = ()


@dataclass(frozen=True)
class LongAwaited:
    """Those that are waited for have had time to come."""


@dataclass(frozen=True)
class HostLost:
    """A host cannot be reached any more, as the sentence `why` says, and its workers with it. may_return: they live on
    there, should it have been cut off, and may come back.
    """

    host: int
    why: str
    may_return: bool = False


@dataclass(frozen=True)
class HostGivenUp:
    """One that might have come back has not, as the sentence `why` says."""

    host: int
    why: str


@dataclass(frozen=True)
class HostBack:
    """A host that could not be reached for a while, as the sentence `why` says, is back before it was lost."""

    host: int
    why: str


@dataclass(frozen=True)
class Saved:
    """The team of this epoch has saved a checkpoint, and has more to train."""

    epoch: int


@dataclass(frozen=True)
class Resize:
    """The run's owner wants so many workers from the next step on."""

    workers: int


@dataclass(frozen=True)
class CannotStart:
    """What was ordered last for a start of the team could not be done."""

    error: InstepError


OfHosts = HostCame | HostLost | HostGivenUp | HostBack | LongAwaited
RosterEvent = Resumed | Said | Lost | StopAsked | EpochEnded | OfHosts | Saved | Resize | CannotStart

Ending = Lost | FoundWritten | Saved | Resize
"""Why an epoch ends before the run."""

# Orders


@dataclass(frozen=True)
class Start:
    """Start these processes, who are the whole team, from the newest checkpoint.

    looked: checkpoints that a forward may have written into, unseen, are to be removed first.
    """

    epoch: int
    members: tuple[Member, ...]
    looked: bool = False


@dataclass(frozen=True)
class Go:
    """All are ready: let them begin."""

    epoch: int
    members: tuple[Member, ...]


@dataclass(frozen=True)
class Join:
    """A successor is ready: let it begin with the others, who go on."""

    member: Member


@dataclass(frozen=True)
class Replace:
    """End what is left of a member that was lost, tell the server or, in lockstep, the tape `why`, and start its
    successor if there is one.

    holders: in lockstep, who holds its place from then on, and the places that it has held itself: by successor. told:
    the tape has it already. resized: it was not lost, and the team is to go on without it.
    """

    member: Member
    successor: Member | None
    why: str
    holders: Mapping[Member, Member] = field(default_factory=dict)
    told: bool = False
    resized: bool = False


@dataclass(frozen=True)
class HandOver:
    """Give a successor its place, with the `state` that who held it has told."""

    member: Member
    state: bytes


@dataclass(frozen=True)
class DropSuccessor:
    """End a process whose place in lockstep others have held until all was done."""

    member: Member


@dataclass(frozen=True)
class Regroup:
    """Have these members, in the order of their ranks, go on in a group of their own, see `messages.NextGroup`.

    at_once: the others are told to leave the group of before wherever they wait; else they do after the present step.
    fewer: some of that are in no group any more, and are to leave what the others need of them. No members: who goes
    on in it is told later; with the generation of the present group, all stay in that. formed: the last one that all of
    it are in, or were, as far as is known. fresh: the numbers of those that are in one for the first time.
    """

    epoch: int
    generation: int
    members: tuple[Member, ...]
    at_once: bool
    fewer: bool = False
    formed: int = field(default=0, compare=False)
    fresh: frozenset[int] = field(default=frozenset(), compare=False)


@dataclass(frozen=True)
class StartMore:
    """Start these processes of a host while the others go on; under a server that has come, and each is to `Join` them;
    in lockstep they are to be in a later group.
    """

    members: tuple[Member, ...]


@dataclass(frozen=True)
class AskToStop:
    """Have the team end after the present step, with a checkpoint."""

    epoch: int


@dataclass(frozen=True)
class AskToPause:
    """As `AskToStop`, for a team that is to start anew."""

    epoch: int


@dataclass(frozen=True)
class StopServer:
    """Have the server save what is sound and stop, since the code of worker number `worker` has raised."""

    server: Member
    worker: int


@dataclass(frozen=True)
class EndEpoch:
    """End all processes of an epoch at once, and answer with `EpochEnded`."""

    epoch: int


@dataclass(frozen=True)
class NoteLoss:
    """Put on the tape that a member was lost."""

    member: Member
    why: str


@dataclass(frozen=True)
class NoteResize:
    """Put on the tape that the team is to have so many workers, as somebody or something asks for."""

    workers: int
    before: int
    by: str


@dataclass(frozen=True)
class Warn:
    """Put a warning on the tape."""

    why: str


@dataclass(frozen=True)
class FinishRun:
    """All have done their part: the run has ended, with the result that `leader` has told."""

    leader: Member


@dataclass(frozen=True)
class FailRun:
    """The run ends with this error. What still lives of the team is to be ended."""

    error: InstepError


@dataclass(frozen=True)
class CancelRun:
    """The run ends without a result, as it was asked to. What still lives of the team is to be ended."""


Order = (
    Start
    | Go
    | Join
    | Replace
    | HandOver
    | DropSuccessor
    | Regroup
    | StartMore
    | AskToStop
    | AskToPause
    | StopServer
    | EndEpoch
    | NoteLoss
    | NoteResize
    | Warn
    | FinishRun
    | FailRun
    | CancelRun
)
