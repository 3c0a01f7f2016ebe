"""Samples in files of each format: every one once an epoch, whatever the team, and bad files in one sentence."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import signal
import sys
import tarfile
import unittest.mock
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instep import Team
from instep.data import digest, file_index, lines
from instep.data.cursor import fetch
from instep.data.file_index import index_all
from instep.data.lines import JsonLines, TextLines, jsonl, text_lines
from instep.data.mixture import cursor_over
from instep.data.parquet import ParquetShard, parquet
from instep.data.tars import tars
from instep.errors import DataError, RecipeError
from support.formats import FORMATS, IN_ORDER, SAMPLES, add, in_json_lines, recipe, seen
from support.harness import Client, act_on, train_here
from support.kinds import quick
from support.resuming import begin, go_on


@pytest.mark.processes
@pytest.mark.parametrize("name", quick(FORMATS, "jsonl"))
def test_every_sample_comes_once_an_epoch_and_the_digest_is_one_for_any_team_and_resumes(
    name: str, tmp_path: Path
) -> None:
    given = recipe(FORMATS[name](tmp_path / "data"))
    alone = train_here(given, Team(workers=1), tmp_path / "alone")
    begin(tmp_path / "stopped", given, Team(workers=3), 7)
    resumed = go_on(tmp_path / "stopped", given, Team(workers=2, loaders=1))
    assert seen(alone) == seen(resumed) == {2}
    assert alone.digest == resumed.digest


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_every_sample_comes_once_an_epoch_for_1_2_3_and_5_workers_0_to_4_loaders_one_killed_and_resumed_at_others(
    name: str, tmp_path: Path
) -> None:
    given = recipe(FORMATS[name](tmp_path / "data"))
    teams = [Team(workers=workers, loaders=loaders) for workers, loaders in ((1, 4), (2, 2), (3, 0), (5, 1))]
    runs = [train_here(given, team, tmp_path / f"{team.workers}") for team in teams]
    for first, then in ((3, 1), (1, 2)):
        begin(tmp_path / f"from {first}", given, teams[first], 7)
        runs.append(go_on(tmp_path / f"from {first}", given, teams[then]))
    client = Client(act_on("merged", lambda pid: os.kill(pid, signal.SIGKILL), 4))
    runs.append(train_here(given, Team(workers=3, loaders=3), tmp_path / "killed", client=client))
    assert [seen(run) for run in runs] == [{2}] * 7
    assert len({run.digest for run in runs}) == 1


@pytest.mark.pure
@pytest.mark.parametrize("name", IN_ORDER)
def test_files_of_each_format_have_every_sample_once_in_the_order_of_their_numbers(name: str, tmp_path: Path) -> None:
    train = FORMATS[name](tmp_path)().train
    assert [int(train[index]) for index in range(len(train))] == list(range(SAMPLES))
    asked = [59, 3, 3, 0, 33, 9]
    assert [int(each) for each in fetch(train, asked)] == asked
    assert [int(each) for each in fetch(pickle.loads(pickle.dumps(train)), asked)] == asked
    for index in (-1, SAMPLES):
        with pytest.raises(IndexError):
            train[index]


@pytest.mark.processes
@pytest.mark.parametrize("name", IN_ORDER)
def test_a_process_that_is_forked_while_the_files_are_open_reads_what_it_asks_for(name: str, tmp_path: Path) -> None:
    train = FORMATS[name](tmp_path)().train
    train[0]
    ours, theirs = os.pipe()
    child = os.fork()
    if not child:
        os.write(theirs, bytes(int(each) for each in fetch(train, range(SAMPLES))))
        os._exit(0)
    os.close(theirs)
    with ThreadPoolExecutor(4) as pool:
        assert [int(each) for each in pool.map(train.__getitem__, range(SAMPLES))] == list(range(SAMPLES))
    assert list(os.read(ours, 2 * SAMPLES)) == list(range(SAMPLES))
    os.close(ours)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.pure
@pytest.mark.parametrize("name", FORMATS)
def test_the_digest_is_that_of_what_the_files_hold_wherever_they_lie(name: str, tmp_path: Path) -> None:
    known = {digest(FORMATS[name](tmp_path / folder)()) for folder in ("a", "b")}
    assert len(known) == 1
    names = ("part-10.", "data-00001-of")
    other = next(path for path in sorted((tmp_path / "b").iterdir()) if path.name.startswith(names))
    content = bytearray(other.read_bytes())
    content[-2] ^= 1
    other.write_bytes(content)
    assert fingerprint_of(FORMATS[name], other) not in known


def fingerprint_of(make: Any, changed: Path) -> str:
    """Of data one file of which has been changed since it was written."""
    content = changed.read_bytes()
    data = make(changed.parent / "again")
    changed = changed.parent / "again" / changed.name
    changed.write_bytes(content)
    try:
        return digest(data())
    except DataError as error:
        return str(error)


@pytest.mark.pure
def test_what_is_held_out_is_a_share_at_the_end_in_an_order_of_its_own_or_files(tmp_path: Path) -> None:
    pattern = in_json_lines(tmp_path).args[0]  # type: ignore[attr-defined]

    def numbers(samples: Any) -> list[int]:
        return [samples[index]["number"] for index in range(len(samples))]

    data = jsonl(pattern, 0.25)
    assert numbers(data.train) == list(range(45))
    assert numbers(data.held_out) != list(range(45, 60))
    assert sorted(numbers(data.held_out)) == list(range(45, 60))
    data = jsonl(pattern, str(tmp_path / "*-10.jsonl"))
    assert numbers(data.train) == [*range(10), *range(34, 60)]
    assert sorted(numbers(data.held_out)) == list(range(10, 34))
    assert jsonl(pattern, 0).held_out is None
    with pytest.raises(DataError, match=r"no training sample is left of the 1 in 1 files, the first of them .*9.jsonl"):
        jsonl(str(tmp_path / "*-9.jsonl"), 0.5)
    with pytest.raises(RecipeError, match="'held_out' is 1; it is a share of the samples"):
        jsonl(pattern, 1)


# --- lines and their index ------------------------------------------------------------------------------------------

LINES = st.lists(st.sampled_from(["", "a", "bé", "\r", "x" * 11]), max_size=12)


@pytest.mark.pure
@given(LINES, st.sampled_from(["\n", "\r\n"]), st.booleans(), st.integers(1, 9))
def test_lines_are_those_that_python_reads_however_the_file_is_read(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], end: str, ended: bool, chunk: int
) -> None:
    path = tmp_path_factory.mktemp("lines") / "a.txt"
    path.write_bytes((end.join(texts) + (end if ended and texts else "")).encode())
    expected = [line.removesuffix("\r") for line in path.read_bytes().decode().removesuffix("\n").split("\n")]
    if not path.stat().st_size:
        expected = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "_CHUNK", chunk)
        file = TextLines(path)
        assert [file.read(place) for place in range(len(file))] == expected
        begun = [piece for part in lines.line_starts(file.indexed.file, empty=False) for piece in part.tolist()]
    raw = path.read_bytes()
    starts = [0, *(place + 1 for place, byte in enumerate(raw) if byte == 10)]
    full = [
        at
        for at, to in zip(starts, [*starts[1:], len(raw)], strict=True)
        if raw[at:to].rstrip(b"\n") not in (b"", b"\r")
    ]
    assert begun == [*full, len(raw)]


@pytest.mark.pure
def test_an_index_is_made_once_and_anew_for_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def starts(*args: Any, **options: Any) -> Any:
        made.append(args)
        return line_starts(*args, **options)

    line_starts = lines.line_starts
    monkeypatch.setattr(lines, "line_starts", starts)
    path = tmp_path / "a.jsonl"
    path.write_text("1\n22\n\n333")
    for _ in range(2):
        file = JsonLines(path)
        assert [file.read(place) for place in range(len(file))] == [1, 22, 333]
    assert len(made) == 1
    assert sorted(each.name for each in tmp_path.iterdir()) == [".a.jsonl.json-lines-index", "a.jsonl"]
    path.write_text("1\n2\n\n3334")
    assert JsonLines(path).read(2) == 3334
    assert len(made) == 2
    (tmp_path / ".a.jsonl.json-lines-index").write_bytes(b"INSTEPX1 cut")
    assert JsonLines(path).read(1) == 2
    elsewhere = JsonLines(path, tmp_path / "new" / "indexes")
    assert elsewhere.read(2) == 3334
    assert elsewhere.indexed.index_path.parent == tmp_path / "new" / "indexes"


@pytest.mark.processes
def test_processes_that_need_the_same_indexes_share_the_making(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / f"{number}.txt" for number in range(6)]
    for path in paths:
        path.write_text("a\nb\n")
    monkeypatch.setattr(lines, "line_starts", counted(lines.line_starts, tmp_path))
    ready, go = os.pipe()
    children = []
    for _ in range(3):
        if not (child := os.fork()):
            os.close(go)
            os.read(ready, 1)  # ends when the parent closes its end
            files = [TextLines(path) for path in paths]
            index_all([file.indexed for file in files])
            os._exit(0 if [len(file) for file in files] == [2] * 6 else 1)
        children.append(child)
    os.close(go)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    os.close(ready)
    assert (tmp_path / "made").read_bytes() == b"." * 6


def counted(starts: Any, folder: Path) -> Any:
    """`starts`, with a dot in a file for each call."""

    def counting(*args: Any, **options: Any) -> Any:
        with open(folder / "made", "ab") as file:
            file.write(b".")
        return starts(*args, **options)

    return counting


@pytest.mark.pure
def test_bad_lines_are_said_in_one_sentence_with_file_and_sample(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"number": 1}\n{"number" 2}\n{"number": 3}\n')
    data = jsonl(str(path), 0)
    with pytest.raises(
        DataError, match=r"sample 1 cannot be read: the line of number 1 .*at byte 14 of .*a.jsonl, is no JSON .*mend"
    ):
        fetch(data.train, [0, 1])
    with pytest.raises(DataError, match=r"'map' failed on sample 2, .*in .*a.jsonl \(KeyError: 'other'"):
        jsonl(str(path), 0, map=lambda value: value["other"]).train[2]
    path.write_text('{"number": 1}\n{"numb')
    with pytest.raises(DataError, match=r"the line of number 1 .* of .*a.jsonl, is no JSON .*the file may be cut"):
        jsonl(str(path), 0)
    path.write_bytes(b"good\n\xff\xfe\nend")
    with pytest.raises(DataError, match=r"the line of number 1 .*at byte 5 of .*a.jsonl, is no UTF-8"):
        text_lines(str(path), 0).train[1]
    path.write_bytes(gzip.compress(b"1\n"))
    with pytest.raises(DataError, match=r"a.jsonl is packed by gzip, so that .*unpack it"):
        jsonl(str(path), 0)
    path.write_text("\n\n")
    with pytest.raises(DataError, match=r"no training sample is left of the 0 in 1 files"):
        jsonl(str(path), 0)


@pytest.mark.pure
def test_a_map_that_changes_what_it_is_given_makes_the_same_of_a_sample_that_is_asked_for_twice(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"number": 1}\n{"number": 2}\n')
    assert fetch(jsonl(str(path), 0, map=lambda value: value.pop("number")).train, [1, 0, 1]) == [2, 1, 2]


@pytest.mark.pure
def test_a_folder_that_takes_no_index_is_said_and_another_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("1\n2\n")

    def refused(name: Any, *args: Any) -> int:
        if str(name).endswith(".lock") and str(name).startswith(str(tmp_path / ".a")):
            raise PermissionError(13, "Permission denied")
        return opened(name, *args)

    opened = os.open
    monkeypatch.setattr(file_index.os, "open", refused)
    with pytest.raises(DataError, match=r"the index of .*a.jsonl cannot be written to .* \(Permission denied\); give"):
        jsonl(str(path), 0)
    assert len(jsonl(str(path), 0, index=str(tmp_path / "other")).train) == 2
    with pytest.raises(DataError, match=r"cannot be written to /proc/nowhere \(No such file"):
        jsonl(str(path), 0, index="/proc/nowhere")
    full = unittest.mock.patch.object(file_index.os, "replace", side_effect=OSError(28, "No space left on device"))
    with (
        full,
        pytest.raises(DataError, match=r"cannot be written to .*third \(No space left on device\); give 'index'"),
    ):
        jsonl(str(path), 0, index=str(tmp_path / "third"))
    assert not list((tmp_path / "third").iterdir())
    assert len(jsonl(str(path), 0, index=str(tmp_path / "other")).train) == 2


@pytest.mark.pure
def test_a_file_that_is_written_to_while_the_run_reads_it_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("1\n2\n")
    for train in (jsonl(str(path), 0).train, pickle.loads(pickle.dumps(jsonl(str(path), 0).train))):
        assert train[0] == 1
        with open(path, "r+b") as file:
            file.write(b"7")
        os.utime(path, ns=(0, 12345 + path.stat().st_mtime_ns))
        with pytest.raises(DataError, match=r"sample 1 cannot be read: .*a.jsonl has changed since the run began"):
            fetch(train, [1])
        path.write_text("1\n2\n")


# --- parquet --------------------------------------------------------------------------------------------------------


def written(path: Path, columns: dict[str, Any], **options: Any) -> str:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, **options)
    return str(path)


@pytest.mark.pure
def test_rows_of_parquet_have_numbers_lists_as_arrays_and_all_else_as_python_has_it(tmp_path: Path) -> None:
    ragged = pyarrow.array([[1, 2], [], None], pyarrow.list_(pyarrow.int32()))
    fixed = pyarrow.array([[0.5, 1.5], [2, 3], [4, 5]], pyarrow.list_(pyarrow.float32(), 2))
    columns = {
        "id": [7, 8, 9],
        "text": ["a", None, "c"],
        "ragged": ragged,
        "fixed": fixed,
        "holes": [[1, None], [], []],
    }
    train = parquet(written(tmp_path / "a.parquet", columns), 0).train
    rows = [train[index] for index in range(3)]
    assert [(row["id"], row["text"]) for row in rows] == [(7, "a"), (8, None), (9, "c")]
    assert rows[0]["holes"] == [1, None]
    assert [row["fixed"].tolist() for row in rows] == [[0.5, 1.5], [2, 3], [4, 5]]
    assert rows[0]["fixed"].dtype == np.float32
    assert rows[0]["fixed"].flags.writeable
    assert (rows[0]["ragged"].tolist(), rows[1]["ragged"].tolist(), rows[2]["ragged"]) == ([1, 2], [], None)
    assert rows[0]["ragged"].dtype == np.int32
    assert list(parquet(str(tmp_path / "a.parquet"), 0, columns=["text"]).train[0]) == ["text"]


@pytest.mark.pure
def test_the_digest_knows_how_many_row_groups_are_mixed(tmp_path: Path) -> None:
    """The order of an epoch depends on it."""
    given = written(tmp_path / "a.parquet", {"id": list(range(9))}, row_group_size=3)
    assert len({digest(parquet(given, 0, together=together)) for together in (0, 1, 2)}) == 3


@pytest.mark.pure
@pytest.mark.parametrize("together", [1, 3])
def test_an_epoch_reads_each_row_group_once_and_keeps_so_many(
    together: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Any] = []
    group = ParquetShard._group
    monkeypatch.setattr(
        ParquetShard, "_group", lambda self, number: read.append((self.path, number)) or group(self, number)
    )
    for name in "ab":
        written(tmp_path / f"{name}.parquet", {"id": list(range(60))}, row_group_size=10)
    train = parquet(str(tmp_path / "*.parquet"), 0, together=together).train
    cursor = cursor_over(train, batch=10 * together, microbatches=2, seed=3)
    for step in range(cursor.steps_per_epoch):
        for microbatch in range(2):
            fetch(train, cursor.microbatch(step, microbatch))
    assert len(read) == len(set(read)) == 12
    assert len(train.shards[0]._kept._values) == together  # type: ignore[attr-defined]
    assert [path for path, _ in read] != sorted(path for path, _ in read)


@pytest.mark.pure
def test_what_is_held_out_of_parquet_files_ends_a_row_group_and_is_mixed_by_groups(tmp_path: Path) -> None:
    for name in "ab":
        written(tmp_path / f"{name}.parquet", {"id": list(range(60))}, row_group_size=10)
    data = parquet(str(tmp_path / "*.parquet"), 0.3)
    groups = [samples.groups.sizes.tolist() for samples in (data.train, data.held_out)]  # type: ignore[union-attr]
    assert groups == [[10] * 8 + [4], [6, 10, 10, 10]]
    held_out = [data.held_out[index]["id"] for index in range(36)]  # type: ignore[index]
    assert sorted(held_out) == list(range(24, 60))
    assert held_out != list(range(24, 60))
    whole = parquet(str(tmp_path / "*.parquet"), 0, together=0).train
    assert whole.groups is None  # type: ignore[attr-defined]


@pytest.mark.pure
def test_bad_parquet_files_are_said_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    given = written(path, {"id": list(range(5000))}, row_group_size=1000, compression="snappy")
    with pytest.raises(DataError, match=r"a.parquet has no column 'name'; it has id"):
        parquet(given, columns=["name"])
    with pytest.raises(RecipeError, match="'together' is -1"):
        parquet(given, together=-1)
    written(tmp_path / "b.parquet", {"id": ["text"]})
    with pytest.raises(
        DataError, match=r"b.parquet has other columns than .*a.parquet: 'id' is string and int64; write"
    ):
        parquet(str(tmp_path / "*.parquet"))
    written(tmp_path / "b.parquet", {"id": [1], "more": ["text"]})
    with pytest.raises(DataError, match=r"'more' is string and not there; write them alike"):
        parquet(str(tmp_path / "*.parquet"))
    content = path.read_bytes()
    path.write_bytes(content[:200] + bytes(3000) + content[3200:])
    with pytest.raises(DataError, match=r"sample 3 cannot be read: row group 0 of .*a.parquet cannot be read \("):
        fetch(parquet(given, 0).train, [3])
    path.write_bytes(content[:-9])
    with pytest.raises(DataError, match=r"a.parquet is no Parquet file, or is cut \(ArrowInvalid"):
        parquet(given)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"pip install 'instep\[parquet\]'"):
        parquet(given)


# --- tars -----------------------------------------------------------------------------------------------------------


def tarred(path: Path, files: dict[str, bytes], **options: Any) -> Path:
    with tarfile.open(path, "w", **options) as tar:
        for name, content in files.items():
            add(tar, name, content)
    return path


@pytest.mark.pure
@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_samples_of_tars_are_files_of_one_name_decoded_by_their_endings(form: int, tmp_path: Path) -> None:
    array = io.BytesIO()
    np.save(array, np.arange(3))
    long = "d/" + "long" * 60
    files = {
        "a.json": b'{"x": [1]}', "a.cls": b"7", "README": b"none", "d/a.seg.npy": array.getvalue(),
        f"{long}.jpg": b"\xff\xd8", f"{long}.txt": "é".encode(),
    }  # fmt: skip
    path = tarred(tmp_path / "a.tar", files, format=form)
    train = tars(str(path), 0).train
    assert len(train) == 3
    assert train[0] == {"__key__": "a", "json": {"x": [1]}, "cls": 7}
    assert train[1]["seg.npy"].tolist() == [0, 1, 2]
    assert train[2] == {"__key__": long, "jpg": b"\xff\xd8", "txt": "é"}


@pytest.mark.pure
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content[:-10240] + content[-10240:-9000], "a.tar is cut: the two empty blocks"),
        (lambda content: content[:2000], r"a.tar is no tar file, or is cut \(ReadError"),
        (lambda content: content[:1024], "a.tar is cut: the two empty blocks that end a tar file do not"),
        (lambda content: content + content, "a.tar goes on after its end at byte 2,560; tar files are put together by"),
        (lambda content: content[:1024] + b"x" * 512 + content[1536:], "a.tar goes on after its end at byte 1,024"),
        (lambda content: b"x" * 2000, r"a.tar is no tar file, or is cut \(ReadError"),
        (gzip.compress, "a.tar is packed by gzip, so that no sample"),
        (lambda content: bytes(10240), "no training sample is left of the 0 in 1 files"),
    ],
)  # fmt: skip
def test_a_tar_that_is_cut_or_none_is_said_in_one_sentence(change: Any, words: str, tmp_path: Path) -> None:
    path = tarred(tmp_path / "a.tar", {"a.txt": b"a", "b.txt": b"b" * 600})
    assert len(tars(str(path), 0).train) == 2
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match=words):
        tars(str(path), 0)


@pytest.mark.pure
def test_a_bad_sample_of_a_tar_is_named(tmp_path: Path) -> None:
    path = tarred(tmp_path / "a.tar", {"a.cls": b"1", "b.cls": b"x", "c.json": b"1"})
    with pytest.raises(
        DataError, match=r"sample 1 cannot be read: sample 'b' of .*a.tar cannot be read \(ValueError: inv"
    ):
        fetch(tars(str(path), 0).train, [0, 1])
    tarred(path, {"a.txt": b"", "b.txt": b"", "a.cls": b"1"})
    with pytest.raises(DataError, match=r"the files of sample 'a' do not lie one after the other in .*a.tar; write it"):
        tars(str(path), 0)
    with tarfile.open(path, "w") as tar:
        for name in ("a.txt", "a.cls", "a.txt", "a.cls"):
            add(tar, name, b"1")
    with pytest.raises(DataError, match=r"sample 'a' of .*a.tar has two files of the ending 'txt', so that they"):
        tars(str(path), 0)
