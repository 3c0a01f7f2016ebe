"""The same numbered samples in files of each format, and a model that counts how often it has seen each of them."""

from __future__ import annotations

import functools
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
from torch import Tensor, nn

from instep.data import Data
from instep.data.hugging_face import from_disk
from instep.data.lines import jsonl, text_lines
from instep.data.parquet import parquet
from instep.data.tars import tars
from instep.objectives import objective
from instep.recipe import Recipe
from instep.record import checkpoint
from instep.record.folder import RunFolder
from support.harness import Outcome

try:
    import datasets
except ImportError:  # it is in no extra that tests need
    datasets = None

SAMPLES = 60
SHARDS = ((0, 9), (9, 10), (10, 34), (34, 60))
"""The numbers that lie in each file, from and to."""


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


def by_shard(folder: Path, ending: str, write: Callable[[Path, range], Any]) -> str:
    """Writes the files; their pattern."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (start, stop) in enumerate(SHARDS):
        write(folder / f"part-{number + 8}{ending}", range(start, stop))  # part-10 comes after part-9
    return str(folder / f"*{ending}")


def number_of(record: Any) -> Tensor:
    if isinstance(record, dict):
        record = record["number"] if "number" in record else record["cls"]
    return torch.tensor(int(record))


def in_json_lines(folder: Path) -> Callable[[], Data]:
    def write(path: Path, numbers: range) -> None:
        path.write_text("".join(json.dumps({"number": number, "text": "é" * number}) + "\n" for number in numbers))

    return functools.partial(jsonl, by_shard(folder, ".jsonl", write), 0, map=number_of)


def in_text(folder: Path) -> Callable[[], Data]:
    pattern = by_shard(folder, ".txt", lambda path, numbers: path.write_text("\n".join(map(str, numbers))))
    return functools.partial(text_lines, pattern, 0, map=number_of)


def in_parquet(folder: Path) -> Callable[[], Data]:
    def write(path: Path, numbers: range) -> None:
        kind = pyarrow.list_(pyarrow.int32())
        columns = {
            "number": list(numbers),
            "tokens": pyarrow.array([[number] * (number % 3) for number in numbers], kind),
        }
        pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=7)

    pattern = by_shard(folder, ".parquet", write)
    return functools.partial(parquet, pattern, 0, together=2, map=number_of)


def in_tars(folder: Path) -> Callable[[], Data]:
    def write(path: Path, numbers: range) -> None:
        with tarfile.open(path, "w") as tar:
            for number in numbers:
                add(tar, f"in/{number:03}.cls", str(number).encode())
                add(tar, f"in/{number:03}.txt", b"x" * number)

    return functools.partial(tars, by_shard(folder, ".tar", write), 0, map=number_of)


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """A file of that content."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def in_hugging_face(folder: Path) -> Callable[[], Data]:
    rows = {"number": list(range(SAMPLES)), "tokens": [[number] * (number % 3) for number in range(SAMPLES)]}
    datasets.Dataset.from_dict(rows).save_to_disk(str(folder), num_shards=3)
    return functools.partial(from_disk, str(folder), 0, map=number_of)


FORMATS: dict[str, Callable[[Path], Callable[[], Data]]] = {
    "jsonl": in_json_lines,
    "text": in_text,
    "parquet": in_parquet,
    "tars": in_tars,
    **({} if datasets is None else {"hugging face": in_hugging_face}),
}
"""By name: writes the files into a folder, and gives what a recipe's `data` is to be."""
