"""JSON lines and text by line: each line a sample, read where it lies."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from instep.data import Codec, Collate, Data
from instep.data.file_index import IndexedFile, index_all
from instep.data.files import ReadAt, refuse_packed
from instep.data.shards import sharded
from instep.errors import DataError, cut

_CHUNK = 1 << 24
_LINE_END, _RETURN = 10, 13


class TextLines:
    """The lines of a text file in UTF-8, without their ends, empty ones too. Raises DataError."""

    kind = "lines"

    def __init__(self, path: Path, index: Path | None = None) -> None:
        self.path = path
        self.indexed = IndexedFile(path, self.kind, partial(line_starts, empty=self.kind == "lines"), index)
        refuse_packed(self.indexed.file)

    def __len__(self) -> int:
        return self.indexed.count

    def read(self, place: int) -> Any:
        """A line. Raises DataError."""
        return self._text(self.indexed.read(place), place)

    def digest(self, *, full: bool = False) -> str:
        """See `ReadAt.digest`."""
        return self.indexed.file.digest(full=True) if full else self.indexed.known

    def _text(self, line: bytes, place: int) -> str:
        try:
            return line.decode("utf-8-sig" if place == 0 else "utf-8").removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise DataError(f"{self._named(place)} is no UTF-8 ({cut(error.reason)}); write the file anew.") from error

    def _named(self, place: int) -> str:
        return f"the line of number {place} (from 0), at byte {self.indexed.bounds(place)[0]:,} of {self.path},"


class JsonLines(TextLines):
    """The values of a file with one of JSON in each line; empty lines are none. Raises DataError."""

    kind = "json-lines"

    def read(self, place: int) -> Any:
        """The value of a line. Raises DataError."""
        line = self.indexed.read(place)
        try:
            return json.loads(line)
        except ValueError as error:
            last = place == len(self) - 1 and not line.endswith(b"\n")
            raise DataError(
                f"{self._named(place)} is no JSON ({cut(error)}); "
                + ("the file may be cut: put the whole of it there." if last else "mend it, or leave it out.")
            ) from error


def line_starts(file: ReadAt, *, empty: bool) -> Iterator[NDArray[np.int64]]:
    """Where the lines of a file begin, without the empty ones unless they are wanted; and its size."""
    start, before = 0, _LINE_END  # of the line that goes on; the byte before the chunk
    for at in range(0, file.size, _CHUNK):
        chunk = np.frombuffer(file.read(at, min(_CHUNK, file.size - at)), np.uint8)
        ends = np.flatnonzero(chunk == _LINE_END)
        starts = np.concatenate([[start], at + ends[:-1] + 1]) if len(ends) else np.empty(0, np.int64)
        lengths = at + ends - starts
        if not empty and len(ends):
            last = np.where(ends > 0, chunk[ends - 1], before)
            starts = starts[(lengths > 1) | ((lengths == 1) & (last != _RETURN))]
        if len(ends):
            start = at + int(ends[-1]) + 1
        before = int(chunk[-1])
        yield starts.astype(np.int64)
    rest = file.size - start
    if rest and (empty or rest > 1 or before != _RETURN):
        yield np.array([start])
    yield np.array([file.size])


def jsonl(
    pattern: str | Sequence[str],
    held_out: float | str = 0.01,
    *,
    map: Callable[[Any], Any] | None = None,
    collate: Collate | None = None,
    codec: Codec | None = None,
    index: str | None = None,
    full_digest: bool = False,
) -> Data:
    """JSON lines of the files that `pattern` names, one glob or several, each line a sample.

    held_out: a share of the samples, the last ones, 0 for none; or a pattern of the files that are held out, which are
    no part of the training data even if `pattern` names them. map: makes the sample of a line's value. index: a folder
    for the indexes, for where they cannot lie beside the files. full_digest: of all bytes. Raises DataError where a
    file cannot be read or no sample is left, RecipeError for a bad share.
    """
    folder = None if index is None else Path(index).expanduser()
    return sharded(
        lambda paths: _opened([JsonLines(path, folder) for path in paths]), pattern, held_out,
        map=map, collate=collate, codec=codec, full_digest=full_digest,
    )  # fmt: skip


def text_lines(
    pattern: str | Sequence[str],
    held_out: float | str = 0.01,
    *,
    map: Callable[[Any], Any] | None = None,
    collate: Collate | None = None,
    codec: Codec | None = None,
    index: str | None = None,
    full_digest: bool = False,
) -> Data:
    """As `jsonl`, of text: each line a sample, without its end, the empty ones too."""
    folder = None if index is None else Path(index).expanduser()
    return sharded(
        lambda paths: _opened([TextLines(path, folder) for path in paths]), pattern, held_out,
        map=map, collate=collate, codec=codec, full_digest=full_digest,
    )  # fmt: skip


def _opened(files: Sequence[TextLines]) -> Sequence[TextLines]:
    """With their indexes, and the last line of each read: a file that is cut ends within a line."""
    index_all([file.indexed for file in files])
    for file in files:
        if len(file):
            file.read(len(file) - 1)
    return files
