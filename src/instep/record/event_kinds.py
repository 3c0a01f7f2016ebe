"""All structures of events, by which tapes are checked and links decode; and that of machines with GPUs. No torch."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import UNSET, Meta

from instep.record.events import (
    BlockEvent,
    CheckpointedEvent,
    ChecksummedEvent,
    ComputedEvent,
    DroppedEvent,
    EvaluatedEvent,
    Event,
    FailedEvent,
    JoinedEvent,
    LeftEvent,
    MergedByServerEvent,
    MergedEvent,
    MergedOnClockEvent,
    PlannedEvent,
    PushedEvent,
    PushedToServerEvent,
    ReleasedEvent,
    RunEndedEvent,
    RunStartedEvent,
    WarnedEvent,
)
from instep.record.fields import Base, Bytes, Count, Maybe, Microbatches, Seconds, Span, Version, Worker
from instep.record.fields import is_ as _is
from instep.record.fields import where_ as _where


class GpuMemoryEvent(Event, frozen=True, kw_only=True, gc=False):
    """A worker on a GPU has done its part: what torch's allocator has counted there."""

    kind = "gpu_memory"
    by = "lockstep, server"

    worker: Worker
    gpu: Annotated[str, _is("its name")]
    peak_bytes: Annotated[Bytes, _is("of tensors, at most")]
    reserved_bytes: Annotated[Bytes, _is("that were taken for them, at most")]


class GraceEndedEvent(Event, frozen=True, kw_only=True, gc=False):
    """Under a rule with `grace_s`: the time is over in which the next update waited for more than its quorum."""

    kind = "grace_ended"
    by = "server, simulation"

    version: Version
    waiting: Annotated[Count, _is("contributions that have come for it")]


class RangesMovedEvent(Event, frozen=True, kw_only=True, gc=False):
    """Workers compute other microbatches than in the step before, as their speed asks for."""

    kind = "ranges_moved"
    by = "lockstep"

    version: Base
    ranges: Annotated[list[Span], _is("the microbatches of each worker; none where both are equal")]
    microbatch_s: Annotated[list[Seconds], _is("what one is taken to need at each worker")]


class SampledEvent(Event, frozen=True, kw_only=True, gc=False):
    """The weights of `version` have been shown: artifacts and, for text, a sample (`recipe.artifacts_every`)."""

    kind = "sampled"
    by = "lockstep, server"

    version: Version
    sample: Annotated[str | None, _is("a text that the model wrote")]
    files: Annotated[list[str], _is("relative to the run folder")]
    figures: Annotated[dict[str, Any], _is("that the recipe's artifacts gave")]
    took_s: Annotated[Seconds, _is("until `t_s`")]


class ResizedEvent(Event, frozen=True, kw_only=True, gc=False):
    """Another number of workers is to train, as somebody or something asks."""

    kind = "resized"
    by = "lockstep, server"

    workers: Annotated[int, Meta(ge=1, le=1 << 24), _is("that the team is to have")]
    before: Annotated[int, Meta(ge=1, le=1 << 24), _is("that it has")]
    by_whom: Annotated[str, _is("the user and process that asked, or what has come or gone")]


class AuditedEvent(Event, frozen=True, kw_only=True, gc=False):
    """A worker has computed microbatches of another's again, and they are the same (`team.audit`)."""

    kind = "audited"
    by = "lockstep"

    worker: Worker
    version: Base
    owner: Annotated[Count, _is("the worker whose microbatches they are")]
    looked_at: Annotated[list[int], _is("microbatches of the global batch")]
    took_s: Annotated[Seconds, _is("computed in addition in this step, for this and for own ones that were looked at")]


class RefutedEvent(Event, frozen=True, kw_only=True, gc=False):
    """A worker has computed a microbatch wrong. The team goes back behind what is uncertain since."""

    kind = "refuted"
    by = "lockstep"

    worker: Worker
    version: Base
    microbatch: Annotated[Count, _is("of the global batch")]
    by_whom: Annotated[str, _is("who has computed it otherwise, and alike")]
    since: Annotated[Count, _is("that of its last good audit, or that it began with; later weights were uncertain")]
    removed: Annotated[list[int], _is("versions of the checkpoints that are not kept for it")]


class StoodInEvent(Event, frozen=True, kw_only=True, gc=False):
    """A worker that died has another do its part of a step, and of those that follow, until its successor is there."""

    kind = "stood_in"
    by = "lockstep"

    worker: Worker
    by_worker: Annotated[Worker, _is("the number of the one that does it")]
    version: Base
    microbatches: Maybe[Annotated[Microbatches, _where("where they were computed again")]] = UNSET


class TookPlaceEvent(Event, frozen=True, kw_only=True, gc=False):
    """The successor of a worker that died has its place: nobody does its part any more."""

    kind = "took_place"
    by = "lockstep"

    worker: Worker
    version: Base


class RegroupedEvent(Event, frozen=True, kw_only=True, gc=False):
    """A team goes on in another group of the same processes, since some were lost, came, or are to leave."""

    kind = "regrouped"
    by = "lockstep"

    version: Version
    workers: Annotated[list[int], _is("the numbers of the workers that go on, in the order of their microbatches")]
    given: Annotated[list[int], _is("the numbers of those that were given the weights of this version by others")]
    kept: Maybe[
        Annotated[
            list[Span],
            _is("by worker, the microbatches of the next update that it had computed, and keeps; none where equal"),
        ]
    ] = UNSET


class HostBackEvent(Event, frozen=True, kw_only=True, gc=False):
    """A host that was cut off from the first one is back, and its processes go on."""

    kind = "host_back"
    by = "lockstep, server"

    host: Annotated[Count, _is("its number, from 0")]
    name: Annotated[str, _is("what it is called")]
    away_s: Annotated[Seconds, _is("for which it could not reach the first one")]


TYPES: tuple[type[Event], ...] = (
    RunStartedEvent, JoinedEvent, ReleasedEvent, RangesMovedEvent, ComputedEvent, PushedEvent, PushedToServerEvent,
    MergedEvent, MergedByServerEvent, MergedOnClockEvent, DroppedEvent, GraceEndedEvent, ChecksummedEvent, AuditedEvent,
    RefutedEvent, EvaluatedEvent, SampledEvent, CheckpointedEvent, LeftEvent, ResizedEvent, StoodInEvent,
    TookPlaceEvent, RegroupedEvent, HostBackEvent, PlannedEvent, WarnedEvent, GpuMemoryEvent, FailedEvent,
    RunEndedEvent, BlockEvent,
)  # fmt: skip
"""All structures, in the order of a run."""

QUIET = frozenset(
    {"released", "ranges_moved", "computed", "pushed", "merged", "dropped", "grace_ended", "checksummed", "audited"}
)
"""Kinds that come with contributions, so that they may wait for others before they are handed on.

A tape that lacks the last of them is as good as one of a run that was killed before: what a resume and its replay
need, the engine has synced before each checkpoint.
"""
