"""Texts in files, each a document: found by pattern, cut into parts that can be read without what is before them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from instep.data.files import ReadAt, found, refuse_packed
from instep.errors import DataError, cut, shown

By = Literal["json", "line", "file"]
"""What a document is: the field of a line's JSON, a line, or a whole file."""

PART_BYTES = 8 << 20
"""Bytes of text that a part has at least, but for the last."""

_JSON_LINES = (".jsonl", ".ndjson")

_MORE = 1 << 20

_COUNTED = 1 << 24

Piece = tuple[int, int, int]
"""The number of a source, and the bytes that a piece of it begins and ends at: its lines that begin in there."""


@dataclass(frozen=True)
class Source:
    """A file of texts, and what a document in it is."""

    path: Path
    by: By

    @cached_property
    def file(self) -> ReadAt:
        """The file. Raises DataError."""
        return ReadAt(self.path)


def sources(patterns: Sequence[str], by: By | None = None) -> list[Source]:
    """The files of `patterns`, in the order of the numbers in their names.

    by: of all of them; None takes ``.jsonl`` and ``.ndjson`` for JSON lines and any other for one document. Raises
    DataError where none is there, or one cannot be read or is packed.
    """
    every = [Source(path, by or ("json" if path.suffix.lower() in _JSON_LINES else "file")) for path in found(patterns)]
    for source in every:
        refuse_packed(source.file)
    return every


def parts(every: Sequence[Source], size: int = PART_BYTES) -> list[list[Piece]]:
    """All that is in the sources, in order, in parts of at least `size` bytes, or a whole file. A part has several
    small files, and a large file of lines is in several parts.
    """
    made: list[list[Piece]] = []
    room = 0
    for number, source in enumerate(every):
        total = source.file.size
        step = total if source.by == "file" else size
        for begin in range(0, total, step or 1):
            end = min(begin + step, total)
            if room <= 0:
                made.append([])
                room = size
            made[-1].append((number, begin, end))
            room -= end - begin
    return made


def texts(every: Sequence[Source], part: Sequence[Piece], field: str) -> Iterator[str]:
    """The documents of a part. Raises DataError, which names the line of the file, for what is none."""
    for number, begin, end in part:
        source = every[number]
        if source.by == "file":
            yield _decoded(source.file.read(begin, end - begin), str(source.path))
            continue
        for start, line in _lines(source.file, begin, end):
            if not line.strip():
                continue
            if source.by == "json":
                yield _field(source.file, start, line, field)
            else:
                try:
                    yield _decoded(line, "").removesuffix("\n").removesuffix("\r")
                except DataError:
                    _decoded(line, _named(source.file, start))


def _lines(file: ReadAt, begin: int, end: int) -> Iterator[tuple[int, bytes]]:
    """The lines that begin from byte `begin` to before `end`, each whole, with the byte that it begins at."""
    block, first = file.read(begin, end - begin), 0
    if begin and file.read(begin - 1, 1) != b"\n":
        first = block.find(b"\n") + 1
        if not first:
            return
    if not block.endswith(b"\n"):
        rest = [block]
        for at in range(end, file.size, _MORE):
            more = file.read(at, min(_MORE, file.size - at))
            stop = more.find(b"\n") + 1
            rest.append(more[:stop] if stop else more)
            if stop:
                break
        block = b"".join(rest)
    while first < len(block):
        stop = block.find(b"\n", first) + 1 or len(block)
        yield begin + first, block[first:stop]
        first = stop


def _field(file: ReadAt, start: int, line: bytes, field: str) -> str:
    """The text in a line's JSON."""
    try:
        value = json.loads(line)
    except ValueError as error:
        remedy = (
            "mend it, or leave it out" if line.endswith(b"\n") else "the file may be cut: put the whole of it there"
        )
        raise DataError(f"{_named(file, start)} is no JSON ({cut(error)}); {remedy}.") from error
    if not isinstance(value, dict) or field not in value:
        has = f"has {_listed(value)}" if isinstance(value, dict) else f"is a {type(value).__name__}"
        raise DataError(
            f"{_named(file, start)} has no field {shown(field)} (it {has}); say with --field which one holds the text."
        )
    text = value[field]
    if not isinstance(text, str):
        raise DataError(
            f"the field {shown(field)} in {_named(file, start)} is of type {type(text).__name__}; it must be text, so "
            f"say with --field which one is, or mend the line."
        )
    return _sound(text, file, start)


def _sound(text: str, file: ReadAt, start: int) -> str:
    """The text, unless it has half of a surrogate pair, as JSON may, which is no character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{_named(file, start)} has {shown(text[error.start])}, half of a surrogate pair, which is no character; "
            f"mend the line, or leave it out."
        ) from None
    return text


def _decoded(text: bytes, name: str) -> str:
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name} is no UTF-8 ({cut(error.reason)} at byte {error.start:,} of it); write it anew, or leave it out."
        ) from error


def _named(file: ReadAt, start: int) -> str:
    """The line that begins at a byte, by its number from 1, as editors have it: counted only where it is asked."""
    before = sum(file.read(at, min(_COUNTED, start - at)).count(b"\n") for at in range(0, start, _COUNTED))
    return f"line {before + 1:,} of {file.path}"


def _listed(value: dict[str, Any]) -> str:
    return ", ".join(map(shown, list(value)[:5])) or "none"
