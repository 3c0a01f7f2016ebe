"""Token files: of each format every token a target once, found when cut or changed, of any size in little memory."""

from __future__ import annotations

import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from instep import Recipe, Team
from instep.data import digest, files
from instep.data.files import PIECE_BYTES, PIECES, ReadAt, found
from instep.data.token_files import TokenFile, TokenWindows, token_files
from instep.errors import DataError, RecipeError
from support.harness import train_here

TOKENS = np.random.default_rng(0).integers(0, 500, 2000)


def raw(path: Path, tokens: Any = TOKENS, dtype: str = "<u2") -> Path:
    path.write_bytes(np.asarray(tokens).astype(dtype).tobytes())
    return path


def llm_c(path: Path, tokens: Any = TOKENS, magic: int = 20240520, version: int = 1, dtype: str = "<u2") -> Path:
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens)
    path.write_bytes(header.tobytes() + np.asarray(tokens).astype(dtype).tobytes())
    return path


def megatron(path: Path, tokens: Any = TOKENS, code: int = 8, dtype: str = "<u2", sequences: int = 7) -> Path:
    parts = np.array_split(np.asarray(tokens), sequences)
    raw(path, tokens, dtype)
    sizes = np.array([len(part) for part in parts], "<i4")
    pointers = (np.cumsum(sizes) - sizes).astype("<i8") * np.dtype(dtype).itemsize
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(parts), len(parts) + 1)
    documents = np.arange(len(parts) + 1, dtype="<i8")
    path.with_suffix(".idx").write_bytes(header + sizes.tobytes() + pointers.tobytes() + documents.tobytes())
    return path


WRITTEN: dict[str, Any] = {
    "nanogpt": raw,
    "bytes": lambda path, tokens=TOKENS: raw(path, tokens % 256, "<u1"),
    "llm.c": llm_c,
    "llm.c of 32 bits": lambda path, tokens=TOKENS: llm_c(path, tokens, 20240801, 7, "<u4"),
    "megatron": megatron,
    "megatron of 32 bits": lambda path, tokens=TOKENS: megatron(path, tokens, 4, "<i4"),
}


@pytest.mark.pure
@pytest.mark.parametrize("kind", WRITTEN)
def test_each_format_has_its_tokens(kind: str, tmp_path: Path) -> None:
    file = TokenFile(WRITTEN[kind](tmp_path / "a.bin"), dtype="uint8" if kind == "bytes" else "uint16")
    expected = TOKENS % 256 if kind == "bytes" else TOKENS
    assert file.count == 2000
    assert (file.tokens(0, 2000) == expected).all()
    assert (file.tokens(700, 703) == expected[700:703]).all()


@pytest.mark.pure
@given(st.lists(st.integers(0, 40), min_size=1, max_size=4), st.integers(1, 9))
def test_every_token_but_the_first_of_a_file_is_a_target_once(
    tmp_path_factory: pytest.TempPathFactory, counts: list[int], context: int
) -> None:
    folder = tmp_path_factory.mktemp("tokens")
    first = 0
    files = []
    for place, count in enumerate(counts):
        files.append(TokenFile(raw(folder / f"{place}.bin", np.arange(first, first + count))))
        first += count
    windows = TokenWindows(files, context)
    targets = [token for window in windows for token in window[1:].tolist()] if len(windows) else []
    expected, first = [], 0
    for count in counts:
        expected += range(first + 1, first + 1 + max(0, count - 1) // context * context)
        first += count
    assert targets == expected
    assert all(window.dtype == torch.int64 and window.shape == (context + 1,) for window in windows)


@pytest.mark.pure
def test_files_come_by_number_and_not_as_text(tmp_path: Path) -> None:
    for number in (10, 9, 100, 1):
        raw(tmp_path / f"shard-{number}.bin")
    names = [path.name for path in found(str(tmp_path / "*.bin"))]
    assert names == ["shard-1.bin", "shard-9.bin", "shard-10.bin", "shard-100.bin"]
    assert found([str(tmp_path / "*-1*"), str(tmp_path / "*-10*")]) == found(str(tmp_path / "*-1*"))


@pytest.mark.pure
def test_what_is_held_out_is_no_part_of_the_training_data(tmp_path: Path) -> None:
    pattern = str(raw(tmp_path / "a.bin", np.arange(1001)))
    made = token_files(pattern, 10, 0.25)
    assert (len(made.train), len(made.held_out or ())) == (75, 25)
    assert [int(window[0]) for window in made.train] == list(range(0, 750, 10))  # type: ignore[attr-defined]
    held_out = [int(made.held_out[index][0]) for index in range(25)]  # type: ignore[index]
    assert held_out != sorted(held_out)
    assert sorted(held_out) == list(range(750, 1000, 10))
    raw(tmp_path / "val.bin", np.arange(2000, 2101))
    other = token_files(pattern, 10, str(tmp_path / "val.bin"))
    assert (len(other.train), len(other.held_out or ())) == (100, 10)
    both = token_files(str(tmp_path / "*.bin"), 10, str(tmp_path / "val*"))
    assert (len(both.train), len(both.held_out or ())) == (100, 10)
    with pytest.raises(DataError, match="all files are held out"):
        token_files(pattern, 10, pattern)


@pytest.mark.pure
def test_of_more_files_than_a_process_keeps_open_all_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MOST_OPEN", 2)
    monkeypatch.setattr(files, "_open", set())
    for number in range(5):
        raw(tmp_path / f"{number}.bin", np.arange(100 * number, 100 * number + 11))
    windows = TokenWindows([TokenFile(path) for path in found(str(tmp_path / "*.bin"))], 10)
    for _ in range(2):
        assert [int(windows[index][0]) for index in range(5)] == [0, 100, 200, 300, 400]
    assert len(files._open) == 2
    del windows
    assert files._open == set()


@pytest.mark.pure
@pytest.mark.parametrize("size", [5000, 2 * PIECES * PIECE_BYTES])
def test_the_digest_sees_the_size_and_a_change_in_the_middle(size: int, tmp_path: Path) -> None:
    content = np.random.default_rng(1).integers(0, 255, size, dtype=np.uint8)

    def known(*, full: bool = False) -> str:
        (tmp_path / "a").write_bytes(content.tobytes())
        return ReadAt(tmp_path / "a").digest(full=full)

    before, before_full = known(), known(full=True)
    assert known() == before
    content[size // 2 : size // 2 + size // PIECES] ^= 1
    assert known() != before
    content[size // 2 : size // 2 + size // PIECES] ^= 1
    content[size // 3] ^= 1
    assert known(full=True) != before_full
    content = np.append(content, np.uint8(0))
    assert known() != before


@pytest.mark.pure
def test_a_file_that_has_changed_or_was_cut_is_named(tmp_path: Path) -> None:
    path = raw(tmp_path / "a.bin", TOKENS[:400])
    file, copied = TokenFile(path), pickle.loads(pickle.dumps(TokenFile(path)))
    assert (copied.tokens(0, 9) == TOKENS[:9]).all()
    os.utime(path, ns=(0, 12345))
    with pytest.raises(DataError, match=r"a.bin has changed since the run began; put the file back"):
        file.tokens(0, 9)
    opened = TokenFile(path)
    opened.tokens(0, 9)
    raw(path, TOKENS[:100])
    with pytest.raises(DataError, match=r"a.bin ends after 200 bytes, and had 800 when the run began"):
        opened.tokens(90, 120)
    path.unlink()
    with pytest.raises(DataError, match=r"cannot read .*a.bin \(No such file"):
        TokenFile(path)


def read_all(pattern: str) -> None:
    made = token_files(pattern, 16, vocabulary=65_000)
    for index in range(len(made.train)):
        made.train[index]


@pytest.mark.pure
@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda path: path.write_bytes(b"123"), "has 3 bytes of tokens of 2 each .uint16., and its size is no multip"),
        (lambda path: llm_c(path).write_bytes(llm_c(path).read_bytes()[:-2]), "should be 2,000 of them: the file is"),
        (lambda path: raw(megatron(path), TOKENS[:-1]), "should be 2,000 of them: the file is"),
        (lambda path: (raw(path), path.with_suffix(".idx").write_bytes(b"MMIDIDX")), "idx is too short for an index"),
        (lambda path: (raw(path), path.with_suffix(".idx").write_bytes(bytes(99))), "idx is no index of whole tokens"),
        (lambda path: megatron(path, code=6), "idx is no index of whole tokens"),
        (
            lambda path: path.with_suffix(".idx").write_bytes(megatron(path).with_suffix(".idx").read_bytes()[:-1]),
            "idx is cut: it says 7 sequences",
        ),
        (lambda path: raw(path, TOKENS[:5]), "the training tokens are too few: 5 in 1 files leave no window of 17"),
        (lambda path: raw(path, TOKENS + 65_000 - 499), "has the token 65000, after token [0-9,]+ of .*a.bin"),
    ],
)  # fmt: skip
def test_what_is_no_token_file_is_said_in_one_sentence(write: Any, words: str, tmp_path: Path) -> None:
    write(tmp_path / "a.bin")
    with pytest.raises(DataError, match=words):
        read_all(str(tmp_path / "a.bin"))


@pytest.mark.pure
def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    pattern = str(raw(tmp_path / "a.bin"))
    with pytest.raises(DataError, match=r"no file is there for .*none\*"):
        token_files(str(tmp_path / "none*"), 16)
    for held_out in (0, 1, 1.5):
        with pytest.raises(RecipeError, match="'held_out' is"):
            token_files(pattern, 16, held_out)
    with pytest.raises(RecipeError, match="'context' is 0"):
        token_files(pattern, 0)


@pytest.mark.pure
def test_the_digest_is_that_of_the_tokens_and_the_windows(tmp_path: Path) -> None:
    def known(path: Path, *args: Any, **options: Any) -> str:
        return digest(token_files(str(path), *args, **options))

    here, there = raw(tmp_path / "a.bin"), raw(tmp_path / "b.bin")
    assert known(here, 16) == known(there, 16)
    others = [known(here, 15), known(here, 16, 0.1), known(raw(tmp_path / "c.bin", TOKENS[::-1]), 16)]
    assert len({known(here, 16), *others}) == 4


SIZED = """
import resource, sys, time, torch
from instep.data.token_files import token_files
began = time.perf_counter()
data = token_files(sys.argv[1], 1024)
data.train.digest
opened_s = time.perf_counter() - began
for index in torch.randint(len(data.train), (20_000,)).tolist():
    data.train[index]
print(opened_s, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.processes
def test_a_hundred_gigabytes_of_tokens_take_no_more_memory_than_a_megabyte(tmp_path: Path) -> None:
    small, large = tmp_path / "small.bin", tmp_path / "large.bin"
    for path, size in ((small, 1 << 20), (large, 100 << 30)):
        path.touch()
        os.truncate(path, size)  # sparse: it takes no room on the disk
    memory = {}
    for path in (small, large):
        ran = subprocess.run([sys.executable, "-c", SIZED, path], capture_output=True, text=True, check=True)
        memory[path] = int(ran.stdout.split()[1])
    assert memory[large] <= 1.05 * memory[small]


@pytest.mark.processes
def test_training_on_token_files_has_one_digest_for_any_number_of_workers(tmp_path: Path) -> None:
    llm_c(tmp_path / "a-1.bin"), llm_c(tmp_path / "a-2.bin", TOKENS[::-1])
    model = {"vocabulary": 500, "context": 16, "width": 16, "depth": 1, "heads": 1}
    data = {"pattern": str(tmp_path / "a-*.bin"), "context": 16}
    recipe = Recipe(
        model={"use": "instep.models.gpt:GPT", "args": model},
        objective="instep.objectives.language:NextToken",
        data={"use": "instep.data.token_files:token_files", "args": data},
        batch=8, microbatches=4, steps=4,
    )  # fmt: skip
    digests = {train_here(recipe, Team(workers=workers), tmp_path / f"{workers}").digest for workers in (1, 3)}
    assert len(digests) == 1
