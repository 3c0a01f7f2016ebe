"""What loaders read: ``python -m benchmarks.loading``; ``python -m benchmarks.data`` has it too.

"read": samples a second through one worker with `LOADERS` loaders, whose objective computes next to nothing, and
through torch's `DataLoader` with as many processes, which gives batches of as many samples to a loop that adds them up.
A sample is work as a JPEG is: `DECODED` times an inverse cosine transform of all 8x8 blocks of an image.
"step": a step whose one worker computes for as long as its samples take to be read, with one loader, against the same
step with samples that cost nothing. Each is measured `ROUNDS` times, by turns, and the medians are compared; the first
steps are left out. Both need a core for each process.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import instep
from benchmarks.lockstep import machine
from instep.record.folder import RunFolder
from instep.record.tape import read

ROUNDS = 5
LOADERS = 1
SIZE = 8
MICROBATCHES = 4
STEPS = 30
FIRST = 6
"""Steps that are left out."""

SIDE = 96
DECODED = 32
STEP_S = 0.08
RESULT = Path(__file__).parent / "results" / "loading.json"


class Images(Dataset[tuple[Tensor, Tensor]]):
    """Images of which each costs so many times a decoding; with seconds, instead, so long of a processor."""

    def __init__(self, decoded: int, seconds: float = 0.0):
        self._decoded, self._seconds = decoded, seconds
        angle = np.outer(np.arange(8) + 0.5, np.arange(8)) * np.pi / 8
        self._waves = (np.cos(angle) / 2).astype(np.float32)
        self._coded = np.random.default_rng(0).integers(-64, 64, (3, SIDE // 8, SIDE // 8, 8, 8), np.int16)

    def __len__(self) -> int:
        return SIZE * MICROBATCHES * STEPS

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        until = time.thread_time() + self._seconds
        for _ in range(self._decoded):
            blocks = self._waves @ self._coded.astype(np.float32) @ self._waves.T
            image = blocks.transpose(0, 1, 3, 2, 4).reshape(3, SIDE, SIDE)
        while time.thread_time() < until:
            pass
        found = torch.from_numpy(np.clip(image, 0, 255).astype(np.float32)) if self._decoded else torch.zeros(3)
        return found, torch.tensor(index % 4)


def cheap(model: nn.Module, batch: Any) -> Tensor:
    """Next to nothing."""
    nothing: Tensor = model(batch[0].flatten(1)[:, :3]) * 0
    return nothing.sum()


def busy(seconds: float, model: nn.Module, batch: Any) -> Tensor:
    """So long of a processor."""
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass
    return cheap(model, batch)


def per_step_s(data: Images, objective: Callable[..., Tensor], loaders: int) -> float:
    """Seconds of a step of one worker."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = instep.Recipe(
            model=partial(nn.Linear, 3, 1), objective=objective, data=data, batch=SIZE * MICROBATCHES,
            microbatches=MICROBATCHES, steps=STEPS, optimizer=partial(torch.optim.SGD, lr=0.0),
        )  # fmt: skip
        run = instep.train(recipe, team=instep.Team(loaders=loaders), out=Path(folder) / "run")
        ends = [float(event["t_s"]) for event in read(RunFolder(run.path).tape_path) if event["kind"] == "merged"]
    return (ends[-1] - ends[FIRST - 1]) / (STEPS - FIRST)


def by_torch_s(data: Images, processes: int) -> float:
    """Seconds in which a DataLoader gives as many samples."""
    loader = DataLoader(data, SIZE, num_workers=processes, shuffle=False)
    ends = []
    for batch in loader:
        batch[0].flatten(1)[:, :3].sum()
        ends.append(time.monotonic())
    return (ends[-1] - ends[FIRST * MICROBATCHES - 1]) / (STEPS - FIRST)


def measured() -> dict[str, Any]:
    """Both, and how they compare: at least 0.97 is wanted of each."""
    found: dict[str, list[float]] = {"read": [], "read_by_torch": [], "loaded": [], "free": []}
    images, objective = Images(DECODED), partial(busy, STEP_S / MICROBATCHES)
    slow, free = Images(0, STEP_S / (SIZE * MICROBATCHES)), Images(0)
    for _ in range(ROUNDS):
        found["read"].append(per_step_s(images, cheap, LOADERS))
        found["read_by_torch"].append(by_torch_s(images, LOADERS))
        found["loaded"].append(per_step_s(slow, objective, 1))
        found["free"].append(per_step_s(free, objective, 0))
    middle = {name: statistics.median(seconds) for name, seconds in found.items()}
    samples = SIZE * MICROBATCHES
    return {
        "cores": len(os.sched_getaffinity(0)),
        "loaders": LOADERS,
        "samples_per_s": samples / middle["read"],
        "samples_per_s_by_torch": samples / middle["read_by_torch"],
        "of_torch": middle["read_by_torch"] / middle["read"],
        "step_s": middle["loaded"],
        "step_s_without_reading": middle["free"],
        "of_step": middle["free"] / middle["loaded"],
        "all": found,
    }


def main() -> None:
    """Measures, prints, saves."""
    torch.set_num_threads(1)
    found = measured()
    print(f"{found['samples_per_s']:.0f} samples a second, {found['of_torch']:.3f} of torch's DataLoader")
    print(f"{1e3 * found['step_s']:.1f} ms a step, {found['of_step']:.3f} of the step without reading")
    if "--save" in sys.argv:
        text = json.dumps({"machine": machine(), "method": (__doc__ or "").strip(), **found}, indent=1)
        RESULT.write_text(text + "\n")


if __name__ == "__main__":
    main()
