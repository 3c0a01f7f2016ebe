"""Data sets of other libraries: taken where they have samples by index, whatever they call themselves."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset, IterableDataset

from instep.data import Data, as_data, digest
from instep.data.cursor import Cursor, fetch
from instep.data.hugging_face import HuggingFaceTable, from_disk, hugging_face
from instep.data.repeats import check_repeats
from instep.errors import DataError, RecipeError

pytestmark = pytest.mark.pure


class Streaming(IterableDataset[int]):
    """As litdata's: it says that it is iterable, and has samples by index."""

    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: int) -> int:
        return 2 * index

    def __iter__(self) -> Any:
        return iter(range(9))


class Lengthy(IterableDataset[int]):
    """It has a length alone."""

    def __len__(self) -> int:
        return 9

    def __iter__(self) -> Any:
        return iter(range(9))


def of(library: str, kind: Any) -> Any:
    """An object of a class of that library's, as far as can be seen."""
    return type(kind.__name__, (kind,), {"__module__": f"{library}.inside"})()


def test_what_has_samples_by_index_is_taken_though_it_calls_itself_iterable() -> None:
    data = as_data(Streaming())
    assert fetch(data.train, [4, 1]) == [8, 2]
    assert digest(data) != digest(Data(range(9)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (Lengthy(), "a map-style data set, .*: write what it yields once into a file .* such as JSON lines"),
        (iter([1]), "is of type list_iterator, which has no length or no samples by index; give a map-style data set"),
        (of("datasets", Lengthy), "load it without streaming, or give its files, such as Parquet to 'instep.data.par"),
        (of("webdataset", Lengthy), "give its tar files to 'instep.data.tars:tars'"),
        (of("grain", Lengthy), "give the MapDataset that it was made of"),
        (7, r"is of type int, .*; give a map-style data set, with __len__ and __getitem__\.$"),
    ],
)
def test_of_what_can_only_be_gone_through_the_error_names_the_way(value: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        as_data(value)


class Rows(Dataset[Any]):
    """A data set of Hugging Face's, as far as Instep asks."""

    def __init__(self, files: list[Path], kind: str | None = None) -> None:
        self.cache_files = [{"filename": str(path)} for path in files]
        self.features = {"number": SimpleNamespace(), "tokens": List()}
        self.format = {"type": kind}
        self._fingerprint = "a1"

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < 6:
            raise IndexError(index)
        return {"number": index, "tokens": [index] * 3}

    def with_format(self, kind: str | None) -> Rows:
        self.format = {"type": kind}
        return self


class List:
    """The type of a column of lists."""


def test_a_table_of_hugging_face_is_known_by_its_fingerprint_and_its_files(tmp_path: Path) -> None:
    path = tmp_path / "data.arrow"

    def known(content: bytes = b"content", fingerprint: str = "a1", *, full: bool = False) -> str:
        path.write_bytes(content)
        rows = Rows([path])
        rows._fingerprint = fingerprint
        return digest(hugging_face(rows, full_digest=full))

    assert known() == known()
    assert len({known(), known(b"c0ntent"), known(fingerprint="a2")}) == 3
    with pytest.raises(DataError, match=r"row 7 of x cannot be read \(IndexError: 7\)"):
        HuggingFaceTable(Rows([]), Path("x")).read(7)


def test_splits_are_held_out_by_name_or_as_a_share() -> None:
    data = hugging_face(Rows([]), 0.34)
    assert (len(data.train), len(data.held_out or ())) == (4, 2)
    splits = {"train": Rows([]), "test": Rows([])}
    by_name = hugging_face(splits, "test")
    shards = [samples.shards[0].dataset for samples in (by_name.train, by_name.held_out)]  # type: ignore[union-attr]
    assert shards == list(splits.values())
    with pytest.raises(DataError, match="has no split 'dev'; it has train, test, and 'held_out' may be a share"):
        hugging_face({"train": Rows([]), "test": Rows([])}, "dev")
    with pytest.raises(RecipeError, match="'held_out' is 2"):
        hugging_face(Rows([]), 2)


def test_a_stream_of_hugging_face_is_refused_with_the_way_to_go_instead() -> None:
    with pytest.raises(DataError, match="no length or no samples by index; load it without streaming"):
        hugging_face(of("datasets", Lengthy))


def test_lists_that_the_default_collate_would_turn_on_their_side_are_warned_of() -> None:
    cursor = Cursor(6, 2, 1, 0)
    Rows.__module__ = "datasets.arrow_dataset"
    try:
        doubts = [
            check_repeats(Data(Rows([], kind), collate=collate), cursor, 0)[1]
            for kind, collate in ((None, None), ("torch", None), (None, lambda rows: torch.tensor(len(rows))))
        ]
    finally:
        Rows.__module__ = __name__
    assert "the column 'tokens' of the data set holds lists" in doubts[0]
    assert "give the data set .with_format('torch'), or recipe.data a 'collate'" in doubts[0]
    assert doubts[1:] == ["", ""]


def test_a_folder_that_holds_no_data_set_and_a_library_that_is_missing_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(path: str) -> None:
        raise FileNotFoundError(f"Directory {path} not found")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_from_disk=fails))
    with pytest.raises(DataError, match=r"no data set of Hugging Face can be read from .* \(FileNotFoundError: Direct"):
        from_disk(str(tmp_path))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'instep\[datasets\]'"):
        from_disk(str(tmp_path))
