"""A few steps in lockstep by a team of forks, and what of them can be compared with those of another team."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from instep.data.signature import signature
from instep.engines.lockstep import Lockstep
from instep.equivalences.forks import Body, Say, in_copies
from instep.equivalences.hidden import moved, state_of
from instep.equivalences.operations import Made, Noted
from instep.memory_file import memory_file
from instep.recipe import Recipe, Team
from instep.record import checkpoint, events
from instep.reduce.checksums import checksum
from instep.reduce.written import FirstWrite
from instep.transport.group import Group, Sizes, Solo
from instep.transport.memory import reserve
from instep.transport.shared_memory import SharedMemoryGroup, regions
from instep.worker.activation_memory import fit_memory
from instep.worker.milestones import Progress
from instep.worker.replica import Replica
from instep.worker.tensor_checksums import checksums_of

UPDATE = 1 << 30
"""Stands for the update in the place of a microbatch: it comes after all."""


@dataclass(frozen=True)
class Setup:
    """How a team computes. No field of it may change what it comes to.

    workers; memory: see `Team`. steps: up to this version. resume: the checkpoint to go on from. save: the folder for
    a checkpoint of the last version. look: the step, from 0, whose operations and values are kept; none if below.
    update: whether those of one worker's update are, too, as microbatch `UPDATE`. keep: microbatch and place of an
    operation of that step whose tensors are kept.
    """

    workers: int = 1
    steps: int = 4
    memory: str = ""
    resume: Path | None = None
    save: Path | None = None
    look: int = -1
    update: bool = False
    keep: tuple[int, int] | None = None


@dataclass
class Steps:
    """What steps came to: signatures of batches by (step, microbatch), checksums of tensors by version and name.

    start: the weights that they began with. gradients: before they are clipped. figures: the objective and the items of
    each update. Of the step that was looked at: operations by microbatch, the values of its gradients and of the
    weights after it, the tensors of the operation to be kept, and the Python state that a worker's computing changed.
    plan: of gradient checkpointing, how many blocks recompute something.
    """

    start: dict[str, str] = field(default_factory=dict)
    batches: dict[tuple[int, int], str] = field(default_factory=dict)
    gradients: dict[int, dict[str, str]] = field(default_factory=dict)
    weights: dict[int, dict[str, str]] = field(default_factory=dict)
    optimizer: dict[int, dict[str, str]] = field(default_factory=dict)
    figures: dict[int, tuple[float | None, int]] = field(default_factory=dict)
    operations: dict[int, list[Made]] = field(default_factory=dict)
    values: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    moved: list[tuple[str, str]] = field(default_factory=list)
    kept: dict[str, Tensor] = field(default_factory=dict)
    plan: str = ""

    def add(self, other: Steps) -> None:
        """What another worker of the team has."""
        self.batches |= other.batches
        self.operations |= other.operations
        self.kept |= other.kept
        for version, found in other.gradients.items():
            self.gradients.setdefault(version, {}).update(found)
        for kind, values in other.values.items():
            self.values.setdefault(kind, {}).update(values)
        for each in other.moved:
            self.moved += [] if each[0] in dict(self.moved) else [each]
        self.weights |= other.weights
        self.optimizer |= other.optimizer
        self.figures |= other.figures
        self.plan = self.plan or other.plan


def compute(recipe: Recipe, setup: Setup) -> Steps:
    """The steps of a team of forks in lockstep. Raises InstepError as a run would."""
    written: set[str] = set()
    while True:
        descriptor = memory_file()
        try:
            bodies = [_Worker(recipe, setup, descriptor, written) for _ in range(setup.workers)]
            traces = in_copies(bodies, partial(_reserved, descriptor))
        except FirstWrite as found:
            if written.issuperset(found.names):
                raise
            written |= set(found.names)
            continue
        finally:
            os.close(descriptor)
        for other in traces[1:]:
            traces[0].add(other)
        whole: Steps = traces[0]
        return whole


def _reserved(descriptor: int, sizes: Sequence[Sizes]) -> None:
    if len(sizes) > 1:
        reserve(descriptor, regions(sizes[0]))


class _Signs:
    """Nobody watches."""

    def advance(self) -> None: ...

    def waiting(self, flag: bool) -> None: ...

    def stop_wanted(self) -> bool:
        return False

    def regroup_wanted(self) -> bool:
        return False

    def fewer_wanted(self) -> bool:
        return False

    def save_wanted(self) -> bool:
        return False


class _Worker(Body):
    """One worker of the team."""

    def __init__(self, recipe: Recipe, setup: Setup, descriptor: int, written: Collection[str]):
        self._recipe, self._setup, self._descriptor, self._written = recipe, setup, descriptor, written
        self._trace = Steps()

    def run(self, rank: int, ask: Say) -> Steps:
        setup, trace = self._setup, self._trace
        replica = self.replica = Replica(self._recipe, "cpu", written=self._written)
        progress = Progress()
        if setup.resume is not None:
            saved = checkpoint.load(setup.resume)
            replica.load(saved.model_state, saved.training_state)
            progress = Progress.resumed(saved, self._recipe)
        engine = Lockstep(replica, rank, (setup.workers,), _Signs(), self._note, time.monotonic)
        if setup.resume is not None:
            engine.updates.watcher.load(saved.training_state.get("watch"))
        engine.prepare(progress.version)
        fit_memory(replica, Team(memory=setup.memory), self._note)
        sizes = engine.sizes()
        ask(sizes)
        if rank == 0:
            self._trace.start = dict(checksums_of(replica)["weights"])
        engine.join(self._group(sizes, rank))
        self._watch(engine)
        engine.run(progress, lambda *_: None, setup.steps)
        if setup.save is not None:
            self._save(engine, progress, rank)
        engine.agree()  # the others may still read
        return trace

    def _group(self, sizes: Sizes, rank: int) -> Group:
        if self._setup.workers == 1:
            return Solo(sizes)
        return SharedMemoryGroup(self._descriptor, sizes, rank)

    def _save(self, engine: Lockstep, progress: Progress, rank: int) -> None:
        training = engine.placement.training_state()
        if training is None or self._setup.save is None:
            return
        training["watch"] = engine.updates.watcher.state()
        checkpoint.save(
            self._setup.save, version=progress.version, model_state=engine.replica.saved_state(),
            training_state=training, meta={"progress": asdict(progress)}, keep=0,
            fingerprint=self._recipe.fingerprint(),
        )  # fmt: skip

    def _note(self, event: events.Event) -> None:
        match event:
            case events.ChecksummedEvent():
                self._trace.weights[event.version] = dict(event.weights)
                self._trace.optimizer[event.version] = dict(event.optimizer)
            case events.MergedEvent():
                self._trace.figures[event.version] = event.objective, event.items
            case events.PlannedEvent():
                self._trace.plan = f"{event.checkpointed} of {event.blocks} blocks recompute something"

    def _watch(self, engine: Lockstep) -> None:
        """Has what is loaded, computed and updated noted on its way."""
        replica, placement, look, trace = engine.replica, engine.placement, self._setup.look, self._trace
        load, compute_one, update = replica.batch, replica.compute, placement.update

        def batch(step: int, microbatch: int) -> Any:
            samples = load(step, microbatch)
            trace.batches[step, microbatch] = signature(samples)
            return samples

        def computed(step: int, microbatch: int, *rest: Any) -> Any:
            before = self._state(replica) if step == look else {}
            with self._noting(replica, step, microbatch):
                answer = compute_one(step, microbatch, *rest)
            if step == look:
                known = dict(trace.moved)
                trace.moved += [each for each in moved(before, self._state(replica)) if each[0] not in known]
            return answer

        def updated(step: int, norm: float, touched: Sequence[bool]) -> float | None:
            pairs = zip(replica.names, placement.gradients, placement.share(engine.worker), touched, strict=True)
            own = {name: view for name, view, mine, seen in pairs if mine and seen}
            trace.gradients[step + 1] = dict(zip(own, checksum(own.values()), strict=True))
            if step == look:
                trace.values["gradient"] = {name: view.detach().clone() for name, view in own.items()}
            with self._noting(replica, step, UPDATE):
                rate = update(step, norm, touched)
            if step == look:
                named = zip(replica.names, replica.parameters, placement.share(engine.worker), strict=True)
                trace.values["weights"] = {name: p.detach().clone() for name, p, mine in named if mine}
            return rate

        for owner, name, noting in ((replica, "batch", batch), (replica, "compute", computed)):
            setattr(owner, name, noting)
        setattr(placement, "update", updated)  # noqa: B010  # a method, for this object alone

    @contextmanager
    def _noting(self, replica: Replica, step: int, microbatch: int) -> Iterator[None]:
        """In the block, the operations of the step that is looked at are noted."""
        setup, update = self._setup, microbatch == UPDATE
        if step != setup.look or (update and not setup.update) or (self._recipe.compile and not update):
            yield
            return
        keep = setup.keep[1] if setup.keep is not None and setup.keep[0] == microbatch else -1
        noted = Noted(replica.module, keep)
        with noted.noting():
            yield
        self._trace.operations[microbatch] = noted.found
        self._trace.kept |= noted.kept

    @staticmethod
    def _state(replica: Replica) -> dict[str, tuple[str, str]]:
        data = replica.data
        return state_of(model=replica.module, objective=replica.objective.given, data=data.train)
