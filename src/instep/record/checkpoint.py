"""Checkpoints: what a run needs to go on exactly, saved so that no crash and no full disk can take an earlier one.

A checkpoint is a folder ``step-00000123``, named by its version, with three files:

- ``model.safetensors``: the model's state_dict, every name in full (tied weights twice), as `load_state_dict` needs it;
- ``training.pt``: the optimizer's state and plain numbers, by `torch.save`, loadable with ``weights_only=True``;
- ``manifest.json``: version, digest of the model, fingerprint of the recipe, free `meta`, size and SHA-256 of the other
  two files, and the SHA-256 of all that. Its bytes are a function of its content, so any changed byte is seen.

It is written aside, in a hidden folder beside it, synced, and renamed. One process at a time may save into a folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import pickle
import pickletools
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, cast

from instep.errors import CheckpointError, RecordError, described, shown
from instep.record import best, shapes
from instep.record.digest import digest_of_state
from instep.record.files import disk_error, json_text, sha256_of_file, sync_folder, synced_file
from instep.record.shapes import misfit
from instep.record.thinning import superfluous
from instep.record.weights import write_weights

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
"""The version of the checkpoint's layout."""

MODEL, TRAINING, MANIFEST = "model.safetensors", "training.pt", "manifest.json"

_NAME = re.compile(r"(\.replaced-)?step-(\d{8,})")
_ONLY_PLAIN = "keep only tensors, numbers, text, lists and dicts in the optimizer's state."
SAVING, _REPLACED = ".saving-", ".replaced-"


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint just written: its folder, its size on the disk in bytes, and the digest of its model."""

    path: Path
    bytes: int
    digest: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says about itself. `files` gives (size in bytes, SHA-256) by name."""

    version: int
    digest: str
    fingerprint: str
    meta: Mapping[str, Any]
    files: Mapping[str, tuple[int, str]]


@dataclass(frozen=True)
class Loaded:
    """A checkpoint in memory, its tensors in the CPU's."""

    version: int
    model_state: dict[str, Tensor]
    training_state: dict[str, Any]
    meta: Mapping[str, Any]
    fingerprint: str
    digest: str


def save(
    folder: Path,
    *,
    version: int,
    model_state: Mapping[str, Tensor],
    training_state: Mapping[str, Any],
    meta: Mapping[str, Any],
    fingerprint: str,
    keep: int | Literal["thinned"],
    sound: Callable[[], None] | None = None,
) -> SavedCheckpoint:
    """Writes the checkpoint of `version` into `folder`, then removes all but those that `keep` says, see `superfluous`,
    and the best one, see `instep.record.best`.

    training_state: a dict of tensors and plain values, as deep as need be. meta: values that JSON can hold.
    sound: called once all is written; what it raises leaves no checkpoint.
    A checkpoint of the same version is replaced; one of a later version (left by a history that was taken back) stays.

    Raises ResourceError if the disk refuses, with nothing lost that was there before, and RecordError if a state holds
    what cannot be saved or could not be loaded safely.
    """
    final = folder / _name(version)
    aside = folder / f"{SAVING}{final.name}"
    try:
        folder.mkdir(exist_ok=True)  # without parents: a run folder that is gone is not born again
        _tidy(folder)
        aside.mkdir()
        about = {"version": version, "fingerprint": fingerprint, "meta": dict(meta)}
        saved = _write(aside, model_state, training_state, about)
        if sound is not None:
            sound()
        put_in_place(aside, final)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise disk_error(f"the checkpoint {final} cannot be saved", error, also=_what_is_kept(folder)) from error
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    if keep:
        _remove_old(folder, version, keep)
    return SavedCheckpoint(final, *saved)


def _write(
    aside: Path, model_state: Mapping[str, Tensor], training_state: Mapping[str, Any], about: Mapping[str, Any]
) -> tuple[int, str]:
    """Writes the three files, the manifest with `about`; gives their size in bytes and the digest of the model."""
    digest = digest_of_state(model_state)
    with synced_file(aside / MODEL) as model:
        write_weights(model, model_state)
    with synced_file(aside / TRAINING) as training:
        _save_training(training_state, cast("IO[bytes]", training))
    _check_safe(aside / TRAINING)
    files = {
        name: {"bytes": file.size_bytes, "sha256": file.sha256} for name, file in ((MODEL, model), (TRAINING, training))
    }
    table = {**about, "format": FORMAT, "digest": digest, "files": files}
    with synced_file(aside / MANIFEST) as manifest:
        manifest.write(_manifest_bytes(table))
    sync_folder(aside)
    return model.size_bytes + training.size_bytes + manifest.size_bytes, digest


def repacked(training_state: Mapping[str, Any]) -> dict[str, Any]:
    """The training state as a checkpoint would give it back. Raises RecordError as `save` does."""
    import torch

    file = io.BytesIO()
    _save_training(training_state, file)
    file.seek(0)
    _check_safe(file)
    file.seek(0)
    found: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    return found


def _save_training(training_state: Mapping[str, Any], file: IO[bytes]) -> None:
    import torch

    try:
        torch.save(dict(training_state), file)
    except (pickle.PicklingError, AttributeError, TypeError, NotImplementedError) as error:
        raise RecordError(f"the training state cannot be saved ({described(error)}); {_ONLY_PLAIN}") from error


def _check_safe(file: Path | IO[bytes]) -> None:
    """Raises RecordError where the training state in `file` holds what could not be loaded safely."""
    import torch

    unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(cast("Any", file))
    if unsafe:
        raise RecordError(
            f"the training state holds {', '.join(sorted(unsafe))}, which torch.load refuses with weights_only=True; "
            f"{_ONLY_PLAIN}"
        )


def _manifest_bytes(table: Mapping[str, Any]) -> bytes:
    """The one way to write `table`: its keys sorted, its own SHA-256 (over the text without it) added."""
    plain = json.loads(json_text(table))  # keys that were numbers are text now, and sort as text
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
    return json.dumps({**plain, "sha256": digest}, sort_keys=True, indent=2).encode() + b"\n"


def put_in_place(aside: Path, final: Path) -> None:
    """Renames `aside` to `final`. At every moment one of the old and the new `final` is there to be found.

    Raises OSError.
    """
    old = final.with_name(_REPLACED + final.name)
    if final.exists():
        final.rename(old)
    try:
        aside.rename(final)
    except BaseException:
        if old.exists():
            old.rename(final)
        raise
    sync_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _remove_old(folder: Path, version: int, keep: int | Literal["thinned"]) -> None:
    """Of what is not newer than `version` removes all but what is to be kept, and the best. Errors are passed over."""
    with contextlib.suppress(OSError):
        paths = {v: path for v, path in by_version(folder).items() if v <= version}
        try:
            kept = best.versions(folder)
        except RecordError:
            return  # which one is the best cannot be told, so none is removed
        for v in superfluous(list(paths), keep):
            if v not in kept:
                shutil.rmtree(paths[v], ignore_errors=True)


def _tidy(folder: Path) -> None:
    """Removes what a crash while saving left behind, and brings back a checkpoint that was being replaced."""
    for path in folder.glob(f"{SAVING}*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(f"{_REPLACED}*"):
        final = folder / path.name.removeprefix(_REPLACED)
        if final.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.rename(final)


def path_of(folder: Path, version: int) -> Path:
    """Where in `folder` the checkpoint of `version` lies."""
    return folder / _name(version)


def _name(version: int) -> str:
    return f"step-{version:08d}"


def all_in(folder: Path) -> list[Path]:
    """All checkpoints in `folder`, sound or not, by version."""
    return list(by_version(folder).values())


def by_version(folder: Path) -> dict[int, Path]:
    """Every checkpoint in `folder` by rising version, sound or not; a replaced one only if its successor is missing."""
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir(), reverse=True) if folder.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match and path.is_dir():
            found.setdefault(int(match[2]), path)  # "step-" sorts after ".replaced-", so in reverse it comes first
    return dict(sorted(found.items()))


def _what_is_kept(folder: Path) -> str:
    with contextlib.suppress(OSError):
        versions = by_version(folder)
        if versions:
            return f"{versions[max(versions)].name} is kept"
    return "there was no checkpoint before it"


def read_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint folder `path`, checked against its own SHA-256. Raises CheckpointError."""
    try:
        data = (path / MANIFEST).read_bytes()
    except OSError as error:
        raise _damaged(path, f"{MANIFEST} cannot be read: {error.strerror}") from error
    try:
        table = json.loads(data)
        sound = data == _manifest_bytes({key: item for key, item in table.items() if key != "sha256"})
    except (ValueError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise _damaged(path, f"{MANIFEST} is not as it was written")
    if table.get("format") != FORMAT:
        raise CheckpointError(
            f"the checkpoint {path} has format {shown(table.get('format'))}, and this version of Instep reads "
            f"{FORMAT}; use the version that wrote it."
        )
    wrong = misfit(table, shapes.MANIFEST)
    if wrong is not None:
        raise _damaged(path, f"of {MANIFEST} {wrong}")
    files = {name: (item["bytes"], item["sha256"]) for name, item in table["files"].items()}
    for name in (MODEL, TRAINING):
        if name not in files:
            raise _damaged(path, f"{MANIFEST} does not tell of {name}, so nothing could be verified")
    return Manifest(table["version"], table["digest"], table["fingerprint"], table["meta"], files)


def steps_done(path: Path) -> int:
    """The global batches that a run had done at the checkpoint `path`. Raises CheckpointError, of no run's too."""
    progress = read_manifest(path).meta.get("progress")
    if progress is None:
        raise _damaged(path, f"{MANIFEST} does not tell how far the run was")
    return int(progress["steps"])


def verify(path: Path) -> Manifest:
    """Checks every byte of the checkpoint folder `path` against its manifest, without torch; gives the manifest.

    Raises CheckpointError naming the file and the damage.
    """
    manifest = read_manifest(path)
    for name, (size, sha256) in manifest.files.items():
        try:
            present = (path / name).stat().st_size
            if present != size:
                raise _damaged(path, f"{name} has {present} bytes of {size}")
            if sha256_of_file(path / name) != sha256:
                raise _damaged(path, f"{name} has {size} bytes as it should, but other ones than were written")
        except OSError as error:
            raise _damaged(path, f"{name} cannot be read: {error.strerror}") from error
    return manifest


def newest_sound(
    folder: Path,
    check: Callable[[Path, Manifest], None] = lambda path, manifest: None,
    among: Callable[[int], bool] = lambda version: True,
) -> tuple[Path | None, list[str]]:
    """The newest checkpoint in `folder` that passes `verify`, or None, and a sentence on each newer one that does not.

    check: raises CheckpointError for one that is sound and yet not to be taken. among: the versions that are looked at.
    Raises CheckpointError if `folder` is there and cannot be listed.
    """
    problems: list[str] = []
    try:
        versions = by_version(folder)
    except OSError as error:
        raise CheckpointError(
            f"the checkpoints in {folder} cannot be listed: {error.strerror}; check its rights."
        ) from error
    for path in [path for version, path in reversed(versions.items()) if among(version)]:
        try:
            check(path, verify(path))
        except CheckpointError as error:
            problems.append(error.message)
        else:
            return path, problems
    return None, problems


def load(path: Path) -> Loaded:
    """The checkpoint folder `path`, verified first. Raises CheckpointError if it is damaged."""
    import safetensors.torch
    import torch

    manifest = verify(path)
    try:
        model_state = safetensors.torch.load_file(path / MODEL)
        training_state = torch.load(path / TRAINING, map_location="cpu", weights_only=True)
    except Exception as error:  # the files are as they were written, so only the libraries can differ
        unsafe = _unsafe(path / TRAINING)
        if unsafe:
            raise CheckpointError(
                f"{path / TRAINING} holds objects that could run code ({', '.join(unsafe)}), which Instep never "
                f"writes; do not use this checkpoint."
            ) from None
        raise CheckpointError(
            f"the checkpoint {path} is sound, but the installed torch and safetensors cannot load it; use the versions "
            "it was saved with.",
            detail=f"{type(error).__name__}: {error}",
        ) from error
    return Loaded(manifest.version, model_state, training_state, manifest.meta, manifest.fingerprint, manifest.digest)


def _unsafe(path: Path) -> list[str]:
    """What the file of `torch.save` holds that `torch.load` refuses with ``weights_only=True``."""
    import torch

    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # it is no such file: a plain pickle, or torn
        return sorted(_globals_of(path.read_bytes()))


def _globals_of(data: bytes) -> set[str]:
    """The names that a plain pickle imports as it is read, without reading it; empty for what is none."""
    found, strings = set[str](), list[str]()
    with contextlib.suppress(Exception):
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "GLOBAL":
                found.add(str(argument).replace(" ", "."))
            elif opcode.name == "STACK_GLOBAL":
                found.add(".".join(strings[-2:]))
            elif isinstance(argument, str):
                strings.append(argument)
    return found


def check_recipe(path: Path, *, saved: str, current: str) -> None:
    """Raises CheckpointError unless the fingerprints `saved` (in the checkpoint `path`) and `current` are equal."""
    if saved != current:
        raise CheckpointError(
            f"the checkpoint {path} belongs to another recipe; resume with the recipe in its run folder, or start "
            "a new run."
        )


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"the checkpoint {path} is damaged: {why}; use an earlier one, or restore the file.")
