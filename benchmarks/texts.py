"""Documents: ``python -m benchmarks.data texts``; `--quick` takes less of all, and saves nothing.

"packing": tokens a second of one process that makes the index of a token file whose documents are of length
exp(N(6, 1)), in rows of 2,048 inputs: separators found, documents packed, the index written; the share of the inputs
that are tokens; and tokens a second in rows that are read. "tokenize": tokens a second of `instep tokenize`, whole, on
texts of Python's standard library, repeated, with a tokenizer of 8,192 tokens that was trained on them before, by one
process and by as many as there are cores. Medians of `ROUNDS`, by turns.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from instep.data.packing import PackedRows
from instep.data.text import stdlib_sources
from instep.data.token_files import TokenFile
from instep.data.tokenizing import Wanted, tokenize

ROUNDS = 5
DOCUMENTS = 3 << 14
CONTEXT = 2_048
READ = 2_000
TEXT_BYTES = 48 << 20
END = 50_000


def documents(folder: Path, count: int) -> TokenFile:
    """A file of so many."""
    draw = np.random.default_rng(0)
    ends = np.cumsum(np.exp(draw.normal(6, 1, count)).astype(np.int64) + 2)
    tokens = draw.integers(0, END, ends[-1]).astype("<u2")
    tokens[ends - 1] = END
    tokens.tofile(folder / "documents.bin")
    return TokenFile(folder / "documents.bin")


def packed(file: TokenFile) -> dict[str, float]:
    """Tokens a second, once."""
    with tempfile.TemporaryDirectory() as index:
        rows = PackedRows([file], CONTEXT, separator=END, index=Path(index))
        rows.digest  # noqa: B018
        began = time.perf_counter()
        count = len(rows)
        made_s = time.perf_counter() - began
        chosen = np.random.default_rng(0).integers(0, count, READ).tolist()
        began = time.perf_counter()
        for row in chosen:
            rows[row]
        read_s = time.perf_counter() - began
        return {
            "packed_per_s": file.count / made_s,
            "read_per_s": READ * CONTEXT * (1 - rows.padding) / read_s,
            "real": 1 - rows.padding,
        }


def texts(folder: Path, size: int) -> str:
    """Files of so many bytes in all; their pattern."""
    source = b"\n".join(stdlib_sources()[0])
    for number, start in enumerate(range(0, size, 1 << 20)):
        at = start % (len(source) - (1 << 20))
        (folder / f"{number:03}.txt").write_bytes(source[at : at + (1 << 20)].decode(errors="ignore").encode())
    return str(folder / "*.txt")


def measured(quick: bool = False) -> dict[str, Any]:
    """Both, at least 2 M tokens a second and 99.5 % of tokens real are wanted of packing."""
    fewer, cores = (16, 1) if quick else (1, ROUNDS), len(os.sched_getaffinity(0))
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        file, pattern = documents(folder, DOCUMENTS // fewer[0]), texts(folder, TEXT_BYTES // fewer[0])
        began = time.perf_counter()
        tokenize(Wanted([pattern], folder / "trained", train=8_192, processes=cores, by="line"))
        trained_s = time.perf_counter() - began
        for turn in range(fewer[1]):
            for name, value in packed(file).items():
                found.setdefault(name, []).append(value)
            for processes in sorted({1, cores}):
                out = folder / f"{turn}-{processes}"
                taken = folder / "trained.tokenizer"
                made = tokenize(Wanted([pattern], out, tokenizer=taken, processes=processes, by="line"))
                found.setdefault(f"tokenized_per_s, {processes}", []).append(made.tokens / made.seconds)
                for path in folder.glob(f"{out.name}.*"):
                    path.unlink() if path.is_file() else None
    middle = {name: statistics.median(values) for name, values in found.items()}
    for name, value in middle.items():
        print(f"{name}: {value:,.4g}", flush=True)
    return {
        "cores": cores, "load": os.getloadavg()[0], "documents": DOCUMENTS // fewer[0],
        "text_bytes": TEXT_BYTES // fewer[0], "trained_s": trained_s, **middle, "all": found,
    }  # fmt: skip
