"""The record of a run as the agent keeps it: what happens goes on the tape, and to the client."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from msgspec import UNSET, UnsetType
from msgspec.structs import replace

from instep.errors import CheckpointError
from instep.record import checkpoint
from instep.record.event_kinds import RefutedEvent
from instep.record.events import CheckpointedEvent, Event, MergedEvent, RunStartedEvent, WarnedEvent, plain
from instep.record.folder import RunFolder
from instep.record.last_good import LastGood, last_good
from instep.record.tape import Tape, ToldCheckpoints, last_update, told
from instep.record.team import BytesOfHost
from instep.team.channel import Channel
from instep.team.messages import Events, FoundWritten, FoundWrong, HeldUp, PlainEvents, WorkerToSupervisor
from instep.team.retold import Retold


class ClientGone(Exception):
    """The client's process has ended, or wants no more."""


class Journal:
    """Of a run that began at `began` on the monotonic clock. Its methods raise ClientGone and RecordError."""

    def __init__(self, folder: RunFolder, tape: Tape, client: Channel, began: float):
        self._folder, self._tape, self._client, self._began = folder, tape, client, began
        self.begun = False
        """Whether the tape had the run's beginning already, whatever the client takes it for."""
        self.started = False
        """Whether a team of this process has: what is told before waits for it, or is not written."""
        self.merged = 0
        """The last update that was told of since the team started, or the version that it started from."""
        self.wire_bytes: Callable[[], Sequence[BytesOfHost] | UnsetType] = lambda: UNSET
        """What the hosts have exchanged by now, where there are several agents."""
        self.note: Callable[[Event], None] = lambda event: None
        """Is told of all that happens."""
        self.wrong: list[dict[str, Any]] = []
        """What audits have found, for the result."""
        self._refuted_in = 0
        self._told = ToldCheckpoints()
        self._good: LastGood | None = None  # None where there are no audits
        self._early: list[dict[str, Any]] = []
        self.retold = Retold()
        """What may be told twice, and is left out then."""

    def read(self, *, audits: bool) -> None:
        """Reads what the tape tells already. audits: whether those are needed."""
        self.begun = self._tape.begun
        self._told = told(self._tape.path)
        self._good = last_good(self._tape.path) if audits else None

    def record(self, event: Event) -> None:
        """Notes an event of the agent's own, that happens now."""
        now = replace(event, t_s=round(time.monotonic() - self._began, 6))
        self.retold.without([now])
        self._pass_on([now])

    def warn(self, why: str) -> None:
        """Notes a warning of the agent's own."""
        self.record(WarnedEvent(why=why))

    def say(self, why: str) -> None:
        """Tells the client something that is for no tape."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._client.send(PlainEvents([plain(WarnedEvent(why=why))]))

    def tell(self, word: HeldUp) -> None:
        """Tells the client how the team stands, which is for no tape."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._client.send(word)

    def pass_on(self, happened: Sequence[Event]) -> None:
        """Notes what has happened, as processes tell, but for what was told before. On the tape, ``run_started`` comes
        first; of a start that comes to nothing it holds none.
        """
        self._pass_on(self.retold.without(happened))

    def _pass_on(self, happened: Sequence[Event]) -> None:
        versions = (e.version for e in reversed(happened) if isinstance(e, MergedEvent | RunStartedEvent))
        self.merged = next(versions, self.merged)
        events = [plain(self._counted(event)) for event in happened]
        self._early += events
        for event in events:
            self._take(event)
        for one in happened:
            self.note(one)
        if self.started or any(isinstance(event, RunStartedEvent) for event in happened):
            self.started = True
            for waiting in sorted(self._early, key=lambda early: early["kind"] != "run_started"):
                self._tape.write(waiting)
            self._early.clear()
            self._tape.flush()  # before anybody is shown it
        try:
            self._client.send(PlainEvents(events))
        except (BrokenPipeError, ConnectionResetError):
            raise ClientGone from None

    def _counted(self, event: Event) -> Event:
        return replace(event, wire_bytes=self.wire_bytes()) if isinstance(event, CheckpointedEvent) else event

    def pass_on_the_rest(self, words: Iterable[WorkerToSupervisor]) -> Sequence[str]:
        """What processes told before their end belongs on the tape: a checkpoint may hold those very steps.

        Returns the parameters that they told their forwards to write.
        """
        found: list[str] = []
        for message in words:
            if isinstance(message, Events):
                with contextlib.suppress(ClientGone):
                    self.pass_on(message.events)
            elif isinstance(message, FoundWritten):
                found += message.names
        return found

    def make_up_for(self, events: Iterable[Event]) -> None:
        """Writes events of a session of before, which nobody has written, while the team of this one has not started.

        They belong before its ``run_started``, and no client of now is told of them.
        """
        assert not self.started, "the tape is at the end of the session before"
        for event in events:
            self._tape.write(plain(event))
            self._take(plain(event))
        self._tape.flush(sync=True)

    def _take(self, event: dict[str, Any]) -> None:
        self._told.note(event)
        if self._good is not None:
            self._good.note(event)

    def last_update(self) -> int:
        """The version at which the tape ends."""
        return last_update(self._tape.path)

    @property
    def saved(self) -> int:
        """The version of the newest checkpoint that the tape tells of, 0 for none."""
        return max(self._told.digests, default=0)

    def told_digest(self, version: int) -> str | None:
        """Of the checkpoint of this version, as the tape tells; None where it tells of none."""
        return self._told.digests.get(version)

    def tell_what_is_lost(self) -> None:
        """The run ends without a result: warns of updates that no checkpoint holds."""
        if not self.started:
            return
        saved = max(checkpoint.by_version(self._folder.checkpoints), default=0)  # none is read: this is the end
        done = self.last_update()
        if done > saved:
            how = f"goes on from there with {self._folder.how_to_resume()}" if saved else "is to be started again"
            lost = f"version {done:,}" if done == saved + 1 else f"versions {saved + 1:,} to {done:,}"
            self.warn(f"the run ends without having saved {lost}; its last checkpoint is version {saved:,}: it {how}.")

    def sync(self) -> None:
        """Makes sure that what was told so far outlives this process, and a power cut."""
        self._tape.flush(sync=True)

    def newest_checkpoint(self, *, resumed: bool) -> Path | None:
        """The newest sound checkpoint, if there is one. Raises CheckpointError where a resumed run has none."""
        path, problems = self._folder.newest_checkpoint(self._told)
        for problem in problems:
            self.warn(problem)
        if path is None and problems and resumed:
            raise CheckpointError(
                f"no checkpoint in {self._folder.checkpoints} is sound, so the run cannot be resumed; start a new one.",
                detail="\n".join(problems),
            )
        return path

    def _with_past(self, found: FoundWrong) -> FoundWrong:
        """The same with what was uncertain of the worker's machine when its team began, if no audit was good since: as
        the team says, whose events may still be on their way.
        """
        if self._good is None or found.since > self._good.start:
            return found
        since, back = self._good.before(found.worker)
        return dataclasses.replace(found, since=since, back=back)

    def note_past(self, audit: dict[str, Any] | None, workers: int) -> None:
        """The same for what the team's leader tells of its audits at its end."""
        if audit is not None and self._good is not None:
            pasts = [past for worker in range(workers) if (past := self._good.began(worker)) is not None]
            audit["uncertain_since"] = min([audit["uncertain_since"], *(since for since, _ in pasts)])

    def refuted(self, found: FoundWrong, epoch: int) -> FoundWrong:
        """Notes that a worker has computed a microbatch wrong, and removes the checkpoints that are uncertain for it.

        All workers of an epoch tell of it; it is noted once. The same, with what is known of before that epoch.
        """
        found = self._with_past(found)
        if epoch <= self._refuted_in:
            return found
        self._refuted_in = epoch
        removed = []
        for version, path in checkpoint.by_version(self._folder.checkpoints).items():
            if version > found.back:
                shutil.rmtree(path, ignore_errors=True)
                removed.append(version)
        event = RefutedEvent(
            worker=found.worker, version=found.version, microbatch=found.microbatch, by_whom=found.by,
            since=found.since, removed=removed,
        )  # fmt: skip
        self.record(event)
        self.wrong.append({name: getattr(event, name) for name in ("worker", "version", "microbatch", "since")})
        return found

    def remove_unlooked(self) -> None:
        """Removes those of stops and of the clock: forwards may have written their weights past autograd, unseen."""
        for path in checkpoint.all_in(self._folder.checkpoints):
            with contextlib.suppress(CheckpointError):
                if checkpoint.read_manifest(path).meta.get("unlooked"):
                    shutil.rmtree(path)
                    self.warn(
                        f"the checkpoint {path} was saved at a stop or by the clock, and that forward may have written "
                        f"its weights before anybody looked; it was removed."
                    )
