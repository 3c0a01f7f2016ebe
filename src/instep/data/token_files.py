"""Files of tokens, as nanoGPT, llm.c and Megatron write them, in windows, whatever their size."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import struct
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from instep.data import Data
from instep.data.files import ReadAt, found_apart
from instep.data.order import keys, permuted
from instep.data.tokenized import Known, known
from instep.errors import DataError, RecipeError

_LLM_C = {20240520: ("uint16", 1), 20240801: ("uint32", 7)}
"""By the number that a file of llm.c begins with: the type of its tokens, and the version of the format."""

_LLM_C_HEADER = 1024

_MEGATRON = b"MMIDIDX\x00\x00"
_MEGATRON_HEADER = struct.Struct("<9sQBQQ")
_MEGATRON_TYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}

TokenType = Literal["uint8", "uint16", "uint32", "int32", "int64"]


class TokenFile:
    """The tokens of one file, in a row. `start` is the byte of the first, `count` their number.

    A file of llm.c is known by its header (its magic number, version and count of tokens), one of Megatron by the
    ``.idx`` beside it, which says the type; any other holds tokens of `dtype` and nothing else, as nanoGPT's. All are
    little-endian. Raises DataError where header and file disagree.
    """

    def __init__(self, path: Path, dtype: TokenType = "uint16") -> None:
        self.path, self._file = path, ReadAt(path)
        index = path.with_suffix(".idx")
        self.start, kind, count = 0, str(dtype), -1
        self.index = index if index.exists() else None
        if self.index is not None:
            kind, count = _megatron(index)
        elif self._file.size >= _LLM_C_HEADER:
            magic, version, tokens = struct.unpack("<3i", self._file.read(0, 12))
            if magic in _LLM_C and _LLM_C[magic][1] == version:
                self.start, kind, count = _LLM_C_HEADER, _LLM_C[magic][0], tokens
        self.dtype = np.dtype(kind).newbyteorder("<")
        self._highest = np.iinfo(self.dtype).max if self.dtype.kind == "u" else 1 << 63  # that a token can be
        size = self._file.size - self.start
        self.count = size // self.dtype.itemsize if count < 0 else count
        if self.count * self.dtype.itemsize != size:
            said = "its size is no multiple of that" if count < 0 else f"there should be {count:,} of them"
            raise DataError(
                f"{path} has {size:,} bytes of tokens of {self.dtype.itemsize} each ({kind}), and {said}: the file is "
                f"cut, or of another 'dtype'; write it anew, or say its type."
            )

    def tokens(self, start: int, stop: int) -> NDArray[np.integer]:
        """Tokens from `start` up to `stop`. Raises DataError where the file is not what it was."""
        each = self.dtype.itemsize
        return np.frombuffer(self._file.read(self.start + start * each, (stop - start) * each), self.dtype)

    def checked(self, start: int, stop: int, vocabulary: int, what: str) -> Tensor:
        """The same, [stop - start], int64. Raises DataError for a token that is not below `vocabulary`, which is of
        sample `what`; 0 does not look.
        """
        tokens = self.tokens(start, stop)
        if 0 < vocabulary <= self._highest and not self._all_below(vocabulary, tokens):
            other = int(tokens.max()) if int(tokens.max()) >= vocabulary else int(tokens.min())
            raise DataError(
                f"{what} has the token {other}, after token {start:,} of {self.path}, and the vocabulary is "
                f"{vocabulary}: the file is of another tokenizer, or of another 'dtype' than {self.dtype.name}; say "
                f"the right one."
            )
        return torch.from_numpy(tokens.astype(np.int64))

    def _all_below(self, vocabulary: int, tokens: NDArray[Any]) -> bool:
        found = int(np.maximum.reduce(tokens)) < vocabulary
        return found and (self.dtype.kind == "u" or int(np.minimum.reduce(tokens)) >= 0)

    def document_ends(self) -> NDArray[np.int64] | None:
        """Where each document ends, in tokens ([documents], int64), as the ``.idx`` beside the file says it; None
        where there is none. Raises DataError where that cannot be.
        """
        if self.index is None:
            return None
        header = ReadAt(self.index)
        _, _, _, sequences, documents = _MEGATRON_HEADER.unpack(header.read(0, _MEGATRON_HEADER.size))
        sizes = np.frombuffer(header.read(_MEGATRON_HEADER.size, 4 * sequences), "<i4")
        after = np.frombuffer(header.read(_MEGATRON_HEADER.size + 12 * sequences, 8 * documents), "<i8")[1:]
        if sequences and not (len(after) and after[0] >= 0 and (np.diff(after) >= 0).all() and after[-1] == sequences):
            raise DataError(
                f"{self.index} says documents that do not cover its {sequences:,} sequences; write it anew."
            )
        ends: NDArray[np.int64] = np.concatenate(([0], np.cumsum(sizes, dtype=np.int64)))[after]
        return ends

    def digest(self, *, full: bool = False) -> str:
        """See `ReadAt.digest`."""
        return self._file.digest(full=full)


def known_of(*several: Sequence[TokenFile]) -> Known:
    """What lies beside these files, see `instep.data.tokenized`. Raises DataError."""
    return known([(file.path, file.count) for files in several for file in files])


def _megatron(index: Path) -> tuple[str, int]:
    """The type and number of tokens of the file beside an index."""
    header = ReadAt(index)
    if header.size < _MEGATRON_HEADER.size:
        raise DataError(f"{index} is too short for an index of Megatron's; write it anew.")
    magic, version, code, sequences, documents = _MEGATRON_HEADER.unpack(header.read(0, _MEGATRON_HEADER.size))
    if magic != _MEGATRON or version != 1 or code not in _MEGATRON_TYPES:
        raise DataError(
            f"{index} is no index of whole tokens as Megatron writes it (version 1); give files whose index is, or "
            f"move it away from beside the tokens."
        )
    if header.size < _MEGATRON_HEADER.size + 12 * sequences + 8 * documents:
        raise DataError(f"{index} is cut: it says {sequences:,} sequences, and ends before; write it anew.")
    total = 0
    for first in range(0, sequences, 1 << 20):
        sizes = header.read(_MEGATRON_HEADER.size + 4 * first, 4 * min(1 << 20, sequences - first))
        total += int(np.frombuffer(sizes, "<i4").sum(dtype=np.int64))
    return _MEGATRON_TYPES[code], total


def write_index(
    file: BinaryIO, dtype: np.dtype[Any], documents: int, sizes: Callable[[], Iterable[NDArray[np.int32]]]
) -> None:
    """Writes the ``.idx`` beside tokens of `dtype`, whose `documents` are each one sequence: `sizes` gives how many
    tokens each has, piece by piece, and is called twice, so that nothing is held by document. Raises OSError.
    """
    code = next(code for code, kind in _MEGATRON_TYPES.items() if kind == dtype.name)
    file.write(_MEGATRON_HEADER.pack(_MEGATRON, 1, code, documents, documents + 1))
    for some in sizes():
        file.write(some.astype("<i4").tobytes())
    place = 0
    for some in sizes():
        ends = place + np.cumsum(some, dtype=np.int64) * dtype.itemsize
        file.write((ends - some.astype(np.int64) * dtype.itemsize).astype("<i8").tobytes())
        place = int(ends[-1]) if len(ends) else place
    for first in range(0, documents + 1, 1 << 20):
        file.write(np.arange(first, min(first + (1 << 20), documents + 1), dtype="<i8").tobytes())


class TokenWindows(Dataset[Tensor]):
    """Windows of ``context + 1`` tokens, [context + 1], int64, each starting `context` tokens after the one before.

    So every token of a file but the first is a target once; the last ones, where they fill no window, are left out, and
    no window spans two files. windows: those of all that are meant; None for all of them. mixed: they come in an order
    at random, always the same, so that the first few are a fair sample. vocabulary: tokens must be below it; 0 does not
    look. full_digest: covers all bytes. Raises DataError, RecipeError.
    """

    def __init__(
        self,
        files: Sequence[TokenFile],
        context: int,
        *,
        windows: range | None = None,
        mixed: bool = False,
        vocabulary: int = 0,
        full_digest: bool = False,
    ) -> None:
        if context < 1:
            raise RecipeError(f"'context' is {context}; it must be at least 1 token.")
        self.files, self.context, self.vocabulary = list(files), context, vocabulary
        self._ends = list(itertools.accumulate(max(0, (file.count - 1) // context) for file in files))
        self.windows = range(self._ends[-1]) if windows is None else windows
        self._mixed, self._full = mixed, full_digest

    @cached_property
    def digest(self) -> str:
        """SHA-256, in hexadecimal, of the files' digests and which windows are meant."""
        files = " ".join(file.digest(full=self._full) for file in self.files)
        return hashlib.sha256(f"{files} {self.context} {self.windows} {self._mixed}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} is not from 0 to {len(self) - 1}")
        if self._mixed:
            index = int(permuted(np.array([index]), len(self), keys(0, 0, "held out"))[0])
        window = self.windows[index]
        place = bisect.bisect_right(self._ends, window)
        file, start = self.files[place], (window - (self._ends[place - 1] if place else 0)) * self.context
        return file.checked(start, start + self.context + 1, self.vocabulary, f"sample {index}")


def token_files(
    pattern: str | Sequence[str],
    context: int,
    held_out: float | str = 0.01,
    *,
    dtype: TokenType = "uint16",
    vocabulary: int = 0,
    full_digest: bool = False,
) -> Data:
    """Token files in windows: those that `pattern` names, one glob or several, see `TokenFile` and `TokenWindows`.

    held_out: a share of the windows, the last ones; or a pattern of the files that are held out, which are no part of
    the training data even if `pattern` names them. Files of ``instep tokenize`` bring their tokenizer as the codec, and
    by default their `vocabulary`. Raises DataError where a file is none, is cut, or there are too few tokens, or where
    files are of several tokenizers, RecipeError for a bad share.
    """
    if not isinstance(held_out, str) and not 0 < held_out < 1:
        raise RecipeError(f"'held_out' is {held_out}; it is a share of the windows, above 0 and below 1, or a pattern.")
    paths, held = found_apart(pattern, held_out)
    files, others = ([TokenFile(path, dtype) for path in some] for some in (paths, held))
    said = known_of(files, others)
    windows_of = partial(
        TokenWindows, context=context, vocabulary=vocabulary or said.vocabulary, full_digest=full_digest
    )
    train = windows_of(files)
    if isinstance(held_out, str):
        rest = windows_of(others, mixed=True)
    else:
        every = train.windows
        cut = max(0, len(every) - max(1, int(len(every) * held_out)))
        train, rest = windows_of(files, windows=every[:cut]), windows_of(files, windows=every[cut:], mixed=True)
    for part, name in ((train, "training"), (rest, "held-out")):
        if not len(part):
            tokens = sum(file.count for file in part.files)
            raise DataError(
                f"the {name} tokens are too few: {tokens:,} in {len(part.files)} files leave no window of "
                f"{context + 1}; give more, or a smaller 'context'."
            )
    return Data(train, rest, codec=said.codec)
