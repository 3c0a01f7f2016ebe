"""What data cost: ``python -m benchmarks.data [--quick] [memory] [loading] [texts]``, by default all of these.

"memory": of data given as an object. A run is trained on `MIB` of data, which the program that calls `train` holds,
with 4 workers that have read all of it.
Counted is the proportional set size (each page divided by the number of processes that map it) of all processes, the
caller included, at its peak over the run, less that of the same run on next to no data; in bytes for a byte of data.
"objects" are 100-character texts in a list; their bytes are those of the caller's own. "loading" is what
benchmarks/loading.py measures of loaders, "texts" what benchmarks/texts.py does of documents. Each part takes less than
four minutes, and replaces what benchmarks/results/data.json had of it; with `--quick`, some seconds, to see that all
runs, and nothing is saved.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import instep
from benchmarks import loading, texts
from benchmarks.lockstep import machine
from benchmarks.memory import sizes

MIB = 256
WORKERS = 4
WIDTH = 1024
RESULT = Path(__file__).parent / "results" / "data.json"


class Rows(Dataset[tuple[Tensor, Tensor]]):
    """Rows of a tensor or an array, or texts. Each process reads all of them before its first sample."""

    def __init__(self, rows: Any):
        self.rows = rows
        self._read = False

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not self._read:
            self._read = True
            sum(map(len, self.rows)) if isinstance(self.rows, list) else self.rows.sum()
        row = self.rows[index]
        taken = np.full(WIDTH, len(row), np.float32) if isinstance(row, str) else np.array(row)
        return torch.from_numpy(taken), torch.tensor(index % 4)


def tensors(count: int, folder: Path) -> Rows:
    """One tensor."""
    return Rows(torch.rand(count, WIDTH))


def arrays(count: int, folder: Path) -> Rows:
    """One numpy array."""
    return Rows(np.random.default_rng(0).random((count, WIDTH), np.float32))


def memmap(count: int, folder: Path) -> Rows:
    """A memory-mapped file."""
    written = np.lib.format.open_memmap(folder / "x.npy", mode="w+", dtype=np.float32, shape=(count, WIDTH))
    written[:] = 1.0
    written.flush()
    del written
    return Rows(np.load(folder / "x.npy", mmap_mode="r"))


def objects(count: int, folder: Path) -> Rows:
    """A list of texts, of 156 bytes each in the memory of a process."""
    return Rows([f"{index:0100d}" for index in range(count * WIDTH * 4 // 156)])


KINDS = {"tensors": tensors, "arrays": arrays, "memmap": memmap, "objects": objects}


def slowly(model: nn.Module, batch: Any) -> Tensor:
    """The objective, after a while: time to look at the processes."""
    time.sleep(0.02)
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")


def peak_mib(kind: str, count: int) -> float:
    """The largest proportional set size of all processes of such a run, in MiB, run by a program of its own."""
    command = [sys.executable, "-m", "benchmarks.data", kind, str(count)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def _peak_mib(make: Callable[[int, Path], Rows], count: int) -> float:
    found, over = [0.0], threading.Event()

    def look() -> None:
        me = psutil.Process()
        while not over.wait(0.05):
            total = 0.0
            for process in [me, *me.children(recursive=True)]:
                with contextlib.suppress(OSError, psutil.NoSuchProcess, IndexError, KeyError):
                    total += sizes(process.pid)["pss"]
            found.append(total)

    with tempfile.TemporaryDirectory() as folder:
        data = make(count, Path(folder))
        recipe = instep.Recipe(
            model=partial(nn.Linear, WIDTH, 4), objective=slowly, data=data, batch=64, microbatches=8, steps=20
        )
        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        instep.train(recipe, team=instep.Team(workers=WORKERS), out=Path(folder) / "run")
        over.set()
        thread.join()
    return max(found)


def measured(quick: bool = False) -> dict[str, Any]:
    """Of each kind, bytes a byte."""
    mib = MIB // 16 if quick else MIB
    count = mib * 2**20 // (4 * WIDTH)
    rows = []
    for kind in KINDS:
        bare, full = peak_mib(kind, 256), peak_mib(kind, count)
        held = (full - bare) / mib
        rows.append({"kind": kind, "bare_mib": bare, "full_mib": full, "held": held})
        print(f"{kind:<10}{bare:>8.0f} MiB without data{full:>8.0f} with{held:>7.2f} bytes a byte", flush=True)
    return {"mib": mib, "workers": WORKERS, "rows": rows}


PARTS = {"memory": (measured, __doc__), "loading": (loading.measured, loading.__doc__),
         "texts": (texts.measured, texts.__doc__)}  # fmt: skip


def main() -> None:
    """Measures, prints, saves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=[], metavar="part")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    for name in given.parts or PARTS:
        began, (measure, method) = time.monotonic(), PARTS[name]
        found = {"machine": machine(), "method": (method or "").strip(), **measure(given.quick)}
        found["seconds"] = round(time.monotonic() - began)
        if not given.quick:
            known = json.loads(RESULT.read_text()) if RESULT.exists() else {}
            RESULT.write_text(json.dumps({**known, name: found}, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] in KINDS:
        print(_peak_mib(KINDS[sys.argv[1]], int(sys.argv[2])))
    else:
        main()
