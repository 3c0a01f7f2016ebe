"""The folder of a run: what lies where, and the digest of what lies there."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from instep.differences import without_address
from instep.errors import CheckpointError, InstepError, RecordError, cut
from instep.recipe_files import read_saved
from instep.record import checkpoint, tape
from instep.record.digest import digest_of_file
from instep.record.files import close_own, disk_error, hold_alone, json_text, write_atomically
from instep.record.held import Held, Identity, is_there
from instep.record.shapes import ABOUT, RESULT, misfit

CONTROL = "control"
"""In a run folder, while the run goes on, the folder of the socket by which its owner asks it."""

_LOG = re.compile(r"(supervisor|server|worker-\d+)\.log|[\w.-]+-\d+\.txt")


@dataclass(frozen=True)
class About:
    """What a run keeps of its start beside the recipe, in `run.json`. Folders of earlier versions have none.

    id: tells it from every other run, of the same recipe too. import_paths: where its modules were looked for. launch:
    what tells torchrun's start of the agents from every other, but not from what torchrun starts again; else "".
    """

    kind: Literal["training", "simulation"] = "training"
    import_paths: tuple[str, ...] = ()
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    launch: str = ""


class RunFolder:
    """A run's folder: `recipe.toml`, `run.json`, `tape.jsonl`, `checkpoints/`, `logs/` and, after an ending,
    `result.json`. From the moment that `recipe.toml` is there, the run can be resumed.
    """

    def __init__(self, path: Path):
        self.path = path
        self.about_path = path / "run.json"
        """The run's id and where its modules are, see `About`."""
        self.recipe_path = path / "recipe.toml"
        """The resolved recipe, TOML."""
        self.tape_path = path / "tape.jsonl"
        """The tape, see `instep.record.tape`."""
        self.checkpoints = path / "checkpoints"
        """The folder of checkpoints, see `instep.record.checkpoint`."""
        self.artifacts = path / "artifacts"
        """The folder of what the recipe leaves at its end: samples, pictures, an exported model."""
        self.logs = path / "logs"
        """The folder of what workers print."""
        self.result_path = path / "result.json"
        """The result, JSON, written when a run ends."""

    def artifacts_at(self, version: int) -> Path:
        """The folder of what the recipe left during the run, see `Recipe.artifacts_every`."""
        return self.path / "artifacts-at" / str(version)

    @classmethod
    def create(cls, path: Path | str, recipe: str = "", about: About | None = None) -> RunFolder:
        """Makes the folder `path`, its parents, and what is in it at a start. An empty folder is taken as it is, and
        so is what a start left that was killed before its recipe was there.

        recipe: the text of the recipe file; "" writes none. Raises RecordError if there is something else at `path`
        already, and ResourceError if the disk refuses.
        """
        run = cls(Path(path))
        check_path(run.path)
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            with run.locked():  # of two runs that start at once, only one gets on
                if not run._unused():
                    raise FileExistsError
                run.checkpoints.mkdir(exist_ok=True)
                run.logs.mkdir(exist_ok=True)
                if about is not None:
                    told = {name: value for name, value in asdict(about).items() if value or name != "launch"}
                    write_atomically(run.about_path, json_text(told).encode() + b"\n")
                if recipe:  # last: a folder with a recipe has all that a resume needs
                    write_atomically(run.recipe_path, recipe.encode())
        except (FileExistsError, NotADirectoryError):
            remedy = "choose another one with --out"
            if run._holds_training():
                remedy += f", or go on with the run in it with {run.how_to_resume()}"
            raise RecordError(f"{path} exists and is not an empty folder; {remedy}.") from None
        except OSError as error:
            raise disk_error(f"the run folder {path} cannot be made", error) from error
        return run

    def how_to_resume(self) -> str:
        """For a message: the flag of ``instep train``, or the call where the recipe holds an object of a program."""
        with suppress(InstepError, OSError):
            if without_address(read_saved(self.recipe_path)) is not None:
                return f"instep.train(recipe, resume={str(self.path)!r})"
        return f"--resume {self.path}"

    def _holds_training(self) -> bool:
        with suppress(OSError, RecordError):
            about = self.about()
            return self.recipe_path.is_file() and (about is None or about.kind == "training")
        return False

    def _unused(self) -> bool:
        """Whether nothing lies here but what a start that was killed leaves; its empty tape is taken away."""
        names = {path.name for path in self.path.iterdir()}
        known = {self.checkpoints.name, self.logs.name, self.about_path.name, self.tape_path.name}
        aside = {f".{self.about_path.name}.new", f".{self.recipe_path.name}.new", CONTROL}
        if names - known - aside:
            return False
        made = [self.checkpoints, self.logs]
        if names and not all(path.is_dir() for path in made if path.name in names):
            return False
        begun = self.checkpoints.is_dir() and any(self.checkpoints.iterdir())
        foreign = self.logs.is_dir() and not all(_LOG.fullmatch(path.name) for path in self.logs.iterdir())
        if begun or foreign or (self.tape_path.exists() and self.tape_path.stat().st_size):
            return False
        self.tape_path.unlink(missing_ok=True)
        return True

    @classmethod
    def open(cls, path: Path | str) -> RunFolder:
        """The folder of a run that was started before. Raises RecordError if `path` is none."""
        run = cls(Path(path))
        with _readable(path):
            is_folder, is_run = run.path.is_dir(), run.recipe_path.is_file()
        if not is_folder:
            raise RecordError(f"there is no folder {cut(path)}; give the folder of a run, such as runs/NAME.")
        if not is_run and run.checkpoints.is_dir() and not any(run.checkpoints.iterdir()):
            raise RecordError(
                f"in {path} a run was ended before its recipe was there, so there is nothing to resume; start it with "
                f"--out {path}."
            )
        if not is_run:
            raise RecordError(
                f"{path} is not the folder of a run: it has no {run.recipe_path.name}; give one that has."
            )
        return run

    @staticmethod
    def claim(name: str, parent: Path | str = "runs") -> Path:
        """Makes the first of the folders parent/name, parent/name-2, parent/name-3, ... that does not exist.

        Of several processes that claim at once, each gets another one. Raises ResourceError if the disk refuses.
        """
        for count in itertools.count(1):
            path = Path(parent) / (f"{name}-{count}" if count > 1 else name)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.mkdir()
            except FileExistsError:
                if not path.parent.is_dir():
                    raise RecordError(f"{path.parent} is a file, so no run folder fits in it; give --out.") from None
            except OSError as error:
                raise disk_error(f"the run folder {path} cannot be made", error, also="or give --out") from error
            else:
                return path
        raise AssertionError("names never end")

    def about(self) -> About | None:
        """What `run.json` says; None for a run of an earlier version. Raises RecordError where it is damaged."""
        try:
            table = json.loads(self.about_path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError):
            table = None
        if misfit(table, ABOUT) is None:
            return About(table["kind"], tuple(table["import_paths"]), table["id"], table.get("launch", ""))
        raise RecordError(
            f"{self.about_path} is not what Instep wrote there; restore it, or take it away: then its id and "
            f"the folders of its modules are read from the tape."
        )

    def log_of(self, who: str) -> Path:
        """Where a process of the team, "worker 0" or "server", prints."""
        return self.logs / f"{who.replace(' ', '-')}.log"

    @contextmanager
    def locked(self, patience_s: float = 0.0) -> Iterator[Held]:
        """Keeps other processes from training in this folder, and holds on to it whatever becomes of its name.

        patience_s: how long to wait for others, such as workers that die with their supervisor. Raises RecordError if
        another process trains here already, and ResourceError where the folder cannot be locked.
        """
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            raise RecordError(f"there is no folder {self.path} any more; start the run again.") from None
        try:
            _lock(descriptor, patience_s)
        except OSError as error:
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                raise RecordError(
                    f"{self.path} is being trained by another process; wait for its end, or end it first."
                ) from None
            raise disk_error(f"the run folder {self.path} cannot be locked", error) from error
        hold_alone(descriptor)
        try:
            yield Held(self.path, descriptor)
        finally:
            close_own(descriptor)

    def newest_checkpoint(
        self, told: tape.ToldCheckpoints | None = None, among: Callable[[int], bool] = lambda version: True
    ) -> tuple[Path | None, list[str]]:
        """The newest sound checkpoint of this run, or None, and a sentence on each newer one that is damaged or of
        another run.

        told: what the tape tells of them; read from there if None. among: the versions that are looked at.
        Raises CheckpointError if the checkpoints are there and cannot be listed, and RecordError where `run.json` is
        damaged.
        """
        told = tape.told(self.tape_path) if told is None else told
        return checkpoint.newest_sound(self.checkpoints, self.own_check(told), among)

    def own_check(self, told: tape.ToldCheckpoints) -> Callable[[Path, checkpoint.Manifest], None]:
        """What raises CheckpointError for another run's checkpoint. Raises RecordError where `run.json` is damaged."""
        about = self.about()
        own = about.id if about is not None else told.run

        def check(path: Path, manifest: checkpoint.Manifest) -> None:
            run = manifest.meta.get("run")
            if run is not None and run != own:
                raise CheckpointError(
                    f"the checkpoint {path} is of another run ({run}), so it is passed over; move it back to its own."
                )
            expected = told.digests.get(manifest.version, manifest.digest)
            if expected != manifest.digest:
                raise CheckpointError(
                    f"the checkpoint {path} has the digest {manifest.digest}, and the tape of the run says {expected} "
                    f"for version {manifest.version}, so it is passed over; move it back to the run that it is of."
                )

        return check

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Writes the result whole or not at all; numbers that are not finite become null. Raises ResourceError."""
        write_atomically(self.result_path, json_text(result, indent=2).encode() + b"\n")

    def read_result(self) -> dict[str, Any]:
        """The result. Raises RecordError if the run has not ended, or the file is damaged."""
        try:
            result = json.loads(self.result_path.read_bytes())
        except FileNotFoundError:
            raise RecordError(
                f"the run {self.path} has no {self.result_path.name}, for it has not ended; go on with it with "
                f"{self.how_to_resume()}."
            ) from None
        except (OSError, ValueError, RecursionError) as error:
            raise self._unreadable() from error
        if not isinstance(result, dict):
            raise self._unreadable()
        wrong = misfit(result, RESULT)
        if wrong is not None:
            raise self._unreadable(wrong)
        return dict(result)

    def _unreadable(self, wrong: str = "") -> RecordError:
        why = f"is not as it was written, for {wrong}" if wrong else "cannot be read as a JSON table"
        return RecordError(f"{self.result_path} {why}; restore it, or have it written anew by {self.how_to_resume()}.")


def digest(path: Path | str) -> str:
    """The digest of a run folder, a checkpoint folder or a .safetensors file, computed from the weights that lie there.

    Of a run it is that of the newest sound checkpoint. `result.json` is not trusted, only contradicted: a run that
    ended at a later step, or with another digest, is an error, never an earlier digest.

    Raises CheckpointError if weights are missing or damaged, and RecordError if `path` is none of the three.
    """
    with _readable(path):
        return _digest(Path(path))


def _lock(descriptor: int, patience_s: float) -> None:
    """Raises BlockingIOError where somebody else still holds the lock after `patience_s`, and OSError."""
    until = time.monotonic() + patience_s
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise
        time.sleep(0.02)


def remove(path: Path, identity: Identity) -> None:
    """Removes the run folder `path` of a start that came to nothing, unless another folder lies there by now.

    Where `path` is a link, it leads to an empty folder afterwards.
    """
    if is_there(path, identity):
        linked = path.is_symlink()
        target = path.resolve() if linked else path
        shutil.rmtree(target, ignore_errors=True)
        if linked:
            with suppress(OSError):
                target.mkdir()


def check_path(path: Path) -> None:
    """Raises RecordError where not every library that reads and writes there could open the path."""
    try:
        os.path.abspath(path).encode()
    except FileNotFoundError:
        raise RecordError(
            f"the run folder {path} is in the working folder, which is not there any more; change to one that is, or "
            f"give an absolute path."
        ) from None
    except UnicodeEncodeError:
        raise RecordError(
            f"the run folder {str(path).encode(errors='replace').decode()} has a path that is not UTF-8, which "
            f"safetensors and torch cannot open; choose another one with --out, or move the folder of the run."
        ) from None


@contextmanager
def _readable(path: Path | str) -> Iterator[None]:
    """What the system refuses in the block, such as a look into another's folder, as a RecordError."""
    try:
        yield
    except OSError as error:
        raise RecordError(f"{cut(path)} cannot be read: {error.strerror}; check the path and its rights.") from error


def _digest(path: Path) -> str:
    if path.is_file():
        return digest_of_file(path)
    if not path.exists():
        raise RecordError(f"there is no {path}; give a run folder, a checkpoint folder or a .safetensors file.")
    if any((path / name).exists() for name in (checkpoint.MANIFEST, checkpoint.MODEL, checkpoint.TRAINING)):
        return _recomputed(path, checkpoint.verify(path))
    run = RunFolder(path)
    if not (run.checkpoints.is_dir() or run.recipe_path.is_file()):
        raise RecordError(f"{path} is neither the folder of a run nor of a checkpoint; give one of these.")
    return _digest_of_run(run)


def _recomputed(path: Path, manifest: checkpoint.Manifest) -> str:
    computed = digest_of_file(path / checkpoint.MODEL)
    if computed != manifest.digest:
        raise CheckpointError(
            f"the weights in the checkpoint {path} have the digest {computed}, and its manifest says "
            f"{manifest.digest}; use an earlier checkpoint."
        )
    return computed


def _digest_of_run(run: RunFolder) -> str:
    newest, problems = run.newest_checkpoint()
    detail = "\n".join(problems)
    if newest is None:
        raise CheckpointError(
            f"the run {run.path} has no sound checkpoint to take a digest of; train it first, or restore its files.",
            detail=detail,
        )
    manifest = checkpoint.read_manifest(newest)
    computed, version = _recomputed(newest, manifest), manifest.version
    if run.result_path.is_file():
        result = run.read_result()
        ended, claimed = result.get("versions", result.get("steps")), result.get("digest")
        if isinstance(ended, int) and (ended > version or (ended == version and claimed != computed)):
            raise CheckpointError(
                f"the run {run.path} ended at version {ended} with the digest {claimed}, and its newest sound "
                f"checkpoint is {newest.name} with {computed}; give the path of a checkpoint for its digest, or resume "
                f"the run.",
                detail=detail,
            )
    return computed
