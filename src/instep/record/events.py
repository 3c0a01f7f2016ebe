"""Every kind of event of a tape: a frozen structure each, whose fields say their types, units and meanings. No torch.

Whoever emits an event makes one of these, so that a field too many or too few is an error on the spot; `plain` gives
what the tape holds. Where engines tell different things of one kind, there are several structures of that kind.

A reader meets tapes of other versions too: it gets plain tables, and passes over kinds and fields that are not here.
`instep.record.schema` makes of these structures what a reader checks, and the table of docs/record.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from msgspec import UNSET, Meta, Struct
from msgspec.structs import astuple

from instep.record.fields import (
    Base,
    Batch,
    Bytes,
    Checksum,
    Count,
    Counted,
    Ema,
    Figure,
    Items,
    LocalSteps,
    LossScaleUsed,
    Maybe,
    Microbatches,
    Overflows,
    Piece,
    Seconds,
    Seq,
    Terms,
    Version,
    Why,
    Worker,
)  # fmt: skip
from instep.record.fields import has_ as _has
from instep.record.fields import is_ as _is
from instep.record.fields import where_ as _where
from instep.record.team import BytesOfHost, HardwareOfHost, HostInTeam, TeamAsRead

SCHEMA = 2
"""The version of the events' fields and of what they mean, named by ``run_started``. 2: checksums weigh by place."""

SCHEMA_IN_BLOCKS = 3
"""That of a tape with ``block`` in it: who knows no such event would take what is left for the whole."""


class Event(Struct, frozen=True, kw_only=True, gc=False):
    """What every event has. Whoever emits it says when."""

    kind: ClassVar[str]
    by: ClassVar[str] = ""
    """The engines that emit it, where not all do."""

    t_s: Annotated[Seconds, _is("since the start of its session")] = 0.0
    clock: Annotated[Literal["wall", "virtual"], _is('"virtual" in a simulation')] = "wall"


class RunStartedEvent(Event, frozen=True, kw_only=True, gc=False):
    """A session begins, or its team starts again: the run goes on from `version`."""

    kind = "run_started"

    schema: Annotated[int, _is("the version of the events' fields and of what they mean")]
    folder: Annotated[str, _is("the run folder, empty for none")]
    run: Maybe[Annotated[str | None, _is("the run's id", where="not in a simulation")]] = UNSET
    recipe: Annotated[dict[str, Any], _is("the resolved recipe")]
    team: Annotated[dict[str, Any], _is("the resolved team"), _has(TeamAsRead)]
    fingerprint: Annotated[str, _is("of the recipe")]
    data_digest: Annotated[str, _is("of the training data")]
    samples: Annotated[Count, _is("of the training data")]
    engine: Annotated[str, _is("what runs the workers"), _has(Literal["lockstep", "server", "virtual"])]
    cut: Annotated[int, Meta(ge=1, le=1 << 24), _is("pieces that a global batch is cut into")]
    parameters: Annotated[Count, _is("trainable weights")]
    version: Version
    digest: Maybe[Annotated[str | None, _is("of the weights that it starts from", where="not in a simulation")]] = UNSET
    step: Annotated[Count, _is("global batches done")]
    steps: Annotated[Counted, _is("global batches of the run")]
    resumed: Annotated[bool, _is("whether anything was done before")]
    remembered: Maybe[
        Annotated[bool, _is("true: it goes on from a copy in memory", where="where it loads no checkpoint")]
    ] = UNSET
    libraries: Annotated[dict[str, str], _is("versions by name")]
    processor: Maybe[Annotated[str, _is("its kind, as far as bits hang on it", where="not in a simulation")]] = UNSET
    hardware: Maybe[Annotated[HardwareOfHost, _is("of the first host", where="not in a simulation")]] = UNSET
    import_paths: Annotated[list[str], _is("folders where the recipe's modules are looked for")]
    microbatch_s: Maybe[Annotated[Seconds | None, _is("of a microbatch, measured", where="in a simulation")]] = UNSET
    batched: Maybe[Annotated[bool, _is("whether gradients are computed together", where="in a simulation")]] = UNSET
    written: Maybe[Annotated[list[str], _is("parameters", where="where forwards are known to write any")]] = UNSET
    optimizers: Maybe[Annotated[list[str], _is("what each of them trains", where="where there are several")]] = UNSET
    whole_update: Maybe[Annotated[str, _is("why each worker makes all of it", where="where it is not shared")]] = UNSET
    hosts: Maybe[Annotated[list[HostInTeam], _is("who has workers", where="where there are several agents")]] = UNSET


class JoinedEvent(Event, frozen=True, kw_only=True, gc=False):
    """A worker is there."""

    kind = "joined"

    worker: Worker
    pid: Maybe[Annotated[Count, _is("its process", where="not in a simulation")]] = UNSET
    host: Maybe[Annotated[str, _is("its machine", where="not in a simulation")]] = UNSET


class ReleasedEvent(Event, frozen=True, kw_only=True, gc=False):
    """A worker gets a piece to compute, and the weights of `version`."""

    kind = "released"
    by = "server, simulation"

    worker: Worker
    version: Base
    piece: Piece
    lead: Maybe[Annotated[Count, _is("rounds that it is ahead", where="not in a simulation")]] = UNSET


class ComputedEvent(Event, frozen=True, kw_only=True, gc=False):
    """A worker has computed a contribution."""

    kind = "computed"

    worker: Worker
    version: Base
    piece: Maybe[Annotated[Piece, _where("in a simulation")]] = UNSET
    from_s: Annotated[Seconds, _is("its begin")]
    to_s: Annotated[Seconds, _is("its end")]
    batch: Maybe[Annotated[Batch, _where("not in lockstep")]] = UNSET
    local_steps: Maybe[Annotated[LocalSteps, _where("not in lockstep")]] = UNSET
    microbatches: Microbatches
    verify_s: Maybe[Annotated[Seconds, _is("spent on it", where="where recomputed values were compared")]] = UNSET
    ahead: Maybe[Annotated[list[float], _is("from, to, s, before its update", where="with `rule.overlap`")]] = UNSET


class PushedEvent(Event, frozen=True, kw_only=True, gc=False):
    """A worker has sent a contribution."""

    kind = "pushed"
    by = "lockstep"

    worker: Worker
    version: Base
    bytes: Bytes
    items: Items
    checksum: Maybe[Annotated[Checksum, _where("in lockstep of each node, with `checksummed`")]] = UNSET


class PushedToServerEvent(Event, frozen=True, kw_only=True, gc=False):
    """A contribution has arrived."""

    kind = "pushed"
    by = "server, simulation"

    seq: Seq
    worker: Worker
    version: Base
    piece: Piece
    batch: Batch
    local_steps: LocalSteps
    microbatches: Microbatches
    items: Items
    bytes: Bytes
    checksum: Maybe[Annotated[Checksum, _where("not without gradients")]] = UNSET


class MergedContribution(Struct, frozen=True, kw_only=True, gc=False):
    """A part of an update."""

    seq: Maybe[Annotated[Seq, _where("not in lockstep")]] = UNSET
    worker: Worker
    version: Base
    piece: Maybe[Annotated[Piece, _where("not in lockstep")]] = UNSET
    items: Maybe[Annotated[Items, _where("in a simulation")]] = UNSET
    microbatches: Maybe[Annotated[Microbatches, _where("in lockstep")]] = UNSET


Contributions = Annotated[list[MergedContribution], _is("in the order in which they are added")]
Weights = Annotated[list[float], _is("of each contribution")]
Staleness = Annotated[list[Count], _is("versions that each contribution was behind")]
Step = Annotated[Count, _is("global batches done")]
Objective = Annotated[Figure, _is("null where it has no items, as at the ragged end of an epoch")]
Rate = Annotated[Figure, _is("the first group's learning rate, null where the optimizer has none")]
Norm = Annotated[Figure, _is("of the gradient or delta, before clipping")]
TrainSeconds = Annotated[Seconds, _is("in steps so far")]
Spike = Annotated[str, _is("the watch's answer", where="where it is one")]
BadBatches = Annotated[Count, _is("batches that were left out", where="where any were bad")]
Gathered = Annotated[Mapping[str, Figure], _is("metrics that are no sums", where="where the objective gathers any")]
WireBytes = Annotated[list[BytesOfHost], _is("to and from other hosts", where="where there are several agents")]
BitsPerByte = Annotated[Figure, _is("of text", where="where cross entropy is counted in tokens of it")]
Turn = Annotated[str, _is("whose objective it is; several joined by +", where="where objectives take turns")]
EachTurn = Annotated[Mapping[str, Figure], _is("the objective of each", where="where objectives take turns")]


class MergedEvent(Event, frozen=True, kw_only=True, gc=False):
    """An update is made."""

    kind = "merged"
    by = "lockstep"

    version: Version
    step: Step
    contributions: Contributions
    weights: Weights
    staleness: Staleness
    objective: Objective
    terms: Terms
    items: Items
    lr: Rate
    grad_norm: Norm
    train_s: TrainSeconds
    spike: Maybe[Spike] = UNSET
    bad_batches: Maybe[BadBatches] = UNSET
    turn: Maybe[Turn] = UNSET
    overflows: Maybe[Overflows] = UNSET
    loss_scale: Maybe[LossScaleUsed] = UNSET


class MergedByServerEvent(Event, frozen=True, kw_only=True, gc=False):
    """An update is made of what has arrived."""

    kind = "merged"
    by = "server, simulation with gradients"

    version: Version
    step: Step
    contributions: Contributions
    weights: Weights
    staleness: Staleness
    train_s: Maybe[Annotated[TrainSeconds, _where("not in a simulation")]] = UNSET
    objective: Objective
    terms: Terms
    items: Items
    lr: Rate
    grad_norm: Norm
    spike: Maybe[Spike] = UNSET
    bad_batches: Maybe[BadBatches] = UNSET
    turn: Maybe[Turn] = UNSET
    overflows: Maybe[Overflows] = UNSET
    loss_scale: Maybe[LossScaleUsed] = UNSET
    checksum: Maybe[Annotated[Checksum, _where("not in a simulation that keeps no tape")]] = UNSET


class MergedOnClockEvent(Event, frozen=True, kw_only=True, gc=False):
    """An update whose gradients nobody computes."""

    kind = "merged"
    by = "simulation without gradients"

    version: Version
    contributions: Contributions
    weights: Weights
    staleness: Staleness


class DroppedEvent(Event, frozen=True, kw_only=True, gc=False):
    """A contribution is not merged. Its piece is given out again."""

    kind = "dropped"
    by = "server, simulation"

    seq: Seq
    worker: Worker
    piece: Maybe[Annotated[Piece, _where("in a simulation")]] = UNSET
    version: Maybe[Annotated[Base, _where("in a simulation")]] = UNSET
    items: Maybe[Annotated[Items, _where("in a simulation")]] = UNSET
    why: Why


class ChecksummedEvent(Event, frozen=True, kw_only=True, gc=False):
    """Under a synchronous rule, every so many updates: what all tensors are."""

    kind = "checksummed"
    by = "lockstep, server, simulation with gradients"

    version: Version
    weights: Annotated[Mapping[str, str], _is("8 hexadecimal digits for each parameter and buffer, by name")]
    optimizer: Annotated[Mapping[str, str], _is("the same for what it keeps, by the parameter's name and its own")]
    took_s: Maybe[Annotated[Seconds, _is("spent on it", where="not in a simulation")]] = UNSET


class EvaluatedEvent(Event, frozen=True, kw_only=True, gc=False):
    """The weights of `version` are evaluated on held-out data."""

    kind = "evaluated"

    version: Version
    objective: Annotated[Figure, _is("null where it is not finite")]
    terms: Terms
    items: Items
    gathered: Maybe[Gathered] = UNSET
    turns: Maybe[EachTurn] = UNSET
    bits_per_byte: Maybe[BitsPerByte] = UNSET
    ema: Maybe[Ema] = UNSET
    took_s: Maybe[Annotated[Seconds, _is("until `t_s`", where="not in a simulation")]] = UNSET


class CheckpointedEvent(Event, frozen=True, kw_only=True, gc=False):
    """A checkpoint is saved."""

    kind = "checkpointed"
    by = "lockstep, server"

    version: Version
    path: Annotated[str, _is("relative to `checkpoints/` in the run folder")]
    bytes: Bytes
    digest: Annotated[str, _is("of the weights")]
    step_s: Maybe[Annotated[Seconds, _is("that steps waited", where="where written in the background")]] = UNSET
    cpu_s: Maybe[Annotated[Seconds, _is("of a processor, to write it", where="there too")]] = UNSET
    wire_bytes: Maybe[WireBytes] = UNSET


class LeftEvent(Event, frozen=True, kw_only=True, gc=False):
    """A worker is gone."""

    kind = "left"

    worker: Worker
    why: Why
    resized: Annotated[Maybe[bool], _is("true: the team was to go on without it")] = UNSET


class PlannedEvent(Event, frozen=True, kw_only=True, gc=False):
    """Activations are recomputed by a plan, which was tried."""

    kind = "planned"
    by = "lockstep, server"

    budget_bytes: Annotated[Bytes, _is("that it may take")]
    nothing_recomputed_bytes: Annotated[Bytes, _is("without a plan")]
    predicted_bytes: Annotated[Bytes, _is("with it")]
    measured_bytes: Annotated[Bytes | None, _is("in its trial; null for a compiled model")]
    extra_flops: Annotated[float, _is("a share of those of a step")]
    extra_time: Annotated[float, _is("a share of that of a step")]
    blocks: Annotated[Count, _is("that the model has")]
    checkpointed: Annotated[Count, _is("blocks in which anything is recomputed")]


class WarnedEvent(Event, frozen=True, kw_only=True, gc=False):
    """Something is doubtful."""

    kind = "warned"

    why: Why
    version: Maybe[Annotated[Version, _where("where it is of one")]] = UNSET


class FailedEvent(Event, frozen=True, kw_only=True, gc=False):
    """The run ends with an error."""

    kind = "failed"
    by = "lockstep, server"

    why: Why


class RunEndedEvent(Event, frozen=True, kw_only=True, gc=False):
    """The run ends, or stops as it was asked to."""

    kind = "run_ended"

    version: Version
    digest: Annotated[str | None, _is("of the weights; null without gradients")]
    result: Annotated[dict[str, Any], _is("what result.json holds")]
    interrupted: Annotated[bool, _is("whether it was asked to end")]
    wire_bytes: Maybe[WireBytes] = UNSET


class BlockEvent(Event, frozen=True, kw_only=True, gc=False):
    """In a tape.jsonl, for the events that lie in columns in another file."""

    kind = "block"
    by = "simulation without gradients"

    file: Annotated[str, _is("relative to the run folder")]
    events: Annotated[Counted, _is("that it holds")]
    bytes: Bytes


def plain(event: Event) -> dict[str, Any]:
    """The event as it stands on a tape: its fields that are set, in their order, as plain values."""
    found = {"t_s": event.t_s, "clock": event.clock, "kind": event.kind, **_table(event)}
    if "contributions" in found:
        found["contributions"] = [_table(each) for each in found["contributions"]]
    return found


def _table(told: Event | MergedContribution) -> dict[str, Any]:
    fields = zip(told.__struct_fields__, astuple(told), strict=True)
    return {name: value for name, value in fields if value is not UNSET}
