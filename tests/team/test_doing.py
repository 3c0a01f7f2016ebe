"""What processes say that they do, in memory that they share."""

from __future__ import annotations

import mmap
import os
import time
from pathlib import Path

import numpy as np
import pytest

from instep.recipe import Team
from instep.team.doing import TEXT_BYTES, DoingBoard
from instep.worker.replica import Replica
from support.harness import train_here
from support.regression import regression


def test_the_last_word_of_each_is_read_with_its_moment() -> None:
    board = DoingBoard(2)
    assert board.read(1) == ("", 0)
    before = time.monotonic_ns()
    for step in range(3):
        board.write(1, f"computing step {step}")
    text, since = board.read(1)
    assert text == "computing step 2"
    assert before <= since <= time.monotonic_ns()
    assert board.read(0) == ("", 0)
    board.clear(1)
    assert board.read(1)[0] == ""


def test_a_long_word_is_cut_between_characters() -> None:
    board = DoingBoard(1)
    board.write(0, "ö" * TEXT_BYTES + "x")
    assert board.read(0)[0] == "ö" * (TEXT_BYTES // 2)
    board.write(0, "o" + "ö" * TEXT_BYTES)
    assert board.read(0)[0] == "o" + "ö" * ((TEXT_BYTES - 1) // 2)


def test_a_word_with_a_path_that_is_no_text_harms_nobody() -> None:
    board = DoingBoard(1)
    board.write(0, os.fsdecode(b"loading runs/\xff"))
    assert board.read(0)[0] == "loading runs/?"


@pytest.mark.processes
def test_what_another_process_writes_meanwhile_is_read_whole() -> None:
    board, texts = DoingBoard(1), ["a" * 100, "b" * 37, "c" * 120]
    pid = os.fork()
    if not pid:
        for _ in range(20_000):
            for text in texts:
                board.write(0, text)
        os._exit(0)
    read: set[str] = set()
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        read.add(board.read(0)[0])
    assert read <= {"", *texts}
    assert board.read(0)[0] == texts[-1]


def test_a_replica_tells_what_it_does() -> None:
    told: list[str] = []
    replica = Replica(regression(), "cpu", tell=told.append)
    assert told == ["building the data set", "building the model", "building the optimizer", "waiting for the team"]
    replica.batch(0, 1)
    assert told[-1] == replica.doing == "loading step 1, microbatch 1"


@pytest.mark.processes
def test_a_step_says_no_more_than_two_words_for_a_microbatch_and_one_for_the_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them costs about a microsecond."""
    said, write = np.frombuffer(mmap.mmap(-1, 16), np.int64), DoingBoard.write  # in common with what is forked

    def counted(board: DoingBoard, process: int, text: str) -> None:
        said[process] += 1
        write(board, process, text)

    monkeypatch.setattr(DoingBoard, "write", counted)
    counts = []
    for steps in (4, 14):
        said[:] = 0
        train_here(regression(steps=steps), Team(workers=2, balance="off"), tmp_path / f"{steps}")
        counts.append(said.copy())
    assert (counts[1] - counts[0] <= 10 * (2 * 2 + 1)).all(), "of 4 microbatches each worker has 2"
