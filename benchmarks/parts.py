"""Data and objective of the contenders."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

from benchmarks.gate import Gate
from benchmarks.work import CONTEXT
from instep.data.text import Windows, stdlib_text
from instep.objectives import Sums
from instep.objectives.language import NextToken


def text() -> Windows:
    """The source of Python's standard library, in windows of `CONTEXT` bytes and one."""
    windows = stdlib_text(CONTEXT).train
    assert isinstance(windows, Windows)
    return windows


def short_text() -> Windows:
    """The same text in windows of 16 bytes and one."""
    windows = stdlib_text(16).train
    assert isinstance(windows, Windows)
    return windows


class SleepyNextToken:
    """Next-token prediction that sleeps `sleep_s` in every training forward."""

    def __init__(self, sleep_s: float):
        self._objective, self._sleep_s = NextToken(), sleep_s

    def counts(self, batch: Tensor) -> int:
        """As next-token prediction."""
        return self._objective.counts(batch)

    def __call__(self, model: nn.Module, batch: Tensor) -> Sums:
        if torch.is_grad_enabled():
            time.sleep(self._sleep_s)
        return self._objective(model, batch)


class GatedNextToken:
    """Next-token prediction with a gate before the first forward of a step; `own`: forwards of a worker in a step."""

    def __init__(self, address: str, own: int):
        self._objective, self._gate, self._own = NextToken(), Gate(address), own
        self._forwards = -1  # the first one is the engine's look at the objective, before the first step

    def counts(self, batch: Tensor) -> int:
        """As next-token prediction."""
        return self._objective.counts(batch)

    def __call__(self, model: nn.Module, batch: Tensor) -> Sums:
        if torch.is_grad_enabled():  # else it is the engine's check for a mean
            if self._forwards >= 0 and self._forwards % self._own == 0:
                self._gate.tick()
            self._forwards += 1
        return self._objective(model, batch)
