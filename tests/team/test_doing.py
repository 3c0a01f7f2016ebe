"""What processes say that they do, in memory that they share."""

from __future__ import annotations

import os
import time

import pytest

from instep.team.doing import TEXT_BYTES, DoingBoard
from instep.worker.replica import Replica
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
