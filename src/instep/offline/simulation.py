"""The virtual engine: any rule on a virtual clock, with real gradients if wanted, in one process.

Timing does not depend on values here, so the whole schedule comes first; then the gradients are computed along it by
the replay's machine, which computes as real workers do.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import UNSET
from msgspec.structs import replace

from instep.clock.slow import parse_slow
from instep.clock.times import RecordedTimes, WorkerTimes
from instep.data import digest
from instep.errors import RecipeError
from instep.offline.cluster import Cluster
from instep.offline.replayer import Replayer
from instep.offline.schedule import simulate as schedule
from instep.offline.simulated_run import SimulatedRun
from instep.offline.trace import EventListener, Listener
from instep.recipe import Recipe, Team, dumps
from instep.record import checkpoint, events
from instep.record.blocks import BlockTape
from instep.record.files import write_atomically
from instep.record.folder import RunFolder
from instep.record.held import Held
from instep.record.result import Costs, Result
from instep.record.tape import Tape
from instep.reduce.written import FirstWrite
from instep.restore import older_kept
from instep.rules.work import Pieces
from instep.tables import to_table
from instep.worker.averages import digests_of
from instep.worker.evaluation import batches_held_out, evaluate_alone
from instep.worker.milestones import Milestones, Progress
from instep.worker.tensor_checksums import checksum_when_due
from instep.worker.trial import try_optimizer
from instep.worker.updates import Merger
from instep.worker.wire import vector_bytes

if TYPE_CHECKING:
    from instep.team.child import Tell

_NO_END = (
    "'recipe.watch' may end the run early, or take updates back, and on a virtual clock the whole schedule is laid out "
    "before any objective is known; set watch.spike to 'warn' or 'skip' and leave watch.patience out, or train."
)

_TOLD = (
    events.RunStartedEvent, events.MergedByServerEvent, events.EvaluatedEvent, events.RunEndedEvent, events.LeftEvent,
    events.WarnedEvent,
)  # fmt: skip
"""What is handed on at once."""

MEASURED = 5
"""Microbatches that are timed where no times are given."""


def simulate(recipe: Recipe, cluster: Cluster, gradients: bool, folder: Path | None, tell: Tell) -> dict[str, Any]:
    """Runs `recipe` on `cluster`. Returns what ``result.json`` holds, and writes a run folder if one is given.

    Without `gradients` only times, bytes, staleness and idle shares are found. Raises InstepError.
    """
    began = time.monotonic()
    written: set[str] = set()
    with contextlib.ExitStack() as stack:
        held = stack.enter_context(RunFolder(folder).locked()) if folder is not None else None
        stack.enter_context(older_kept())
        while True:
            try:
                with contextlib.closing(VirtualRun(recipe, cluster, gradients, held, tell, written)) as simulation:
                    return simulation.run(began)
            except FirstWrite as found:  # there is no checkpoint to go back to, so it begins anew
                written |= set(found.names)
                if held is not None:
                    RunFolder(held.path).tape_path.unlink(missing_ok=True)


def sizes_of(merger: Merger) -> dict[str, Any]:
    """The sizes of messages, as the schedule takes them."""
    fragments, parameters, wire = merger.fragments.all, merger.replica.parameters, merger.rule.wire
    return {
        "contribution_bytes": [vector_bytes(wire, parameters, which) for which in fragments],
        "weights_bytes": [(merger.way_down or merger.pack).change_bytes(which) for which in fragments],
        "first_bytes": merger.pack.size_bytes,
    }


class VirtualRun:
    """One simulation, whose schedule is laid out whole and then lived event by event."""

    def __init__(
        self, recipe: Recipe, cluster: Cluster, gradients: bool, held: Held | None, tell: Tell, written: Collection[str]
    ):
        self._recipe, self._cluster, self._gradients, self._tell = recipe, cluster, gradients, tell
        if recipe.changes:
            raise RecipeError(
                f"'recipe.changes' hold from version {recipe.changes[0].version} of one run on, and a simulation is "
                f"another run; leave them out."
            )
        if gradients and recipe.watch.ends_early:
            raise RecipeError(_NO_END)
        self._held = held
        self._folder = RunFolder(held.path) if held is not None else None
        self._pieces = Pieces(recipe.rule, cluster.workers, recipe.microbatches, recipe.steps)
        self._replayer = Replayer(
            recipe, cluster.workers, "cpu", batched=gradients and cluster.batched, written=written,
            checkpoint_every=Team().checkpoint_every,
        )  # fmt: skip
        self._tape: Tape | BlockTape | None = Tape(self._folder.tape_path) if self._folder else None
        if isinstance(self._tape, Tape) and not gradients:  # which would take longer than all that is written
            self._tape = BlockTape(self._tape, self._pieces, self._tell_of)
        self._replica = self._replayer.merger.replica
        self.progress, self._milestones = Progress(), Milestones(recipe.steps, recipe.evaluate_every)
        self.events: list[events.Event] = []

    def run(self, began: float) -> dict[str, Any]:
        recipe, cluster = self._recipe, self._cluster
        steps = self._gradients or not recipe.rule.gradients  # local ones are made to be timed
        doubt = try_optimizer(lambda: self._replica) if steps else None
        doubts = [] if doubt is None else [doubt]
        if self._gradients:
            self._replayer.look(doubts.append)
        microbatch_s, merge_s = self.measured()
        slow = parse_slow(cluster.slow) if cluster.slow else ()
        times = cluster.times or WorkerTimes.constant(microbatch_s, slow=slow, seed=recipe.seed)
        self._start(microbatch_s)
        for why in [*doubts, *(self._replica.doubts() if self._gradients else ())]:
            self._emit(events.WarnedEvent(clock="virtual", why=why))
        found = self.lay_out(times, merge_s)
        scheduled_s = time.monotonic() - began
        for event in self.events:
            self.live(event)
        return self._end(found, scheduled_s, time.monotonic() - began)

    def lay_out(self, times: WorkerTimes | RecordedTimes, merge_s: float) -> SimulatedRun:
        """Finds who does what when. With gradients, `events` then has what is to be lived."""
        recipe, cluster, merger = self._recipe, self._cluster, self._replayer.merger
        listener: Listener | None = self._tape if isinstance(self._tape, BlockTape) else None
        if self._gradients:
            listener = EventListener(self._pieces, self._note)
        return schedule(
            recipe.rule, self._pieces,
            times,  # type: ignore[arg-type]  # recorded ones have its methods
            cluster.network, **sizes_of(merger),
            merge_s=merge_s if cluster.merge_s is None else cluster.merge_s, collective=cluster.collective,
            items_of=self._replayer.items if self._gradients else None, listener=listener,
        )  # fmt: skip

    def close(self) -> None:
        if self._tape is not None:
            self._tape.close()

    def measured(self) -> tuple[float, float]:
        """Seconds of a microbatch and of an update on this machine; 0 for what is given."""
        if self._cluster.times is not None and self._cluster.merge_s is not None:
            return 0.0, self._cluster.merge_s
        work = self._pieces.work(0)
        found = []
        for _ in range(MEASURED + 1):
            began = time.monotonic()
            self._replayer.probe(work)
            found.append((time.monotonic() - began) / work.microbatches)
        began = time.monotonic()
        self._replayer.merger.pack.save(self._replayer.merger.pack.empty())
        return statistics.median(found[1:]), 2 * (time.monotonic() - began)

    def _note(self, event: events.Event) -> None:
        if event.kind != "computed" or self._tape is not None:
            self.events.append(event)

    def live(self, event: events.Event) -> None:
        """Computes what an event stands for, if gradients are wanted, and hands it on."""
        before = self.progress.steps
        self._emit(self._computed(event) if self._gradients else event)
        if self._gradients and self._tape is not None and isinstance(event, events.MergedOnClockEvent):
            checksum_when_due(
                self._replica, self.progress,
                lambda found: self._emit(replace(found, t_s=event.t_s, clock="virtual", took_s=UNSET)),
            )  # fmt: skip
        if self._milestones.evaluates(before, self.progress.steps):
            self.evaluate(self.progress.version, event.t_s)

    def _computed(self, event: events.Event) -> events.Event:
        """The event with what its gradients tell."""
        replayer = self._replayer
        match event:
            case events.LeftEvent():
                replayer.left(event.worker)
            case events.ReleasedEvent():
                replayer.released(event.worker, event.piece, event.version)
            case events.PushedToServerEvent():
                replayer.pushed(event.seq, event.worker)
                items = replayer.waiting[event.seq]  # fewer than expected where a local step is left out
                checksum = UNSET if self._tape is None else replayer.checksum(event.seq)
                return replace(event, items=items, checksum=checksum)
            case events.DroppedEvent():
                replayer.dropped(event.seq)
            case events.MergedOnClockEvent():
                return self._merge(event)
        return event

    def _merge(self, event: events.MergedOnClockEvent) -> events.Event:
        rule, staleness, weights = self._recipe.rule, event.staleness, event.weights
        seqs = [each.seq for each in event.contributions if each.seq is not UNSET]
        if not rule.gradients:
            waiting = self._replayer.waiting
            weights = list(rule.weights([waiting[seq] for seq in seqs], staleness))
        parts = zip(seqs, weights, staleness, strict=True)
        update = self._replayer.merged(event.version, {seq: (weight, old) for seq, weight, old in parts})
        done = self._replayer.merger.microbatches // self._pieces.microbatches
        for why in filter(None, (update.verdict.why, *update.doubts)):
            self._emit(events.WarnedEvent(t_s=event.t_s, clock="virtual", why=why))
        self.progress.merged(version=event.version, steps=done, items=update.items, objective=update.objective)
        update.verdict.note(self.progress)
        return events.MergedByServerEvent(
            t_s=event.t_s, clock="virtual", version=event.version, step=done, contributions=event.contributions,
            weights=weights, staleness=staleness, **update.facts(),
            checksum=UNSET if self._tape is None else self._replayer.merger.checksum(),
        )  # fmt: skip

    def evaluate(self, version: int, t_s: float) -> None:
        found = evaluate_alone(self._replica, batches_held_out(self._replica))
        if found is None:
            return
        self.progress.held_out = found.facts(version, self._replica)
        self._emit(events.EvaluatedEvent(t_s=t_s, clock="virtual", **self.progress.held_out))
        for why in filter(None, (found.problem(version), *found.doubts)):
            self._emit(events.WarnedEvent(t_s=t_s, clock="virtual", why=why))

    def _start(self, microbatch_s: float) -> None:
        recipe, data, each = self._recipe, self._replica.data, self._replica.optimizer.each
        team = Team(workers=self._cluster.workers, slow=self._cluster.slow)
        schema = events.SCHEMA_IN_BLOCKS if isinstance(self._tape, BlockTape) else events.SCHEMA
        if self._folder is not None:
            write_atomically(self._folder.recipe_path, dumps(recipe, team).encode())
        self._emit(
            events.RunStartedEvent(
                clock="virtual", schema=schema, folder=str(self._folder.path) if self._folder else "",
                recipe=recipe.to_table(), team=to_table(team), fingerprint=recipe.fingerprint(),
                data_digest=digest(data), samples=len(data.train), parameters=self._replica.size, version=0, step=0,
                steps=recipe.steps, resumed=False, engine="virtual", cut=self._cluster.workers, libraries={},
                import_paths=[], microbatch_s=microbatch_s, batched=self._cluster.batched,
                written=list(self._replica.written.names) or UNSET,
                optimizers=[one.what_it_trains for one in each] if len(each) > 1 else UNSET,
            )
        )  # fmt: skip
        for why in recipe.rule.warnings():
            self._emit(events.WarnedEvent(clock="virtual", why=why))

    def _end(self, found: SimulatedRun, scheduled_s: float, took_s: float) -> dict[str, Any]:
        digests, progress = None, self.progress
        if self._held is not None:
            self._held.check()
        items = progress.items if self._gradients else None
        if self._gradients:
            self.evaluate(found.versions, found.wall_s)
            state = self._replica.saved_state()
            digests = digests_of(self._replica)
            if self._folder is not None:
                checkpoint.save(
                    self._folder.checkpoints, version=found.versions, model_state=state,
                    training_state=self._replayer.merger.training_state(), meta={}, keep=1,
                    fingerprint=self._recipe.fingerprint(),
                )  # fmt: skip
        costs = Costs(
            bytes_sent=found.bytes_sent,
            staleness_mean=found.staleness_mean,
            staleness_max=found.staleness_max,
            delayed_max=found.delayed_max,
            lead_max=found.lead_max,
            idle_share=[round(float(share), 4) for share in found.idle_share],
            dropped=found.dropped,
        )
        result = Result.of(
            asdict(progress),
            costs,
            None if digests is None else digests.averages,
            recipe=self._recipe.name,
            digest=None if digests is None else digests.weights,
            rule=self._recipe.rule.name,
            engine="virtual",
            steps=self._recipe.steps,
            versions=found.versions,
            items=items,
            workers=self._cluster.workers,
            microbatches=self._recipe.microbatches,
            contributions=found.contributions,
            items_per_s=items / found.wall_s if items and found.wall_s else None,
            wall_s=found.wall_s,
            restarts=found.failures,
            simulated_in_s=round(took_s, 3),
            scheduled_in_s=round(scheduled_s, 3),
        ).table()
        if self._folder is not None:
            self._folder.write_result(result)
        self._emit(
            events.RunEndedEvent(
                t_s=found.wall_s, clock="virtual", version=found.versions, digest=result["digest"], result=result,
                interrupted=False,
            )
        )  # fmt: skip
        return result

    def _emit(self, event: events.Event) -> None:
        if isinstance(self._tape, BlockTape):
            self._tape.write(event)
        elif self._tape is not None:
            self._tape.write(events.plain(event))
            if isinstance(event, _TOLD):  # before anybody is shown it
                self._tape.flush()
        self._tell_of(event)

    def _tell_of(self, event: events.Event) -> None:
        if isinstance(event, _TOLD):
            self._tell(events.plain(event))
