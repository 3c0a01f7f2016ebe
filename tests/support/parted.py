"""Pairs of short runs that part in a known way, and single faults in a run: what `instep diff` must find."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from instep.recipe import Recipe, Team
from instep.worker.replica import Replica
from support.harness import Outcome, train_here

WIDE, CLASSES, SAMPLES = 6, 4, 41


class Block(nn.Module):
    """A small block whose steps a pair may make in another way; `how` gives them, by name."""

    def __init__(self, how: dict[str, Callable[..., Tensor]], eps: float = 1e-5):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(WIDE, 16), nn.Linear(16, 16), nn.Linear(16, CLASSES)
        self.norm = nn.LayerNorm(16, eps=eps)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self._do("activation", F.gelu, self.first(x)))
        x = self._do("residual", torch.add, x, self.second(x))
        x = self._do("mask", lambda x: x, x)
        x = self._do("sum", lambda x: x, x)
        return self.last(x)  # type: ignore[no-any-return]

    def _do(self, name: str, otherwise: Callable[..., Tensor], *given: Tensor) -> Tensor:
        return self.how.get(name, otherwise)(*given)


def data(change: Callable[[Tensor, Tensor], None] = lambda x, y: None) -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(SAMPLES, WIDE, generator=generator)
    y = torch.randint(0, CLASSES, (SAMPLES,), generator=generator)
    change(x, y)
    return TensorDataset(x, y)


def entropy(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")


def recipe(how: dict[str, Callable[..., Tensor]] | None = None, *, eps: float = 1e-5, **fields: Any) -> Recipe:
    """A sound one of 8 updates with checksums after every 4."""
    given: dict[str, Any] = {
        "model": lambda: Block(how or {}, eps), "objective": entropy, "data": data(), "batch": 12, "microbatches": 4,
        "steps": 8, "optimizer": lambda p: torch.optim.Adam(p, lr=0.05), "name": "parted", "checksum_every": 4,
        "order": "permutation",
    }  # fmt: skip
    return Recipe(**{**given, **fields})


def trained(given: Recipe, path: Path, **team: Any) -> Outcome:
    return train_here(given, Team(**{"workers": 2, "checkpoint_every": 3, "keep": 99, **team}), path)


class Once:
    """True the first time that it is asked in any process, once a file is there; then never again."""

    def __init__(self, file: Path):
        self._file = file

    def __call__(self) -> bool:
        try:
            os.close(os.open(self._file, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True


def flip(tensor: Tensor, place: int, bit: int) -> None:
    """Changes one bit of a float32 tensor, where it lies."""
    with torch.no_grad():
        tensor.view(-1).view(torch.int32)[place] ^= 1 << bit


@dataclass(frozen=True)
class Flip:
    """A single bit, in the gradient of a tensor that one microbatch of one update has, or in a moment after the update.

    update: from 1.
    """

    tensor: str
    update: int
    microbatch: int = 0
    place: int = 0
    bit: int = 20
    moment: str = ""

    def recipe(self, once: Path, **fields: Any) -> Recipe:
        """One whose run has it, and a run computed again has not."""
        if self.moment:
            return recipe(optimizer=_Flipping(self, Once(once)), **fields)
        sound = recipe(**fields)
        target = float(Replica(sound, "cpu").batch(self.update - 1, self.microbatch)[0].sum())
        return recipe(objective=_Struck(self, Once(once), target), **fields)


class _Struck:
    def __init__(self, flip: Flip, once: Once, target: float):
        self._flip, self._once, self._target = flip, once, target

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        if float(batch[0].sum()) == self._target and torch.is_grad_enabled() and self._once():
            parameter = dict(model.named_parameters())[self._flip.tensor]

            def strike(gradient: Tensor) -> Tensor:
                handle.remove()
                gradient = gradient.clone()
                flip(gradient, self._flip.place, self._flip.bit)
                return gradient

            handle = parameter.register_hook(strike)
        return entropy(model, batch)


class _Flipping:
    """Builds an Adam one bit of whose state changes after an update."""

    def __init__(self, flip: Flip, once: Once):
        self._flip, self._once = flip, once

    def __call__(self, named_parameters: Any) -> torch.optim.Optimizer:
        named = dict(named_parameters)
        optimizer, steps = torch.optim.Adam(named.values(), lr=0.05), [0]
        wanted = named[self._flip.tensor]

        def after(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            steps[0] += 1
            if steps[0] == self._flip.update and wanted in optimizer.state and self._once():
                flip(optimizer.state[wanted][self._flip.moment], self._flip.place, self._flip.bit)

        optimizer.register_step_post_hook(after)
        return optimizer


def changed_checksum(run: Path, version: int, tensor: str) -> None:
    """Changes a bit of one checksum on the tape, or changes it back."""
    lines = (run / "tape.jsonl").read_text().splitlines()
    for place, line in enumerate(lines):
        event = json.loads(line)
        if event["kind"] == "checksummed" and event["version"] == version:
            kind = "weights" if tensor in event["weights"] else "optimizer"
            event[kind][tensor] = f"{int(event[kind][tensor], 16) ^ 1 << 7:08x}"
            lines[place] = json.dumps(event)
    (run / "tape.jsonl").write_text("\n".join(lines) + "\n")
