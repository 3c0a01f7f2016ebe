"""Checkpoints every so many minutes, written by a thread from a copy of the state, while training goes on.

A step waits for the copy alone. The thread then does what a checkpoint in the step's way does, and whoever trains hears
between two steps that it is whole, or why it is not. One is written at a time. Torch, hashing and writing leave Python
to other threads, so that a process of its own would gain nothing: it would take a copy of its own as well.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from instep.errors import ResourceError, described
from instep.record import checkpoint
from instep.record.checkpoint import SavedCheckpoint
from instep.record.events import CheckpointedEvent, Event, WarnedEvent
from instep.reduce.layout import is_dense
from instep.worker.optimizer_state import tensors_in


@dataclass(frozen=True)
class _Written:
    """What became of a checkpoint: `saved`, or else `error`. cpu_s: of a processor, that it took. ended_s: on the run's
    clock."""

    saved: SavedCheckpoint | None
    error: BaseException | None
    cpu_s: float
    ended_s: float


class KeptCopy:
    """Copies of a state that changes, one after the other, each in the memory of the one before."""

    def __init__(self) -> None:
        self._homes: list[Tensor] = []

    @property
    def nbytes(self) -> int:
        """Of that memory."""
        return sum(home.nbytes for home in self._homes)

    def of(self, model_state: Mapping[str, Tensor], training_state: Mapping[str, Any], meta: Mapping[str, Any]) -> Any:
        """Copies of the three. They hold until the next call. Raises RecordError for what no checkpoint can hold."""
        state, homes, known = (dict(model_state), dict(training_state), dict(meta)), list[Tensor](), dict[Any, Tensor]()
        memo: dict[int, Any] = {}
        for _, value in tensors_in(state[:2]):
            if id(value) in memo or not _is_simple(value):
                continue
            where = value.data_ptr(), value.dtype, value.shape, value.stride(), value.device
            if where not in known or not value.numel():
                home = known[where] = self._home(len(homes), value)
                homes.append(home.copy_(value))
            memo[id(value)] = known[where]
        self._homes = homes
        try:
            return copy.deepcopy(state, memo)
        except (NotImplementedError, RuntimeError, TypeError):  # tensors of some classes; a file's bytes hold them
            model = {name: value.detach().clone() for name, value in model_state.items()}
            return model, checkpoint.repacked(training_state), copy.deepcopy(dict(meta))

    def _home(self, place: int, value: Tensor) -> Tensor:
        """Memory of the CPU's for a copy of the tensor, that of before if it fits."""
        if place < len(self._homes):
            home = self._homes[place]
            if (home.dtype, home.shape, home.stride()) == (value.dtype, value.shape, value.stride()):
                return home
        pinned = value.device.type == "cuda"  # a GPU writes there without a copy between
        try:
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, pin_memory=pinned)
        except (RuntimeError, MemoryError) as error:
            raise ResourceError(
                f"memory for a copy of the training state cannot be had ({described(error)}); set "
                f"team.checkpoint_minutes to 0, and fewer steps between checkpoints, team.checkpoint_every."
            ) from error


def _is_simple(tensor: Tensor) -> bool:
    """Whether its elements, in their order, are all that a file would hold of it."""
    return (
        type(tensor) is Tensor
        and tensor.layout == torch.strided
        and not (tensor.requires_grad or tensor.is_conj() or tensor.is_neg() or tensor.is_meta or tensor.is_quantized)
        and is_dense(tensor)
    )


class BackgroundCheckpoints:
    """Those of one process, in one start of the team, in `folder`. minutes: `Team.checkpoint_minutes`, 0 for none.

    `clock()`: seconds since the run's start. `emit(event)` notes what is told of them, by the thread that calls.
    """

    def __init__(self, minutes: float, folder: Path, clock: Callable[[], float], emit: Callable[[Event], None]):
        self._every_s, self._folder, self._clock, self._emit = 60 * minutes, folder, clock, emit
        self._last_s: float | None = None
        self._copy = KeptCopy()
        self._version, self._step_s = 0, 0.0  # of the last one that was begun
        self._thread: threading.Thread | None = None
        self._done: list[_Written] = []
        self._refused = self._late = False  # whether that was told
        self._unfinished = set[int]()  # that was told of

    def due(self) -> bool:
        """Whether it is time for the next one, and nothing is being written."""
        if not self._every_s or self._thread is not None or self._done:
            return False
        if self._last_s is None:
            self._last_s = self._newest_s()
        return self._clock() - self._last_s >= self._every_s

    def saved(self) -> None:
        """A checkpoint was saved, or begun, of this moment."""
        self._last_s = self._clock()

    def begin(
        self,
        model_state: Mapping[str, Tensor],
        training_state: Mapping[str, Any],
        about: Mapping[str, Any],
        began_s: float,
        sound: Callable[[], None] | None = None,
    ) -> None:
        """Copies the state, and has it written as `checkpoint.save` does, which takes `about` too.

        sound: called after the copy; what it raises leaves no checkpoint. began_s: since when the next step waits.
        """
        assert self._thread is None, "one is written at a time"
        self._version, meta = about["version"], about["meta"]
        try:
            model, training, meta = self._copy.of(model_state, training_state, meta)
        except ResourceError as error:
            self._done.append(_Written(None, error, 0.0, self._clock()))
            self.saved()
            return
        if sound is not None:
            sound()
        arguments = {**about, "model_state": model, "training_state": training, "meta": meta}
        # A daemon: whoever ends the process for an error does not wait for a disk that is full or gone.
        self._thread = threading.Thread(target=self._write, args=(arguments,), name="checkpoint", daemon=True)
        self.saved()  # before: the writer tells how long it took since
        self._thread.start()
        self._step_s = self._clock() - began_s

    def settle(self, *, wait: bool) -> int:
        """Tells of the one that was begun, if it is whole, or, where it is to `wait`, once it is. Its version, or 0.

        A disk that refuses is warned of: what was saved before is there. Raises what else may have come of it.
        """
        if self._thread is not None and (wait or self._done):
            self._thread.join()
            self._thread = None
        if self._thread is not None or not self._done:
            return 0
        written = self._done.pop()
        refused, self._refused = self._refused, isinstance(written.error, ResourceError)
        if isinstance(written.error, ResourceError):
            if not refused:  # not each one of a disk that stays full
                why = written.error.message.rstrip(".")
                self._emit(WarnedEvent(why=f"{why}; training goes on, and tries it again.", version=self._version))
            return 0
        if written.error is not None:
            raise written.error
        assert written.saved is not None, "it was written, or raised"
        self._tell_late(written.ended_s)
        saved = written.saved
        self._emit(
            CheckpointedEvent(
                version=self._version, path=saved.path.name, bytes=saved.bytes, digest=saved.digest,
                step_s=round(self._step_s, 6), cpu_s=round(written.cpu_s, 6),
            )
        )  # fmt: skip
        return self._version

    def tell_unfinished(self, but: int = -1) -> None:
        """Warns of checkpoints that whoever wrote them left unfinished, but for one of version `but`, which is written
        again. Nobody may be writing in the folder.
        """
        for path in sorted(self._folder.glob(f"{checkpoint.SAVING}step-*")):
            number = path.name.rpartition("-")[2]
            version = int(number) if number.isdecimal() else but
            if version not in (but, *self._unfinished):
                self._unfinished.add(version)
                why = (
                    f"the checkpoint of version {version} was not finished, for the process that wrote it ended; "
                    f"it is left out, and those before it are as they were."
                )
                self._emit(WarnedEvent(why=why))

    def _write(self, arguments: dict[str, Any]) -> None:
        saved, error = None, None
        try:
            saved = checkpoint.save(self._folder, **arguments)
        except BaseException as raised:
            error = raised
        self._done.append(_Written(saved, error, time.thread_time(), self._clock()))

    def _tell_late(self, ended_s: float) -> None:
        assert self._last_s is not None, "it was begun"
        took_s = ended_s - self._last_s
        if took_s > self._every_s and not self._late:
            self._late = True
            why = (
                f"a checkpoint was whole {took_s:.3g} s after it was begun, and the next one waits for that, though "
                f"team.checkpoint_minutes, {self._every_s / 60:.3g}, asks for one every {self._every_s:.3g} s; give "
                f"more minutes, or a quicker disk."
            )
            self._emit(WarnedEvent(why=why, version=self._version))

    def _newest_s(self) -> float:
        """When the newest checkpoint was written, or the run began: who takes the place of another that died goes on
        with its minutes.
        """
        try:
            newest = max(path.stat().st_mtime for path in checkpoint.all_in(self._folder))
        except (OSError, ValueError):
            return 0.0
        return max(0.0, self._clock() - max(0.0, time.time() - newest))
