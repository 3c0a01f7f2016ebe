"""Events in columns: what a large simulation tells, block by block, in .npz files that lines of its tape name.

A block holds some 65,000 events. Of each kind it has an array a field, in the smallest type that holds its values, of
one element where all are the same; of a list the lengths, and its items one after the other. numpy reads it alone.
No torch.
"""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from msgspec import UNSET, Struct
from msgspec.structs import astuple
from numpy.typing import NDArray

from instep.errors import RecordError, shown
from instep.record.events import QUIET, BlockEvent, Event, plain
from instep.record.files import disk_error

if TYPE_CHECKING:
    from instep.record.tape import Tape

SIZE = 1 << 16
"""Events of a block, at most."""

_IN_BLOCKS = QUIET | {"joined", "left"}
_NAME = re.compile(r"tape/\d{6}\.npz")

Arrays = Mapping[str, NDArray[Any]]


class BlockTape:
    """A tape of a simulation without gradients: events that come with every contribution go into blocks beside it.

    Of a process that is killed, `tape` is whole up to its last block. Its methods raise ResourceError.
    """

    def __init__(self, tape: Tape):
        self._tape, self._events, self._count = tape, list[Event](), 0

    def write(self, event: Event) -> None:
        """Adds an event."""
        if event.kind in _IN_BLOCKS:
            self._events.append(event)
            if len(self._events) == SIZE:
                self._write_block()
        else:
            self._write_block()
            self._tape.write(plain(event))

    def close(self) -> None:
        """Writes what waits, and closes the tape."""
        try:
            self._write_block()
        finally:
            self._tape.close()

    def _write_block(self) -> None:
        if not self._events:
            return
        events, self._events = self._events, []
        self._count += 1
        path = self._tape.path.parent / "tape" / f"{self._count:06d}.npz"
        try:
            path.parent.mkdir(exist_ok=True)
            np.savez(path, **packed(events))  # type: ignore[arg-type]  # mypy takes them for its flag too
            size = path.stat().st_size
        except OSError as error:
            raise disk_error(f"{path} cannot be written", error) from error
        last = events[-1]
        name = f"{path.parent.name}/{path.name}"
        self._tape.write(plain(BlockEvent(t_s=last.t_s, clock=last.clock, file=name, events=len(events), bytes=size)))


def packed(events: Sequence[Event]) -> dict[str, NDArray[Any]]:
    """The columns of events."""
    places: dict[type[Event], int] = {
        structure: place for place, structure in enumerate(dict.fromkeys(map(type, events)))
    }
    found = {
        "kinds": np.array([structure.kind for structure in places]),
        "order": np.fromiter((places[type(event)] for event in events), np.uint8, len(events)),
    }
    for structure, place in places.items():
        _pack(found, str(place), [event for event in events if type(event) is structure])
    return found


def _pack(found: dict[str, NDArray[Any]], name: str, structures: Sequence[Struct]) -> None:
    if structures:
        columns = zip(*map(astuple, structures), strict=True)
        for field, column in zip(structures[0].__struct_fields__, columns, strict=True):
            _pack_column(found, f"{name}.{field}", column)


def _pack_column(found: dict[str, NDArray[Any]], name: str, column: Sequence[Any]) -> None:
    first = column[0]
    if first is UNSET:
        assert all(value is UNSET for value in column), f"{name} is set in all events of a block, or in none"
    elif isinstance(first, str):
        texts = {text: code for code, text in enumerate(dict.fromkeys(column))}
        found[f"{name}:texts"] = np.array(list(texts))
        found[name] = _smallest([texts[text] for text in column])
    elif isinstance(first, list):
        found[f"{name}:lengths"] = _smallest([len(items) for items in column])
        items = list(chain.from_iterable(column))
        if items and isinstance(items[0], Struct):
            _pack(found, name, items)
        elif items:
            _pack_column(found, f"{name}:items", items)
    else:
        found[name] = _smallest(column)


def _smallest(column: Sequence[Any]) -> NDArray[Any]:
    array = np.array(column)
    if (array[0] == array).all():
        array = array[:1]
    if array.dtype.kind == "i":
        low, high = int(array.min()), int(array.max())
        array = array.astype(np.result_type(np.min_scalar_type(low), np.min_scalar_type(high)))
    return array


def unpacked(arrays: Arrays) -> Iterator[dict[str, Any]]:
    """The events of `packed`, in order, as they stand on a tape."""
    kinds, order = arrays["kinds"].tolist(), arrays["order"]
    rows = []
    for place, kind in enumerate(kinds):
        rows.append(_rows(arrays, str(place), int((order == place).sum()), kind))
    for place in order.tolist():
        yield next(rows[place])


def _rows(arrays: Arrays, name: str, count: int, kind: str = "") -> Iterator[dict[str, Any]]:
    """`count` tables of the columns under a name; of events with their kind in its place."""
    names = dict.fromkeys(re.split("[.:]", key[len(name) + 1 :])[0] for key in arrays if key.startswith(f"{name}."))
    columns = {field: _column(arrays, f"{name}.{field}", count) for field in names}
    if kind:
        columns = {"t_s": columns.pop("t_s"), "clock": columns.pop("clock"), "kind": [kind] * count, **columns}
    for values in zip(*columns.values(), strict=True):
        yield dict(zip(columns, values, strict=True))


def _column(arrays: Arrays, name: str, count: int) -> list[Any]:
    if f"{name}:lengths" in arrays:
        lengths = _whole(arrays[f"{name}:lengths"], count)
        total = sum(lengths)
        if f"{name}:items" in arrays:
            items: Iterator[Any] = iter(_column(arrays, f"{name}:items", total))
        else:
            items = _rows(arrays, name, total)
        return [list(islice(items, length)) for length in lengths]
    values = _whole(arrays[name], count)
    if f"{name}:texts" in arrays:
        texts = arrays[f"{name}:texts"].tolist()
        return [texts[code] for code in values]
    return values


def _whole(array: NDArray[Any], count: int) -> list[Any]:
    if len(array) not in (1, count):
        raise ValueError("a column is shorter than its block")
    values: list[Any] = array.tolist()
    return values * count if len(array) == 1 and count != 1 else values


def read_block(tape: Path, event: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The events of a block that a tape names. Raises RecordError where it is missing or damaged."""
    name = event.get("file")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RecordError(f"the tape {tape} names a block {shown(name)}, which is none; restore the file.")
    path = tape.parent / name
    try:
        if path.stat().st_size != event.get("bytes"):
            raise ValueError("it is cut")
        with np.load(path, allow_pickle=False) as arrays:
            found = list(unpacked(dict(arrays)))
        if len(found) != event.get("events"):
            raise ValueError("it has other events")
    except OSError as error:
        raise RecordError(f"the block {path} of the tape cannot be read: {error.strerror}; restore the file.") from None
    except (ValueError, LookupError, TypeError, StopIteration, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error):
        raise RecordError(f"the block {path} of the tape is damaged; restore the file.") from None
    return found
