"""What crosses between the agents of a run, see `instep.team.wire_format` for how. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from msgspec import Meta

from instep.record.events import Event
from instep.record.hardware import Hardware
from instep.team.messages import Cancelled, Failed, Finished, StopRun, SupervisorToWorker, WorkerToSupervisor
from instep.team.orders import Member

PART_BYTES = 4 << 20
"""Bytes of a file that a `CheckpointPart` has at most."""

LOG_BYTES = 1 << 16
"""Bytes of a log that a `LogPart` has at most."""

Count = Annotated[int, Meta(ge=0, lt=1 << 53)]
Name = Annotated[str, Meta(max_length=1000)]
FileName = Annotated[str, Meta(max_length=255, pattern=r"^\w[\w .-]*\Z")]
"""Of a file or folder in one that the reader knows: it leads nowhere else."""

FilePath = Annotated[str, Meta(max_length=1000, pattern=r"^\w[\w .-]*(/\w[\w .-]*)*\Z")]

Names = Annotated[Sequence[str], Meta(max_length=1 << 20)]
Table = Annotated[Mapping[str, Any], Meta(max_length=1 << 12)]
"""Of plain values: nothing, numbers, text, bytes, and lists, tuples and tables of such."""

LONGEST = 1 << 16
"""Elements of a list of messages or members."""


class WireError(OSError):
    """What came is nothing that the other end may send, or it does not take what it is sent."""


# ------------------------------------------------------------------------------------------------------- to agent 0


@dataclass(frozen=True)
class Kept:
    """What the workers of a host have kept of a run, when they had lost agent 0: a checkpoint of this name there."""

    run: Name | None
    version: Count
    name: FileName
    digest: Name


@dataclass(frozen=True)
class HelloAgent:
    """An agent is there; the first message of its link.

    here: how many agents its host has. name: its host's. session: a word that it alone has, drawn as it starts. recipe:
    the table that `fingerprint` is of. address: of its own interface on the way to agent 0. kept: if it has something.
    room: for how many workers its host has room.
    """

    agent: Count
    host: Count
    local: Count
    here: Count
    name: Name
    session: Name
    pid: Count
    versions: Annotated[Mapping[str, str], Meta(max_length=64)]
    processor: Name
    fingerprint: Name
    recipe: Table
    address: Name
    hardware: Hardware
    kept: Kept | None = None
    room: Count = 0


@dataclass(frozen=True)
class HelloAgain:
    """An agent has reached agent 0 again after `away_s` seconds; the first message of a connection by which its link is
    to go on, of which so many messages `came`. members: those that live there, and can go on.
    """

    agent: Count
    session: Name
    came: Count
    away_s: float
    members: tuple[Member, ...] = ()


@dataclass(frozen=True)
class WasAway:
    """An agent could not reach agent 0 for `away_s` seconds, and its link goes on as it was."""

    away_s: float


@dataclass(frozen=True)
class FromMember:
    """What a process of its host has sent. A `Ready` crosses without memory and files: its host's."""

    member: Member
    message: WorkerToSupervisor


@dataclass(frozen=True)
class MemberLost:
    """A process of its host died or does not answer, as the sentence `why` says. detail: what it printed last."""

    member: Member
    why: str
    detail: str = ""


@dataclass(frozen=True)
class LogPart:
    """More of what a process of its host has printed."""

    name: FileName
    content: Annotated[bytes, Meta(max_length=LOG_BYTES)]


@dataclass(frozen=True)
class Beat:
    """A sign of life, `sent_s` on the sender's monotonic clock, and agent 0's answer, with the run's clock, `clock_s`.

    error_s: how far the agent's idea of that may be off. sent, received: bytes, by it and its workers, see `Carried`.
    """

    seq: Count
    sent_s: float
    clock_s: float = 0.0
    error_s: float = 0.0
    sent: Count = 0
    received: Count = 0


@dataclass(frozen=True)
class Shown:
    """A process of the team, as its agent sees it. Times are seconds since the run's start, on the run's clock.

    seen_s: when it was seen. since_s: of the process. doing: in words, "" before it has told, and since when. waits_s:
    since when it waits for others, None where it does not. stopped: by SIGSTOP or a debugger. done: with its part.
    """

    member: Member
    pid: Count
    seen_s: float
    since_s: float
    doing: Name
    doing_s: float
    waits_s: float | None = None
    stopped: bool = False
    done: bool = False


@dataclass(frozen=True)
class LoaderShown:
    """A loader, as its agent sees it. number: of all of the team's. read: microbatches since the team started. ahead:
    those that no worker has taken yet, and their bytes. died: how many in its place did. doing: in words; "" for that
    nothing more is wanted. stopped: by SIGSTOP or a debugger.
    """

    host: Count
    number: Count
    pid: Count
    read: Count
    ahead: Count
    ahead_bytes: Count
    died: Count
    doing: Name
    stopped: bool = False


@dataclass(frozen=True)
class MembersShown:
    """What the processes of its host do, about every second; and more of the stacks, by number in text, that answer the
    last `StacksWanted`, of this count.
    """

    shown: tuple[Shown, ...]
    asked: Count = 0
    stacks: Table = field(default_factory=dict)
    loaders: tuple[LoaderShown, ...] = ()


@dataclass(frozen=True)
class HostLeaves:
    """Its host's processes cannot go on with the others, as the sentence `why` says: it ends them, and comes anew."""

    why: str


@dataclass(frozen=True)
class EpochGone:
    """All its host's processes of the epoch have ended, and their last words were sent."""

    epoch: Count


@dataclass(frozen=True)
class KeptGiven:
    """All parts of what was kept have been sent; some of the run's last events, in order, and whether `more` follow.
    why: a sentence where it cannot be sent.
    """

    name: FileName
    events: tuple[Event, ...] = ()
    why: str = ""
    more: bool = False


@dataclass(frozen=True)
class AskRun:
    """An agent, which has no folder, asks what is trained; the first message of a link that is for this alone."""

    agent: Count


@dataclass(frozen=True)
class NotComing:
    """An agent has failed before it could take part; the only message of its link.

    name: its host's. kind, sentence, detail: those of a `Failed`.
    """

    agent: Count
    host: Count
    name: Name
    kind: Name
    sentence: str
    detail: str = ""


# ----------------------------------------------------------------------------------------------------- from agent 0


@dataclass(frozen=True)
class Welcome:
    """The answer to a hello: agent 0's run, clock and host."""

    run_id: Name | None
    clock_s: float
    name: Name


@dataclass(frozen=True)
class WelcomeAgain:
    """The answer to `HelloAgain`: how many messages of the link have come. known: whether agent 0 knows it any more."""

    came: Count
    known: bool = True


@dataclass(frozen=True)
class RunGiven:
    """The answer to `AskRun`: recipe and team, in TOML, and where the recipe's modules are looked for."""

    recipe_file: str
    import_paths: Names


@dataclass(frozen=True)
class StartMembers:
    """Start these processes, from the checkpoint of this name if any.

    team, first, run_id, written, late: as in `instep.team.messages.Assignment`. hosts: workers by host. store: address
    of that of gloo, in which the group is called `name`. folder: agent 0's run folder, for sentences.
    """

    epoch: Count
    members: tuple[Member, ...]
    checkpoint: FileName | None
    team: Table
    first: bool
    run_id: Name | None
    written: Names
    hosts: Annotated[tuple[Count, ...], Meta(max_length=LONGEST)]
    store: tuple[Name, Count]
    name: Name
    folder: str
    late: bool = False


@dataclass(frozen=True)
class CheckpointPart:
    """Bytes of a file of a checkpoint. last: of this file, whose SHA-256, in hexadecimal digits, comes with it."""

    name: FileName
    file: FilePath
    offset: Count
    content: Annotated[bytes, Meta(max_length=PART_BYTES)]
    last: bool
    sha256: Name = ""


@dataclass(frozen=True)
class GiveKept:
    """Send what was kept, in parts of a checkpoint, and then `KeptGiven`."""

    name: FileName


@dataclass(frozen=True)
class GoMembers:
    """All are ready, and agree on these facts: let them begin."""

    epoch: Count
    facts: Table


@dataclass(frozen=True)
class ToMember:
    """For a process of the other's host. An `Agreed` crosses without memory."""

    member: Member
    message: SupervisorToWorker


@dataclass(frozen=True)
class StacksWanted:
    """Have these workers show their stacks, for the `MembersShown` that follow. asked: counts such questions."""

    asked: Count
    numbers: Annotated[tuple[Count, ...], Meta(max_length=LONGEST)]


@dataclass(frozen=True)
class TakeOut:
    """End what is left of this process, which was lost, and send its last words."""

    member: Member


@dataclass(frozen=True)
class StartSuccessor:
    """Start this process in the place of one that was taken out."""

    member: Member


@dataclass(frozen=True)
class RegroupMembers:
    """Have these members go on in a group of their own, as in `instep.team.orders.Regroup`. told, saved: the last
    update and checkpoint that the tape has.
    """

    epoch: Count
    generation: Count
    members: tuple[Member, ...]
    at_once: bool
    told: Count
    saved: Count
    fewer: bool = False
    formed: Count = 0


@dataclass(frozen=True)
class EndMembers:
    """End all processes of the epoch at once, and answer with `EpochGone`."""

    epoch: Count


ToAgent0 = (
    HelloAgent | HelloAgain | WasAway | AskRun | NotComing | FromMember | MemberLost | StopRun | LogPart | Beat
    | MembersShown | HostLeaves | EpochGone | CheckpointPart | KeptGiven | Failed
)  # fmt: skip
FromAgent0 = (
    Welcome
    | WelcomeAgain
    | RunGiven
    | StartMembers
    | CheckpointPart
    | GiveKept
    | GoMembers
    | ToMember
    | StacksWanted
    | TakeOut
    | StartSuccessor
    | RegroupMembers
    | EndMembers
    | Beat
    | Finished
    | Failed
    | Cancelled
)
Message = ToAgent0 | FromAgent0
