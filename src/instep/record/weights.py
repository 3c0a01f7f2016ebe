"""Weights as bytes: the safetensors format, written from a state_dict without copies and read without torch.

A file is 8 bytes that hold the length of the header (little endian), the header (JSON, one entry a tensor: dtype,
shape, offsets), and the tensors' bytes, which cover the rest of the file without gap or overlap. Source: the format
section of https://github.com/huggingface/safetensors.

The files are written here rather than by the safetensors package because that refuses tensors that share memory
(tied weights), needs contiguous copies of all tensors at once, and loses the number of the system's error.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from instep.errors import CheckpointError, RecordError, cut
from instep.record.files import HashingFile

if TYPE_CHECKING:
    from torch import Tensor

_NAMES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
    "complex64": "C64", "float8_e4m3fn": "F8_E4M3", "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2": "F8_E5M2",
    "float8_e5m2fnuz": "F8_E5M2FNUZ", "float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip
"""The names of torch's types in a safetensors file."""

_ITEM_BYTES = (
    dict.fromkeys(("BOOL", "F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ", "F8_E8M0"), 1)
    | {"BF16": 2, "C64": 8}
    | {f"{kind}{bits}": bits // 8 for kind in "FIU" for bits in (8, 16, 32, 64) if (kind, bits) != ("F", 8)}
)

_METADATA = "__metadata__"


_MOST_HEADER_BYTES = 100_000_000
"""The longest header that safetensors itself reads."""

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Stored:
    """One tensor of a file: its type as safetensors writes it, its shape, and where its bytes are: [start, stop)."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def dtype_of(name: str, value: Any) -> str:
    """The type of the state_dict's item `value` as safetensors writes it: "F32", "BF16", ...

    Raises RecordError for what is not a dense tensor of a type that safetensors has.
    """
    import torch

    if not isinstance(value, torch.Tensor):
        raise RecordError(
            f"'{cut(name)}' in the model's state_dict is of type {type(value).__name__}, and only tensors can be "
            "saved; register it as a buffer, or keep it out of the state_dict."
        )
    dtype = _NAMES.get(str(value.dtype).removeprefix("torch."))
    if dtype is None or value.layout != torch.strided or value.device.type == "meta":
        raise RecordError(
            f"'{cut(name)}' in the model's state_dict is a {value.layout} tensor of {value.dtype} on {value.device}, "
            f"which a safetensors file cannot hold; use a dense tensor of one of {', '.join(_NAMES)}."
        )
    return dtype


def bytes_of(tensor: Tensor) -> memoryview:
    """The tensor's bytes in C order; a copy only if it is not contiguous or not in the CPU's memory."""
    import torch

    whole = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    flat = whole.as_strided((whole.numel(),), (1,))  # a reshape keeps the odd strides of 0 or 1 items
    return flat.view(torch.uint8).numpy().data


def write_weights(file: HashingFile, state: Mapping[str, Tensor]) -> None:
    """Writes `state` as safetensors, every name in full: tied weights are written once for each of their names.

    Raises RecordError for an item that cannot be saved.
    """
    if _METADATA in state:
        raise RecordError(f"the model's state_dict has an item '{_METADATA}', a name safetensors keeps; rename it.")
    dtypes = {name: dtype_of(name, tensor) for name, tensor in state.items()}
    # Wide types first, as safetensors does, so that every tensor is aligned in the file.
    order = sorted(dtypes, key=lambda name: (-_ITEM_BYTES[dtypes[name]], name))
    header: dict[str, Any] = {_METADATA: {"format": "pt"}}
    start = 0
    for name in order:
        stop = start + state[name].numel() * _ITEM_BYTES[dtypes[name]]
        header[name] = {"dtype": dtypes[name], "shape": list(state[name].shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    for name in order:
        file.write(bytes_of(state[name]))


def read_header(file: BinaryIO, path: Path) -> dict[str, Stored]:
    """What the safetensors file holds, by name. `path` is for messages.

    Raises CheckpointError if the header does not describe the file exactly, and OSError if it cannot be read.
    """
    try:
        return _parse(file)
    except _Damage as damage:
        raise CheckpointError(f"{path} is not a sound safetensors file: {damage}; use another one.") from None


def read_chunks(file: BinaryIO, stored: Stored) -> Iterator[memoryview]:
    """The tensor's bytes, piece by piece; a piece is overwritten by the next. Raises OSError, also for a short file."""
    buffer = memoryview(bytearray(min(_CHUNK_BYTES, stored.stop - stored.start)))
    file.seek(stored.start)
    left = stored.stop - stored.start
    while left:
        count = file.readinto(buffer[: min(left, len(buffer))])  # type: ignore[attr-defined]
        if not count:
            raise OSError("it became shorter while it was read")
        left -= count
        yield buffer[:count]


class _Damage(Exception):
    """What is wrong with a file, in words that follow a colon."""


def _parse(file: BinaryIO) -> dict[str, Stored]:
    size = file.seek(0, 2)
    file.seek(0)
    base = 8 + int.from_bytes(file.read(8), "little")
    if size < 8 or base > size or base > _MOST_HEADER_BYTES:
        raise _Damage("its header is cut off")
    try:
        header = json.loads(file.read(base - 8), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError):
        raise _Damage("its header is not JSON") from None
    if not isinstance(header, dict):
        raise _Damage("its header is not a table")
    header.pop(_METADATA, None)
    found = {name: _stored(name, item, base) for name, item in header.items()}
    end = base
    for name, stored in sorted(found.items(), key=lambda item: (item[1].start, item[1].stop)):
        if stored.start != end:
            raise _Damage(f"'{cut(name)}' does not begin where the tensor before it ends")
        end = stored.stop
    if end != size:
        raise _Damage(f"its header describes {end} bytes and it has {size}")
    return found


def _stored(name: str, item: Any, base: int) -> Stored:
    match item:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(start), int(stop)]}:
            if dtype not in _ITEM_BYTES:
                raise _Damage(f"'{cut(name)}' is of the type {cut(repr(dtype))}, which Instep does not know")
            whole = all(type(size) is int and size >= 0 for size in shape)
            if whole and start >= 0 and stop - start == math.prod(shape) * _ITEM_BYTES[dtype]:
                return Stored(dtype, tuple(shape), base + start, base + stop)
    raise _Damage(f"its entry for '{cut(name)}' contradicts itself")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name twice")
    return table
