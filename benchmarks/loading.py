"""What loaders read: ``python -m benchmarks.data loading``; `--quick` takes few steps, once, and saves nothing.

"read": samples a second through one worker with `LOADERS` loaders, whose objective computes next to nothing, and
through torch's `DataLoader` with as many processes over the same data set, which gives the same microbatches in the
same order to a loop that adds some of them up. "images" are work as a JPEG is: `DECODED` times an inverse cosine
transform of all 8x8 blocks of an image. "parquet" are rows of 512 token numbers and a label, in row groups of 1,000.
"tokens" are windows of 1,024 in a file of nanoGPT's.
"step": a step whose one worker computes for as long as its samples take to be read, with one loader, against the same
step with samples that cost nothing. Each is measured `ROUNDS` times, by turns, and the medians are compared; the first
steps are left out. All need a core for each process.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pyarrow import parquet as of_arrow
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import instep
from instep.data import Data, as_data
from instep.data.mixture import cursor_over
from instep.data.parquet import parquet
from instep.data.token_files import token_files
from instep.record.folder import RunFolder
from instep.record.tape import read

ROUNDS = 5
LOADERS = 1
SIDE = 96
DECODED = 8
STEP_S = 0.08
STEP_SAMPLES, STEP_MICROBATCHES, STEPS = 32, 4, 30
FIRST = 0.2
"""Share of the steps that are left out."""

QUICK = 10
"""So many times fewer steps."""


class Images(Dataset[tuple[Tensor, Tensor]]):
    """Images of which each costs so many times a decoding; with seconds, instead, so long of a processor."""

    def __init__(self, count: int, decoded: int, seconds: float = 0.0):
        self._count, self._decoded, self._seconds = count, decoded, seconds
        angle = np.outer(np.arange(8) + 0.5, np.arange(8)) * np.pi / 8
        self._waves = (np.cos(angle) / 2).astype(np.float32)
        self._coded = np.random.default_rng(0).integers(-64, 64, (3, SIDE // 8, SIDE // 8, 8, 8), np.int16)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        until = time.thread_time() + self._seconds
        for _ in range(self._decoded):
            blocks = self._waves @ self._coded.astype(np.float32) @ self._waves.T
            image = blocks.transpose(0, 1, 3, 2, 4).reshape(3, SIDE, SIDE)
        while time.thread_time() < until:
            pass
        found = torch.from_numpy(np.clip(image, 0, 255).astype(np.float32)) if self._decoded else torch.zeros(3)
        return found, torch.tensor(index % 4)


def images(folder: Path) -> Callable[[], Any]:
    """Work as of JPEGs."""
    return partial(Images, 10_000, DECODED)


def rows(folder: Path) -> Callable[[], Any]:
    """Parquet: 40,000 rows, about 80 MB."""
    draw = np.random.default_rng(0)
    for number in range(2):
        kind = pa.list_(pa.int32(), 512)
        tokens = pa.FixedSizeListArray.from_arrays(
            pa.array(draw.integers(0, 50_000, 20_000 * 512, np.int32)), type=kind
        )
        table = pa.table({"tokens": tokens, "label": pa.array(draw.integers(0, 4, 20_000))})
        of_arrow.write_table(table, folder / f"part-{number}.parquet", row_group_size=1_000)
    return partial(parquet, str(folder / "*.parquet"), 0, map=tensors_of)


def tensors_of(row: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """A row's."""
    return torch.from_numpy(row["tokens"]), torch.tensor(row["label"])


def windows(folder: Path) -> Callable[[], Any]:
    """A file of 20,000,000 tokens."""
    np.random.default_rng(0).integers(0, 50_000, 20_000_000).astype("<u2").tofile(folder / "tokens.bin")
    return partial(token_files, str(folder / "tokens.bin"), 1_024, vocabulary=50_257)


@dataclass(frozen=True)
class Kind:
    """Samples to be read. `write` gives what a recipe's `data` is to be; a step has `microbatches` of `size`."""

    write: Callable[[Path], Callable[[], Any]]
    size: int
    microbatches: int
    steps: int


KINDS = {
    "images": Kind(images, 8, 4, 50),
    "parquet": Kind(rows, 64, 4, 200),
    "tokens": Kind(windows, 64, 4, 300),
}


def cheap(model: nn.Module, batch: Any) -> Tensor:
    """Next to nothing."""
    nothing: Tensor = model(some_of(batch)) * 0
    return nothing.sum()


def some_of(batch: Any) -> Tensor:
    """Three numbers of each sample."""
    first: Tensor = batch if isinstance(batch, Tensor) else batch[0]
    return first.flatten(1)[:, :3].float()


def busy(seconds: float, model: nn.Module, batch: Any) -> Tensor:
    """So long of a processor."""
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass
    return cheap(model, batch)


def per_step_s(
    data: Any, objective: Callable[..., Tensor], size: int, microbatches: int, steps: int, loaders: int
) -> float:
    """Seconds of a step of one worker."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = instep.Recipe(
            model=partial(nn.Linear, 3, 1), objective=objective, data=data, batch=size * microbatches,
            microbatches=microbatches, steps=steps, optimizer=partial(torch.optim.SGD, lr=0.0),
        )  # fmt: skip
        run = instep.train(recipe, team=instep.Team(loaders=loaders), out=Path(folder) / "run")
        ends = [float(event["t_s"]) for event in read(RunFolder(run.path).tape_path) if event["kind"] == "merged"]
    first = int(FIRST * steps)
    return (ends[-1] - ends[first - 1]) / (steps - first)


def by_torch_s(data: Any, size: int, microbatches: int, steps: int, processes: int) -> float:
    """Seconds in which a DataLoader gives the same samples."""
    found: Data = as_data(data())
    cursor = cursor_over(found.train, batch=size * microbatches, microbatches=microbatches, seed=0)
    order = [
        [indices for microbatch in range(microbatches) if (indices := list(cursor.microbatch(step, microbatch)))]
        for step in range(steps)
    ]
    listed: Any = found.train, list(chain.from_iterable(order))
    loader: Any = DataLoader(listed[0], batch_sampler=listed[1], num_workers=processes)
    ends = []
    for batch in loader:
        some_of(batch).sum()
        ends.append(time.monotonic())
    first = int(FIRST * steps)
    return (ends[-1] - ends[sum(map(len, order[:first])) - 1]) / (steps - first)


def measured(quick: bool = False) -> dict[str, Any]:
    """All, and how they compare: at least 0.97 is wanted of each."""
    torch.set_num_threads(1)
    found: dict[str, list[float]] = {}
    fewer = QUICK if quick else 1
    objective = partial(busy, STEP_S / STEP_MICROBATCHES)
    with tempfile.TemporaryDirectory() as place:
        made = {}
        for name, kind in KINDS.items():
            (folder := Path(place) / name).mkdir()
            made[name] = kind.write(folder)
        for _ in range(1 if quick else ROUNDS):
            for name, kind in KINDS.items():
                shape = kind.size, kind.microbatches, kind.steps // fewer
                found.setdefault(name, []).append(per_step_s(made[name], cheap, *shape, LOADERS))
                found.setdefault(f"{name} by torch", []).append(by_torch_s(made[name], *shape, LOADERS))
            shape = STEP_SAMPLES // STEP_MICROBATCHES, STEP_MICROBATCHES, max(10, STEPS // fewer)
            slow, free = (partial(Images, 960, 0, seconds) for seconds in (STEP_S / STEP_SAMPLES, 0.0))
            found.setdefault("loaded", []).append(per_step_s(slow, objective, *shape, 1))
            found.setdefault("free", []).append(per_step_s(free, objective, *shape, 0))
    return compared(found)


def compared(found: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, in samples a second, and the shares; `all` are seconds of a step."""
    middle = {name: statistics.median(seconds) for name, seconds in found.items()}
    kinds = {}
    for name, kind in KINDS.items():
        samples = kind.size * kind.microbatches
        kinds[name] = {
            "samples_per_s": samples / middle[name],
            "samples_per_s_by_torch": samples / middle[f"{name} by torch"],
            "of_torch": middle[f"{name} by torch"] / middle[name],
        }
        print(f"{name}: {kinds[name]['samples_per_s']:.0f} samples a second, {kinds[name]['of_torch']:.3f} of torch's")
    of_step = middle["free"] / middle["loaded"]
    print(f"{1e3 * middle['loaded']:.1f} ms a step, {of_step:.3f} of the step without reading", flush=True)
    return {
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "loaders": LOADERS,
        "read": kinds,
        "step_s": middle["loaded"],
        "step_s_without_reading": middle["free"],
        "of_step": of_step,
        "all": found,
    }
