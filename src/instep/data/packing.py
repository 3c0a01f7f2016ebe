"""Documents of any length in rows of one length, as many as fit: packed once, then read from an index."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import os
import struct
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from instep.data import Data
from instep.data.file_index import made_alone, written_whole
from instep.data.files import ReadAt, check_share, found_apart
from instep.data.order import keys, permuted
from instep.data.token_files import TokenFile, TokenType, known_of
from instep.errors import DataError, RecipeError
from instep.packed import PackedTokens

WINDOW = 1 << 14
"""Documents that are packed together."""

IGNORED = -100

_SCANNED = 1 << 22
"""Tokens that are looked at together for separators."""

_HEADER = struct.Struct("<8s64sqqq")  # magic, what is packed, rows, pieces, real inputs
_MAGIC = b"INSTEPK1"


def best_fit(lengths: NDArray[np.int64], capacity: int) -> list[list[int]]:
    """Which of these `lengths`, each from 1 to `capacity`, share a row: by number, the longest first.

    Each is put where it leaves least (best fit decreasing; Johnson, "Near-optimal bin packing algorithms", 1973), of
    several such rows into the one that was filled last.
    """
    rows: list[list[int]] = []
    left: list[list[int]] = [[] for _ in range(capacity + 1)]  # rows by what they have left
    some = 0  # has bit n where there are rows with n left
    for number in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[number])
        fitting = some >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = left[room].pop()
            if not left[room]:
                some ^= 1 << room
            rows[row].append(number)
        else:
            room, row = capacity, len(rows)
            rows.append([number])
        if room > length:
            left[room - length].append(row)
            some |= 1 << room - length
    return rows


def pack(
    starts: NDArray[np.int64], lengths: NDArray[np.int64], context: int, seed: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
    """Rows of `context` inputs, window by window: the first input of each piece, its inputs, and pieces by row.

    starts, lengths: of the documents, in tokens. Each token of a document but its last is an input once, and what
    follows it its target. Documents come into windows of `WINDOW` in an order keyed by `seed`; one with more inputs
    than `context` is cut into pieces of that, and a rest.
    """
    for first in range(0, len(lengths), WINDOW):
        places = np.arange(first, min(first + WINDOW, len(lengths)))
        chosen = permuted(places, len(lengths), keys(seed, 0, "packing"))
        inputs = np.maximum(lengths[chosen] - 1, 0)
        counts = -(-inputs // context)
        of = np.repeat(np.arange(len(chosen)), counts)
        before = (np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts, counts)) * context
        begun, sizes = starts[chosen][of] + before, np.minimum(inputs[of] - before, context)
        if rows := best_fit(sizes, context):
            order = np.array(list(itertools.chain.from_iterable(rows)))
            yield begun[order], sizes[order], np.array([len(row) for row in rows])


def document_ends(file: TokenFile, separator: int | None = None) -> NDArray[np.int64]:
    """Where each document of a file ends, in tokens ([documents], int64).

    Each `separator` ends one; with None, the ``.idx`` beside the file says it. Raises DataError where neither does.
    """
    if separator is None:
        if (known := file.document_ends()) is None:
            raise DataError(
                f"{file.path} does not say where its documents end; give 'separator', the token that ends one, or "
                f"files of Megatron's, with an .idx beside them."
            )
        return known
    found = [np.empty(0, np.int64)]
    for start in range(0, file.count, _SCANNED):
        found.append(start + 1 + np.flatnonzero(file.tokens(start, min(start + _SCANNED, file.count)) == separator))
    ends = np.concatenate(found)
    return ends if file.count in (0, *ends[-1:]) else np.append(ends, file.count)


class PackedRows(Dataset[PackedTokens]):
    """Documents of token files in rows of `context` inputs, see `PackedTokens` and `pack`.

    part: which documents are meant, from one share of them, in order, up to another. separator: the token that ends a
    document, where the files do not say where documents end, see `document_ends`. index: the folder for the index,
    where the pieces of each row are listed; None for the one that the first file lies in. It is made once for files,
    part, seed and context, which holds 24 bytes a document; it has 16 a piece, and is read where it is asked.
    vocabulary: tokens must be below it; 0 does not look. Raises DataError, RecipeError.
    """

    def __init__(
        self,
        files: Sequence[TokenFile],
        context: int,
        *,
        part: tuple[float, float] = (0, 1),
        separator: int | None = None,
        seed: int = 0,
        index: Path | None = None,
        vocabulary: int = 0,
        full_digest: bool = False,
    ) -> None:
        if context < 1:
            raise RecipeError(f"'context' is {context}; it must be at least 1 token.")
        self.files, self.context, self.vocabulary = list(files), context, vocabulary
        self._part, self._separator, self._seed, self._full = part, separator, seed, full_digest
        self._ends = list(itertools.accumulate(file.count for file in files))
        folder = self.files[0].path.parent if index is None else index
        self.index_path = folder / f".{self.files[0].path.name}.{self.digest[:16]}.packed"

    @cached_property
    def digest(self) -> str:
        """SHA-256, in hexadecimal, of the files' digests, the type of their tokens, where they say that documents end,
        and how these are packed.
        """
        files = " ".join(f"{file.dtype.str} {file.digest(full=self._full)}" for file in self.files)
        if self._separator is None:  # then these say where documents end
            files += "".join(f" {ReadAt(file.index).digest(full=True)}" for file in self.files if file.index)
        how = f"{self.context} {self._part} {self._separator} {self._seed} {WINDOW}"
        return hashlib.sha256(f"packed {files} {how}".encode()).hexdigest()

    @property
    def padding(self) -> float:
        """The share of all inputs that is padding."""
        rows, _, real = self._counts
        return 1 - real / (rows * self.context) if rows else 0.0

    def __len__(self) -> int:
        return self._counts[0]

    def __getitem__(self, row: int) -> PackedTokens:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} is not from 0 to {len(self) - 1}")
        first, stop = self._numbers(row, 2)
        pieces = self._numbers(len(self) + 1 + 2 * first, 2 * (stop - first)).reshape(-1, 2)
        found = PackedTokens(*(torch.zeros(self.context, dtype=torch.int64) for _ in PackedTokens._fields))
        found.inputs.fill_(IGNORED)
        found.targets.fill_(IGNORED)
        place = 0
        for number, (start, size) in enumerate(pieces.tolist(), 1):
            tokens, here = self._tokens(row, start, size + 1), slice(place, place + size)
            found.inputs[here], found.targets[here] = tokens[:-1], tokens[1:]
            found.documents[here], found.positions[here] = number, torch.arange(size)
            place += size
        return found

    def _tokens(self, row: int, start: int, count: int) -> torch.Tensor:
        place = bisect.bisect_right(self._ends, start)
        file, start = self.files[place], start - (self._ends[place - 1] if place else 0)
        return file.checked(start, start + count, self.vocabulary, f"row {row}")

    def _numbers(self, first: int, count: int) -> NDArray[np.int64]:
        return np.frombuffer(self._index.read(_HEADER.size + 8 * first, 8 * count), "<i8")

    @cached_property
    def _counts(self) -> tuple[int, int, int]:
        """Rows, pieces and real inputs."""
        self._index  # noqa: B018
        return self._found() or (0, 0, 0)

    @cached_property
    def _index(self) -> ReadAt:
        if self._found() is None:
            try:
                with made_alone(self.index_path):
                    if self._found() is None:
                        self._make()
            except OSError as error:
                raise DataError(
                    f"the index of packed documents cannot be written to {self.index_path.parent} ({error.strerror}); "
                    f"give 'index', a folder that can be written, or make that one so."
                ) from error
        return ReadAt(self.index_path)

    def _found(self) -> tuple[int, int, int] | None:
        """What the index says, if it is there and whole."""
        try:
            size = os.stat(self.index_path).st_size
            header = ReadAt(self.index_path).read(0, _HEADER.size) if size >= _HEADER.size else b""
        except (OSError, DataError):
            return None
        if not header:
            return None
        magic, packed, rows, pieces, real = _HEADER.unpack(header)
        whole = size == _HEADER.size + 8 * (rows + 1 + 2 * pieces)
        return (rows, pieces, real) if whole and (magic, packed) == (_MAGIC, self.digest.encode()) else None

    def _make(self) -> None:
        starts, lengths = self._meant()
        counts, begun, sizes = [], [], []
        for first, size, count in pack(starts, lengths, self.context, self._seed):
            begun.append(first)
            sizes.append(size)
            counts.append(count)
        if not counts:
            raise DataError(
                f"there is no document of at least 2 tokens among {len(lengths):,} in {len(self.files)} files, from "
                f"{self.files[0].path} on; give more, or the right 'separator'."
            )
        rows = np.concatenate(([0], np.cumsum(np.concatenate(counts))))
        pieces = np.stack((np.concatenate(begun), np.concatenate(sizes)), axis=1)
        header = _HEADER.pack(_MAGIC, self.digest.encode(), len(rows) - 1, len(pieces), int(pieces[:, 1].sum()))
        with written_whole(self.index_path) as file:
            file.write(header + rows.astype("<i8").tobytes() + pieces.astype("<i8").tobytes())

    def _meant(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where each document that is meant begins, over all files, and how many tokens it has."""
        ends, before = [np.zeros(1, np.int64)], 0
        for file in self.files:
            ends.append(before + document_ends(file, self._separator))
            before += file.count
        bounds = np.concatenate(ends)
        first, stop = (round(share * (len(bounds) - 1)) for share in self._part)
        return bounds[first:stop], np.diff(bounds[first : stop + 1])


def packed_token_files(
    pattern: str | Sequence[str],
    context: int,
    held_out: float | str = 0.01,
    *,
    separator: int | None = None,
    seed: int = 0,
    index: str | None = None,
    dtype: TokenType = "uint16",
    vocabulary: int = 0,
    full_digest: bool = False,
) -> Data:
    """Token files with documents, in rows of several documents each: those that `pattern` names, see `PackedRows`.

    held_out: a share of the documents, the last ones; or a pattern of the files that are held out. Takes `NextToken`,
    and a model that keeps the documents of a row apart. Files of ``instep tokenize`` bring their tokenizer as the
    codec, and by default their `vocabulary`. Raises DataError, and RecipeError for a bad share.
    """
    check_share(held_out)
    paths, held = found_apart(pattern, held_out)
    files, others = ([TokenFile(path, dtype) for path in some] for some in (paths, held))
    said = known_of(files, others)
    rows_of = partial(
        PackedRows,
        context=context,
        separator=separator,
        seed=seed,
        index=None if index is None else Path(index).expanduser(),
        vocabulary=vocabulary or said.vocabulary,
        full_digest=full_digest,
    )
    if isinstance(held_out, str):
        return Data(rows_of(files), rows_of(others), codec=said.codec)
    if not held_out:
        return Data(rows_of(files), codec=said.codec)
    return Data(rows_of(files, part=(0, 1 - held_out)), rows_of(files, part=(1 - held_out, 1)), codec=said.codec)
