"""``instep tokenize``: its flags, and what it shows."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, cast

from cyclopts import App

from instep.cli.flags import Settings, UsageError, refuse, whole_number
from instep.cli.helping import COMMANDS
from instep.errors import shown
from instep.record.files import json_text

if TYPE_CHECKING:
    from instep.data.documents import By
    from instep.data.tokenizing import Tokenized

_HELP = """\
Files for instep.data.token_files and instep.data.packing: OUT.bin, OUT.idx and OUT.json, with the tokenizer in \
OUT.tokenizer. They are the same bit for bit for any number of processes. What is interrupted goes on with the same \
command. Needs the hf extra."""

_BY = ("json", "line", "file")


def declare(app: App, settings: Settings) -> None:
    """Adds the command to `app`."""

    @app.command(help=f"{COMMANDS['tokenize']}\n\n{_HELP}")
    def tokenize(
        *files: str,
        out: Path,
        tokenizer: Path | None = None,
        train: str | None = None,
        field: str = "text",
        by: str | None = None,
        separator: str | None = None,
        processes: str | None = None,
        json: bool = False,
    ) -> None:
        """Tokenize.

        Parameters
        ----------
        files
            Texts: files, or patterns such as 'texts/*.jsonl' (** for any folders).
        out
            The files to make, without their endings: data/tok.
        tokenizer
            The tokenizer to take: its file tokenizer.json, or a folder that has it.
        train
            Trains one on the texts instead, a byte-level BPE of so many tokens: 8192.
        field
            Of each line's JSON, the one that holds the text.
        by
            What a document is: json (a field of each line), line, or file. By default json for .jsonl and .ndjson,
            and file for all else.
        separator
            The token after each document, such as '<|endoftext|>', or none. By default the tokenizer's own, if it has
            one.
        processes
            How many work; by default one a processor.
        json
            Prints one JSON document at the end.
        """
        refuse(settings)
        count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        count = count if processes is None else whole_number(processes, "--processes")
        if not 1 <= count <= 1024:
            raise UsageError(f"--processes is {count}; it must be from 1 to 1,024.")
        if by is not None and by not in _BY:
            raise UsageError(f"--by is {shown(by)}; it must be one of {', '.join(_BY)}.")
        if not files:
            raise UsageError("no texts are named; give files or patterns, such as 'texts/*.jsonl'.")
        if (tokenizer is None) == (train is None):
            raise UsageError("give either --tokenizer, a file or folder to take it from, or --train, such as 8192.")
        size = None if train is None else _size(train)
        tokenize_files(files, out, tokenizer, size, field, cast("By | None", by), separator, count, json)


def tokenize_files(
    files: tuple[str, ...],
    out: Path,
    tokenizer: Path | None,
    train: int | None,
    field: str,
    by: By | None,
    separator: str | None,
    processes: int,
    as_json: bool,
) -> None:
    """Makes the files and prints what they are. Raises InstepError."""
    from instep.data.tokenizing import Wanted, tokenize
    from instep.monitors.terminal import MovingLine

    out = out.with_suffix("") if out.suffix == ".bin" else out
    wanted = Wanted(files, out, tokenizer, train, field, by, separator, processes)
    with MovingLine() as line:
        found = tokenize(wanted, line.show)
    print(json_text(dataclasses.asdict(found)) if as_json else _told(found))


def _size(text: str) -> int:
    kind, colon, size = text.rpartition(":")
    if colon and kind.lower() != "bpe":
        raise UsageError(
            f"--train is {shown(text)}; only byte-level BPE is trained, since the same texts give other kinds, such as "
            f"WordPiece and Unigram, other tokens from run to run; give --train {size or 8192}, or --tokenizer."
        )
    return whole_number(size, "--train")


def _told(found: Tokenized) -> str:
    """A sentence or two."""
    ends = 0 if found.separator is None else found.documents
    left_out = f" ({found.empty:,} empty ones are left out)" if found.empty else ""
    text = (
        f"{found.path}.bin has {found.documents:,} documents{left_out} in {found.tokens:,} tokens of {found.dtype}, "
        f"below {found.vocabulary:,}: {found.text_bytes / found.tokens:.2f} bytes of text a token, "
        f"{100 * ends / found.tokens:.2f} % of them ends of documents; {found.seconds:.1f} s."
    )
    if found.parts_found:
        text += f" {found.parts_found:,} of its {found.parts:,} parts had been done before."
    return text
