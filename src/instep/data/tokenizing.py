"""Texts made token files, by several processes and in parts, so that what was done before a death is not done again.

A part's tokens are in a file of their own until they are put at their place in the one of all; how long its documents
are stays beside until the end. So which parts are done is told by which files are there, and the last file is the same
whoever made which part, and when.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from instep.data import documents
from instep.data.documents import By, Piece, Source
from instep.data.encoder import END_OF_TEXT, LEAST, NO_SEPARATOR, Encoder, one_thread, take, train
from instep.data.file_index import made_alone, written_whole
from instep.data.several_processes import call_apart, in_processes
from instep.data.token_files import write_index
from instep.data.tokenized import FORMAT, beside
from instep.errors import DataError, ResourceError, shown

Told = Callable[[str], None]
"""Takes a line that says how far it is."""

TRAINED_BYTES = 1 << 30
"""Of text that a tokenizer is trained on, about: of more, parts at even distances."""

_PLAN = "plan.json"

_BATCH = 1 << 20
"""Characters that are made tokens together."""

_SIZES = struct.Struct("<8s4q")  # magic, tokens, documents, empty ones, bytes of text
_MAGIC = b"INSTEPT1"
_MOST = (1 << 31) - 1
_COPIED = 1 << 24


@dataclass(frozen=True)
class Wanted:
    """What is to be made: see ``instep tokenize --help``. Either a `tokenizer` or what `train` says."""

    patterns: Sequence[str]
    out: Path
    tokenizer: Path | None = None
    train: int | None = None
    field: str = "text"
    by: By | None = None
    separator: str | None = None
    processes: int = 1
    part_bytes: int = documents.PART_BYTES


@dataclass(frozen=True)
class Tokenized:
    """What was made. parts_found: of the `parts`, those that were done before. text_bytes: of documents, as UTF-8."""

    path: str
    tokenizer: str
    vocabulary: int
    dtype: str
    separator: int | None
    documents: int
    empty: int
    tokens: int
    text_bytes: int
    parts: int
    parts_found: int
    seconds: float


@dataclass(frozen=True)
class _Job:
    """What a process needs to know."""

    folder: Path
    sources: Sequence[Source]
    parts: Sequence[Sequence[Piece]]
    encoder: Encoder
    field: str
    separator: int | None

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype("<u2" if self.encoder.vocabulary <= 1 << 16 else "<i4")

    def part(self, number: int, kind: str) -> Path:
        return self.folder / f"{number:06}.{kind}"

    def bytes_of(self, number: int) -> int:
        return sum(end - begin for _, begin, end in self.parts[number])


def tokenize(wanted: Wanted, told: Told = lambda line: None) -> Tokenized:
    """Makes the files, or the rest of them; finds them made where they are. Raises DataError for texts or a tokenizer
    that are none and for files of other settings, ResourceError where the disk does not take them, WorkerError.
    """
    begun = time.monotonic()
    if wanted.train is not None and wanted.train < LEAST:
        raise DataError(f"--train is {wanted.train}; a vocabulary has at least {LEAST} tokens: bytes and an end.")
    every = documents.sources(wanted.patterns, wanted.by)
    try:
        settings = _settings(wanted, every)
        with _alone(_named(wanted.out, "parts"), told) as folder:
            if (known := _finished(wanted.out, settings)) is None:
                with _nothing_left(folder):
                    known = _made(wanted, every, settings, folder, told)
            else:
                known["parts_found"] = known["parts"]
            _clear(folder)
    except OSError as error:
        raise ResourceError(
            f"{wanted.out} cannot be written ({error.strerror or error}); make room, or name another place, and start "
            f"again: with the same --out what is done is not done again."
        ) from error
    return Tokenized(path=str(wanted.out), seconds=time.monotonic() - begun, **known)


def _named(out: Path, kind: str) -> Path:
    return out.with_name(f"{out.name}.{kind}")


def _settings(wanted: Wanted, every: Sequence[Source]) -> dict[str, Any]:
    """All that decides what comes out, by the name that a sentence has for it."""
    if wanted.train is None:
        assert wanted.tokenizer is not None, "the command line sees to that"
        with tempfile.TemporaryDirectory() as folder:
            take(wanted.tokenizer, Path(folder))
            encoder = Encoder(Path(folder))
            tokenizer: Any = encoder.digest
            separator: Any = encoder.separator(wanted.separator)
    else:
        tokenizer, separator = {"trained": wanted.train}, wanted.separator or END_OF_TEXT
    return {
        "tokenizer": tokenizer,
        "separator": separator,
        "field": wanted.field if any(source.by == "json" for source in every) else None,
        "sources": [
            {"name": each.path.name, "by": each.by, "bytes": each.file.size, "digest": each.file.digest()}
            for each in every
        ],
    }


@contextmanager
def _alone(folder: Path, told: Told) -> Iterator[Path]:
    """The folder of the parts, which no other process is making."""
    with made_alone(folder, wait=False) as alone:
        if alone:
            yield folder
            return
    told(f"another process is making {folder}; this one waits for it")
    with made_alone(folder):
        yield folder


@contextmanager
def _nothing_left(folder: Path) -> Iterator[None]:
    """Of an error about the input no folder is left, unless some part is done."""
    try:
        yield
    except DataError:
        if _plan(folder) is not None and not any(folder.glob("*.sizes")):
            _clear(folder)
        raise


def _finished(out: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """What was made before. Raises DataError where that is something else."""
    plan = _plan(_named(out, "parts"))
    names = [_named(out, kind) for kind in ("bin", "idx", "json", "tokenizer")]
    there = next((path for path in names if path.exists()), None)
    if there is None or (plan is not None and not names[2].exists()):
        _refuse_others(out, plan and plan["settings"], settings)
        return None
    try:
        said = json.loads(names[2].read_bytes())
        ours = isinstance(said, dict) and said.get("format") == FORMAT
    except (OSError, ValueError):
        ours = False
    if not ours:
        raise DataError(f"{there} is there, and was not made by 'instep tokenize'; name another --out.")
    _refuse_others(out, said["settings"], settings)
    if missing := next((path for path in names if not path.exists()), None):
        raise DataError(f"{missing} is not there any more; remove {names[2]} too to have all made anew.")
    return {name: said[name] for name in _FACTS}


_FACTS = (
    "tokenizer", "vocabulary", "dtype", "separator", "documents", "empty", "tokens", "text_bytes", "parts",
)  # fmt: skip


def _refuse_others(out: Path, made: dict[str, Any] | None, settings: dict[str, Any]) -> None:
    other = next((name for name in settings if made is not None and made.get(name) != settings[name]), None)
    if other is not None and made is not None:
        what = "other sources" if other == "sources" else f"another {other}"
        begun = not beside(_named(out, "bin")).exists()
        raise DataError(
            f"{out} was {'begun' if begun else 'made'} with {what} than this; name another --out, or remove "
            f"{_named(out, 'parts' if begun else '*')}."
        )


def _clear(folder: Path) -> None:
    """Removes the folder of the parts: the plan last, since it tells that the rest is of this. Raises DataError."""
    inside = sorted(folder.iterdir()) if folder.is_dir() else []
    if not (folder / _PLAN).exists() and not all(path.name.startswith(_PLAN) for path in inside):
        raise DataError(f"{folder} is there, and was not made by 'instep tokenize'; name another --out.")
    for path in inside:
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != _PLAN:
            path.unlink()
    (folder / _PLAN).unlink(missing_ok=True)
    if folder.is_dir():
        folder.rmdir()


def _plan(folder: Path) -> dict[str, Any] | None:
    try:
        plan: dict[str, Any] = json.loads((folder / _PLAN).read_bytes())
    except (OSError, ValueError):
        return None
    return plan


def _made(
    wanted: Wanted, every: Sequence[Source], settings: dict[str, Any], folder: Path, told: Told
) -> dict[str, Any]:
    plan = _plan(folder)
    if plan is None:
        _clear(folder)
        folder.mkdir(parents=True)
        plan = {"settings": settings, "part_bytes": wanted.part_bytes}
        _write(folder / _PLAN, plan)
    for path in (*folder.glob("*.tokens.*"), *folder.glob("*.sizes.*")):
        path.unlink()  # what a process was writing when it was killed
    parts = documents.parts(every, plan["part_bytes"])
    encoder = _encoder(wanted, every, parts, folder, told)
    separator = encoder.separator(wanted.separator)
    job = _Job(folder, every, parts, encoder, wanted.field, separator)
    encoder.vocabulary  # noqa: B018  (loaded once, before processes are forked)
    left = [number for number in range(len(parts)) if not job.part(number, "sizes").exists()]
    merged = _Merged(job)
    merged.go_on()
    done = total = sum(map(job.bytes_of, range(len(parts))))
    done -= sum(map(job.bytes_of, left))
    begun, before = time.monotonic(), done
    for number in in_processes(lambda number: _make_part(job, number), left, wanted.processes):
        done += job.bytes_of(number)
        merged.go_on()
        rate = (done - before) / max(1e-9, time.monotonic() - begun)
        told(
            f"{100 * done / total:.0f} % of {total / 1e6:,.0f} MB, {merged.tokens:,} tokens, {rate / 1e6:,.1f} MB/s, "
            f"{(total - done) / rate:,.0f} s left"
        )
    known = {
        "tokenizer": encoder.digest, "vocabulary": encoder.vocabulary, "dtype": job.dtype.name, "separator": separator,
        "documents": merged.documents, "empty": merged.empty, "tokens": merged.tokens, "text_bytes": merged.text_bytes,
        "parts": len(parts),
    }  # fmt: skip
    if not merged.documents:
        for path in folder.glob("*.sizes"):
            path.unlink()
        raise DataError(
            f"there is no text in {len(every)} files, from {every[0].path} on; check the pattern and the --field."
        )
    _finish(wanted.out, job, merged, {"format": FORMAT, **known, "settings": settings})
    return known | {"parts_found": len(parts) - len(left)}


def _encoder(
    wanted: Wanted, every: Sequence[Source], parts: Sequence[Sequence[Piece]], folder: Path, told: Told
) -> Encoder:
    """The tokenizer, in a folder of its own, where it stays for a process that goes on."""
    place = folder / "tokenizer"
    place.mkdir(exist_ok=True)
    if wanted.train is None:
        assert wanted.tokenizer is not None, "the command line sees to that"
        take(wanted.tokenizer, place)
    elif not (place / "tokenizer.json").exists():
        told("training the tokenizer")
        size, end = wanted.train, wanted.separator or END_OF_TEXT
        step = max(1, math.ceil(sum(each.file.size for each in every) / TRAINED_BYTES))

        def learn() -> None:
            texts = (text for part in parts[::step] for text in documents.texts(every, part, wanted.field))
            train(texts, size, None if end == NO_SEPARATOR else end, place)

        call_apart(learn, wanted.processes)
    return Encoder(place)


def _make_part(job: _Job, number: int) -> None:
    """The files of a part. The one of sizes is the last, and says that it is done."""
    sizes: list[int] = []
    empty = text_bytes = 0
    with one_thread(), written_whole(job.part(number, "tokens")) as file:
        for batch in _batches(documents.texts(job.sources, job.parts[number], job.field)):
            for text, tokens in zip(batch, job.encoder.encode(batch), strict=True):
                if not tokens:
                    empty += 1
                    continue
                if job.separator is not None:
                    tokens.append(job.separator)
                if len(tokens) > _MOST:
                    raise DataError(
                        f"a document has {len(tokens):,} tokens, and the file's format takes {_MOST:,}; it begins with "
                        f"{shown(text[:40])}, so give its file by --by line, or cut it."
                    )
                file.write(np.array(tokens, job.dtype).tobytes())
                sizes.append(len(tokens))
                text_bytes += len(text.encode())
    with written_whole(job.part(number, "sizes")) as file:
        file.write(_SIZES.pack(_MAGIC, sum(sizes), len(sizes), empty, text_bytes) + np.array(sizes, "<i4").tobytes())


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    held = 0
    for text in texts:
        batch.append(text)
        held += len(text) + 1
        if held >= _BATCH:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


class _Merged:
    """The parts put together, as far as all before them are done."""

    def __init__(self, job: _Job) -> None:
        self.job, self.path = job, job.folder / "all.tokens"
        self.next = self.tokens = self.documents = self.empty = self.text_bytes = 0

    def go_on(self) -> None:
        """Puts what parts are next, and done, at their place. Raises OSError."""
        while self.next < len(self.job.parts) and (sizes := self.job.part(self.next, "sizes")).exists():
            with open(sizes, "rb") as file:
                _, tokens, count, empty, text_bytes = _SIZES.unpack(file.read(_SIZES.size))
            part = self.job.part(self.next, "tokens")
            if part.exists():
                self._put(part, self.tokens * self.job.dtype.itemsize)
            self.tokens += tokens
            self.documents += count
            self.empty += empty
            self.text_bytes += text_bytes
            self.next += 1

    def _put(self, part: Path, place: int) -> None:
        with open(part, "rb") as read, open(os.open(self.path, os.O_CREAT | os.O_WRONLY, 0o666), "wb") as file:
            file.seek(place)
            shutil.copyfileobj(read, file, _COPIED)
            file.flush()
            os.fsync(file.fileno())
        part.unlink()

    def sizes(self) -> Iterator[np.ndarray[Any, np.dtype[np.int32]]]:
        """How many tokens each document has, part by part."""
        for number in range(len(self.job.parts)):
            yield np.frombuffer(self.job.part(number, "sizes").read_bytes()[_SIZES.size :], "<i4")


def _finish(out: Path, job: _Job, merged: _Merged, said: dict[str, Any]) -> None:
    """Puts what is made where it stays; the last file says that it is all there. Raises DataError, OSError."""
    tokens = merged.path if merged.path.exists() else _named(out, "bin")
    if (size := os.stat(tokens).st_size) != merged.tokens * job.dtype.itemsize:
        raise DataError(
            f"{tokens} has {size:,} bytes, which are not those of its parts; remove {_named(out, '*')} and start again."
        )
    if tokens == merged.path:
        os.replace(tokens, _named(out, "bin"))
    with written_whole(_named(out, "idx")) as file:
        write_index(file, job.dtype, merged.documents, merged.sizes)
    shutil.copytree(job.encoder.folder, _named(out, "tokenizer"), dirs_exist_ok=True)
    _write(beside(_named(out, "bin")), said)


def _write(path: Path, table: dict[str, Any]) -> None:
    with written_whole(path) as file:
        file.write((json.dumps(table, indent=1, ensure_ascii=False) + "\n").encode())
