"""What a worker that is alone remembers: its training state of a few steps before, in memory that outlives it.

No other could stand in for it. Where it dies, who comes in its place goes on from there, without a checkpoint, and does
at most so many steps again as `Team.remember` says. So it is where a team came to have one worker while it went on, and
where it is to have more and dies before they share its state. The state is copied into two files of memory by turns,
each with a mark that says when it is whole, so that one of them is whole whenever the worker dies, in the midst of a
copy too.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from instep.errors import ResourceError, described
from instep.memory_file import memory_file
from instep.record.checkpoint import Loaded
from instep.reduce.layout import ALIGN_BYTES, is_dense, padded, tensor_at
from instep.team.messages import Request
from instep.team.orders import Start
from instep.transport.memory import Region, attach, reserve

_HEAD = struct.Struct("<4q")
"""What a file begins with: the copy's mark, its version, and where its pickled part begins and ends.

Marks count the copies; 0 is that of a copy that is not whole.
"""


@dataclass(frozen=True)
class Remembered:
    """Both files, as descriptors, and the newest copy that is whole: its mark, 0 for none, and its version."""

    files: tuple[int, int]
    mark: int = 0
    version: int = 0


class KeptCopies:
    """The agent's side: holds the files while it lives. `now`: for the present start, None where nothing is kept."""

    def __init__(self) -> None:
        self._files: tuple[int, int] | None = None
        self.now: Remembered | None = None

    def __enter__(self) -> KeptCopies:
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._files or ():
            os.close(file)
        self._files = self.now = None

    def begin(self, run: Request, start: Start, newest: Path | None) -> bool:
        """For a start of the team, whether it goes on from what is remembered, and not from the `newest` checkpoint.

        Not where that is newer, nor where the team goes back for what forwards were found to write.
        """
        several = len(start.members) > 1
        self.now = None if several and self._files is None else self._whole(run)
        if self.now is None:
            return False
        if start.looked or (newest is not None and self.now.version < int(newest.name.rpartition("-")[2])):
            for file in self.now.files:
                os.ftruncate(file, 0)
            self.now = replace(self.now, mark=0, version=0)
        if several and not self.now.mark:
            self.__exit__()
        return self.now is not None and bool(self.now.mark)

    def of_one(self, run: Request) -> Remembered | None:
        """For a worker that comes to be alone while it goes on; None where nothing is to be kept, or can be."""
        self.now = self._whole(run)
        return self.now

    def _whole(self, run: Request) -> Remembered | None:
        """The files, with what is whole in them."""
        if run.engine != "lockstep" or run.place is not None or not run.team.remember:
            return None
        try:
            self._files = self._files or (memory_file(), memory_file())
        except OSError:  # no more files may be open
            return None
        heads = [os.pread(file, _HEAD.size, 0).ljust(_HEAD.size, b"\0") for file in self._files]
        mark, version, *_ = max(map(_HEAD.unpack, heads))
        return Remembered(self._files, mark, version)

    def begun(self, workers: int) -> None:
        """A team of so many goes on now: several need no copies, for each of them sees the state."""
        if workers > 1:
            self.__exit__()


class Remembering:
    """The worker's side: copies its state every so many steps. at_once: beginning with the present one.

    The files are written, not mapped: the copies are the agent's, and take no room in the worker. held: keeps it open.
    """

    def __init__(self, remembered: Remembered, every: int, *, at_once: bool = False, held: Sequence[Any] = ()):
        self._files, self._mark, self._every, self._held = remembered.files, remembered.mark, every, held
        self._last = -every if at_once else remembered.version if remembered.mark else 0

    def due(self, version: int, saved: int) -> bool:
        """Whether this version is to be copied. saved: that of the newest checkpoint, behind which none goes back."""
        return version - self._last >= self._every or self._last < saved == version

    def copy(
        self, version: int, model_state: Mapping[str, Tensor], training_state: Mapping[str, Any], **meta: Any
    ) -> str:
        """Copies them. Why it cannot be done, as a clause; "" where it is done."""
        tensors, file = _Tensors(), self._files[(self._mark + 1) % 2]
        try:
            pickled = tensors.pickled((dict(model_state), dict(training_state), meta))
            end = tensors.end + len(pickled)
            if os.fstat(file).st_size < end:
                reserve(file, {"state": Region((end,), "uint8")})
            _write(file, _HEAD.pack(0, version, tensors.end, end), 0)  # not whole
            self._put(file, tensors)
            _write(file, pickled, tensors.end)
        except ResourceError:
            return f"memory for a copy of its state, {end / 2**20:,.0f} MiB, cannot be had"
        except Exception as error:
            return f"its state cannot be copied ({described(error)})"
        self._mark, self._last = self._mark + 1, version
        _write(file, struct.pack("<q", self._mark), 0)
        return ""

    def recall(self) -> Loaded:
        """What the files hold, where that is anything, as a checkpoint."""
        file = self._files[self._mark % 2]
        (memory,) = attach(file, {"state": Region((os.fstat(file).st_size,), "uint8")}).values()
        _, version, start, end = _HEAD.unpack(memory[: _HEAD.size].tobytes())
        model, training, meta = _Found(memory, start, end).load()
        return Loaded(version, model, training, meta, "", "")

    def _put(self, file: int, tensors: _Tensors) -> None:
        for (place, *_), value in zip(tensors.places, tensors.found, strict=True):
            if value.numel():
                flat = value.detach().cpu().as_strided((value.numel(),), (1,))
                _write(file, flat.view(torch.uint8).numpy(), place)


def remembering_in(remembered: Remembered | None, every: int) -> Remembering | None:
    """For a worker that is alone now, in files that its agent holds open; None where there are none."""
    if remembered is None:
        return None
    try:
        held = [io.FileIO(f"/proc/{os.getppid()}/fd/{file}", "r+") for file in remembered.files]
    except OSError:
        return None
    first, second = (file.fileno() for file in held)
    return Remembering(replace(remembered, files=(first, second)), every, at_once=True, held=held)


def _write(file: int, data: Any, place: int) -> None:
    left = memoryview(data)
    while left:
        written = os.pwrite(file, left, place)
        left, place = left[written:], place + written


class _Tensors:
    """The tensors of a state, which are copied beside what is pickled of it. `places`: of each, as for `tensor_at`."""

    def __init__(self) -> None:
        self.found: list[Tensor] = []
        self.places: list[tuple[int, torch.dtype, torch.Size, tuple[int, ...]]] = []
        self.end = ALIGN_BYTES

    def pickled(self, state: Any) -> bytes:
        """The rest of it."""
        file = io.BytesIO()
        _Pickler(file, self._place).dump(state)
        return file.getvalue()

    def _place(self, value: Any) -> Any:
        if type(value) not in (Tensor, nn.Parameter) or value.layout is not torch.strided or not is_dense(value):
            return None
        if value.is_conj() or value.is_neg():  # its memory holds other numbers
            return None
        place = (self.end, value.dtype, value.shape, value.stride())
        self.found.append(value)
        self.places.append(place)
        self.end += padded(value.nbytes)
        return place


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, place: Callable[[Any], Any]):
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._place = place

    def persistent_id(self, value: Any) -> Any:
        return self._place(value)


class _Found(pickle.Unpickler):
    """A state, with tensors of its own."""

    def __init__(self, memory: Any, start: int, end: int):
        super().__init__(io.BytesIO(memory[start:end].tobytes()))
        self._memory = memory

    def persistent_load(self, place: Any) -> Tensor:
        return tensor_at(self._memory, *place).clone()
