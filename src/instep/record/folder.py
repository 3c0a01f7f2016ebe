"""The folder of a run: what lies where, and the digest of what lies there."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instep.errors import CheckpointError, RecordError
from instep.record import checkpoint
from instep.record.digest import digest_of_file
from instep.record.files import disk_error, json_text, write_atomically


@dataclass(frozen=True)
class RunFolder:
    """A run's folder: `recipe.toml`, `tape.jsonl`, `checkpoints/`, `logs/` and, after an ending, `result.json`."""

    path: Path

    @classmethod
    def create(cls, path: Path | str) -> RunFolder:
        """Makes the folder `path`, its parents, and the folders in it; an empty folder is taken as it is.

        Raises RecordError if there is something at `path` already, and ResourceError if the disk refuses.
        """
        run = cls(Path(path))
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            if any(run.path.iterdir()):
                raise FileExistsError
            run.checkpoints.mkdir()  # of two runs that start at once, only one makes this one
            run.logs.mkdir()
        except (FileExistsError, NotADirectoryError):
            raise RecordError(
                f"{path} exists and is not an empty folder; choose another one with --out, or go on with the run in it "
                f"with --resume {path}."
            ) from None
        except OSError as error:
            raise disk_error(f"the run folder {path} cannot be made", error) from error
        return run

    @classmethod
    def open(cls, path: Path | str) -> RunFolder:
        """The folder of a run that was started before. Raises RecordError if `path` is none."""
        run = cls(Path(path))
        with _readable(path):
            is_folder, is_run = run.path.is_dir(), run.recipe_path.is_file()
        if not is_folder:
            raise RecordError(f"there is no folder {path}; give the folder of a run, such as runs/NAME.")
        if not is_run:
            raise RecordError(
                f"{path} is not the folder of a run: it has no {run.recipe_path.name}; give one that has."
            )
        return run

    @staticmethod
    def default_path(name: str, parent: Path | str = "runs") -> Path:
        """The first of parent/name, parent/name-2, parent/name-3, ... that does not exist."""
        paths = (Path(parent) / (f"{name}-{count}" if count > 1 else name) for count in itertools.count(1))
        return next(path for path in paths if not os.path.exists(path))  # False where it cannot be known

    @property
    def recipe_path(self) -> Path:
        """The resolved recipe, TOML."""
        return self.path / "recipe.toml"

    @property
    def tape_path(self) -> Path:
        """The tape, see `instep.record.tape`."""
        return self.path / "tape.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints, see `instep.record.checkpoint`."""
        return self.path / "checkpoints"

    @property
    def artifacts(self) -> Path:
        """The folder of what the recipe leaves at its end: samples, pictures, an exported model."""
        return self.path / "artifacts"

    @property
    def logs(self) -> Path:
        """The folder of what workers print."""
        return self.path / "logs"

    def log_of(self, who: str) -> Path:
        """Where a process of the team, "worker 0" or "server", prints."""
        return self.logs / f"{who.replace(' ', '-')}.log"

    @property
    def result_path(self) -> Path:
        """The result, JSON, written when a run ends."""
        return self.path / "result.json"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from training in this folder. Raises RecordError if one does already."""
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError:
            raise RecordError(
                f"{self.path} is being trained by another process; wait for its end, or end it first."
            ) from None
        finally:
            os.close(descriptor)

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
                f"--resume {self.path}."
            ) from None
        except (OSError, ValueError, RecursionError) as error:
            raise self._unreadable() from error
        if not isinstance(result, dict):
            raise self._unreadable()
        return result

    def _unreadable(self) -> RecordError:
        return RecordError(
            f"{self.result_path} cannot be read as a JSON table; restore it, or have it written anew by --resume "
            f"{self.path}."
        )


def digest(path: Path | str) -> str:
    """The digest of a run folder, a checkpoint folder or a .safetensors file, computed from the weights that lie there.

    Of a run it is that of the newest sound checkpoint. `result.json` is not trusted, only contradicted: a run that
    ended at a later step, or with another digest, is an error, never an earlier digest.

    Raises CheckpointError if weights are missing or damaged, and RecordError if `path` is none of the three.
    """
    with _readable(path):
        return _digest(Path(path))


@contextmanager
def _readable(path: Path | str) -> Iterator[None]:
    """What the system refuses in the block, such as a look into another's folder, as a RecordError."""
    try:
        yield
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror}; check the path and its rights.") from error


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
    newest, problems = checkpoint.newest_sound(run.checkpoints)
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
