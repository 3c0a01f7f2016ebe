"""Events in columns: what a large simulation tells, block by block, in .npz files that lines of its tape name.

A block holds some 65,000 events. Of each kind it has an array a field, in the smallest type that holds its values, of
one element where all are the same; of a list the lengths, and its items one after the other. numpy reads it alone.
No torch.
"""

from __future__ import annotations

import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from instep.errors import RecordError, shown
from instep.record.events import BlockEvent, Event, LeftEvent, plain
from instep.record.files import disk_error
from instep.rules.actions import Drop, Merge
from instep.rules.work import Pieces

if TYPE_CHECKING:
    from instep.record.tape import Tape

SIZE = 1 << 16
"""Events after which a block is closed with the next contribution."""

_JOINED, _LEFT, _RELEASED, _COMPUTED, _PUSHED, _MERGED, _DROPPED, _GRACE_ENDED, _BEGUN_AHEAD = range(9)
_KINDS = np.array(["joined", "left", "released", "computed", "pushed", "merged", "dropped", "grace_ended", "computed"])
_ALL_OF_CONTRIBUTION = ("seq", "worker", "version", "piece", "items")
_NAME = re.compile(r"tape/\d{6}\.npz")

Arrays = Mapping[str, NDArray[Any]]


class _Rows:
    """Numbers of many events, a row each: of 8 bytes, floats where a name says seconds or weight."""

    def __init__(self, names: str):
        types = [(name, "f8" if name.endswith("_s") or name == "weight" else "i8") for name in names.split()]
        self._dtype, self.data = np.dtype(types), bytearray()
        self.pack = struct.Struct("".join("d" if kind == "f8" else "q" for _, kind in types)).pack

    def take(self) -> NDArray[Any]:
        """All rows, which are kept no longer."""
        data, self.data = self.data, bytearray()
        return np.frombuffer(data, self._dtype)


class BlockTape:
    """A tape of a simulation without gradients: events that come with every contribution go into blocks beside it.

    Their numbers go into rows, and these into columns: an object an event would take longer than the simulation.
    `tell` gets those that are handed on at once. Of a process that is killed, `tape` is whole up to its last block.
    Methods raise ResourceError.
    """

    def __init__(self, tape: Tape, pieces: Pieces, tell: Callable[[Event], None]):
        self._tape, self._pieces, self._tell, self._count = tape, pieces, tell, 0
        self._order = bytearray()  # the kind of each event
        self._texts: dict[str, int] = {}
        self._joined, self._left = _Rows("t_s worker"), _Rows("t_s worker why")
        self._released = _Rows("t_s worker version piece")
        self._pushed = _Rows("t_s worker version piece from_s to_s seq items bytes")  # computed, and pushed
        self._ahead = _Rows("place from_s to_s")  # of which of them steps were made before
        self._merged, self._parts = _Rows("t_s version parts"), _Rows("seq worker piece version items weight staleness")
        self._graces = _Rows("t_s version waiting")
        self._dropped = _Rows("t_s seq worker piece version items why")
        self._ranges = np.array([pieces.work(part)[3:] for part in range(pieces.parts)])

    def joined(self, t_s: float, worker: int) -> None:
        """A worker is there."""
        self._joined.data += self._joined.pack(t_s, worker)
        self._order.append(_JOINED)

    def left(self, t_s: float, worker: int, why: str) -> None:
        """A worker is gone."""
        self._left.data += self._left.pack(t_s, worker, self._code(why))
        self._order.append(_LEFT)
        self._tell(LeftEvent(t_s=t_s, clock="virtual", worker=worker, why=why))

    def released(self, t_s: float, worker: int, version: int, piece: int) -> None:
        """A worker has work."""
        rows = self._released
        rows.data += rows.pack(t_s, worker, version, piece)
        self._order.append(_RELEASED)

    def pushed(
        self, t_s: float, worker: int, version: int, piece: int, from_s: float, to_s: float, seq: int, items: int,
        size_bytes: int, ahead: tuple[float, float] | None = None,
    ) -> None:  # fmt: skip
        """A contribution was computed, and has arrived."""
        if len(self._order) >= SIZE:
            self._write_block()
        rows = self._pushed
        row = rows.pack(t_s, worker, version, piece, from_s, to_s, seq, items, size_bytes)
        if ahead is not None:
            self._ahead.data += self._ahead.pack(len(rows.data) // len(row), *ahead)
        rows.data += row
        self._order += b"%c%c" % (_COMPUTED if ahead is None else _BEGUN_AHEAD, _PUSHED)

    def merged(self, t_s: float, action: Merge) -> None:
        """An update is made."""
        version, contributions, weights, staleness = action
        self._merged.data += self._merged.pack(t_s, version, len(contributions))
        rows = self._parts
        for part, weight, old in zip(contributions, weights, staleness, strict=True):
            rows.data += rows.pack(*part, weight, old)
        self._order.append(_MERGED)

    def dropped(self, t_s: float, action: Drop) -> None:
        """A contribution came too late."""
        self._dropped.data += self._dropped.pack(t_s, *action.contribution, self._code(action.why))
        self._order.append(_DROPPED)

    def grace_ended(self, t_s: float, version: int, waiting: int) -> None:
        """The time is over in which an update waited for more than its quorum."""
        self._graces.data += self._graces.pack(t_s, version, waiting)
        self._order.append(_GRACE_ENDED)

    def write(self, event: Event) -> None:
        """Adds an event of the frame."""
        self._write_block()
        self._tape.write(plain(event))

    def close(self) -> None:
        """Writes what waits, and closes the tape."""
        try:
            self._write_block()
        finally:
            self._tape.close()

    def _code(self, text: str) -> int:
        return self._texts.setdefault(text, len(self._texts))

    def _write_block(self) -> None:
        if not self._order:
            return
        self._count += 1
        path = self._tape.path.parent / "tape" / f"{self._count:06d}.npz"
        events, arrays = len(self._order), self._arrays()
        last_s = max(array[-1] for name, array in arrays.items() if name.endswith(".t_s"))
        try:
            path.parent.mkdir(exist_ok=True)
            np.savez(path, **arrays)  # type: ignore[arg-type]  # mypy takes them for its flag too
            size = path.stat().st_size
        except OSError as error:
            raise disk_error(f"{path} cannot be written", error) from error
        name = f"{path.parent.name}/{path.name}"
        self._tape.write(plain(BlockEvent(t_s=float(last_s), clock="virtual", file=name, events=events, bytes=size)))

    def _arrays(self) -> dict[str, NDArray[Any]]:
        """What a block holds, of all that waits."""
        kinds, order = np.unique(np.frombuffer(self._order, np.uint8), return_inverse=True)
        self._order = bytearray()
        found = {"kinds": _KINDS[kinds], "order": order.astype(np.uint8)}
        tables = self._tables()
        for place, kind in enumerate(kinds):
            table = {"clock:texts": np.array(["virtual"]), "clock": np.zeros(1, np.uint8), **tables[kind]}
            for name, column in table.items():
                found[f"{place}.{name}"] = _smallest(column)
        return found

    def _tables(self) -> tuple[dict[str, NDArray[Any]], ...]:
        """The columns of each kind, in the order in which fields stand on a tape."""
        texts, self._texts = np.array(list(self._texts)), {}
        pushed, merged, parts = self._pushed.take(), self._merged.take(), self._parts.take()
        ahead = self._ahead.take()
        begun, others = pushed[ahead["place"]], np.delete(pushed, ahead["place"])
        computed = "t_s", "worker", "version", "piece", "from_s", "to_s"
        spans = np.stack([ahead["from_s"], ahead["to_s"]], axis=1).ravel()
        return (
            _of(self._joined.take()),
            {**_of(self._left.take()), "why:texts": texts},
            _of(self._released.take()),
            {**_of(others, *computed), **self._work(others)},
            {
                **_of(pushed, "t_s", "seq", "worker", "version", "piece"),
                **self._work(pushed),
                **_of(pushed, "items", "bytes"),
            },
            {
                **_of(merged, "t_s", "version"),
                "contributions:lengths": merged["parts"],
                **{f"contributions.{name}": parts[name] for name in _ALL_OF_CONTRIBUTION},
                "weights:lengths": merged["parts"],
                "weights:items": parts["weight"],
                "staleness:lengths": merged["parts"],
                "staleness:items": parts["staleness"],
            },
            {**_of(self._dropped.take()), "why:texts": texts},
            _of(self._graces.take()),
            {**_of(begun, *computed), **self._work(begun), "ahead:lengths": np.array([2]), "ahead:items": spans},
        )

    def _work(self, rows: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """What the pieces of these rows are."""
        groups, which = np.unique(rows["piece"] // self._pieces.parts, return_inverse=True)
        batches = np.array([self._pieces.batches_of(group) for group in groups.tolist()]).reshape(-1, 2)[which]
        return {
            "batch": batches[:, 0],
            "local_steps": batches[:, 1],
            "microbatches:lengths": np.array([2]),
            "microbatches:items": self._ranges[rows["piece"] % self._pieces.parts].ravel(),
        }


def _of(rows: NDArray[Any], *names: str) -> dict[str, NDArray[Any]]:
    return {name: rows[name] for name in names or rows.dtype.names or ()}


def _smallest(array: NDArray[Any]) -> NDArray[Any]:
    if (array[0] == array).all():
        array = array[:1]
    if array.dtype.kind == "i":
        low, high = int(array.min()), int(array.max())
        array = array.astype(np.result_type(np.min_scalar_type(low), np.min_scalar_type(high)))
    return array


def unpacked(arrays: Arrays) -> Iterator[dict[str, Any]]:
    """The events of a block, in order, as they stand on a tape."""
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
