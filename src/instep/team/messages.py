"""Every message between the processes of a run, and for each direction the union of what may come. No torch.

A receiver matches on the class; mypy sees that it knows all of its union, and what is in none is a fault of Instep.
"""

from __future__ import annotations

import copyreg
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from msgspec import UnsetType

from instep.errors import InstepError, by_name
from instep.team.regroup_messages import LeftGroup, NextGroup, NotRegrouped, PeersLost, Regrouped, TakePlace

if TYPE_CHECKING:
    from pathlib import Path

    from instep.recipe import Team
    from instep.record.events import Event
    from instep.record.held import Identity
    from instep.record.result import Costs
    from instep.rules import UpdateRule
    from instep.team.channel import Line
    from instep.team.pickling import Pickled
    from instep.team.place import Place
    from instep.team.remembered import Remembered
    from instep.transport.memory import Region
    from instep.worker.contribution import Facts

copyreg.pickle(UnsetType, lambda _: (UnsetType, ()))  # else pickle looks for it in every module that is loaded

# ------------------------------------------------------------------------------------------------------ several ways


@dataclass(frozen=True, slots=True)
class Events:
    """What has happened in a process, in order."""

    events: Sequence[Event]


@dataclass(frozen=True, slots=True)
class PlainEvents:
    """Events as they stand on the tape, for who watches."""

    events: Sequence[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Failed:
    """An InstepError ends it: the name of its class, its sentence and its detail."""

    name: str
    sentence: str
    detail: str = ""

    @classmethod
    def of(cls, error: InstepError) -> Failed:
        """The message of an error."""
        return cls(type(error).__name__, error.message, error.detail)

    def error(self) -> InstepError:
        """The error again, to be raised."""
        return by_name(self.name)(self.sentence, detail=self.detail)


@dataclass(frozen=True, slots=True)
class Finished:
    """It is done: the fields of ``result.json``, or whatever a call gives."""

    result: Any


@dataclass(frozen=True, slots=True)
class StopRun:
    """End after the present step, with a checkpoint."""


# ------------------------------------------------------------------------------------------- client and supervisor


@dataclass(frozen=True, slots=True)
class Request:
    """One run. `recipe` is pickled, into memory that all workers map, so that only they run the user's code;
    `recipe_table` and `recipe_file`, the file to save, are for the record.

    `fingerprints` are those with none of the recipe's changes, with the first, and so on. `notices` are sentences to
    warn with at the start. `began`, in seconds on the machine's monotonic clock, is the zero of the tape's times.
    `place`: this agent's, of several; those but the first have `folder` for scratch. `environment`: variables besides.
    """

    recipe: Pickled
    recipe_table: Mapping[str, Any]
    recipe_file: str
    fingerprint: str
    team: Team
    rule: UpdateRule
    engine: str
    folder: Path
    resumed: bool
    import_paths: tuple[str, ...]
    began: float
    fingerprints: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()
    place: Place | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The run was asked to stop, or terminated, where there was nothing to save."""


@dataclass(frozen=True, slots=True)
class HeldUp:
    """For whom the others wait, what that does, and for how long; of nobody: nobody waits any more."""

    who: str = ""
    doing: str = ""
    seconds: float = 0.0


ClientToSupervisor = Request | StopRun
SupervisorToClient = PlainEvents | HeldUp | Finished | Failed | Cancelled

# ------------------------------------------------------------------- supervisor, and worker or server of its team


@dataclass(frozen=True, slots=True)
class HostNetwork:
    """How the workers of several hosts reach each other, or their server, in one start of the team.

    workers: how many each host has, neighbours. store: address and port of the store where they find each other, which
    worker 0 serves; or of the server. name: of this start, unlike that of all others. address: this host's, where the
    others reach it. listener: in the process of worker 0, or the server's, a descriptor that listens at the store's
    port. key: by which a server and its workers know each other."""

    workers: tuple[int, ...]
    store: tuple[str, int]
    name: str
    address: str
    listener: int | None = None
    key: bytes = b""


@dataclass(frozen=True, slots=True)
class Assignment:
    """What the supervisor gives to the processes of one start of the team, as it forks them.

    `recipe` is pickled: only workers run the user's code. `began` is the run's start on the monotonic clock. `serving`:
    whether a server makes the updates, else the workers are in lockstep. `lines`: between the server and each worker of
    its host; `incarnation` counts the processes that had this worker's place before. `first`: nothing of the run was
    trained before, and no team of it has started. `run_id` is kept in checkpoints; `identity` is that of the run
    folder. `written`: the parameters that forwards are known to write. `network`: None where the workers of one host
    need none. `place`: among those of its host, from 0, and how many these are. `scratch`: for logs, where the host
    lacks the run folder. `remembered`: where a lone worker keeps its state. `units`: of loaders. `generation`: of the
    newest group, `late`: to be in a later one, see `NextGroup`. `succeeds`: it comes in the place of one that was lost
    while the others go on; `numbers`: of the workers of the group in which it does, by rank, where it shares memory.
    `sources`: source files by path, as those of its host have imported them that came before.
    """

    recipe: Pickled
    team: Team
    folder: Path
    fingerprints: tuple[str, ...]
    resume_from: Path | None
    began: float
    identity: Identity
    run_id: str | None = None
    serving: bool = False
    lines: tuple[Line, ...] = ()
    incarnation: int = 0
    first: bool = False
    written: tuple[str, ...] = ()
    network: HostNetwork | None = None
    place: tuple[int, int] = (0, 1)
    scratch: Path | None = None
    remembered: Remembered | None = None
    units: Any = None
    generation: int = 0
    late: bool = False
    succeeds: bool = False
    numbers: tuple[int, ...] = ()
    sources: Mapping[str, bytes] = field(default_factory=dict)

    def of_team(self, workers: int) -> Assignment:
        """In a team of so many."""
        return replace(self, team=replace(self.team, workers=workers))


@dataclass(frozen=True, slots=True)
class Ready:
    """All is built. `facts` must be the same everywhere; the leader's `memory` is what the team is to share."""

    facts: Mapping[str, Any]
    memory: Mapping[str, Region]
    files: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Agreed:
    """Everybody is ready: the leader's facts and memory. Start."""

    facts: Mapping[str, Any]
    memory: Mapping[str, Region]


@dataclass(frozen=True, slots=True)
class Digest:
    """The digest of a worker's weights of this version."""

    version: int
    digest: str


@dataclass(frozen=True, slots=True)
class Sync:
    """Make sure that the tape holds all events so far, whatever happens to machine or processes."""


@dataclass(frozen=True, slots=True)
class Synced:
    """It does."""


@dataclass(frozen=True, slots=True)
class FoundWritten:
    """Forwards were found to write these parameters, of which nobody knew; `where` it was first."""

    names: Sequence[str]
    where: str


@dataclass(frozen=True, slots=True)
class FoundWrong:
    """Worker number `worker` has computed a microbatch of the step from `version` wrong, as `by` show. since: the
    version after which the weights are uncertain; back: the newest that the team is to begin again from."""

    worker: int
    version: int
    microbatch: int
    since: int
    back: int
    by: str


@dataclass(frozen=True, slots=True)
class KeepState:
    """Agent 0 is lost: keep what the workers of this host hold, for a worker in lockstep that has lost others."""


@dataclass(frozen=True, slots=True)
class KeepingState:
    """The workers of this host have agreed on what is to be kept, and it is being written."""


@dataclass(frozen=True, slots=True)
class StateKept:
    """The answer. Of the first worker of a host: what was kept of the run, as a checkpoint of this name, and the events
    of the last updates. Of others, and where nothing can be kept: version 0, and why."""

    version: int = 0
    name: str = ""
    digest: str = ""
    events: Sequence[Event] = ()
    why: str = ""


@dataclass(frozen=True, slots=True)
class HandedOver:
    """From who holds the place of a worker that died in lockstep: what its successor, of this incarnation, goes on
    with, pickled. The place is not held there any more."""

    worker: int
    incarnation: int
    state: bytes


@dataclass(frozen=True, slots=True)
class EndedFor:
    """From who holds the place of a worker that died in lockstep, before its own end: what that would have told."""

    worker: int
    ended: Ended


@dataclass(frozen=True, slots=True)
class NotStoodIn:
    """Nobody can do what this worker, which died, was doing; who tells it waits for its end."""

    worker: int
    why: str


@dataclass(frozen=True, slots=True)
class SeatHanded:
    """For a successor: the state with which it takes its place, pickled."""

    state: bytes


@dataclass(frozen=True, slots=True)
class StoppedAt:
    """The server has stopped, as it was told to; the newest version that it has saved."""

    version: int


@dataclass(frozen=True, slots=True)
class Ended:
    """A process has done its part. `progress` is `instep.worker.milestones.Progress`; `left`, what the run leaves
    beside its weights; `costs`, of its rule: in lockstep each worker tells its own idle share, and all the same bytes;
    `generation`, of its last group. A worker of the server engine has nothing to tell but that."""

    progress: Mapping[str, Any] = field(default_factory=dict)
    digest: str = ""
    interrupted: bool = False
    left: Mapping[str, Any] = field(default_factory=dict)
    costs: Costs | None = None
    generation: int = 0


@dataclass(frozen=True, slots=True)
class Left:
    """For the server: the process of this worker is gone, and why."""

    worker: int
    why: str


SupervisorToWorker = Agreed | Synced | Left | StopRun | KeepState | SeatHanded | NextGroup | TakePlace
WorkerToSupervisor = (
    Events | Ready | Digest | Sync | FoundWritten | FoundWrong | PeersLost | KeepingState | StateKept | HandedOver
    | EndedFor | NotStoodIn | NotRegrouped | Regrouped | LeftGroup | StoppedAt | Failed | Ended
)  # fmt: skip

# --------------------------------------------------------------------------------------- server and worker, on a line
# `incarnation`: of the process in the worker's place that it is of, or for. What is of another one changes nothing.


@dataclass(frozen=True, slots=True)
class Hello:
    """A worker is there."""

    incarnation: int
    pid: int
    host: str


@dataclass(frozen=True, slots=True)
class Compute:
    """Compute this piece from the weights of `version`, in `slot`, with the loss `scale`. off: what is not trained."""

    incarnation: int
    piece: int
    slot: int
    off: tuple[int, ...]
    version: int
    scale: float


@dataclass(frozen=True, slots=True)
class Pushed:
    """The piece is computed and lies in the worker's vectors; when, on the run's clock, and what was verified.

    ahead: the begin and the end of its steps before the worker had the last update, under rules with `overlap`."""

    incarnation: int
    facts: Facts
    from_s: float
    to_s: float
    verified: dict[str, Any]
    ahead: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class NoMore:
    """There is no more work, for whoever has the worker's place."""


ServerToWorker = Compute | NoMore
WorkerToServer = Hello | Pushed

# ------------------------------------------------------------------------------- caller, and process that computes


@dataclass(frozen=True, slots=True)
class Call:
    """Call the function at `address` ("module:name") with the arguments that are pickled, with so many threads."""

    address: str
    threads: int
    arguments: Pickled


CallerToChild = Call
ChildToCaller = PlainEvents | Finished | Failed
