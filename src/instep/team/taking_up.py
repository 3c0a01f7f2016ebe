"""How an agent 0 that is started again takes up what the others' workers have kept of the run. No torch.

Agents that lose agent 0 have their workers keep what they hold, and tell of it when they find agent 0 again. Before the
team first starts, the newest that is newer than the folder's last checkpoint comes over the link in parts, and becomes
a checkpoint of the folder; the tape gets the updates that it lacks. What is torn, or of another run, is not used.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from msgspec.structs import replace

from instep.errors import CheckpointError, InstepError, WorkerError
from instep.record import checkpoint
from instep.record.events import CheckpointedEvent, Event, MergedEvent
from instep.record.files import disk_error, sync_folder
from instep.record.folder import RunFolder
from instep.team.journal import Journal
from instep.team.messages import Request
from instep.team.received import Received
from instep.team.remote import RemoteCrew
from instep.team.wire_messages import CheckpointPart, Kept, KeptGiven

ASIDE = ".saving-what-was-kept"
"""In the folder of checkpoints: the next one that is saved there takes it away, if it is left."""


class TakingUp:
    """Of one run, whose folder's newest checkpoint is `newest`."""

    def __init__(self, run: Request, folder: RunFolder, journal: Journal, run_id: str | None, newest: Path | None):
        self._run, self._folder, self._journal, self._run_id = run, folder, journal, run_id
        self._version = checkpoint.read_manifest(newest).version if newest is not None else 0
        self._open = run.engine == "lockstep"
        self._offers: list[RemoteCrew] = []
        self._giver: RemoteCrew | None = None
        self._waited_for = False
        self.path: Path | None = None
        """The checkpoint that was taken up, if one was."""

    @property
    def busy(self) -> bool:
        """Whether something is on its way, so that the team is not to start."""
        return self._giver is not None

    def ended(self) -> bool:
        """Whether something was on its way, and is no more: once for each time. To be asked now and then, for who sent
        it may be lost.
        """
        if self._giver is not None and self._giver.lost is not None:
            self._done()
        ended, self._waited_for = self._waited_for and not self.busy, self.busy
        return ended

    def end(self) -> Path | None:
        """The team starts: what is offered from now on is too late. What was taken up, if something was."""
        self._open, self._offers = False, []
        return self.path

    def offer(self, crew: RemoteCrew) -> None:
        """A host is there, which may have kept something."""
        kept = crew.hello.kept
        if self._giver is not None and self._giver.hello.agent == crew.hello.agent:  # it has come again
            self._done()
        if kept is None or not self._open:
            return
        if kept.run != self._run_id or kept.version > self._run.recipe_table["steps"]:
            self._refuse(crew, kept, "it is of another run")
            return
        self._offers.append(crew)
        self._ask()

    def _ask(self) -> None:
        """For the newest, if nothing is on its way."""
        while self._giver is None and self._offers:
            crew = max(self._offers, key=_version)
            self._offers.remove(crew)
            if crew.lost is None and crew.hello.kept is not None and _version(crew) > self._version:
                self._giver, self._received = crew, Received(self._aside, sender=crew.name)
                self._files: dict[str, str] = {}
                self._events: list[Event] = []
                self._waited_for = True
                crew.ask_for(crew.hello.kept)

    def hear(self, crew: RemoteCrew, message: CheckpointPart | KeptGiven) -> None:
        """A part has come, or the end of what was asked for."""
        kept = crew.hello.kept
        if crew is not self._giver or kept is None or message.name != kept.name:
            return
        try:
            if isinstance(message, CheckpointPart):
                self._write(message)
                return
            if message.why:
                raise WorkerError(message.why)
            self._events += message.events
            if message.more:
                return
            self._take(crew, kept, self._events)
        except InstepError as error:
            self._refuse(crew, kept, error.message.partition(";")[0].rstrip("."))
        self._done()

    def _write(self, part: CheckpointPart) -> None:
        if part.file not in (checkpoint.MODEL, checkpoint.TRAINING, checkpoint.MANIFEST):
            raise WorkerError(f"it has a file {part.file!r}, which no checkpoint has")
        self._received.write(part)
        if part.last:
            self._files[part.file] = part.sha256

    def _take(self, crew: RemoteCrew, kept: Kept, events: Sequence[Event]) -> None:
        """Puts it among the folder's checkpoints. Raises InstepError where it is not what it is said to be."""
        aside, final = self._aside / kept.name, checkpoint.path_of(self._folder.checkpoints, kept.version)
        manifest = checkpoint.read_manifest(aside)
        changes = self._run.recipe_table.get("changes", ())
        known = self._run.fingerprints or (self._run.fingerprint,)
        fingerprint = known[sum(change["version"] < kept.version for change in changes)]
        checkpoint.check_recipe(aside, saved=manifest.fingerprint, current=fingerprint)
        if manifest.meta.get("run") != self._run_id:
            raise CheckpointError("it is of another run")
        said = (manifest.version, manifest.digest, final.name)
        whole = all(self._files.get(name) == sha256 for name, (_, sha256) in manifest.files.items())
        if said != (kept.version, kept.digest, kept.name) or not whole:
            raise CheckpointError("it is not whole")
        if self._journal.told_digest(kept.version) not in (None, kept.digest):
            raise CheckpointError("the run has other weights at this version, as its tape tells")
        self._tell(kept, events)
        try:
            for path in (*aside.iterdir(), aside):
                sync_folder(path)
            checkpoint.put_in_place(aside, final)
        except OSError as error:
            raise disk_error(f"the checkpoint {final} cannot be saved", error) from error
        self._version, self.path = kept.version, final
        crew.has(kept.name)
        size = sum(file.stat().st_size for file in final.iterdir())
        saved = CheckpointedEvent(version=kept.version, path=final.name, bytes=size, digest=kept.digest)
        last_s = max((event.t_s for event in events), default=0.0)
        self._journal.make_up_for([replace(saved, t_s=last_s)])
        self._journal.warn(
            f"agent 0 was started again: the run goes on from version {kept.version}, which the workers of "
            f"{crew.name} had kept."
        )

    def _tell(self, kept: Kept, events: Sequence[Event]) -> None:
        """Has the tape tell of the updates up to there: a checkpoint never holds steps that the tape lacks."""
        told = self._journal.last_update()
        merged = [event for event in events if isinstance(event, MergedEvent)]
        lacking = [event for event in merged if told < event.version <= kept.version]
        if [event.version for event in lacking] != list(range(told + 1, kept.version + 1)):
            raise CheckpointError("the tape lacks updates before it, which nobody has")
        self._journal.make_up_for(lacking)

    def _refuse(self, crew: RemoteCrew, kept: Kept, why: str) -> None:
        self._journal.warn(
            f"what the workers of {crew.name} had kept, version {kept.version}, is not used, for {why}; the run goes "
            f"on from its last checkpoint."
        )

    def _done(self) -> None:
        self._giver = None
        shutil.rmtree(self._aside, ignore_errors=True)
        self._ask()

    @property
    def _aside(self) -> Path:
        return self._folder.checkpoints / ASIDE


def _version(crew: RemoteCrew) -> int:
    return crew.hello.kept.version if crew.hello.kept is not None else 0
