"""Parquet files: each row a sample, read by row group."""

from __future__ import annotations

import bisect
import io
import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from instep.data import Codec, Collate, Data
from instep.data.files import ReadAt
from instep.data.shards import sharded
from instep.errors import DataError, RecipeError, described


class ParquetShard:
    """A Parquet file. `columns` are read of it, None for all; row groups that were read are kept in `kept`.

    Raises DataError where the file is none, is cut, or has no such columns.
    """

    def __init__(self, path: Path, columns: Sequence[str] | None, kept: RecentlyRead) -> None:
        self.path, self._file, self._kept = path, ReadAt(path), kept
        opened = self._opened()
        self.schema, metadata = opened.schema_arrow, opened.metadata
        rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self.group_sizes = np.array(rows, dtype=np.int64)
        self._ends = list(itertools.accumulate(rows))
        self.columns = list(self.schema.names if columns is None else columns)
        if missing := [name for name in self.columns if name not in self.schema.names]:
            raise DataError(f"{path} has no column {missing[0]!r}; it has {', '.join(self.schema.names)}.")

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, place: int) -> dict[str, Any]:
        """The values of a row, by column: lists of numbers as arrays, all else as Python has it. Raises DataError."""
        group = bisect.bisect_right(self._ends, place)
        columns = self._kept.get((self.path, group), partial(self._group, group))
        row = place - (self._ends[group - 1] if group else 0)
        return {name: value(column[row]) for name, column, value in columns}

    def digest(self, *, full: bool = False) -> str:
        """See `ReadAt.digest`."""
        return self._file.digest(full=full)

    def _group(self, group: int) -> list[tuple[str, Any, Callable[[Any], Any]]]:
        """Of each column of a row group its name, what it holds, and what makes a value of a part of that."""
        try:
            table = self._opened().read_row_group(group, columns=self.columns, use_threads=False).combine_chunks()
            return [
                (name, column.chunk(0) if column.num_chunks == 1 else column, _value_of(column.type))
                for name, column in zip(table.column_names, table.columns, strict=True)
            ]
        except DataError:
            raise
        except Exception as error:
            raise DataError(
                f"row group {group} of {self.path} cannot be read ({described(error)}); write the file anew."
            ) from error

    def _opened(self) -> Any:
        try:
            from pyarrow import PythonFile, parquet
        except ImportError:
            raise DataError(
                "Parquet is read by pyarrow, which is in the parquet extra: pip install 'instep[parquet]'."
            ) from None
        try:
            return parquet.ParquetFile(PythonFile(_Opened(self._file), mode="r"))
        except DataError:
            raise
        except Exception as error:
            raise DataError(
                f"{self.path} is no Parquet file, or is cut ({described(error)}); write it anew, or leave it out."
            ) from error


class RecentlyRead:
    """What was read last, so many of it, in this process. Several threads may read."""

    def __init__(self, most: int) -> None:
        self._most, self._lock = most, threading.Lock()
        self._values: OrderedDict[Any, Any] = OrderedDict()

    def get(self, key: Any, read: Callable[[], Any]) -> Any:
        """What is kept by this key, or else what is read now."""
        with self._lock:
            value = self._values.get(key)
            while value is None and len(self._values) >= self._most:  # before reading: it needs the memory
                self._values.popitem(last=False)
        if value is None:
            value = read()
            with self._lock:
                self._values[key] = value
        return value

    def __reduce__(self) -> tuple[Any, ...]:
        return RecentlyRead, (self._most,)


class _Opened(io.RawIOBase):
    """The file as pyarrow reads one: without a place of its own in what the system has open."""

    def __init__(self, file: ReadAt) -> None:
        self._file, self._at = file, 0

    def read(self, size: int = -1, /) -> bytes:
        count = max(0, self._file.size - self._at)
        read = self._file.read(self._at, count if size < 0 else min(size, count))
        self._at += len(read)
        return read

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._at = offset + (0, self._at, self._file.size)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


def _value_of(kind: Any) -> Callable[[Any], Any]:
    """What makes a value of a scalar of this type of pyarrow's."""
    from pyarrow import types

    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        inner = kind.value_type
        if types.is_integer(inner) or types.is_floating(inner):
            return _array
    return _plain


def _array(scalar: Any) -> Any:
    values = scalar.values
    if values is None or values.null_count:
        return scalar.as_py()
    found: NDArray[Any] = np.array(values.to_numpy(zero_copy_only=False))  # one that may be written to
    return found


def _plain(scalar: Any) -> Any:
    return scalar.as_py()


def parquet(
    pattern: str | Sequence[str],
    held_out: float | str = 0.01,
    *,
    columns: Sequence[str] | None = None,
    together: int = 1,
    map: Callable[[Any], Any] | None = None,
    collate: Collate | None = None,
    codec: Codec | None = None,
    full_digest: bool = False,
) -> Data:
    """Rows of the Parquet files that `pattern` names, one glob or several, each a sample: its values by column.

    columns: those that are read; None for all. together: so many row groups are mixed and kept in memory at a time. An
    epoch goes through the row groups in an order at random, and through the rows of `together` of them in one; 0 mixes
    all rows, and reads a row group for almost every sample. The others are as in `instep.data.lines.jsonl`. Raises
    DataError, RecipeError.
    """
    if together < 0:
        raise RecipeError(f"'together' is {together}; it must be at least 1 row group, or 0 to mix all rows.")
    return sharded(
        partial(_opened_alike, columns=columns, kept=RecentlyRead(max(1, together))), pattern, held_out,
        map=map, collate=collate, codec=codec, full_digest=full_digest, together=together,
    )  # fmt: skip


def _opened_alike(paths: Sequence[Path], columns: Sequence[str] | None, kept: RecentlyRead) -> list[ParquetShard]:
    shards = [ParquetShard(path, columns, kept) for path in paths]
    first = shards[0]
    for shard in shards[1:]:
        for name in dict.fromkeys([*first.columns, *shard.columns]):
            own, known = (
                each.schema.field(name).type if name in each.columns else "not there" for each in (shard, first)
            )
            if known != own:
                raise DataError(
                    f"{shard.path} has other columns than {first.path}: {name!r} is {own} and {known}; write "
                    f"them alike, or name 'columns' that are."
                )
    return shards
