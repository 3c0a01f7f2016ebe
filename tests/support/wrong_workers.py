"""Objectives that one process of a team computes wrong, by one bit: a fault of its machine's, as far as Instep sees."""

from __future__ import annotations

import multiprocessing
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def wrong_by_a_bit(value: Tensor) -> Tensor:
    """The next number above it; gradients change by as little."""
    return value * (1 + torch.finfo(value.dtype).eps)


def one_wrong(
    objective: Callable[[nn.Module, Any], Tensor], worker: int, noted: Path, *, after: int = 0, one_in: int = 0,
    seed: int = 0,
) -> Callable[[nn.Module, Any], Tensor]:  # fmt: skip
    """`objective`, wrong in the first process that has this worker's number, and in no later one: in every microbatch
    after so many, or in about one in so many.

    noted: a file that gets that process's number, and then a letter for each microbatch: r where it is right, else w.
    """
    done, chance = [0], random.Random(seed)

    def computing(model: nn.Module, batch: Any) -> Tensor:
        value = objective(model, batch)
        if not value.requires_grad or multiprocessing.current_process().name != f"worker-{worker}":
            return value
        own = f"{os.getpid()}\n"
        if not noted.exists():
            noted.write_text(own)
        if not noted.read_text().startswith(own):
            return value
        done[0] += 1
        wrong = chance.random() < 1 / one_in if one_in else done[0] > after
        with noted.open("a") as file:
            file.write("w" if wrong else "r")
        return wrong_by_a_bit(value) if wrong else value

    return computing


def computed(noted: Path) -> str:
    """The letters of `one_wrong`; none where that worker computed nothing."""
    return noted.read_text().partition("\n")[2] if noted.exists() else ""
