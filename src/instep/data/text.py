"""Text as bytes: the source of Python's standard library, or files of one's own."""

from __future__ import annotations

import glob
import hashlib
import os
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from instep.data import Data
from instep.data.files import unreadable
from instep.data.tokenizer import BYTES, save_bytes
from instep.errors import DataError, RecipeError

LEFT_OUT = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "_bundled", "__pycache__", "lib-dynload"}
)
"""Folders of the standard library that are not read: tests, other people's packages, binaries."""

HELD_OUT_ONE_IN = 20
"""One module of the standard library in so many is held out."""


@dataclass(frozen=True)
class Bytes:
    """The codec of bytes: a vocabulary of 256, text as UTF-8."""

    vocabulary: int = 256
    bytes_per_token: float = 1.0
    digest: str = BYTES

    def encode(self, text: str) -> list[int]:
        """The bytes of `text`."""
        return list(text.encode("utf-8", errors="replace"))

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of bytes; what is no valid UTF-8 becomes U+FFFD."""
        return bytes(tokens).decode("utf-8", errors="replace")

    def save(self, folder: Path) -> None:
        """Writes the same as a tokenizer of transformers."""
        save_bytes(folder)


class Windows(Dataset[Tensor]):
    """Windows of ``context + 1`` bytes, [context + 1], int64, each starting `context` bytes after the one before.

    So every byte but the first is a target once; the last bytes, where they fill no window, are left out. With
    `mixed`, windows come in a fixed order at random, so that the first few are a fair sample of all.
    """

    def __init__(self, text: bytes, context: int, *, mixed: bool = False) -> None:
        if context < 1:
            raise RecipeError(f"a text's 'context' is {context}; it must be at least 1 byte.")
        self.context = context
        self.text = torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)
        self._length = max(0, (len(text) - 1) // context)
        self._order = torch.randperm(self._length, generator=torch.Generator().manual_seed(0)) if mixed else None
        self._offsets = torch.arange(context + 1)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the bytes, in hexadecimal."""
        return hashlib.sha256(self.text.numpy().data).hexdigest()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Tensor:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Tensor]:
        """Several windows at once. Raises IndexError."""
        if not all(0 <= index < self._length for index in indices):
            raise IndexError(f"windows {list(indices)} are not all from 0 to {self._length - 1}")
        starts = torch.tensor(indices, dtype=torch.int64)
        if self._order is not None:
            starts = self._order[starts]
        return list(self.text[(starts * self.context)[:, None] + self._offsets].long())


def stdlib_text(context: int = 128) -> Data:
    """The source of the running Python's standard library as bytes, in windows; about 11 MB, no download.

    All ``.py`` files in order of their paths, a newline between them, test folders left out. Whole modules are held
    out, those whose path's hash says so, about one in 20. Raises DataError where the library's source is not there.
    """
    train, held_out = stdlib_sources()
    return _data(b"\n".join(train), b"\n".join(held_out), context)


def stdlib_sources() -> tuple[list[bytes], list[bytes]]:
    """The files of `stdlib_text`, to train on and held out. Raises DataError."""
    root = Path(sysconfig.get_paths()["stdlib"])
    train: list[bytes] = []
    held_out: list[bytes] = []
    for path in _source_files(root):
        hashed = hashlib.sha256(path.relative_to(root).as_posix().encode()).digest()
        (held_out if hashed[0] % HELD_OUT_ONE_IN == 0 else train).append(_read(path))
    if not train or not held_out:
        raise DataError(
            f"the standard library's source is not in {root} (this Python may keep it in an archive); "
            f"use a Python with its source, or the data 'instep.data.text:text_files'."
        )
    return train, held_out


def text_files(pattern: str | Sequence[str], context: int = 128, held_out: float = 0.05) -> Data:
    """Text files as bytes, in windows: those that `pattern` names, one glob or several (``**`` for any folders).

    They follow each other in order of their paths, a newline between them; the last share, `held_out`, of these bytes
    is held out. Raises DataError where no file is found or there is too little text, RecipeError for a bad share.
    """
    if not 0 < held_out < 1:
        raise RecipeError(f"'held_out' is {held_out}; it is a share of the text, above 0 and below 1.")
    patterns = [pattern] if isinstance(pattern, str) else list(pattern)
    paths = sorted({Path(found) for each in patterns for found in glob.glob(each, recursive=True)})
    text = b"\n".join(_read(path) for path in paths if path.is_file())
    if not text:
        raise DataError(f"no text is in the files {', '.join(patterns)} (from {os.getcwd()}); check the pattern.")
    cut = len(text) - int(len(text) * held_out)
    return _data(text[:cut], text[cut:], context)


def _data(train: bytes, held_out: bytes, context: int) -> Data:
    windows = Windows(train, context), Windows(held_out, context, mixed=True)
    for part, name, size in zip(windows, ("training", "held-out"), (len(train), len(held_out)), strict=True):
        if not len(part):
            raise DataError(
                f"the {name} text is too small: {size} bytes hold no window of {context + 1}; "
                f"give more text or a smaller 'context'."
            )
    return Data(*windows, codec=Bytes())


def _source_files(root: Path) -> list[Path]:
    found: list[Path] = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in LEFT_OUT]
        found.extend(Path(folder, name) for name in files if name.endswith(".py"))
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from None
