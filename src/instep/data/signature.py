"""What a batch is, bit by bit: for telling whether two readings of the same samples gave the same."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

_PLAIN = (int, str, bytes, bytearray, bool, complex, type(None))

_DEPTH = 100
"""Levels of containers and objects that are looked into."""


def signature(value: Any) -> str:
    """SHA-256, in hexadecimal, of all that `value` holds: tensors and arrays by their bits, numbers, text, containers,
    and objects by what a pickle of them would hold. Of what cannot be pickled, its type alone.

    Two values of one signature are equal bit by bit, NaNs included, but for what is hidden in such objects.
    """
    walk = _Walk()
    walk.add(value)
    return walk.sha.hexdigest()


class _Walk:
    def __init__(self) -> None:
        self.sha = hashlib.sha256()
        self._above: list[int] = []  # ids of what is being looked into, for objects that hold themselves

    def add(self, value: Any) -> None:
        kind = type(value)
        self.sha.update(f"<{kind.__module__}.{kind.__qualname__}".encode())
        if kind in _PLAIN:
            self.sha.update(repr(value).encode("utf-8", "surrogatepass"))
        elif isinstance(value, float):
            self.sha.update(struct.pack("<d", value))
        elif isinstance(value, (type, FunctionType, BuiltinFunctionType, ModuleType)):
            self.sha.update(f"{getattr(value, '__qualname__', value.__name__)}".encode())
        elif id(value) in self._above or len(self._above) == _DEPTH:
            self.sha.update(b"above")
        else:
            self._above.append(id(value))
            try:
                self._look_into(value)
            except Exception:  # it refuses, as a file does: its type stands for it
                self.sha.update(b"hidden")
            self._above.pop()
        self.sha.update(b">")

    def _look_into(self, value: Any) -> None:
        if isinstance(value, Tensor):
            self._tensor(value.detach())
        elif isinstance(value, (np.ndarray, np.generic)):
            array = np.asarray(value)
            self.sha.update(f"{array.dtype}{array.shape}".encode())
            if array.dtype.hasobject:
                self._all(array.ravel().tolist())
            else:
                self.sha.update(array.tobytes())
        elif isinstance(value, Mapping) and type(value).__module__ in ("builtins", "collections"):
            self._all(part for pair in value.items() for part in pair)
        elif isinstance(value, (list, tuple)):
            if {type(part) for part in value} <= set(_PLAIN):  # tokens: at once
                self.sha.update(repr(value).encode("utf-8", "surrogatepass"))
            else:
                self._all(value)
        elif isinstance(value, AbstractSet):
            self._all(sorted(signature(part) for part in value))
        else:
            self._object(value.__reduce_ex__(4))

    def _object(self, reduced: Any) -> None:
        """What a pickle holds of an object: (callable, arguments, state, items, pairs), the last ones iterators."""
        if isinstance(reduced, str):
            self.add(reduced)
            return
        for part in reduced[:3]:
            self.add(part)
        for iterator in reduced[3:5]:
            self._all(iterator or ())

    def _all(self, values: Iterable[Any]) -> None:
        for value in values:
            self.add(value)

    def _tensor(self, tensor: Tensor) -> None:
        self.sha.update(f"{tensor.dtype}{tensor.layout}".encode())
        if tensor.is_nested:  # its shape has a new symbol each time
            self._all(tensor.unbind())
        elif tensor.layout == torch.sparse_coo:
            self._all((tuple(tensor.shape), tensor._indices(), tensor._values()))
        elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
            self._all((tuple(tensor.shape), tensor.crow_indices(), tensor.col_indices(), tensor.values()))
        elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
            self._all((tuple(tensor.shape), tensor.ccol_indices(), tensor.row_indices(), tensor.values()))
        elif tensor.is_quantized:
            self._all((tensor.int_repr(), repr(tensor.qscheme())))
        else:
            self.sha.update(str(tuple(tensor.shape)).encode())
            flat = tensor.cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
            self.sha.update(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]  # it has a buffer
