"""What every process of a team has in common: its replica, its events, its word with the supervisor, checkpoints."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import replace
from torch import Tensor

from instep.by_pattern import ByPattern
from instep.data import digest_without
from instep.data.cursor import rows_of
from instep.data.repeats import what_does_not_repeat
from instep.errors import CheckpointError, RecordError
from instep.recipe import Recipe
from instep.record import best, checkpoint
from instep.record.event_kinds import QUIET, GpuMemoryEvent, SampledEvent
from instep.record.events import CheckpointedEvent, EvaluatedEvent, Event, WarnedEvent
from instep.record.files import json_text
from instep.record.folder import RunFolder
from instep.record.held import is_there
from instep.sources import import_kept, models, own_files, sources
from instep.team.background import BackgroundCheckpoints
from instep.team.channel import Channel
from instep.team.heartbeat import Heartbeat
from instep.team.messages import Assignment, Events, KeepState, Ready, StateKept
from instep.team.remembered import Remembering
from instep.transport.memory import Region
from instep.turns import each_of
from instep.worker.artifacts import make, make_aside, makes_any
from instep.worker.device import check_nccl, own_device, peak_bytes
from instep.worker.evaluation import Evaluation
from instep.worker.loaded import LoadedAhead
from instep.worker.milestones import Progress
from instep.worker.replica import Replica
from instep.worker.trial import try_checkpoint, try_optimizer

HOLD_S = 0.1
"""Seconds that a process holds its events of a step, to send them together: each message wakes two processes."""


class Session:
    """One process between one start of the team and its end."""

    def __init__(self, assignment: Assignment, number: int, pipe: Channel, heartbeat: Heartbeat):
        self.assignment, self.number, self.pipe, self.heartbeat = assignment, number, pipe, heartbeat
        network = assignment.network
        here = len(assignment.numbers) or assignment.team.workers
        self.machines = network.workers if network is not None else (here,)
        self.numbers = assignment.numbers or tuple(range(sum(self.machines)))
        self.rank = self.numbers.index(number) if number in self.numbers else sum(self.machines) - 1
        """How many workers each machine has, the `numbers` of those of the group, and `rank`, this one's there."""
        self.replica: Replica | None = None
        self._data: dict[str, Any] | None = None
        self._unread: list[int] = []  # samples that the digest should cover, but that are left out and fail
        self._events: list[Event] = []
        self._sent_s, kept = 0.0, assignment.remembered
        self._told: set[str] = set()
        self._recalls = kept is not None and kept.mark > 0
        self.remembering = None if kept is None else Remembering(kept, assignment.team.remember)
        """What copies the state of a worker that is alone, where that is wanted."""
        self.saved_version = self._tried_version = self.stopped_at = 0
        """Of the newest checkpoint that this process has written or found; of that where an error stops the run."""
        minutes, folder = assignment.team.checkpoint_minutes, RunFolder(assignment.folder).checkpoints
        self.aside = BackgroundCheckpoints(minutes, folder, self.clock, self.emit)

    def build(self) -> Replica:
        """Builds what the recipe says. Raises InstepError."""
        import_kept(self.assignment.sources)
        self.recipe: Recipe = self.assignment.recipe.load()
        written = self.assignment.written
        if self._on_gpu:  # before the build: a process that uses a GPU, or looked for one, has no copies that can
            self._try_optimizer(self._build)
        self.replica = replica = self._build(written)
        if not self._on_gpu:
            self._try_optimizer(lambda: replica)
        if (units := self.assignment.units) is not None and self.number < self.assignment.team.workers:
            place, microbatches = self.assignment.place[0], self.recipe.microbatches
            idle = rows_of(replica.data.train, replica.data.collate) is not None
            replica.reader.loaded = LoadedAhead(units, place, microbatches, idle=idle)
        self._warn()
        if self.leads and not self.assignment.incarnation:  # else others may be writing
            self.aside.tell_unfinished()
        return self.replica

    @property
    def _on_gpu(self) -> bool:
        """Where there is a server it computes on the CPU."""
        team = self.assignment.team
        return team.device != "cpu" and self.number < team.workers

    def _build(self, written: Collection[str] = ()) -> Replica:
        team, (place, here) = self.assignment.team, self.assignment.place
        device = own_device(team.device, place, here) if self._on_gpu else "cpu"
        if self._on_gpu and not self.assignment.serving:
            check_nccl(team.by_nccl, team.workers)
        return Replica(
            self.recipe, device, retries=team.restarts, written=written, deterministic=team.deterministic,
            tell=self.heartbeat.doing,
        )  # fmt: skip

    def _try_optimizer(self, build: Callable[[], Replica]) -> None:
        """Tries it once in a run, see `instep.worker.trial`. Raises InstepError."""
        if not (self.assignment.first and self.leads) or self.assignment.succeeds:
            return
        if (why := try_optimizer(build, resume=not self.assignment.team.memory)) is not None:
            self.emit(WarnedEvent(why=why))

    def _warn(self) -> None:
        """Tells of what is doubtful, once."""
        assert self.replica is not None
        for why in (*self._doubts(), *self.replica.doubts()) if self.leads else ():
            if why not in self._told:
                self._told.add(why)
                self.emit(WarnedEvent(why=why))

    def _doubts(self) -> list[str]:
        team, recipe, doubts = self.assignment.team, self.recipe, list[str]()
        if not team.deterministic and (team.device != "cpu" or recipe.threads > 1):
            doubts.append("team.deterministic is false, so that equal runs may come to other bits.")
        assert self.replica is not None
        if recipe.artifacts_every and not makes_any(self.replica):
            doubts.append(
                f"recipe.artifacts_every is {recipe.artifacts_every}, and nothing is made: the recipe has no artifacts "
                f"and, for text, no sample_length."
            )
        return doubts

    def tell_gpu_memory(self) -> None:
        """Notes what the process has taken of its GPU, if it has one."""
        assert self.replica is not None
        if (peak := peak_bytes(self.replica.device)) is not None:
            name = torch.cuda.get_device_name(self.replica.device)
            self.emit(GpuMemoryEvent(worker=self.number, gpu=name, peak_bytes=peak[0], reserved_bytes=peak[1]))

    def saved(self) -> checkpoint.Loaded | None:
        """The checkpoint to go on from, or what is remembered, if there is one.

        Raises CheckpointError if it is of other data or recipe.
        """
        if self._recalls and self.remembering is not None:
            recalled = self.remembering.recall()
            self.saved_version = recalled.meta["saved"]
            if self.assignment.team.workers > 1:
                self.remembering = None  # others have it too
            return recalled
        path = self.assignment.resume_from
        if path is None:
            return None
        assert self.replica is not None
        self.replica.doing = f"loading {path}"
        saved = checkpoint.load(path)
        checkpoint.check_recipe(path, saved=saved.fingerprint, current=self._fingerprint(saved.version))
        if "data" not in saved.meta:
            raise CheckpointError(f"the checkpoint {path} does not tell what data it was trained on; use another one.")
        if saved.meta["data"] != self.data_facts() and not self._told_apart_by_samples_left_out(saved.meta["data"]):
            changing = what_does_not_repeat(self.replica.data)
            if changing:
                raise CheckpointError(f"the data of {path} cannot be told from others: {changing}")
            raise CheckpointError(
                f"the data are not those that {path} was trained on: {self.data_facts()['samples']} samples here and "
                f"{saved.meta['data']['samples']} there, or other content; give back those, or start a new run."
            )
        self.saved_version = saved.version
        return saved

    def _fingerprint(self, version: int) -> str:
        """Of what has decided the weights of `version`: changes that hold from it on have not yet."""
        return self.assignment.fingerprints[sum(change.version < version for change in self.recipe.changes)]

    def data_facts(self) -> dict[str, Any]:
        """Digest and length of the training data."""
        assert self.replica is not None
        if self._data is None:
            data, changes = self.replica.data, self.replica.recipe.changes
            left_out = {index for change in changes for index in change.skip_samples}
            digest, self._unread = digest_without(data, left_out)
            self._data = {"digest": digest, "samples": len(data.train)}
        return self._data

    def _told_apart_by_samples_left_out(self, saved: Mapping[str, Any]) -> bool:
        """Whether the digests differ, or may, since samples that are left out cannot be read. Warns of it."""
        if not self._unread or saved["samples"] != self.data_facts()["samples"]:
            return False
        if self.leads:
            listed = ", ".join(map(str, self._unread))
            why = (
                f"samples {listed}, which are left out, cannot be read, so that the data could not be compared with "
                f"those that the run was trained on."
            )
            self.emit(WarnedEvent(why=why))
        return True

    def facts(self, **more: Any) -> dict[str, Any]:
        """What all processes of a team must agree on before they start."""
        assert self.replica is not None
        return {
            "data": self.data_facts()["digest"],
            "samples": self.data_facts()["samples"],
            "parameters": self.replica.size,
            "optimizers": [one.what_it_trains for one in self.replica.optimizer.each],
            **({"remembered": True} if self._recalls else {}),
            **({"sources": sources(self.uses()) | models()} if self.assignment.network is not None else {}),
            **more,
        }

    def uses(self) -> list[Any]:
        """What the recipe has loaded by now."""
        recipe = self.recipe
        parts = recipe.optimizer.parts if isinstance(recipe.optimizer, ByPattern) else (((), recipe.optimizer),)
        components = [recipe.model, *each_of(recipe.objective), recipe.data, *(component for _, component in parts)]
        return [component.use for component in components]

    def ready(self, facts: Mapping[str, Any], memory: Mapping[str, Region]) -> Any:
        """Tells the supervisor that all is built, and waits until everybody is.

        Returns `Agreed`, with worker 0's or the server's facts and memory, or a `NextGroup`, to begin in a later group.
        """
        self.pipe.send(Ready(facts, memory, own_files(self.uses())))
        self.heartbeat.waiting(True)
        while isinstance(agreed := self.pipe.recv(), KeepState):  # agent 0 is lost
            self.pipe.send(StateKept(why="it is in no group yet"))
        self.heartbeat.waiting(False)
        return agreed

    def save(
        self,
        progress: Progress,
        model_state: Mapping[str, Tensor],
        training_state: Mapping[str, Any],
        sound: Callable[[], None] | None = None,
        looked: bool = True,
        **meta: Any,
    ) -> None:
        """Writes a checkpoint; `sound` may still raise then. Raises ResourceError where the disk refuses.
        looked: whether all bits of the weights were looked at, for what forwards write past autograd.
        """
        about = self.to_save(progress, looked=looked, **meta)
        saved = checkpoint.save(
            self._checkpoints, model_state=model_state, training_state=training_state, sound=sound, **about
        )
        self.saved_version = progress.version
        self.aside.saved()
        self.heartbeat.advance()
        self.emit(
            CheckpointedEvent(version=progress.version, path=saved.path.name, bytes=saved.bytes, digest=saved.digest)
        )

    def to_save(self, progress: Progress, *, looked: bool, **meta: Any) -> dict[str, Any]:
        """What `checkpoint.save` takes beside the states, once no other is being written. Raises RecordError where the
        run folder is gone.
        """
        self.settle()
        self._warn()
        self.aside.tell_unfinished(but=progress.version)
        self._tried_version = progress.version
        if not is_there(self.assignment.folder, self.assignment.identity):  # the supervisor says what became of it
            raise RecordError(f"the run folder {self.assignment.folder} is not where it was; resume it from there.")
        return self._about(progress, looked=looked, **meta)

    def settle(self, *, wait: bool = True) -> None:
        """Notes a checkpoint that is written in the background, if it is whole, or once it is."""
        self.saved_version = max(self.saved_version, self.aside.settle(wait=wait))

    def keep(
        self, progress: Progress, model_state: Mapping[str, Tensor], training_state: Mapping[str, Any]
    ) -> checkpoint.SavedCheckpoint:
        """As `save`, on a host without the run folder, for an agent 0 to come. Raises ResourceError."""
        assert self.assignment.scratch is not None, "the host has no run folder, but one for scratch"
        folder, about = RunFolder(self.assignment.scratch).checkpoints, self._about(progress, looked=False)
        return checkpoint.save(folder, model_state=model_state, training_state=training_state, **about)

    def _about(self, progress: Progress, *, looked: bool, **meta: Any) -> dict[str, Any]:
        assert self.replica is not None
        if self.assignment.run_id is not None:
            meta["run"] = self.assignment.run_id
        if not looked:
            meta["unlooked"] = True
        if self.replica.written.names:
            meta["written"] = list(self.replica.written.names)
        meta |= {"progress": asdict(progress), "data": self.data_facts()}
        version, keep = progress.version, self.assignment.team.keep
        return {"version": version, "meta": meta, "fingerprint": self._fingerprint(version), "keep": keep}

    def tries_checkpoint(self, version: int) -> bool:
        """Whether it is to be tried now, once in a run, if a checkpoint can be loaded: alike at all workers."""
        return self.assignment.first and version == 1 and not self.assignment.team.memory

    def try_checkpoint(
        self, version: int, model_state: Mapping[str, Tensor], training_state: Mapping[str, Any]
    ) -> None:
        """Tries it, see `instep.worker.trial`. Raises CheckpointError or RecordError where it cannot be loaded."""
        assert self.replica is not None
        before, self._tried_version = self._tried_version, version  # one that cannot be loaded is not saved
        why = try_checkpoint(self.replica, model_state, training_state)
        self._tried_version = before
        if why is not None:
            self.emit(WarnedEvent(why=why))

    def must_save(self, version: int) -> bool:
        """Whether a checkpoint of `version` is worth a try: there is something to save, and the disk did not refuse."""
        return 0 < version not in (self.saved_version, self._tried_version)

    def evaluated(self, progress: Progress, found: Evaluation | None, began_s: float) -> bool:
        """Notes the objective on held-out data, found since `began_s`. Whether this version is to be saved as best."""
        if found is None or self.replica is None:
            return False
        facts, best_so_far = self.looked_at(progress.version, found, began_s, tell=self.leads)
        progress.evaluated(facts, self.recipe.steps, self.replica.watch.patience)
        return best_so_far

    def looked_at(self, version: int, found: Evaluation, began_s: float, *, tell: bool) -> tuple[dict[str, Any], bool]:
        """What `Progress` is to know of an evaluation. Who speaks for all is to `tell` the tape, too, and says whether
        this version is to be saved as the best.
        """
        assert self.replica is not None
        facts = found.facts(version, self.replica)
        if not tell:
            return facts, False
        self.emit(EvaluatedEvent(**facts, took_s=round(self.clock() - began_s, 6)))
        for why in filter(None, (found.problem(version), *found.doubts)):
            self.emit(WarnedEvent(why=why, version=version))
        return facts, self.assignment.team.keep_best and bool(best.better(self._checkpoints, version, facts))

    def mark_best(self, progress: Progress) -> None:
        """Notes of what the checkpoint of this version, which is saved, is the best so far. Raises ResourceError."""
        for average, objective in best.better(self._checkpoints, progress.version, progress.held_out).items():
            best.mark(self._checkpoints, progress.version, objective, average)

    @property
    def leads(self) -> bool:
        """Whether this process speaks for all: worker 0 or, where there is one, the server."""
        return self.number == self.assignment.team.workers if self.assignment.serving else self.rank == 0

    def regrouped(self, numbers: Sequence[int], machines: Sequence[int]) -> None:
        """The worker is in another group now, of these and so many workers by machine."""
        self.numbers, self.rank, self.machines = tuple(numbers), numbers.index(self.number), tuple(machines)

    def take_place(self, workers: int) -> None:
        """It has its place, in a team of so many workers, and had none."""
        self.assignment = self.assignment.of_team(workers)

    @property
    def _checkpoints(self) -> Path:
        return RunFolder(self.assignment.folder).checkpoints

    def leave(self) -> dict[str, Any]:
        """What a finished run leaves beside its weights, as `result.json` tells of it."""
        assert self.replica is not None
        made = make(self.replica, RunFolder(self.assignment.folder))
        for why in made.problems:
            self.emit(WarnedEvent(why=why))
        made_any = self.recipe.artifacts is not None or made.files  # or averages' samples
        artifacts = {"files": made.files, "figures": made.figures} if made_any else None
        return {"sample": made.sample, "artifacts": artifacts}

    def show(self, version: int, *, for_leader: bool = False) -> None:
        """Has artifacts and a sample made of the present weights, by the process that speaks for all, or in its place
        (`for_leader`).
        """
        assert self.replica is not None
        if not (self.leads or for_leader) or not makes_any(self.replica):
            return
        self.settle()  # a copy of the process must not be made in the midst of what a thread does
        began_s, self.replica.doing = self.clock(), f"writing the artifacts of version {version}"
        within_s = self.assignment.team.stall_timeout_s / 2  # after twice that the worker would count as stuck
        made = make_aside(self.replica, RunFolder(self.assignment.folder), version, within_s)
        self.heartbeat.advance()
        for why in made.problems:
            self.emit(WarnedEvent(why=why, version=version))
        figures, took_s = json.loads(json_text(made.figures)), round(self.clock() - began_s, 6)
        self.emit(SampledEvent(version=version, sample=made.sample, files=made.files, figures=figures, took_s=took_s))

    def emit(self, event: Event) -> None:
        """Notes an event that happens now. Those of every step are sent with others, see `HOLD_S`."""
        self._events.append(replace(event, t_s=self.clock()))
        if event.kind not in QUIET:
            self.send_events()

    def send_events(self, *, held: bool = False) -> None:
        """Sends the events that were held; with `held`, only if it is time to."""
        if held and self.clock() - self._sent_s < HOLD_S:
            return
        if not held:
            self.heartbeat.count_bytes()  # first: what is told may be what it is counted for
        if self._events:
            self.pipe.send(Events(self._events))
            self._events = []
        self._sent_s = self.clock()

    def clock(self) -> float:
        """Seconds since the run's start."""
        return round(time.monotonic() - self.assignment.began, 6)
