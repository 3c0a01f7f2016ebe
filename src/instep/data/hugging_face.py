"""Data sets of Hugging Face's `datasets`, map-style, from memory or from disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sized
from pathlib import Path
from typing import Any

from instep.data import Codec, Collate, Data, foreign, indexed
from instep.data.files import ReadAt
from instep.data.shards import apart
from instep.errors import DataError, described


class HuggingFaceTable:
    """A map-style data set of Hugging Face as a shard. path: where it lies, for sentences."""

    def __init__(self, dataset: Any, path: Path) -> None:
        self.path, self.dataset = path, dataset
        self._files = [ReadAt(Path(file["filename"])) for file in dataset.cache_files]

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, place: int) -> Any:
        """A row, as the data set's format has it. Raises DataError."""
        try:
            return self.dataset[place]
        except Exception as error:
            raise DataError(
                f"row {place:,} of {self.path} cannot be read ({described(error)}); make the data set anew."
            ) from error

    def digest(self, *, full: bool = False) -> str:
        """Of its fingerprint, which does not know whether its files have been changed, and of these, see
        `ReadAt.digest`.
        """
        files = " ".join(file.digest(full=full) for file in self._files)
        return hashlib.sha256(f"{self.dataset._fingerprint} {files}".encode()).hexdigest()


def from_disk(
    folder: str,
    held_out: float | str = 0.01,
    *,
    split: str = "train",
    format: str | None = "torch",
    map: Callable[[Any], Any] | None = None,
    collate: Collate | None = None,
    codec: Codec | None = None,
    full_digest: bool = False,
) -> Data:
    """What `save_to_disk` has left in a folder: rows, by column.

    held_out: a share, the last rows, 0 for none; or the name of another split. split: which is trained on, where there
    are several. format: as ``with_format`` takes it. The others are as in `instep.data.lines.jsonl`. Raises DataError,
    RecipeError.
    """
    try:
        import datasets
    except ImportError:
        raise DataError(
            "data sets of Hugging Face are read by its datasets, which is in the datasets extra: pip install "
            "'instep[datasets]'."
        ) from None
    path = Path(folder).expanduser()
    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:
        raise DataError(
            f"no data set of Hugging Face can be read from {path} ({described(error)}); give a folder that "
            f"save_to_disk has made."
        ) from error
    return hugging_face(
        loaded, held_out, split=split, format=format, map=map, collate=collate, codec=codec, full_digest=full_digest,
        path=path,
    )  # fmt: skip


def hugging_face(
    dataset: Any,
    held_out: float | str = 0.01,
    *,
    split: str = "train",
    format: str | None = "torch",
    map: Callable[[Any], Any] | None = None,
    collate: Collate | None = None,
    codec: Codec | None = None,
    full_digest: bool = False,
    path: Path = Path("the data set"),
) -> Data:
    """As `from_disk`, of a data set, or several by split, that `datasets` has made. Raises DataError, RecipeError."""
    splits = dict(dataset) if isinstance(dataset, dict) else {split: dataset}
    wanted = [split, *([held_out] if isinstance(held_out, str) else [])]
    if missing := [name for name in wanted if name not in splits]:
        raise DataError(
            f"{path} has no split {missing[0]!r}; it has {', '.join(splits)}, and 'held_out' may be a share."
        )
    for name in wanted:
        if not indexed(splits[name]) or not isinstance(splits[name], Sized):
            raise DataError(f"{path} has no length or no samples by index; {foreign.way(splits[name])}.")
    tables = [HuggingFaceTable(splits[name].with_format(format), path) for name in wanted]
    return apart(tables[:1], tables[1:], held_out, map=map, collate=collate, codec=codec, full_digest=full_digest)
