"""The same numbered samples in files of each format, and a model that counts how often it has seen each of them."""

from __future__ import annotations

import functools
import io
import json
import struct
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from instep.data import Data
from instep.data.hugging_face import from_disk
from instep.data.lines import jsonl, text_lines
from instep.data.packing import packed_token_files
from instep.data.parquet import parquet
from instep.data.tars import tars
from instep.data.token_files import token_files, write_index
from instep.data.tokenizer import save_bytes
from instep.data.tokenizing import Wanted, tokenize
from instep.objectives import objective
from instep.packed import PackedTokens
from instep.recipe import Recipe
from instep.record import checkpoint
from instep.record.folder import RunFolder
from support.harness import Outcome

try:
    import datasets
except ImportError:  # it is in no extra that tests need
    datasets = None

Spans = Sequence[tuple[int, int]]

SAMPLES = 60
SHARDS: Spans = ((0, 9), (9, 10), (10, 34), (34, 60))
"""The numbers that lie in each file, from and to."""

CONTEXT = 3
END = 50_000
"""The token that ends a document."""


class Seen(nn.Module):
    """`seen[n]` is how often the sample of number n was trained on; the weight is trained by what it gives."""

    seen: Tensor

    def __init__(self, samples: int = SAMPLES) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5]))
        self.register_buffer("seen", torch.zeros(samples, dtype=torch.int64))

    def forward(self, numbers: Tensor) -> Tensor:
        if self.training:
            self.seen += torch.bincount(numbers, minlength=len(self.seen))
        return self.weight * numbers / len(self.seen)


@objective
def distance(model: nn.Module, numbers: Tensor) -> Tensor:
    return (model(numbers) - 0.3).square().sum()


def recipe(data: Any, *, epochs: int = 2, **fields: Any) -> Recipe:
    """Goes through the samples so often, by batches of 10 in 5 microbatches."""
    defaults: dict[str, Any] = {
        "model": Seen, "objective": distance, "data": data, "batch": 10, "microbatches": 5,
        "steps": epochs * SAMPLES // 10, "optimizer": functools.partial(torch.optim.AdamW, lr=0.01),
        "buffers": {"seen": "sum"},
    }  # fmt: skip
    return Recipe(**{**defaults, **fields})


def seen(run: Outcome) -> set[int]:
    """How often the run has trained on its samples, each number that there is."""
    path, _ = RunFolder(run.path).newest_checkpoint()
    assert path is not None
    return set(checkpoint.load(path).model_state["seen"].tolist())


def by_shard(folder: Path, ending: str, shards: Spans, write: Callable[[Path, range], Any]) -> str:
    """Writes the files; their pattern."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (start, stop) in enumerate(shards):
        write(folder / f"part-{number + 8}{ending}", range(start, stop))  # part-10 comes after part-9
    return str(folder / f"*{ending}")


def number_of(record: Any) -> Tensor:
    if isinstance(record, dict):
        record = record["number"] if "number" in record else record["cls"]
    return torch.tensor(int(record))


def in_json_lines(folder: Path, shards: Spans = SHARDS) -> Callable[[], Data]:
    def write(path: Path, numbers: range) -> None:
        path.write_text("".join(json.dumps({"number": number, "text": "é" * number}) + "\n" for number in numbers))

    return functools.partial(jsonl, by_shard(folder, ".jsonl", shards, write), 0, map=number_of)


def in_text(folder: Path, shards: Spans = SHARDS) -> Callable[[], Data]:
    pattern = by_shard(folder, ".txt", shards, lambda path, numbers: path.write_text("\n".join(map(str, numbers))))
    return functools.partial(text_lines, pattern, 0, map=number_of)


def in_parquet(folder: Path, shards: Spans = SHARDS) -> Callable[[], Data]:
    def write(path: Path, numbers: range) -> None:
        kind = pyarrow.list_(pyarrow.int32())
        columns = {
            "number": list(numbers),
            "tokens": pyarrow.array([[number] * (number % 3) for number in numbers], kind),
        }
        pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=7)

    pattern = by_shard(folder, ".parquet", shards, write)
    return functools.partial(parquet, pattern, 0, together=2, map=number_of)


def in_tars(folder: Path, shards: Spans = SHARDS) -> Callable[[], Data]:
    def write(path: Path, numbers: range) -> None:
        with tarfile.open(path, "w") as tar:
            for number in numbers:
                add(tar, f"in/{number:03}.cls", str(number).encode())
                add(tar, f"in/{number:03}.txt", b"x" * number)

    return functools.partial(tars, by_shard(folder, ".tar", shards, write), 0, map=number_of)


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """A file of that content."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def in_hugging_face(folder: Path, shards: Spans = SHARDS) -> Callable[[], Data]:
    numbers = range(shards[-1][1])
    rows = {"number": list(numbers), "tokens": [[number] * (number % 3) for number in numbers]}
    datasets.Dataset.from_dict(rows).save_to_disk(str(folder), num_shards=3)
    return functools.partial(from_disk, str(folder), 0, map=number_of)


# --- tokens: a sample is a window of CONTEXT + 1 of them, or a packed row of one document, which tells its number -----


class Numbers(Dataset[Tensor]):
    """The numbers of samples, which `of` tells."""

    def __init__(self, samples: Any, of: Callable[[Any], int]):
        self._samples, self._of = samples, of

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor(self._of(self._samples[index]))

    @property
    def digest(self) -> str:
        found: str = self._samples.digest
        return found


def numbers_in(read: Callable[[], Data], of: Callable[[Any], int]) -> Data:
    return Data(Numbers(read().train, of))


def first_token(window: Tensor) -> int:
    return int(window[0])


def windows(pattern: str, of: Callable[[Any], int] = first_token) -> Callable[[], Data]:
    """Of token files; the last one is held out."""
    return functools.partial(numbers_in, functools.partial(token_files, pattern, CONTEXT, 1e-9), of)


def with_one_held_out(numbers: range, shards: Spans) -> range:
    """Those of a file, and in the last one one more."""
    return range(numbers.start, numbers.stop + (numbers.stop == shards[-1][1]))


def tokens_of(numbers: range) -> np.ndarray[Any, Any]:
    """Each number is the first of a window's tokens; 7 are the others, and what the last window ends with."""
    rows = [token for number in numbers for token in (number, *[7] * (CONTEXT - 1))]
    return np.array([*rows, 7], dtype="<u2")


def in_nanogpt(folder: Path, shards: Spans = SHARDS) -> Callable[[], Data]:
    def write(path: Path, numbers: range) -> None:
        tokens_of(with_one_held_out(numbers, shards)).tofile(path)

    return windows(by_shard(folder, ".bin", shards, write))


def in_llm_c(folder: Path, shards: Spans = SHARDS) -> Callable[[], Data]:
    def write(path: Path, numbers: range) -> None:
        tokens = tokens_of(with_one_held_out(numbers, shards))
        path.write_bytes(struct.pack("<3i", 20240520, 1, len(tokens)).ljust(1024, b"\0") + tokens.tobytes())

    return windows(by_shard(folder, ".bin", shards, write))


def in_megatron(folder: Path, shards: Spans = SHARDS) -> Callable[[], Data]:
    def write(path: Path, numbers: range) -> None:
        tokens = tokens_of(with_one_held_out(numbers, shards))
        tokens.tofile(path)
        with open(path.with_suffix(".idx"), "wb") as file:
            write_index(file, tokens.dtype, 1, lambda: [np.array([len(tokens)], dtype=np.int32)])

    return windows(by_shard(folder, ".bin", shards, write))


def in_own_tokens(folder: Path, shards: Spans = SHARDS) -> Callable[[], Data]:
    """As ``instep tokenize`` makes them of texts, a document a line: signs, of which three are a number."""
    folder.mkdir(parents=True, exist_ok=True)
    save_bytes(folder / "bytes")

    def write(path: Path, numbers: range) -> None:
        text = path.with_suffix(".txt")
        text.write_text("".join(map(in_three, [*with_one_held_out(numbers, shards), 0])))
        tokenize(Wanted([str(text)], path.with_suffix(""), tokenizer=folder / "bytes", by="line", separator="none"))

    return windows(by_shard(folder, ".bin", shards, write), number_in_three)


FIRST_SIGN = 64


def in_three(number: int) -> str:
    """Three signs, and the end of a line."""
    return "".join(chr(FIRST_SIGN + part) for part in divmod(number, 60)) + "!\n"


def number_in_three(window: Tensor) -> int:
    return 60 * (int(window[0]) - FIRST_SIGN) + int(window[1]) - FIRST_SIGN


def in_packed_rows(folder: Path, shards: Spans = SHARDS) -> Callable[[], Data]:
    """Each document fills a row: a number and one, two tokens, and the end."""

    def write(path: Path, numbers: range) -> None:
        np.array([[number + 1, 7, 7, END] for number in numbers], dtype="<u2").tofile(path)

    read = functools.partial(packed_token_files, by_shard(folder, ".bin", shards, write), CONTEXT, 0, separator=END)
    return functools.partial(numbers_in, read, number_in_row)


def number_in_row(row: PackedTokens) -> int:
    return int(row.inputs[0]) - 1


FORMATS: dict[str, Callable[..., Callable[[], Data]]] = {
    "jsonl": in_json_lines,
    "text": in_text,
    "parquet": in_parquet,
    "tars": in_tars,
    "tokens of nanoGPT": in_nanogpt,
    "tokens of llm.c": in_llm_c,
    "tokens of Megatron": in_megatron,
    "tokens of instep tokenize": in_own_tokens,
    "packed documents": in_packed_rows,
    **({} if datasets is None else {"hugging face": in_hugging_face}),
}
"""By name: writes the files into a folder, and gives what a recipe's `data` is to be."""

IN_ORDER = [name for name in FORMATS if name != "packed documents"]
"""Those whose samples come as they lie; documents are packed in an order keyed by a seed."""
