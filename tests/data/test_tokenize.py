"""Texts made token files: each document whole and once, the same bytes by any processes and after any death."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from instep import Recipe, Team
from instep.cli import main
from instep.data import documents, several_processes, tokenizing
from instep.data.encoder import Encoder, train
from instep.data.packing import packed_token_files
from instep.data.token_files import TokenFile, token_files
from instep.data.tokenizer import digest_of
from instep.data.tokenizing import Tokenized, Wanted, tokenize
from instep.errors import DataError, InstepError, ResourceError, WorkerError
from instep.models import GPT
from instep.objectives.language import NextToken
from instep.worker.model import check_tokenizer
from support.full_disk import full_disk
from support.harness import train_here
from support.sentences import one_sentence

TEXTS = [f"Text {n}: the {'quick brown ' * (n % 7)}fox, naïve\n and {n * n} dogs." for n in range(60)]

KINDS = ("bin", "idx", "json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of JSON lines."""
    folder = tmp_path_factory.mktemp("texts")
    for n, some in enumerate((TEXTS[:25], [*TEXTS[25:40], ""], TEXTS[40:])):
        lines = (json.dumps({"id": 1, "text": text}) + "\n" for text in some)
        (folder / f"{n}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train(TEXTS, 300, "<|endoftext|>", folder)
    return folder / "tokenizer.json"


def wanted(texts: Path, out: Path, tokenizer: Path | None, **other: Any) -> Wanted:
    return Wanted([str(texts / "*.jsonl")], out, tokenizer, **{"part_bytes": 700, **other})


def content(out: Path) -> dict[str, bytes]:
    return {kind: Path(f"{out}.{kind}").read_bytes() for kind in KINDS}


def refusal(call: Callable[[], object], kind: type[InstepError] = DataError) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert one_sentence(caught.value.message), caught.value.message
    return caught.value.message


def dies(work: Callable[[], object]) -> bool:
    """Whether the work, in a process of its own, kills that."""
    if (child := os.fork()) == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


LINES = st.lists(st.text(st.sampled_from("ab é"), max_size=9), max_size=12)


@pytest.mark.pure
@given(st.lists(LINES, min_size=1, max_size=3), st.integers(1, 30), st.booleans())
def test_parts_of_any_size_have_each_line_once_and_in_order(
    tmp_path_factory: pytest.TempPathFactory, files: list[list[str]], size: int, ended: bool
) -> None:
    folder = tmp_path_factory.mktemp("lines")
    for n, lines in enumerate(files):
        (folder / f"{n}.txt").write_text("\n".join(lines) + "\n" * ended, encoding="utf-8")
    every = documents.sources([str(folder / "*.txt")], "line")
    found = [text for part in documents.parts(every, size) for text in documents.texts(every, part, "text")]
    assert found == [line for lines in files for line in lines if line.strip()]


@pytest.mark.pure
def test_whole_files_and_small_ones_together_are_documents(tmp_path: Path) -> None:
    for n in range(12):
        (tmp_path / f"{n}.txt").write_text(f"{n}\nend", encoding="utf-8")
    every = documents.sources([str(tmp_path / "*")])
    parts = documents.parts(every, 10)
    assert len(parts) == 6
    assert [text for part in parts for text in documents.texts(every, part, "")] == [f"{n}\nend" for n in range(12)]


@pytest.mark.pure
@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"body": "x"}', "line 3 of {} has no field 'text' (it has 'body'); say with --field"),
        (b'["x"]', "line 3 of {} has no field 'text' (it is a list)"),
        (b'{"text": 3}', "the field 'text' in line 3 of {} is of type int"),
        (b'{"text": "x', "line 3 of {} is no JSON"),
        (b'{"text": "\\ud800"}', "line 3 of {} has '\\ud800', half of a surrogate pair"),
        (b'{"text": "\xff"}', "line 3 of {} is no JSON"),
    ],
)
def test_a_line_that_is_no_document_is_named(tmp_path: Path, tokenizer: Path, line: bytes, said: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x"}\n\n' + line + b'\n{"text": "y"}\n')
    message = refusal(lambda: tokenize(wanted(tmp_path, tmp_path / "tok", tokenizer, part_bytes=5)))
    assert said.format(tmp_path / "a.jsonl") in message


@pytest.mark.pure
def test_texts_that_are_none_are_refused(tmp_path: Path, tokenizer: Path) -> None:
    def made(pattern: str, **other: Any) -> Callable[[], object]:
        return lambda: tokenize(Wanted([str(tmp_path / pattern)], tmp_path / "tok", tokenizer, **other))

    assert "no file is there for" in refusal(made("*.txt"))
    (tmp_path / "a.txt").write_bytes(b"\n\n")
    assert "there is no text in 1 files" in refusal(made("*.txt", by="line"))
    (tmp_path / "b.latin").write_bytes(b"na\xefve")
    assert "b.latin is no UTF-8" in refusal(made("*.latin"))
    (tmp_path / "c.jsonl").write_bytes(b"\x1f\x8b123456789")
    assert "is packed by gzip" in refusal(made("*.jsonl"))


@pytest.mark.pure
def test_a_tokenizer_that_is_none_or_draws_is_refused(texts: Path, tokenizer: Path, tmp_path: Path) -> None:
    def made(tokenizer: Path | None, **other: Any) -> Callable[[], object]:
        return lambda: tokenize(wanted(texts, tmp_path / "tok", tokenizer, **other))

    assert "there is no tokenizer at" in refusal(made(tmp_path / "none.json"))
    assert "has no token '<end>' to end a document with" in refusal(made(tokenizer, separator="<end>"))
    assert "--train is 256; a vocabulary has at least 257" in refusal(made(None, train=256))
    (tmp_path / "bad.json").write_text("{")
    assert "is no file of a tokenizer" in refusal(made(tmp_path / "bad.json"))
    table = json.loads(tokenizer.read_bytes())
    table["model"]["dropout"] = 0.1
    (tmp_path / "drawn.json").write_text(json.dumps(table))
    assert "leaves merges out by chance (dropout 0.1)" in refusal(made(tmp_path / "drawn.json"))


@pytest.mark.processes
def test_the_files_are_the_same_for_any_number_of_processes_and_any_parts(texts: Path, tmp_path: Path) -> None:
    made = []
    for processes, size in ((1, 700), (2, 700), (3, 700), (2, 1 << 20)):
        out = tmp_path / f"{processes} {size}" / "tok"
        found = tokenize(wanted(texts, out, None, train=300, processes=processes, part_bytes=size))
        assert (found.documents, found.empty, found.parts_found) == (len(TEXTS), 1, 0)
        made.append(content(out))
        assert {path.name for path in out.parent.iterdir()} == {f"tok.{kind.split('/')[0]}" for kind in KINDS}
    said = made.pop()
    said["json"] = re.sub(rb'"parts": \d+', rb'"parts": 10', said["json"])  # alone of the parts
    assert [re.sub(rb'"parts": \d+', rb'"parts": 10', one.pop("json")) for one in made] == [said.pop("json")] * 3
    assert made == [said] * 3


@pytest.mark.pure
@pytest.mark.parametrize("separator", [None, "none", "Ġ"])
def test_what_was_made_is_read_back_document_by_document(
    texts: Path, tokenizer: Path, tmp_path: Path, separator: str | None
) -> None:
    found = tokenize(wanted(texts, tmp_path / "tok", tokenizer, separator=separator))
    encoder, file = Encoder(tokenizer.parent), TokenFile(tmp_path / "tok.bin")
    ends = file.document_ends()
    assert ends is not None
    assert (len(ends), file.count, file.dtype) == (len(TEXTS), found.tokens, np.dtype("<u2"))
    assert found.text_bytes == sum(len(text.encode()) for text in TEXTS)
    index = (tmp_path / "tok.idx").read_bytes()[34 + 4 * len(ends) :]
    pointers = np.frombuffer(index[: 8 * len(ends)], "<i8")  # of documents, in bytes, which others read
    assert (pointers == 2 * np.array([0, *ends[:-1]])).all()
    after = [] if separator == "none" else [encoder.separator(separator)]
    for text, (start, stop) in zip(TEXTS, itertools.pairwise([0, *ends.tolist()]), strict=True):
        assert file.tokens(start, stop).tolist() == [*encoder.encode([text])[0], *after]


@pytest.mark.pure
def test_a_large_vocabulary_takes_four_bytes(texts: Path, tokenizer: Path, tmp_path: Path) -> None:
    table = json.loads(tokenizer.read_bytes())
    table["model"]["vocab"]["far"] = 1 << 16
    (tmp_path / "large.json").write_text(json.dumps(table), encoding="utf-8")
    assert tokenize(wanted(texts, tmp_path / "tok", tmp_path / "large.json")).dtype == "int32"
    assert tokenize(wanted(texts, tmp_path / "small", tokenizer)).dtype == "uint16"
    large, small = TokenFile(tmp_path / "tok.bin"), TokenFile(tmp_path / "small.bin")
    assert large.dtype == np.dtype("<i4")
    assert large.tokens(0, large.count).tolist() == small.tokens(0, small.count).tolist()


@pytest.mark.processes
def test_killed_at_any_write_it_goes_on_to_the_same_files(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenize(wanted(texts, tmp_path / "whole" / "tok", None, train=300, part_bytes=3000))
    expected = content(tmp_path / "whole" / "tok")
    real, left = os.replace, [0]

    def replace(source: Any, target: Any) -> None:
        real(source, target)
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(os, "replace", replace)
    for number in itertools.count(1):
        out, left[0] = tmp_path / f"{number}" / "tok", number
        died = dies(partial(tokenize, wanted(texts, out, None, train=300, part_bytes=3000)))
        left[0] = 0
        again = tokenize(wanted(texts, out, None, train=300, part_bytes=3000, processes=1 + number % 2))
        assert content(out) == expected
        assert {path.name for path in out.parent.iterdir()} == {f"tok.{kind.split('/')[0]}" for kind in KINDS}
        if not died:
            break
        assert again.parts_found >= min((number - 2) // 2, again.parts)  # two writes, then each part's two
    assert number >= 10


@pytest.mark.processes
def test_killed_with_several_processes_what_is_done_is_not_done_again(
    texts: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenize(wanted(texts, tmp_path / "whole", tokenizer))
    reports = itertools.count(1)

    def killed(line: str) -> None:
        if next(reports) == 4:
            os.kill(os.getpid(), signal.SIGKILL)

    assert dies(lambda: tokenize(wanted(texts, tmp_path / "tok", tokenizer, processes=3), killed))
    (tmp_path / "tok.parts" / "000007.tokens.0a1b2c3d").write_bytes(b"of one that was killed")
    left = []
    again = tokenize(
        wanted(texts, tmp_path / "tok", tokenizer, processes=1),
        lambda line: left.extend((tmp_path / "tok.parts").glob("*.tokens.*") if "MB/s" in line else ()),
    )
    assert again.parts_found >= 4
    assert left == []
    assert content(tmp_path / "tok") == content(tmp_path / "whole")
    monkeypatch.setattr(tokenizing, "_make_part", lambda *_: pytest.fail("all is there"))
    assert tokenize(wanted(texts, tmp_path / "tok", tokenizer)).parts_found == again.parts


@pytest.mark.processes
def test_a_process_that_dies_or_fails_ends_all_with_one_sentence(
    texts: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = tokenizing._make_part

    def killed(job: Any, number: int) -> None:
        if number == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        real(job, number)

    monkeypatch.setattr(tokenizing, "_make_part", killed)
    message = refusal(lambda: tokenize(wanted(texts, tmp_path / "tok", tokenizer, processes=2)), WorkerError)
    assert "a process that makes texts tokens died (exit status -9)" in message

    def full(job: Any, number: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tokenizing, "_make_part", full)
    message = refusal(lambda: tokenize(wanted(texts, tmp_path / "tok", tokenizer, processes=2)), ResourceError)
    assert "cannot be written (No space left on device)" in message
    monkeypatch.setattr(tokenizing, "_make_part", real)
    assert tokenize(wanted(texts, tmp_path / "tok", tokenizer, processes=2)).parts_found >= 1
    assert "the field 'id' in line " in refusal(
        lambda: tokenize(wanted(texts, tmp_path / "other", tokenizer, processes=2, field="id"))
    )
    assert several_processes.multiprocessing.active_children() == []


@pytest.mark.processes
def test_a_full_disk_is_one_sentence_and_what_is_done_stays(tokenizer: Path, tmp_path: Path) -> None:
    lines = (json.dumps({"text": f"{n} dogs" * 1000}) + "\n" for n in range(40))
    (tmp_path / "a.jsonl").write_text("".join(lines))
    with full_disk(tmp_path, 192 << 10) as disk:
        out = disk / "tok"
        message = refusal(
            lambda: tokenize(wanted(tmp_path, out, tokenizer, processes=2, part_bytes=30_000)), ResourceError
        )
        assert f"{out} cannot be written (No space left on device); make room" in message
        assert list(disk.glob("tok.parts/*.sizes"))
        assert not list(disk.glob("tok.[bij]*"))


@pytest.mark.pure
def test_files_of_other_settings_are_neither_taken_nor_replaced(texts: Path, tokenizer: Path, tmp_path: Path) -> None:
    out = tmp_path / "tok"
    tokenize(wanted(texts, out, tokenizer))
    before = content(out)
    for other, what in (
        ({"separator": "none"}, "another separator"),
        ({"field": "id"}, "another field"),
        ({"by": "line"}, "another field"),
    ):
        assert f"was made with {what}" in refusal(
            lambda other=other: tokenize(wanted(texts, out, tokenizer, **other))  # type: ignore[misc]
        )
    fewer = Wanted([str(texts / "[01].jsonl")], out, tokenizer)
    assert "with other sources than this" in refusal(lambda: tokenize(fewer))
    assert content(out) == before
    (tmp_path / "mine.bin").write_bytes(b"1234")
    assert "mine.bin is there, and was not made by" in refusal(
        lambda: tokenize(wanted(texts, tmp_path / "mine", tokenizer))
    )
    (tmp_path / "own.parts").mkdir()
    (tmp_path / "own.parts" / "thesis.txt").write_text("precious")
    assert "own.parts is there, and was not made by" in refusal(
        lambda: tokenize(wanted(texts, tmp_path / "own", tokenizer))
    )
    assert (tmp_path / "own.parts" / "thesis.txt").read_text() == "precious"


@pytest.fixture
def made(texts: Path, tokenizer: Path, tmp_path: Path) -> Tokenized:
    return tokenize(wanted(texts, tmp_path / "tok", tokenizer))


@pytest.mark.pure
def test_data_of_token_files_know_their_tokenizer_and_vocabulary(
    made: Tokenized, tokenizer: Path, tmp_path: Path
) -> None:
    for data in (token_files(f"{made.path}.bin", 16, 0.2), packed_token_files(f"{made.path}.bin", 32, 0.2)):
        samples: Any = data.train
        codec: Any = data.codec
        assert samples.vocabulary == made.vocabulary
        assert codec.digest == made.tokenizer == digest_of(tokenizer.parent)
        assert codec.bytes_per_token == made.text_bytes / made.tokens
        assert codec.decode(codec.encode("naïve dogs")) == "naïve dogs"
        assert codec.end == made.separator
        model = nn.Linear(1, 1)
        model.tokenizer_digest = "0" * 64  # type: ignore[assignment]
        assert "of another tokenizer" in refusal(partial(check_tokenizer, model, codec))
    given: Any = token_files(f"{made.path}.bin", 16, vocabulary=999).train
    assert given.vocabulary == 999


@pytest.mark.pure
def test_files_that_are_not_what_was_made_are_refused(
    made: Tokenized, texts: Path, tmp_path: Path, tokenizer: Path
) -> None:
    other = tmp_path / "other"
    tokenize(wanted(texts, other, None, train=280))
    several = [f"{made.path}.bin", f"{other}.bin"]
    assert "is of another tokenizer" in refusal(lambda: token_files(several, 16))
    assert "is of another tokenizer" in refusal(lambda: packed_token_files(several[0], 16, several[1]))
    (tmp_path / "tok.tokenizer" / "tokenizer.json").write_bytes(
        (tmp_path / "other.tokenizer" / "tokenizer.json").read_bytes()
    )
    assert "is another one" in refusal(lambda: token_files(several[0], 16))
    (tmp_path / "tok.tokenizer" / "tokenizer.json").unlink()
    assert "is not there" in refusal(lambda: token_files(several[0], 16))
    for kind in ("bin", "idx"):
        (tmp_path / f"other.{kind}").write_bytes((tmp_path / f"tok.{kind}").read_bytes())
    assert "beside it tells of" in refusal(lambda: token_files(several[1], 16))
    (tmp_path / "other.json").write_text('{"tokens": 3}')  # anybody's
    assert token_files(several[1], 16).codec is None


@pytest.mark.processes
def test_one_digest_for_any_number_of_workers_on_what_was_made(made: Tokenized, tmp_path: Path) -> None:
    recipe = Recipe(
        model=lambda: GPT(vocabulary=made.vocabulary, context=16, width=16, heads=2, depth=1),
        data=lambda: token_files(f"{made.path}.bin", 16, 0.2),
        objective=NextToken(), optimizer="torch.optim:AdamW", batch=4, microbatches=4, steps=3,
    )  # fmt: skip
    digests = {train_here(recipe, Team(workers=workers), tmp_path / f"{workers}").digest for workers in (1, 2, 3)}
    assert len(digests) == 1


@pytest.mark.processes
def test_the_command_makes_files_and_says_what_they_are(
    texts: Path, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--out", str(tmp_path / "tok.bin"), "--processes", "2"]
    assert main(["tokenize", str(texts / "*.jsonl"), "--tokenizer", str(tokenizer), *flags]) == 0
    said = capsys.readouterr()
    assert re.search(r"tok\.bin has 60 documents \(1 empty ones are left out\) in [\d,]+ tokens of uint16", said.out)
    assert said.err == ""
    assert main(["tokenize", str(texts / "*.jsonl"), "--tokenizer", str(tokenizer), *flags, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["documents"], found["parts_found"], found["parts"]) == (60, 1, 1)
    assert main(["tokenize", str(texts / "*.jsonl"), "--tokenizer", str(tokenizer.parent), *flags, "--field", "x"]) == 1
    assert "with another field than this" in capsys.readouterr().err


@pytest.mark.pure
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("a.txt --out tok", "give either --tokenizer"),
        ("a.txt --out tok --tokenizer t --train 300", "give either --tokenizer"),
        ("a.txt --out tok --train unigram:300", "only byte-level BPE is trained"),
        ("a.txt --out tok --train many", "--train is 'many'"),
        ("a.txt --out tok --train 300 --by word", "--by is 'word'; it must be one of json, line, file"),
        ("a.txt --out tok --train 300 --processes 0", "--processes is 0"),
        ("--out tok --train 300", "no texts are named"),
        ("a.txt --train 300", "--out"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(flags: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tokenize", *flags.split()]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.pure
def test_a_missing_library_names_its_extra(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    message = refusal(lambda: tokenize(wanted(texts, tmp_path / "tok", None, train=300)), InstepError)
    assert "pip install 'instep[hf]'" in message
