"""The state of optimizers in memory that the workers of a machine share: what a worker that dies has kept of its share
of the parameters, another has at once.

Each parameter has a part of the memory: first a word on what lies there, then its state's tensors, one after the other.
They get there once the optimizer has made them, and stay: the optimizers of `BY_PARAMETER` change them in place.
"""

from __future__ import annotations

import math
import pickle
import sys
from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor

from instep.engines.undo import SharedSpan
from instep.reduce.layout import ALIGN_BYTES, is_dense, padded, placed, tensor_at
from instep.worker.replica import Replica

_WORD = 1024
"""Bytes of the word on what lies in a part; its length comes first."""

_LENGTH = 8
"""Bytes of that length. It is 0 where there is nothing, and -1 where what there is lies elsewhere."""

_COPIES = 3
"""Of a parameter's size: the most that an optimizer of torch keeps of it. Pages that nobody writes take no memory."""

_NUMBERS = 8
"""Tensors of a few bytes that it keeps besides."""


class SharedState:
    """One worker's side of it. `nbytes`: of the memory for all parameters."""

    def __init__(self, replica: Replica):
        self._parameters = replica.parameters
        owners = {
            id(p): one.of_torch
            for one in replica.optimizer.each
            for group in one.of_torch.param_groups
            for p in group["params"]
        }
        self._optimizers = [owners.get(id(parameter)) for parameter in self._parameters]
        sizes = [_WORD + _COPIES * padded(p.nbytes) + _NUMBERS * ALIGN_BYTES for p in self._parameters]
        self._offsets, self.nbytes = placed(sizes, ALIGN_BYTES)
        self._ends = [offset + size for offset, size in zip(self._offsets, sizes, strict=True)]
        self._open: set[int] = set()  # parameters whose state may still get tensors
        self._told: dict[int, list[Any]] = {}
        self._used = dict.fromkeys(range(len(sizes)), _LENGTH)  # bytes from where a part begins

    def attach(self, memory: Tensor) -> None:
        """Takes the memory into use: [nbytes], uint8, at first 0."""
        self._memory = memory.numpy()

    def keep(self, own: Collection[int]) -> None:
        """From now on the state of the parameters `own` lies there: what there is of it, and what `grow` finds."""
        self._open |= set(own)
        self.grow(own)

    def grow(self, which: Collection[int]) -> None:
        """After an update of these parameters: has tensors that it has made lie there. It costs next to nothing once
        all do.
        """
        if self._open:
            self._open -= {index for index in self._open.intersection(which) if self._moved(index)}

    def most_bytes(self, index: int) -> int:
        """Of a parameter's part."""
        return self._ends[index] - self._offsets[index]

    def span(self, index: int) -> SharedSpan:
        """What an update of the parameter may change there."""
        start, used = self._offsets[index], self._used[index]
        skipped = 0 if index in self._open else min(used, _WORD)
        return SharedSpan(1, start + skipped, used - skipped)

    def take_over(self, which: Collection[int]) -> bool:
        """Gives this worker's optimizers the state of these parameters, as its owner has left it, if it is there."""
        self._open |= set(which)
        for index in which:
            start = self._offsets[index]
            length = int.from_bytes(self._memory[start : start + _LENGTH].tobytes(), "little", signed=True)
            if length < 0:
                return False
            optimizer, parameter = self._optimizers[index], self._parameters[index]
            if optimizer is None or not length:
                continue
            told = pickle.loads(self._memory[start + _LENGTH :][:length].tobytes())
            # interned, as the names that the optimizer gives: pickled, the state takes as many bytes as its owner's
            optimizer.state[parameter] = {
                sys.intern(name): what and tensor_at(self._memory, *what) for name, what in told
            }
            self._note(index, told)
        return True

    @property
    def whole(self) -> bool:
        """Whether the state of all parameters lies there, as far as there is any."""
        lengths = [self._memory[start : start + _LENGTH].tobytes() for start in self._offsets]
        return not any(int.from_bytes(length, "little", signed=True) < 0 for length in lengths)

    def give_back(self, which: Collection[int]) -> None:
        """Has this worker's optimizers forget the state of these parameters, which lies there."""
        self._open -= set(which)
        for index in which:
            self._told.pop(index, None)
            self._used[index] = _LENGTH
            optimizer = self._optimizers[index]
            if optimizer is not None:
                optimizer.state.pop(self._parameters[index], None)

    def _moved(self, index: int) -> bool:
        """Moves the parameter's state there, if it is not there yet. Whether nothing can be added to it."""
        optimizer, parameter = self._optimizers[index], self._parameters[index]
        state = None if optimizer is None else optimizer.state.get(parameter)
        if state is None:
            return False
        known = self._told.get(index)
        if known is not None and [(name, value is None) for name, value in state.items()] == known:
            return bool(state) and not any(none for _, none in known)
        place, told = self._offsets[index] + _WORD, list[tuple[str, Any]]()
        for name, value in state.items():
            if value is None:
                told.append((name, None))
                continue
            if not isinstance(value, Tensor) or value.device.type != "cpu" or not is_dense(value):
                return self._elsewhere(index)
            what = (place, value.dtype, tuple(value.shape), tuple(value.stride()))
            place += padded(value.nbytes)
            if place > self._ends[index]:
                return self._elsewhere(index)
            view = tensor_at(self._memory, *what)
            view.copy_(value)
            state[name] = view
            told.append((name, what))
        word = pickle.dumps(told)
        if len(word) > _WORD - _LENGTH:
            return self._elsewhere(index)
        self._write(index, len(word).to_bytes(_LENGTH, "little") + word)
        self._note(index, told)
        return bool(state) and all(value is not None for value in state.values())

    def _note(self, index: int, told: list[tuple[str, Any]]) -> None:
        """What lies in a part now."""
        self._told[index] = [(name, what is None) for name, what in told]
        ends = [what[0] + padded(_bytes_of(*what[1:3])) for _, what in told if what is not None]
        self._used[index] = max([_WORD, *(end - self._offsets[index] for end in ends)])

    def _elsewhere(self, index: int) -> bool:
        """The parameter's state cannot lie there: nobody can stand in for its owner's updates."""
        self._write(index, (-1).to_bytes(_LENGTH, "little", signed=True))
        self._used[index] = _LENGTH
        return True

    def _write(self, index: int, word: bytes) -> None:
        start = self._offsets[index]
        self._memory[start : start + len(word)] = np.frombuffer(word, np.uint8)


def _bytes_of(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * dtype.itemsize
