"""Tar files as WebDataset writes them: files of one name, but for what follows its first dot, are a sample."""

from __future__ import annotations

import io
import json
import tarfile
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
from instep.errors import DataError, cut, described

_BLOCK = 512
_PIECE = 1 << 16


class Tar:
    """The samples of a tar file, whose files lie one after the other. Raises DataError.

    A sample is a mapping of what follows the first dot in the names of its files to their content; ``__key__`` is what
    comes before it. What ends in json, txt, cls or npy is decoded, see `decoded`; all else is bytes. Files whose names
    have no dot are in no sample.
    """

    def __init__(self, path: Path, index: Path | None = None) -> None:
        self.path = path
        self.indexed = IndexedFile(path, "tar", sample_starts, index)
        refuse_packed(self.indexed.file)

    def __len__(self) -> int:
        return self.indexed.count

    def read(self, place: int) -> dict[str, Any]:
        """A sample. Raises DataError."""
        sample: dict[str, Any] = {}
        try:
            with tarfile.open(fileobj=io.BytesIO(self.indexed.read(place)), mode="r:", ignore_zeros=False) as tar:
                for member in tar:
                    if (named := _named(member)) is not None:
                        content = tar.extractfile(member)
                        assert content is not None
                        sample["__key__"], ending = named
                        sample[ending] = decoded(ending, content.read())
        except (tarfile.TarError, ValueError) as error:
            raise DataError(
                f"sample {sample.get('__key__', place)!r} of {self.path} cannot be read ({described(error)}); write "
                f"the file anew."
            ) from error
        return sample

    def digest(self, *, full: bool = False) -> str:
        """See `ReadAt.digest`."""
        return self.indexed.file.digest(full=True) if full else self.indexed.known


def decoded(ending: str, content: bytes) -> Any:
    """What a file of this ending holds: json its value, txt text in UTF-8, cls a whole number, npy an array; all else
    its bytes. Raises ValueError.
    """
    kind = ending.rsplit(".", 1)[-1].lower()
    if kind == "json":
        return json.loads(content)
    if kind == "txt":
        return content.decode()
    if kind == "cls":
        return int(content)
    if kind == "npy":
        return np.load(io.BytesIO(content), allow_pickle=False)
    return content


def _named(member: tarfile.TarInfo) -> tuple[str, str] | None:
    """The key and the ending of a file that belongs to a sample."""
    folder, _, name = member.name.rpartition("/")
    key, dot, ending = name.partition(".")
    if not member.isfile() or not dot or not key:
        return None
    return (f"{folder}/{key}" if folder else key), ending


def sample_starts(file: ReadAt) -> Iterator[NDArray[np.int64]]:
    """Where the samples of a tar file begin, and where the last one ends. Raises DataError for a file that is cut."""
    starts: list[int] = []
    known: set[str] = set()
    endings: set[str] = set()  # of this sample
    now, end = None, 0
    try:
        with open(file.path, "rb") as opened, tarfile.open(fileobj=opened, mode="r:") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # it would keep all of them
                end = tar.offset
                if (named := _named(member)) is None:
                    continue
                if named[0] == now:
                    if named[1] in endings:
                        raise DataError(
                            f"sample {now!r} of {file.path} has two files of the ending {cut(named[1])!r}, so that "
                            f"they may be two samples; write it with another name for each sample."
                        )
                    endings.add(named[1])
                    continue
                now, endings = named[0], {named[1]}
                if now in known:
                    raise DataError(
                        f"the files of sample {now!r} do not lie one after the other in {file.path}; write it in the "
                        f"order of the names, as tar --sort=name does."
                    )
                known.add(now)
                starts.append(member.offset)
    except tarfile.TarError as error:
        raise DataError(
            f"{file.path} is no tar file, or is cut ({described(error)}); put the whole file there."
        ) from error
    _ended(file, end)
    yield np.array([*starts, end], dtype=np.int64)


def _ended(file: ReadAt, end: int) -> None:
    """Raises DataError unless blocks of zeros, and nothing else, follow."""
    if file.size < end + 2 * _BLOCK:
        raise DataError(
            f"{file.path} is cut: the two empty blocks that end a tar file do not follow byte {end:,}; put the whole "
            f"file there."
        )
    for at in range(end, file.size, _PIECE):
        if any(file.read(at, min(_PIECE, file.size - at))):
            raise DataError(
                f"{file.path} goes on after its end at byte {end:,}; tar files are put together by tar --concatenate."
            )


def tars(
    pattern: str | Sequence[str],
    held_out: float | str = 0.01,
    *,
    map: Callable[[Any], Any] | None = None,
    collate: Collate | None = None,
    codec: Codec | None = None,
    index: str | None = None,
    full_digest: bool = False,
) -> Data:
    """Samples of the tar files that `pattern` names, one glob or several, as WebDataset writes them, see `Tar`.

    The others are as in `instep.data.lines.jsonl`. Raises DataError, RecipeError.
    """
    folder = None if index is None else Path(index).expanduser()
    return sharded(
        partial(_opened, folder=folder), pattern, held_out,
        map=map, collate=collate, codec=codec, full_digest=full_digest,
    )  # fmt: skip


def _opened(paths: Sequence[Path], folder: Path | None) -> list[Tar]:
    files = [Tar(path, folder) for path in paths]
    index_all([file.indexed for file in files])
    return files
