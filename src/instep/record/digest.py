"""The digest of a model: SHA-256 over its state_dict in name order.

For each name, in the order of Python's `sorted`, two things are hashed: one line of JSON, ``[name, dtype, shape]``
as `json.dumps` writes it with its defaults, ended by a newline, where dtype is the name that safetensors uses
("F32", "BF16", "I64"); then the tensor's bytes, little endian, in C order. The number of bytes follows from dtype
and shape, so no two models share a stream. Weights tied under two names count twice, as they are saved.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from instep.errors import CheckpointError
from instep.record.weights import bytes_of, dtype_of, read_chunks, read_header

if TYPE_CHECKING:
    from torch import Tensor


def digest_of_state(state: Mapping[str, Tensor]) -> str:
    """The digest of a state_dict, 64 hexadecimal digits. Its tensors may be on any device and have any strides.

    One tensor at a time is copied, and only if it is not contiguous or not in the CPU's memory.
    Raises RecordError for an item that is no dense tensor, such as a module's extra state.
    """
    hashed = hashlib.sha256()
    for name in sorted(state):
        hashed.update(_line(name, dtype_of(name, state[name]), state[name].shape))
        hashed.update(bytes_of(state[name]))
    return hashed.hexdigest()


def digest_of_file(path: Path | str) -> str:
    """The digest of the weights in a .safetensors file: that of the state_dict saved there. Needs no torch.

    Raises CheckpointError if the file cannot be read or is damaged.
    """
    hashed = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            for name, stored in sorted(read_header(file, Path(path)).items(), key=lambda item: item[0]):
                hashed.update(_line(name, stored.dtype, stored.shape))
                for chunk in read_chunks(file, stored):
                    hashed.update(chunk)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}; use another file.") from error
    return hashed.hexdigest()


def _line(name: str, dtype: str, shape: Iterable[int]) -> bytes:
    return json.dumps([name, dtype, list(shape)]).encode() + b"\n"
